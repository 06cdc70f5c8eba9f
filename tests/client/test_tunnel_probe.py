"""Each obstacle between a site and the coordinator is told apart from the others."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from tls_parties import Federation, Recorder, Server, connect_proxy, echo, free_port

from fedcmr_client.tunnel import Credentials, Proxy, Route, probe
from fedcmr_shared.errors import ConfigurationError, ConnectionProblem
from fedcmr_shared.identity.certificates import certificate_pem, read_certificate, read_key

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
NEVER = datetime(2090, 1, 1, tzinfo=UTC)
SOON_S = 0.3
"""Long enough for a server that never answers."""


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation.make(tmp_path / "hearts")


@pytest.fixture
def foreign(tmp_path: Path) -> Federation:
    return Federation.make(tmp_path / "foreign", "Foreign")


def problem(route: Route, credentials: Credentials, timeout_s: float = 20) -> ConnectionProblem:
    with pytest.raises(ConnectionProblem) as caught:
        probe(route, credentials, timeout_s)
    # Whatever it is, the message names an address or file, and ends with what to do.
    assert ": " in str(caught.value)
    return caught.value


def problem_at(
    server: Server, credentials: Credentials, timeout_s: float = 20
) -> ConnectionProblem:
    route = Route("localhost", server.port)
    found = problem(route, credentials, timeout_s)
    assert route.address in str(found)
    return found


def say(text: bytes) -> Callable[[socket.socket], None]:
    """Return an answer that waits for a question and says ``text``."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(text)

    return answer


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("status", ["200 OK", "302 Found", "403 Forbidden", "404 Not Found"])
def test_any_answer_will_do(federation: Federation, host: str, status: str) -> None:
    answer = say(f"HTTP/1.1 {status}\r\n\r\n".encode())
    with Server(answer, federation.mutual_context()) as server:
        probe(Route(host, server.port), federation.credentials())


def test_unknown_name(federation: Federation) -> None:
    found = problem(Route("coordinator.invalid", 8443), federation.credentials())
    assert found.kind == "name-unknown"
    assert "coordinator.invalid:8443" in str(found)


def test_refused_port(federation: Federation) -> None:
    port = free_port()
    found = problem(Route("localhost", port), federation.credentials())
    assert found.kind == "refused"
    assert f"ask IT to open outbound TCP localhost:{port}" in str(found)


def test_packets_that_are_dropped(federation: Federation) -> None:
    # A listener whose queue is full drops what comes, as a firewall does.
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        port = listener.getsockname()[1]
        found = problem(Route("127.0.0.1", port), federation.credentials(), SOON_S)
    assert found.kind == "timed-out"
    assert f"ask IT to open outbound TCP 127.0.0.1:{port}" in str(found)


def test_handshake_that_is_never_answered(federation: Federation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        route = Route("localhost", silent.getsockname()[1])
        assert problem(route, federation.credentials(), SOON_S).kind == "timed-out"


def test_question_that_is_never_answered(federation: Federation) -> None:
    def wait(connection: socket.socket) -> None:
        while connection.recv(65536):
            pass

    with Server(wait, federation.mutual_context()) as server:
        assert problem_at(server, federation.credentials(), 1).kind == "timed-out"


@pytest.mark.parametrize(
    "text", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b""]
)
def test_no_tls(federation: Federation, text: bytes) -> None:
    with Server(say(text)) as server:
        assert problem_at(server, federation.credentials()).kind == "tls"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_wrong_host(federation: Federation, host: str) -> None:
    with Server(echo, federation.mutual_context("other.example")) as server:
        found = problem(Route(host, server.port), federation.credentials())
    assert found.kind == "wrong-host"


@pytest.mark.parametrize(("made", "word"), [(LONG_AGO, "expired"), (NEVER, "not valid yet")])
def test_dates_of_the_server(federation: Federation, made: datetime, word: str) -> None:
    with Server(echo, federation.mutual_context(now=made)) as server:
        found = problem_at(server, federation.credentials())
    assert found.kind == "server-dates"
    assert word in str(found)
    assert "this machine's clock" in str(found)


def test_inspection(federation: Federation, foreign: Federation) -> None:
    read = Recorder()
    with Server(read, foreign.server_context()) as server:
        found = problem_at(server, federation.credentials())
    assert found.kind == "inspected"
    assert "“FedCMR Foreign”" in str(found)
    assert f"exempt localhost:{server.port} from TLS inspection" in str(found)
    assert read.received == b""


def test_inspector_that_imitates_the_coordinators_certificate(
    federation: Federation, foreign: Federation
) -> None:
    certificate_file, key_file = federation.server_files()
    real = read_certificate(certificate_file.read_bytes())
    builder = x509.CertificateBuilder(
        real.issuer,
        real.subject,
        real.public_key(),
        real.serial_number,
        real.not_valid_before_utc,
        real.not_valid_after_utc,
        list(real.extensions),
    )
    forged = builder.sign(foreign.authority.key, SHA256())  # differs in the signature alone
    certificate_file.write_text(certificate_pem(forged))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    with Server(echo, context) as server:
        found = problem_at(server, federation.credentials())
    assert found.kind == "inspected"
    assert "FedCMR hearts" in str(found)


