"""The service on a Unix socket, behind the gateway."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedcmr_server.governance.admission import SERVICE
from fedcmr_server.governance.gatekeeper import Gatekeeper
from fedcmr_server.governance.limits import CallLimits
from fedcmr_server.governance.service import Service
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.store import Store
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.governance.governance_pb2_grpc import add_GovernanceServicer_to_server

THREADS: Final = 32
MOST_CALLS: Final = 128
"""Calls that run or wait for a thread; further ones are refused."""

LARGEST_MESSAGE: Final = 4 * 2**20

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", LARGEST_MESSAGE),
    ("grpc.max_send_message_length", LARGEST_MESSAGE),
    ("grpc.max_concurrent_streams", MOST_CALLS),
    ("grpc.max_metadata_size", 16 * 1024),
)


def serve(home: CoordinatorHome, store: Store, socket: Path) -> grpc.Server:
    """Return the running service at ``socket``; whoever called stops it.

    It believes the metadata with the caller's certificate, which the gateway writes: ``socket``
    lies in a folder that nobody else may enter. Health checks need no certificate.

    Raises:
        ConfigurationError: others may enter the folder, or the socket cannot be made.
    """
    if socket.parent.stat().st_mode & 0o077:
        raise ConfigurationError(
            f"{socket.parent} may be entered by others: run chmod 700 {socket.parent}"
        )
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="governance"),
        interceptors=[Gatekeeper(store, CallLimits())],
        options=_OPTIONS,
        maximum_concurrent_rpcs=MOST_CALLS,
    )
    add_GovernanceServicer_to_server(Service(home, store), server)  # type: ignore[no-untyped-call]
    checks = health.HealthServicer()
    checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    socket.unlink(missing_ok=True)  # of a coordinator that was killed
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise ConfigurationError(
            f"{socket}: the governance service cannot listen there: choose a shorter folder, or "
            "check its owner"
        ) from error
    server.start()
    return server
