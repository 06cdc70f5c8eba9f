"""A short connection to the coordinator for one command; a running agent has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fedcmr_client.agent_settings import AgentSettings
from fedcmr_client.governance import Governance
from fedcmr_client.membership import Membership
from fedcmr_client.site_home import SiteHome
from fedcmr_client.tunnel import Proxy, Tunnel, probe
from fedcmr_shared.errors import ConnectionProblem, FederationError


def governance_of(home: SiteHome) -> AbstractContextManager[Governance]:
    """Connect as the site's member while inside; see `governance_as`.

    Raises:
        ConfigurationError: ``agent.yaml`` is wrong.
    """
    return governance_as(home.membership, AgentSettings.load(home.folder).forward_proxy())


@contextmanager
def governance_as(membership: Membership, proxy: Proxy | None) -> Iterator[Governance]:
    """Connect as a member, a site or an auditor, while inside.

    Raises:
        ConfigurationError: it has not joined or has left, or its certificate has expired.
        ConnectionProblem: the coordinator cannot be reached.
        FederationError: it was reached, and a call failed.
    """
    membership.require_joined()
    route, credentials = membership.route(proxy), membership.credentials()
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