def test_inspector_whose_certificate_is_garbled(
    federation: Federation, foreign: Federation
) -> None:
    certificate_file, key_file = foreign.server_files()
    der = read_certificate(certificate_file.read_bytes()).public_bytes(Encoding.DER)
    version = b"\xa0\x03\x02\x01"
    assert version + b"\x02" in der
    garbled = der.replace(version + b"\x02", version + b"\x09", 1)
    certificate_file.write_text(ssl.DER_cert_to_PEM_cert(garbled))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    with Server(echo, context) as server:
        found = problem_at(server, federation.credentials())
    assert found.kind == "inspected"
    assert "issued by someone else" in str(found)


def test_member_cannot_pose_as_the_coordinator(federation: Federation) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    member = federation.credentials("south")
    context.load_cert_chain(member.certificate, member.key)
    read = Recorder()
    with Server(read, context) as server:
        assert problem_at(server, federation.credentials()).kind == "tls"
    assert read.received == b""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_foreign_certificate(
    federation: Federation, foreign: Federation, version: ssl.TLSVersion
) -> None:
    context = federation.mutual_context()
    context.maximum_version = version
    mine, other = federation.credentials(), foreign.credentials()
    stranger = Credentials(federation.root, other.certificate, other.key)
    with Server(echo, context) as server:
        probe(Route("localhost", server.port), mine)
        found = problem_at(server, stranger)
    assert found.kind == "rejected"
    assert str(other.certificate) in str(found)


def test_old_tls(federation: Federation) -> None:
    # A server that speaks nothing newer than 1.1 says so in an alert, byte for byte this one.
    with Server(say(b"\x15\x03\x02\x00\x02\x02\x46")) as server:
        assert problem_at(server, federation.credentials()).kind == "tls"


@pytest.mark.parametrize("status", ["400 Bad Request", "495 SSL Certificate Error"])
def test_gateway_that_refuses_the_certificate(federation: Federation, status: str) -> None:
    answer = say(f"HTTP/1.1 {status}\r\n\r\n".encode())
    with Server(answer, federation.server_context()) as server:
        assert problem_at(server, federation.credentials()).kind == "rejected"


@pytest.mark.parametrize(
    ("made", "text"), [(LONG_AGO, "expired on 2020-12-31"), (NEVER, "set the clock")]
)
def test_own_certificates_dates_are_seen_without_connecting(
    federation: Federation, made: datetime, text: str
) -> None:
    credentials = federation.credentials(now=made)
    with Server(echo, federation.mutual_context()) as server:
        found = problem(Route("localhost", server.port), credentials)
        assert server.handshakes == 0
    assert found.kind == "own-certificate"
    assert text in str(found)
    assert str(credentials.certificate) in str(found)


def test_days_left(federation: Federation) -> None:
    assert 364 < federation.credentials().days_left() < 366
    old = federation.credentials(now=datetime.now(UTC) - timedelta(days=366))
    assert -2 < old.days_left() < 0


@pytest.mark.parametrize("damage", ["missing", "empty", "binary"])
@pytest.mark.parametrize("which", ["authority", "certificate", "key"])
def test_files_that_cannot_be_used(federation: Federation, which: str, damage: str) -> None:
    credentials = federation.credentials()
    path: Path = getattr(credentials, which)
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else b"\xff\x00\xfe")
    with pytest.raises(ConfigurationError, match=path.name):
        probe(Route("localhost", 1), credentials)


def test_key_of_another_certificate(federation: Federation) -> None:
    north, south = federation.credentials("north"), federation.credentials("south")
    mixed = Credentials(federation.root, north.certificate, south.key)
    with pytest.raises(ConfigurationError, match=r"south\.key is not the key of .*north\.pem"):
        probe(Route("localhost", 1), mixed)


def test_encrypted_key_asks_nobody(federation: Federation) -> None:
    credentials = federation.credentials()
    key = read_key(credentials.key.read_bytes())
    encryption = BestAvailableEncryption(b"secret")
    credentials.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))

    def run(code: str) -> str:
        # OpenSSL asks the terminal, or the standard input where there is none.
        files = [credentials.authority, credentials.certificate, credentials.key]
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {code}", *files],
            input="secret\n",
            capture_output=True,
            text=True,
            start_new_session=True,
            check=False,
        )
        return done.stderr

    ours = "from fedcmr_client.tunnel import Credentials; from pathlib import Path; "
    ours += "Credentials(*map(Path, sys.argv[1:])).tls_context('h2')"
    assert "or it is encrypted" in run(ours)
    unguarded = "import ssl; ssl.create_default_context().load_cert_chain(*sys.argv[2:])"
    assert "Error" not in run(unguarded)  # it took the password


