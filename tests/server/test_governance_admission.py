"""Who gets past the gatekeeper, and what the rules say about it: roles, certificates, limits."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import grpc
import pytest
from governance_parties import (
    DEADLINE_S,
    Coordinator,
    Metadata,
    Party,
    coordinator,
    issue,
    long_ago,
    shown,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import update

from fedcmr_client.governance import Governance, problem_of
from fedcmr_server.governance import limits, server
from fedcmr_server.governance.admission import (
    LONGEST_CALL_S,
    LONGEST_STREAM_S,
    ROLES,
    SERVICE,
    Refused,
    require_deadline,
    require_role,
)
from fedcmr_server.governance.limits import AT_ONCE, BURST, PER_SECOND, Bucket, CallLimits
from fedcmr_server.governance.service import Service
from fedcmr_server.store import AccessLog, Certificates, Members, StoreUnreachable
from fedcmr_server.store.tables import CertificateRow
from fedcmr_shared import governance
from fedcmr_shared.errors import ConfigurationError, ConnectionProblem
from fedcmr_shared.governance import governance_pb2 as pb
from fedcmr_shared.identity.certificates import (
    Role,
    certificate_pem,
    certificate_request,
    fingerprint,
    issue_member,
    new_authority,
    new_key,
    read_certificate,
    serial,
)

METHODS: Mapping[str, Any] = {
    method.name: method for method in pb.DESCRIPTOR.services_by_name["Governance"].methods
}
CASES = [(name, role) for name in METHODS for role in get_args(Role)]


@pytest.fixture(scope="module")
def running() -> Iterator[Coordinator]:
    with coordinator() as running:
        yield running


@pytest.fixture(scope="module")
def alder(running: Coordinator) -> Party:
    return running.join("alder")


def empty(name: str) -> Any:
    request = getattr(pb, METHODS[name].input_type.name)()
    return iter([request]) if METHODS[name].client_streaming else request


def call(
    running: Coordinator, name: str, metadata: Metadata, timeout: float | None = DEADLINE_S
) -> tuple[grpc.StatusCode, str]:
    """Call a method with nothing in the request; return the status and its words."""
    with running.stub() as stub:
        try:
            answer = getattr(stub, name)(empty(name), timeout=timeout, metadata=metadata)
            if METHODS[name].server_streaming:
                list(answer)
        except grpc.RpcError as error:
            failed: Any = error
            return failed.code(), failed.details()
    return grpc.StatusCode.OK, ""


def refused(running: Coordinator, metadata: Metadata, words: str) -> None:
    code, details = call(running, "GetRoster", metadata)
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert words in details


def passes(running: Coordinator, metadata: Metadata) -> None:
    assert call(running, "GetRoster", metadata)[0] == grpc.StatusCode.OK


def test_every_method_has_its_roles_and_no_other_does() -> None:
    assert {f"/{SERVICE}/{name}" for name in METHODS} == set(ROLES)


@pytest.mark.parametrize(("name", "role"), CASES)
def test_a_method_is_for_its_roles_alone(running: Coordinator, name: str, role: Role) -> None:
    party = running.join(f"{name}-{role}", role)
    code, details = call(running, name, party.metadata)
    newest = AccessLog(running.store).newest(1)[0]
    assert (newest.member, newest.method) == (party.name, f"{SERVICE}/{name}")
    if role in ROLES[f"/{SERVICE}/{name}"]:
        assert code not in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INTERNAL), details
        assert newest.allowed
    else:
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert (newest.allowed, newest.detail) == (False, "role")


def test_what_stands_in_no_table_is_refused(running: Coordinator, alder: Party) -> None:
    with pytest.raises(Refused):
        require_role(f"/{SERVICE}/Forgotten", "coordinator")
    with grpc.insecure_channel(running.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = stub.Watch(
            health_pb2.HealthCheckRequest(), timeout=DEADLINE_S, metadata=alder.metadata
        )
        with pytest.raises(grpc.RpcError) as error:
            next(watching)
        assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
        # Positive control: that one stands in the table of what is open to all.
        checked = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=DEADLINE_S)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING


def test_nobody_passes_without_a_certificate(running: Coordinator, alder: Party) -> None:
    passes(running, alder.metadata)
    refused(running, (), "show the certificate")
    refused(running, alder.metadata * 2, "show the certificate")
    refused(running, shown("-----BEGIN CERTIFICATE-----"), "not a certificate")


def test_a_foreign_certificate_is_refused(running: Coordinator, alder: Party) -> None:
    foreign = issue(new_authority("hearts"), alder.member, alder.key)
    refused(running, shown(foreign), "does not know")
    # Signed by our authority, but never entered into the database.
    unknown = issue(running.home.authority(), alder.member, new_key())
    refused(running, shown(unknown), "does not know")


def test_a_revoked_certificate_is_refused_from_the_next_call_on(running: Coordinator) -> None:
    party = running.join("revoked-certificate")
    with running.stub() as stub:

        def ask() -> None:
            stub.GetRoster(pb.GetRosterRequest(), timeout=DEADLINE_S, metadata=party.metadata)

        ask()
        number = serial(read_certificate(party.certificate))
        Certificates(running.store).revoke(number, "lost")
        with pytest.raises(grpc.RpcError) as error:
            ask()  # over the same connection
    assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    refused(running, party.metadata, "revoked")


@pytest.mark.parametrize(("state", "words"), [("revoked", "revoked"), ("left", "you left")])
def test_who_is_no_member_any_more_is_refused(running: Coordinator, state: Any, words: str) -> None:
    party = running.join(f"gone-{state}")
    passes(running, party.metadata)
    Members(running.store).end(party.name, state, "test")
    refused(running, party.metadata, words)


def test_the_dates_of_a_certificate_count(running: Coordinator) -> None:
    refused(running, running.join("too-old", now=long_ago(400)).metadata, "expired")
    refused(running, running.join("too-new", now=long_ago(-2)).metadata, "not valid yet")


def test_a_replaced_certificate_passes_while_its_grace_lasts(running: Coordinator) -> None:
    old = running.join("replaced")
    newer = issue_member(
        running.home.authority(), certificate_request(old.key, old.member), old.member
    )
    Certificates(running.store).add(old.name, newer, replaces_others=True, grace=timedelta(days=7))
    passes(running, old.metadata)
    passes(running, shown(certificate_pem(newer)))
    with running.store.writing() as session:
        session.execute(
            update(CertificateRow)
            .where(CertificateRow.fingerprint == fingerprint(read_certificate(old.certificate)))
            .values(ended_at=long_ago(0.001))
        )
    refused(running, old.metadata, "newer certificate")
    passes(running, shown(certificate_pem(newer)))


def test_a_replacement_without_grace_ends_all_others_at_once(running: Coordinator) -> None:
    """As when an operator replaces a certificate whose key was lost, just after a renewal."""
    first = running.join("stolen")
    certificates, authority = Certificates(running.store), running.home.authority()
    request = certificate_request(first.key, first.member)
    second, third = (issue_member(authority, request, first.member) for _ in range(2))
    certificates.add(first.name, second, replaces_others=True, grace=timedelta(days=7))
    certificates.add(first.name, third, replaces_others=True)
    refused(running, first.metadata, "newer certificate")
    refused(running, shown(certificate_pem(second)), "newer certificate")
    passes(running, shown(certificate_pem(third)))


@pytest.mark.parametrize("name", ["GetRoster", "GetRelease", "PutEvidence"])
def test_a_call_needs_a_deadline_that_is_not_far(
    running: Coordinator, alder: Party, name: str
) -> None:
    streams = METHODS[name].server_streaming or METHODS[name].client_streaming
    longest = LONGEST_STREAM_S if streams else LONGEST_CALL_S
    for timeout in (None, 1.2 * longest):
        code, details = call(running, name, alder.metadata, timeout)
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "deadline" in details
    _, details = call(running, name, alder.metadata, longest)
    assert "deadline" not in details


def test_deadlines_by_the_rule() -> None:
    require_deadline(LONGEST_CALL_S, streams=False)
    require_deadline(LONGEST_STREAM_S, streams=True)
    for remaining, streams in ((None, False), (130.0, False), (None, True), (3800.0, True)):
        with pytest.raises(Refused):
            require_deadline(remaining, streams=streams)


def test_a_message_above_the_limit_is_refused(running: Coordinator, alder: Party) -> None:
    with running.stub() as stub:
        for size, expected in (
            (server.LARGEST_MESSAGE, grpc.StatusCode.RESOURCE_EXHAUSTED),
            (server.LARGEST_MESSAGE // 2, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as error:
                stub.PutReceipt(
                    pb.PutReceiptRequest(receipt="x" * size),
                    timeout=DEADLINE_S,
                    metadata=alder.metadata,
                )
            assert error.value.code() == expected


def test_a_bucket_refills_and_never_overflows() -> None:
    bucket = Bucket(2.0, 0.0)
    for _ in range(2):
        taken = bucket.take(0.0)
        assert taken is not None
        bucket = taken
    assert bucket.take(0.5 / PER_SECOND) is None
    assert bucket.take(1 / PER_SECOND) == Bucket(0.0, 1 / PER_SECOND)
    assert bucket.take(1e9) == Bucket(BURST - 1, 1e9)


def test_one_member_s_calls_cost_no_other_member() -> None:
    now = 0.0
    calls = CallLimits(lambda: now)
    for _ in range(int(BURST)):
        calls.spend("alder")
    for reason in ("rate", "rate-again", "rate-again"):
        with pytest.raises(Refused) as refusal:
            calls.spend("alder")
        assert refusal.value.reason == reason
    calls.spend("birch")
    now = 1.0
    calls.spend("alder")


def test_a_member_has_few_calls_open_at_once() -> None:
    calls = CallLimits()
    holding = [calls.running("alder") for _ in range(AT_ONCE)]
    for each in holding:
        each.__enter__()
    with pytest.raises(Refused, match="at once"), calls.running("alder"):
        pass
    with (
        calls.running("birch", streams=True),
        calls.running("birch", streams=True),
        pytest.raises(Refused, match="at once"),
        calls.running("birch"),
    ):
        pass
    for each in holding:
        each.__exit__(None, None, None)
    with calls.running("alder"):
        pass


def test_too_many_calls_are_refused_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator
) -> None:
    party = running.join("eager")
    monkeypatch.setattr(limits, "BURST", 3.0)
    monkeypatch.setattr(limits, "PER_SECOND", 0.001)
    codes = [call(running, "GetRoster", party.metadata)[0] for _ in range(6)]
    assert codes == [grpc.StatusCode.OK] * 3 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    logged = [row for row in AccessLog(running.store).newest(10) if row.member == party.name]
    assert [row.detail for row in logged] == ["rate", "ok", "ok", "ok"]


def test_the_log_holds_who_called_what_and_no_more(running: Coordinator, alder: Party) -> None:
    with running.stub() as stub, pytest.raises(grpc.RpcError):
        stub.PutReceipt(
            pb.PutReceiptRequest(receipt="no-secret-here"),
            timeout=DEADLINE_S,
            metadata=alder.metadata,
        )
    row = AccessLog(running.store).newest(1)[0]
    assert (row.member, row.method, row.allowed, row.detail) == (
        "alder",
        f"{SERVICE}/PutReceipt",
        True,
        "invalid_argument",
    )
    call(running, "GetRoster", ())
    row = AccessLog(running.store).newest(1)[0]
    assert (row.member, row.allowed, row.detail) == (None, False, "no-certificate")


def test_a_mistake_of_ours_says_nothing(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Party
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the secret path")

    monkeypatch.setattr(Service, "GetRoster", fail)
    # The running service looked its methods up before: a second one meets the mistake.
    with coordinator() as broken:
        code, details = call(broken, "GetRoster", broken.join("alder").metadata)
        assert AccessLog(broken.store).newest(1)[0].detail == "internal"
    assert code == grpc.StatusCode.INTERNAL
    assert "secret" not in details


def test_a_database_that_does_not_answer_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Party
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnreachable("sqlite:////secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(Certificates, "find", fail)
        code, details = call(running, "GetRoster", alder.metadata)
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "secret" not in details
    passes(running, alder.metadata)


def test_the_socket_lies_in_a_private_folder(running: Coordinator, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        server.serve(running.home, running.store, tmp_path / "g.sock")


def test_clients_learn_why_they_are_refused(running: Coordinator, alder: Party) -> None:
    with (
        Governance(running.target, shown("nothing"), wait=lambda _: None) as stranger,
        pytest.raises(ConnectionProblem, match="not a certificate") as rejected,
    ):
        stranger.roster_history()
    assert rejected.value.kind == "rejected"


def test_a_client_tries_again_only_so_often(tmp_path: Path) -> None:
    waited: list[float] = []
    with (
        Governance(f"unix:{tmp_path}/nobody.sock", wait=waited.append) as lonely,
        pytest.raises(ConnectionProblem, match="cannot be reached") as problem,
    ):
        lonely.roster_history()
    assert problem.value.kind == "unreachable"
    assert waited == [0.5, 1.0, 2.0, 4.0]


class Answer(grpc.RpcError, grpc.Call):
    """A failed call as gRPC makes it of a gateway's answer in plain HTTP."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def initial_metadata(self) -> Any:
        return ()

    def trailing_metadata(self) -> Any:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float | None:
        return None

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: Any) -> bool:
        return False


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (grpc.StatusCode.INTERNAL, 400, "rejected"),
        (grpc.StatusCode.PERMISSION_DENIED, 403, "rejected"),
        (grpc.StatusCode.UNAVAILABLE, 502, "unreachable"),
        (grpc.StatusCode.UNAVAILABLE, 503, "unreachable"),
    ],
)
def test_a_gateway_s_answer_in_plain_http_is_understood(
    code: grpc.StatusCode, status: int, kind: str
) -> None:
    problem = problem_of(Answer(code, f"Received http2 header with status: {status}"))
    assert isinstance(problem, ConnectionProblem)
    assert problem.kind == kind


def test_generated_code_is_that_of_the_interface(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    folder = Path(next(iter(governance.__path__)))
    root = folder.parents[1]
    options = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", *options]
    subprocess.run([*command, str(folder / "governance.proto")], check=True)
    made = sorted(tmp_path.rglob("governance_pb2*"))
    assert len(made) == 3
    for path in made:
        assert path.read_text() == (folder / path.name).read_text(), f"regenerate {path.name}"
