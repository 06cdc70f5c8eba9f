"""Stands before every handler: certificate, role, deadline and limits; logs each call.

The gateway has checked that the federation's authority signed the certificate and wrote it into
the metadata. Whether it counts now is asked of the database for each call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import unquote

import grpc
from sqlalchemy.exc import DBAPIError, IntegrityError

from fedcmr_server.governance.admission import (
    OPEN,
    Caller,
    Refused,
    bad_certificate,
    require_deadline,
    require_role,
)
from fedcmr_server.governance.limits import CallLimits
from fedcmr_server.store import AccessLog, Certificates, Store, StoreUnreachable
from fedcmr_server.store.members import certificate_problem
from fedcmr_shared.errors import ConfigurationError, FedcmrError, LedgerError
from fedcmr_shared.identity.certificates import fingerprint, read_certificate

CERTIFICATE_KEY: Final = "x-fedcmr-certificate"
"""Metadata with the verified certificate (URL-escaped PEM); the gateway overwrites it."""

if TYPE_CHECKING:
    from collections.abc import Callable

    # At run time gRPC's classes take no parameters.
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Handler | None]

_log = logging.getLogger("fedcmr.governance")


class NotFound(FedcmrError):
    """Nothing of this name or number is there."""


class Gatekeeper(grpc.ServerInterceptor):
    """Calls handlers with the `Caller` in place of gRPC's context, and ends calls by their errors.

    Handlers raise `FedcmrError`; whatever else they raise is a mistake, of which the caller learns
    no more than that.
    """

    def __init__(self, store: Store, limits: CallLimits) -> None:
        self._store = store
        self._limits = limits

    def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Return the handler of a call with this guard before it."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if handler is None or method in OPEN:
            return handler
        metadata = handler_call_details.invocation_metadata
        shown = [str(value) for key, value in metadata if key == CERTIFICATE_KEY]
        codecs = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            behaviour: Any = handler.unary_stream

            def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                with self._guarded(method, shown, context, streams=True) as caller:
                    yield from behaviour(request, caller)

            return grpc.unary_stream_rpc_method_handler(stream, *codecs)
        streams = handler.request_streaming
        behaviour = handler.stream_unary if streams else handler.unary_unary

        def single(request: Any, context: grpc.ServicerContext) -> Any:
            with self._guarded(method, shown, context, streams=streams) as caller:
                return behaviour(request, caller)

        if streams:
            return grpc.stream_unary_rpc_method_handler(single, *codecs)
        return grpc.unary_unary_rpc_method_handler(single, *codecs)

    @contextmanager
    def _guarded(
        self, method: str, shown: list[str], context: grpc.ServicerContext, *, streams: bool
    ) -> Iterator[Caller]:
        """Admit a call, run its handler inside, note how it ended; aborts it on any error."""
        name, detail, admitted = None, "cancelled", False
        try:
            caller = self._caller(shown)
            name = caller.name
            require_role(method, caller.role)
            require_deadline(context.time_remaining(), streams=streams)
            self._limits.spend(name)
            with self._limits.running(name, streams=streams):
                admitted = True
                yield caller
            detail = "ok"
        except Refused as refusal:
            detail = refusal.reason
            _abort(context, refusal.code, str(refusal))
        except FedcmrError as error:
            code, message = _status(error)
            detail = code.name.lower()
            _abort(context, code, message)
        except grpc.RpcError:  # the caller's stream broke off
            raise
        except Exception:  # noqa: BLE001  # it is logged and ends this call alone
            detail = "internal"
            _log.exception("%s failed", method)
            _abort(context, grpc.StatusCode.INTERNAL, "the coordinator failed: tell its operator")
        finally:
            self._note(name, method, admitted, detail)

    def _caller(self, shown: list[str]) -> Caller:
        try:
            return self._member(shown)
        except Refused:
            self._limits.spend(None)
            raise

    def _member(self, shown: list[str]) -> Caller:
        code = grpc.StatusCode.UNAUTHENTICATED
        if len(shown) != 1:
            raise Refused(code, "no-certificate", "show the certificate of a member")
        try:
            certificate = read_certificate(unquote(shown[0]))
        except ConfigurationError as error:
            raise Refused(code, "no-certificate", str(error)) from error
        found = Certificates(self._store).find(fingerprint(certificate))
        if found is None:
            raise Refused(code, "unknown", "this federation does not know the certificate")
        member, row = found
        problem = certificate_problem(member, row, datetime.now(UTC))
        if problem is not None:
            raise bad_certificate(problem)
        return Caller(member.name, member.role, member.identity, certificate)

    def _note(self, name: str | None, method: str, allowed: bool, detail: str) -> None:
        if detail == "rate-again":
            return
        try:
            AccessLog(self._store).write(name, method.lstrip("/"), allowed, detail)
        except FedcmrError as error:
            _log.error("the access of %s to %s cannot be noted: %s", name, method, error)


def _status(error: FedcmrError) -> tuple[grpc.StatusCode, str]:
    match error:
        case StoreUnreachable():
            _log.error("%s", error)
            return grpc.StatusCode.UNAVAILABLE, "the coordinator's database does not answer"
        case NotFound():
            return grpc.StatusCode.NOT_FOUND, str(error)
        case ConfigurationError() | LedgerError():
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    cause = error.__cause__
    if isinstance(cause, DBAPIError) and not isinstance(cause, IntegrityError):
        _log.error("%s", error)
        return grpc.StatusCode.INTERNAL, "the coordinator's database fails: tell its operator"
    return grpc.StatusCode.FAILED_PRECONDITION, str(error)


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message)
    raise AssertionError("abort always raises")
