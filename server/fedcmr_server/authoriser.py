"""Decides about every request for Flower's interface, which the gateway asks it about.

The gateway has checked that the federation's authority signed the certificate. Whether it counts
*now* stands in the database: nothing is remembered between two requests, so that whoever is revoked
is refused from the next message on, over connections that are open already too.
"""

from __future__ import annotations

import base64
import binascii
import logging
from typing import Final
from urllib.parse import unquote

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from starlette.requests import Request
from starlette.responses import Response

from fedcmr_server.store import Certificates, Store, StoreUnreachable
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import fingerprint, read_certificate

CERTIFICATE_HEADER: Final = "x-fedcmr-certificate"
"""Holds the verified certificate (URL-escaped PEM); the gateway overwrites what a client sent."""

_log = logging.getLogger("fedcmr.authoriser")


def authorise(request: Request) -> Response:
    """Answer 204 if the request may pass, 403 if not, 503 while the database does not answer.

    The application's ``state.store`` is the coordinator's store.
    """
    certificate = request.headers.get(CERTIFICATE_HEADER, "")
    node_key = request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, "")
    try:
        refusal = fleet_refusal(request.app.state.store, certificate, node_key)
    except StoreUnreachable as error:
        _log.error("%s", error)
        return Response(status_code=503)
    if refusal is not None:
        _log.warning("refused: %s", refusal)
        return Response(status_code=403)
    return Response(status_code=204)


def fleet_refusal(store: Store, escaped_certificate: str, node_key: str) -> str | None:
    """Return why a request may not reach Flower's Fleet interface; None if it may.

    ``node_key`` is what Flower's header says: PEM in base64. That the sender holds that key, Flower
    checks; that it is the key of the certificate's site, nobody but us.

    Raises:
        StoreUnreachable: the database does not answer.
    """
    try:
        certificate = read_certificate(unquote(escaped_certificate))
    except ConfigurationError as error:
        return str(error)
    digest = fingerprint(certificate)
    found = Certificates(store).holder(digest)
    if found is None:
        return f"certificate {digest[:16]}… is unknown, revoked or expired"
    member, _ = found
    if member.role != "site" or member.node_key is None:
        return f"{member.role} {member.name} is no site"
    try:
        shown = base64.b64decode(node_key, validate=True)
    except (binascii.Error, ValueError):
        return f"site {member.name} sent a malformed node key"
    if shown != flower_key(member.node_key):
        return f"site {member.name} came with a node key that is not its own"
    return None


def flower_key(node_key: str) -> bytes:
    """Return a node key (OpenSSH) as Flower writes it: PEM."""
    public = load_ssh_public_key(node_key.encode())
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