def test_proxy_on_the_way(federation: Federation) -> None:
    with Server(echo, federation.mutual_context()) as server, connect_proxy() as log:
        proxy = Proxy("localhost", log.port)
        probe(Route("localhost", server.port, proxy), federation.credentials())
    assert log.targets == [f"localhost:{server.port}"]


@pytest.mark.parametrize("url", ["http://localhost", "http://me:wrong@localhost"])
def test_proxy_wants_a_password(federation: Federation, url: str) -> None:
    with connect_proxy(password="me:right") as log:
        proxy = Proxy.parse(f"{url}:{log.port}")
        found = problem(Route("localhost", 1, proxy), federation.credentials())
    assert found.kind == "proxy-credentials"
    assert f"localhost:{log.port}" in str(found)
    assert "wrong" not in str(found)


@pytest.mark.parametrize("status", ["403 Forbidden", "502 Bad Gateway", "302 Found"])
def test_proxy_refuses(federation: Federation, status: str) -> None:
    with connect_proxy(status=status) as log:
        route = Route("coordinator.test", 8443, Proxy("localhost", log.port))
        found = problem(route, federation.credentials())
    assert found.kind == "proxy-refused"
    assert f"status {status[:3]}" in str(found)
    assert "allow CONNECT to coordinator.test:8443" in str(found)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nnot the coordinator's bytes",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        b"",
    ],
)
def test_no_proxy_at_all(federation: Federation, answer: bytes) -> None:
    with Server(say(answer)) as server:
        route = Route("coordinator.test", 8443, Proxy("localhost", server.port))
        assert problem(route, federation.credentials()).kind == "proxy-refused"


def test_proxy_that_is_not_there(federation: Federation) -> None:
    for host in ("localhost", "proxy.invalid"):
        proxy = Proxy(host, free_port())
        found = problem(Route("localhost", 1, proxy), federation.credentials())
        assert found.kind == "proxy-unreachable"
        assert f"the proxy {proxy.address}" in str(found)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_does_not_answer(federation: Federation, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = Proxy("localhost", silent.getsockname()[1], tls=scheme == "https")
        found = problem(Route("localhost", 1, proxy), federation.credentials(), SOON_S)
    assert found.kind == "proxy-unreachable"


def test_proxys_own_certificate_is_checked(federation: Federation, foreign: Federation) -> None:
    mine = federation.credentials()
    password = "me:secret"
    with (
        Server(echo, federation.mutual_context()) as server,
        connect_proxy(password=password, context=foreign.server_context()) as log,
    ):
        url = f"https://{password}@localhost:{log.port}"
        # Neither the system's store nor the federation's authority speaks for a proxy.
        for authority in (None, federation.root):
            found = problem(Route("localhost", server.port, Proxy.parse(url, authority)), mine)
            assert found.kind == "proxy-unreachable"
            assert "is not trusted" in str(found)
        assert log.targets == []
        probe(Route("localhost", server.port, Proxy.parse(url, foreign.root)), mine)
        assert len(log.targets) == 1


@pytest.mark.parametrize("secure", [False, True])
def test_obstacles_behind_a_proxy(
    federation: Federation, foreign: Federation, secure: bool
) -> None:
    context = foreign.server_context() if secure else None
    mine, other = federation.credentials(), foreign.credentials()
    stranger = Credentials(federation.root, other.certificate, other.key)
    with (
        connect_proxy(context=context) as log,
        Server(echo, federation.mutual_context()) as server,
        Server(echo, foreign.server_context()) as inspector,
        Server(echo, federation.mutual_context("other.example")) as misnamed,
    ):
        proxy = Proxy("localhost", log.port, secure, authority=foreign.root if secure else None)
        probe(Route("localhost", server.port, proxy), mine)
        found = problem(Route("localhost", inspector.port, proxy), mine)
        assert found.kind == "inspected"
        assert "FedCMR Foreign" in str(found)
        assert problem(Route("localhost", misnamed.port, proxy), mine).kind == "wrong-host"
        assert problem(Route("localhost", server.port, proxy), stranger).kind == "rejected"


def test_probe_leaves_nothing_open(federation: Federation, foreign: Federation) -> None:
    before = len(os.listdir("/proc/self/fd"))
    mine = federation.credentials()
    with (
        Server(say(b"HTTP/1.1 200 OK\r\n\r\n"), federation.mutual_context()) as server,
        Server(echo, foreign.server_context()) as inspector,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        probe(Route("localhost", server.port), mine)
        problem_at(inspector, mine)
        problem(Route("localhost", silent.getsockname()[1]), mine, SOON_S)
    assert len(os.listdir("/proc/self/fd")) == before
