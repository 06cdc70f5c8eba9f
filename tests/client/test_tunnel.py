"""The tunnel carries every byte and nothing else, and comes back when the coordinator does."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import secrets
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tls_parties import LONG_S, Federation, Recorder, Server, connect_proxy, echo, free_port

from fedcmr_client.tunnel import Credentials, Proxy, Route, Tunnel, relay
from fedcmr_shared.errors import ConfigurationError

MEGABYTE = 1 << 20


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation.make(tmp_path / "hearts")


@pytest.fixture(autouse=True)
def quiet_loop(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No connection, however it ends, leaves an error in asyncio's log."""
    yield
    assert [record for record in caplog.records if record.name == "asyncio"] == []


@pytest.fixture
def doors(tmp_path: Path) -> Path:
    return tmp_path / "doors"


def governance(tunnel: Tunnel) -> socket.socket:
    """Knock at the governance door, which takes plain bytes."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(LONG_S)
    connection.connect(tunnel.governance_target.removeprefix("unix:"))
    return connection


@contextmanager
def fleet(tunnel: Tunnel) -> Iterator[ssl.SSLSocket]:
    """Knock at the fleet's door as a SuperNode does: TLS, with its root certificate alone."""
    host, port = tunnel.fleet_address.split(":")
    context = ssl.create_default_context(cafile=tunnel.fleet_root)
    with (
        socket.create_connection((host, int(port)), LONG_S) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        yield connection


def exactly(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size > 0 and (part := connection.recv(min(size, 65536))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def sent_before_it_sticks(connection: socket.socket, message: bytes) -> int:
    """Send until nobody takes any more for a second; return the number of bytes sent."""
    connection.settimeout(1)
    sent = 0
    with suppress(TimeoutError):
        while sent < len(message):
            sent += connection.send(memoryview(message)[sent : sent + 65536])
    return sent


def said_back(tunnel: Tunnel, message: bytes) -> bytes:
    """Send ``message`` and return what comes back before the connection ends or is complete."""
    with governance(tunnel) as connection:
        try:
            connection.sendall(message)
            return exactly(connection, len(message))
        except ConnectionError:
            return b""


def test_bytes_survive_both_ways(federation: Federation, doors: Path) -> None:
    message = secrets.token_bytes(100_000)
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
    ):
        assert said_back(tunnel, message) == message
        with fleet(tunnel) as connection:
            connection.sendall(message)
            assert exactly(connection, len(message)) == message
        assert tunnel.problem is None


@pytest.mark.parametrize("door", ["governance", "fleet"])
def test_slow_reader_slows_its_writer(federation: Federation, doors: Path, door: str) -> None:
    reading = threading.Event()
    digest = hashlib.sha256()

    def read_later(connection: socket.socket) -> None:
        reading.wait(LONG_S)
        size = 0
        while size < 64 * MEGABYTE and (data := connection.recv(65536)):
            digest.update(data)
            size += len(data)
        connection.sendall(digest.digest())

    message = secrets.token_bytes(64 * MEGABYTE)
    with (
        Server(read_later, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        fleet(tunnel) if door == "fleet" else governance(tunnel) as connection,
    ):
        sent = sent_before_it_sticks(connection, message)
        assert sent < 32 * MEGABYTE  # what the sockets hold, and not all of it in memory
        reading.set()
        connection.settimeout(LONG_S)
        connection.sendall(memoryview(message)[sent:])
        assert exactly(connection, 32) == hashlib.sha256(message).digest()


def test_nothing_is_taken_before_the_coordinator_is_there(
    federation: Federation, doors: Path
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # never answers the handshake
    with (
        silent,
        Tunnel(
            Route("localhost", silent.getsockname()[1]), federation.credentials(), doors
        ) as tunnel,
        governance(tunnel) as connection,
    ):
        assert sent_before_it_sticks(connection, bytes(64 * MEGABYTE)) < 8 * MEGABYTE


def test_slow_client_slows_the_coordinator(federation: Federation, doors: Path) -> None:
    answer = secrets.token_bytes(8 * MEGABYTE)

    def pour(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(answer)

    with (
        Server(pour, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        governance(tunnel) as connection,
    ):
        connection.sendall(b"?")
        received = b"".join(iter(lambda: connection.recv(4096), b""))
        assert received == answer


def test_answer_is_complete_although_the_coordinator_closes(
    federation: Federation, doors: Path
) -> None:
    answer = secrets.token_bytes(MEGABYTE)

    def pour(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(answer)
        assert isinstance(connection, ssl.SSLSocket)
        connection.unwrap()

    with (
        Server(pour, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        fleet(tunnel) as connection,
    ):
        connection.sendall(b"?")
        assert b"".join(iter(lambda: connection.recv(65536), b"")) == answer


def test_half_closed_client_gets_its_answer(federation: Federation, doors: Path) -> None:
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        governance(tunnel) as connection,
    ):
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert exactly(connection, 10) == b"last words"


@pytest.mark.parametrize("half", [False, True])
def test_connection_of_a_client_that_left_is_closed(
    federation: Federation, doors: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    monkeypatch.setattr(relay, "LINGER_S", 0.1)
    ended = threading.Event()

    def listen(connection: socket.socket) -> None:
        while connection.recv(1):
            pass
        ended.set()

    with (
        Server(listen, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        governance(tunnel) as connection,
    ):
        connection.sendall(b"and nothing more")
        if half:
            connection.shutdown(socket.SHUT_WR)
        else:
            connection.close()
        assert ended.wait(LONG_S)
        assert tunnel.problem is None  # it did not wait for an answer


def test_many_connections_do_not_mix(federation: Federation, doors: Path) -> None:
    messages = [secrets.token_bytes(100_000) for _ in range(40)]
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        ThreadPoolExecutor(40) as pool,
    ):
        answers = list(pool.map(lambda message: said_back(tunnel, message), messages))
    assert answers == messages
    assert server.handshakes == 40


def test_idle_connections_are_closed(
    federation: Federation, doors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "IDLE_S", 0.2)
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        governance(tunnel) as connection,
    ):
        assert connection.recv(1) == b""
        assert tunnel.problem is None  # nobody was refused anything


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("password", [None, "north:p%:ss"])
def test_through_a_proxy(
    federation: Federation, doors: Path, tmp_path: Path, secure: bool, password: str | None
) -> None:
    hospital = Federation.make(tmp_path / "hospital", "of the hospital")
    context = hospital.server_context() if secure else None
    names = {"coordinator.test": "127.0.0.1"}  # only the proxy knows the name
    message = secrets.token_bytes(3 * MEGABYTE)
    with (
        Server(echo, federation.mutual_context("coordinator.test")) as server,
        connect_proxy(password=password, context=context, names=names) as log,
    ):
        user = "" if password is None else "north:p%25%3Ass@"
        url = f"{'https' if secure else 'http'}://{user}localhost:{log.port}"
        proxy = Proxy.parse(url, hospital.root if secure else None)
        route = Route("coordinator.test", server.port, proxy)
        with Tunnel(route, federation.credentials(), doors) as tunnel, ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda _: said_back(tunnel, message), range(3)))
    assert answers == [message] * 3
    assert log.targets == [f"coordinator.test:{server.port}"] * 3


def test_inspector_reads_nothing(
    federation: Federation, doors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector = Federation.make(tmp_path / "inspector", "Security Appliance")
    monkeypatch.setenv("SSL_CERT_FILE", str(inspector.root))  # as IT installs it in the system
    context = inspector.server_context()
    context.load_verify_locations(federation.root)
    context.verify_mode = ssl.CERT_OPTIONAL  # it would take a certificate
    read = Recorder()
    with Server(read, context) as server:
        route = Route("localhost", server.port)
        with Tunnel(route, federation.credentials(), doors) as tunnel:
            assert said_back(tunnel, b"secret") == b""
            assert tunnel.problem is not None
            assert tunnel.problem.kind == "inspected"
            assert "FedCMR Security Appliance" in str(tunnel.problem)
            assert f"exempt localhost:{server.port}" in str(tunnel.problem)
        assert read == Recorder(bytearray(), [None] * len(read.certificates))

        # With the system's store, or the inspector's authority pinned, the bytes are read.
        with (
            socket.create_connection(("127.0.0.1", server.port), LONG_S) as plain,
            ssl.create_default_context().wrap_socket(plain, server_hostname="localhost") as leak,
        ):
            leak.sendall(b"secret")
            assert exactly(leak, 6) == b"secret"
        site = federation.credentials()
        fooled = Credentials(inspector.root, site.certificate, site.key)
        with Tunnel(route, fooled, doors) as tunnel:
            assert said_back(tunnel, b"secret") == b"secret"
        assert read.received == b"secretsecret"
        assert read.certificates[-1]  # and the site's certificate was shown


def test_renewed_certificate_needs_no_restart(federation: Federation, doors: Path) -> None:
    seen = Recorder()
    with (
        Server(seen, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        governance(tunnel) as before,
    ):
        before.sendall(b"1")
        assert exactly(before, 1) == b"1"
        federation.credentials()
        assert said_back(tunnel, b"2") == b"2"
        before.sendall(b"3")  # open connections are left alone
        assert exactly(before, 1) == b"3"
    first, second = seen.certificates
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["subject"] == second["subject"]
    assert first["serialNumber"] != second["serialNumber"]


def test_unusable_certificate_is_a_problem_until_replaced(
    federation: Federation, doors: Path
) -> None:
    credentials = federation.credentials()
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), credentials, doors) as tunnel,
    ):
        credentials.certificate.write_text("")
        assert said_back(tunnel, b"1") == b""
        assert tunnel.problem is not None
        assert tunnel.problem.kind == "own-certificate"
        assert str(credentials.certificate) in str(tunnel.problem)
        federation.credentials()
        assert said_back(tunnel, b"2") == b"2"
        assert tunnel.problem is None


def test_foreign_certificate_is_a_problem(
    federation: Federation, doors: Path, tmp_path: Path
) -> None:
    other = Federation.make(tmp_path / "other").credentials()
    stranger = Credentials(federation.root, other.certificate, other.key)
    read = Recorder()
    with (
        Server(read, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), stranger, doors) as tunnel,
    ):
        assert said_back(tunnel, b"secret") == b""
        assert tunnel.problem is not None
        assert tunnel.problem.kind == "rejected"
    assert read.received == b""


def test_end_without_an_answer_is_a_problem(federation: Federation, doors: Path) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(65536)

    with (
        Server(hang_up, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
    ):
        assert said_back(tunnel, b"anybody there?") == b""
        assert tunnel.problem is not None
        assert tunnel.problem.kind == "rejected"
        assert "without an answer" in str(tunnel.problem)


def test_coordinator_goes_and_comes_back(
    federation: Federation, doors: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcmr.site")
    context = federation.mutual_context()
    port = free_port()
    with Tunnel(Route("localhost", port), federation.credentials(), doors) as tunnel:
        for _ in range(2):
            for _ in range(2):
                assert said_back(tunnel, b"secret") == b""
                assert tunnel.problem is not None
                assert tunnel.problem.kind == "refused"
            with Server(echo, context, port):
                assert said_back(tunnel, b"secret") == b"secret"
                assert tunnel.problem is None
    texts = [record.getMessage() for record in caplog.records if record.name == "fedcmr.site"]
    assert [f"localhost:{port} refuses" in text for text in texts] == [True, False, True, False]
    assert "secret" not in "".join(texts)


def test_connections_end_with_the_coordinator(federation: Federation, doors: Path) -> None:
    with Server(echo, federation.mutual_context()) as server:
        route = Route("localhost", server.port)
        with (
            Tunnel(route, federation.credentials(), doors) as tunnel,
            governance(tunnel) as plain,
            fleet(tunnel) as secure,
        ):
            for connection in (plain, secure):
                connection.sendall(b"1")
                assert exactly(connection, 1) == b"1"
            server.__exit__()
            assert plain.recv(1) == b""
            assert secure.recv(1) == b""


def test_grpc_through_the_governance_door(federation: Federation, doors: Path) -> None:
    certificate, key = (path.read_bytes() for path in federation.server_files())
    service = health.HealthServicer()
    service.set("governance", health_pb2.HealthCheckResponse.SERVING)
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        credentials = grpc.ssl_server_credentials(
            [(key, certificate)], federation.root.read_bytes(), require_client_auth=True
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            with (
                Tunnel(Route("localhost", port), federation.credentials(), doors) as tunnel,
                grpc.insecure_channel(tunnel.governance_target) as channel,
            ):
                request = health_pb2.HealthCheckRequest(service="governance")
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=LONG_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            server.stop(None).wait()


def test_http_through_the_fleet_door(federation: Federation, doors: Path) -> None:
    protocols = []

    def http(connection: socket.socket) -> None:
        assert isinstance(connection, ssl.SSLSocket)
        protocols.append(connection.selected_alpn_protocol())
        for _ in range(2):
            head = b""
            while not head.endswith(b"\r\n\r\nbody"):
                head += connection.recv(65536)
            assert head.startswith(b"POST /v1/fleet/pull-messages HTTP/1.1\r\n")
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")

    with (
        Server(http, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        httpx.Client(
            verify=ssl.create_default_context(cafile=tunnel.fleet_root),
            trust_env=False,
            timeout=LONG_S,
        ) as client,
    ):
        url = f"https://{tunnel.fleet_address}/v1/fleet/pull-messages"
        assert [client.post(url, content=b"body").text for _ in range(2)] == ["OK", "OK"]
    assert protocols == ["http/1.1"]  # one connection for both


def test_fleet_door_needs_tls(federation: Federation, doors: Path) -> None:
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
    ):
        host, port = tunnel.fleet_address.split(":")
        with socket.create_connection((host, int(port)), LONG_S) as plain:
            plain.sendall(b"POST / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionError):
                while plain.recv(65536):  # an alert at most
                    pass
        assert server.handshakes == 0
        assert tunnel.problem is None


def test_doors_are_this_users_alone(federation: Federation, doors: Path) -> None:
    with Tunnel(Route("localhost", 1), federation.credentials(), doors) as tunnel:
        assert doors.stat().st_mode & 0o777 == 0o700
        assert (doors / "loopback.key").stat().st_mode & 0o777 == 0o600
        assert tunnel.fleet_root == doors / "loopback.pem"
        assert tunnel.fleet_address.startswith("127.0.0.1:")
    doors.chmod(0o750)
    with (
        pytest.raises(ConfigurationError, match="chmod 700"),
        Tunnel(Route("localhost", 1), federation.credentials(), doors),
    ):
        pass


def test_folder_too_long_for_a_socket(federation: Federation, tmp_path: Path) -> None:
    threads = threading.active_count()
    with (
        pytest.raises(ConfigurationError, match="shorter folder"),
        Tunnel(Route("localhost", 1), federation.credentials(), tmp_path / ("long" * 30)),
    ):
        pass
    assert threading.active_count() == threads


def test_socket_of_a_killed_tunnel_is_replaced(federation: Federation, doors: Path) -> None:
    doors.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(doors / "governance.sock"))
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
    ):
        assert said_back(tunnel, b"1") == b"1"


def test_missing_credentials_are_found_at_the_start(federation: Federation, doors: Path) -> None:
    credentials = federation.credentials()
    credentials.key.unlink()
    with (
        pytest.raises(ConfigurationError, match=r"north\.key cannot be read"),
        Tunnel(Route("localhost", 1), credentials, doors),
    ):
        pass
    proxy = Proxy("localhost", 1, tls=True, authority=doors / "missing.pem")
    with (
        pytest.raises(ConfigurationError, match=r"missing\.pem cannot be read"),
        Tunnel(Route("localhost", 1, proxy), federation.credentials(), doors),
    ):
        pass


def test_doors_open_again_when_files_can_be_opened_again(
    federation: Federation, doors: Path
) -> None:
    warned = threading.Semaphore(0)
    handler = logging.Handler()
    handler.emit = lambda record: warned.release()  # type: ignore[method-assign]  # tells us when
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    log = logging.getLogger("fedcmr.site")
    with (
        Server(echo, federation.mutual_context()) as server,
        Tunnel(Route("localhost", server.port), federation.credentials(), doors) as tunnel,
        socket.socket(socket.AF_UNIX) as plain,
        socket.socket() as secure,
    ):
        used = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
        log.addHandler(handler)
        try:
            with suppress(OSError):
                while True:
                    used.append(os.dup(0))
            plain.connect(tunnel.governance_target.removeprefix("unix:"))
            host, port = tunnel.fleet_address.split(":")
            secure.connect((host, int(port)))
            for _ in range(2):
                assert warned.acquire(timeout=LONG_S)
        finally:
            log.removeHandler(handler)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in used:
                os.close(descriptor)
        plain.sendall(b"1")
        assert exactly(plain, 1) == b"1"
        with fleet(tunnel) as connection:
            connection.sendall(b"2")
            assert exactly(connection, 1) == b"2"


def test_leaving_closes_everything(federation: Federation, doors: Path) -> None:
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    waiting = threading.Event()

    def listen(connection: socket.socket) -> None:
        waiting.set()
        connection.recv(1)

    silent = socket.create_server(("127.0.0.1", 0))
    with silent, Server(listen, federation.mutual_context()) as server:
        for port in (server.port, silent.getsockname()[1]):
            route = Route("localhost", port)
            with ExitStack() as held, ExitStack() as opened:
                tunnel = opened.enter_context(Tunnel(route, federation.credentials(), doors))
                plain = held.enter_context(governance(tunnel))
                host, door = tunnel.fleet_address.split(":")
                held.enter_context(socket.create_connection((host, int(door)), LONG_S))
                if port == server.port:
                    assert waiting.wait(LONG_S)
                else:
                    held.enter_context(silent.accept()[0])  # the handshake is never answered
                opened.close()
                assert plain.recv(1) == b""
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((host, int(door)), LONG_S)
            assert not (doors / "governance.sock").exists()
            with pytest.raises(ConfigurationError, match="not open"):
                _ = tunnel.fleet_address
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
