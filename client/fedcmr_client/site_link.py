"""A short connection to the coordinator for one command; a running agent has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fedcmr_client.agent_settings import AgentSettings
from fedcmr_client.governance import Governance
from fedcmr_client.site_home import SiteHome
from fedcmr_client.tunnel import Tunnel, probe
from fedcmr_shared.errors import ConnectionProblem, FederationError


@contextmanager
def governance_of(home: SiteHome) -> Iterator[Governance]:
    """Connect as the site's member while inside.

    Raises:
        ConfigurationError: the site has not joined or has left, its certificate has expired, or
            ``agent.yaml`` is wrong.
        ConnectionProblem: the coordinator cannot be reached.
        FederationError: it was reached, and a call failed.
    """
    membership = home.membership
    membership.require_joined()
    route = membership.route(AgentSettings.load(home.folder).forward_proxy())
    credentials = membership.credentials()
    probe(route, credentials)  # says at once, and best, what stands in the way
    # Of the system's temporary folders, since a socket's path may not be long.
    with (
        TemporaryDirectory(prefix="fedcmr-") as folder,
        Tunnel(route, credentials, Path(folder)) as tunnel,
        Governance(tunnel.governance_target) as governance,
    ):
        try:
            yield governance
        except (ConnectionProblem, FederationError) as error:
            if tunnel.problem is not None:  # which knows more
                raise tunnel.problem from error
            raise
