"""The coordinator's dashboard: pages that show a federation and change nothing.

Whoever reads them shows a member's certificate, or opens a session with a one-time token. They
show what the coordinator knows, and that is figures of the whole federation: no page has a count,
score or loss of a single site.
"""

from fedcmr_server.dashboard.app import create_app

__all__ = ["create_app"]
