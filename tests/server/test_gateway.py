"""The public port lets through what sites may ask for, and nothing else.

What stands behind the gateway here answers everything and tells what reached it: a request that is
refused was refused by the gateway. The last tests have a real SuperLink behind it.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import uvicorn
from coordinator_parties import Party, new_home
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flower_parties import free_port, wait_for
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER as KEY_HEADER
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from fedcmr_server.authoriser import authorise, flower_key
from fedcmr_server.gateway import FLEET_PATHS, Gateway, find_nginx, require_port, take_line
from fedcmr_server.governance import evidence_files
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.log_files import JsonLines
from fedcmr_server.members import end_membership
from fedcmr_server.store import Certificates, Members, Store, StoreUnreachable
from fedcmr_server.superlink import (
    Control,
    KeyUsed,
    SuperLink,
    SuperLinkUnreachable,
    reconcile_nodes,
)
from fedcmr_server.supervisor import WebServer
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.federation.flower_app import app_bundle
from fedcmr_shared.identity.certificates import (
    Authority,
    certificate_pem,
    issue_member,
    issue_server,
    key_pem,
    new_authority,
    new_key,
)

pytestmark = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") is None,
    reason="nginx is not installed",
)

GOVERNANCE = "/fedcmr.governance.v1.Governance/Anything"
COUNT = "/fedcmr.governance.v1.Governance/Count"
PULL = "/v1/fleet/pull-messages"


async def tell(request: Request) -> JSONResponse:
    """Answer with what arrived."""
    body = await request.body()
    return JSONResponse(
        {
            "path": request.scope["raw_path"].decode(),
            "query": request.url.query,
            "headers": dict(request.headers),
            "bytes": len(body),
        }
    )


GRPC = {"content-type": "application/grpc", "te": "trailers"}
EMPTY = bytes(5)
"""An empty gRPC message."""

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
TELL = Route("/{path:path}", tell, methods=METHODS)


def web_app(store: Store) -> Starlette:
    app = Starlette(routes=[Route("/_authorise", authorise), TELL])
    app.state.store = store
    return app


class Behind(grpc.GenericRpcHandler):
    """Answers each gRPC call with the metadata that came with it, `COUNT` with the bytes."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        if str(details.method) == COUNT:
            return grpc.stream_unary_rpc_method_handler(
                lambda pieces, _: str(sum(map(len, pieces))).encode()
            )

        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            return json.dumps(
                [list(map(str, pair)) for pair in context.invocation_metadata()]
            ).encode()

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def everything_behind(home: CoordinatorHome, store: Store) -> Iterator[tuple[int, Path]]:
    """Run web app, governance and a SuperLink that answer anything; give the last one's place."""
    authority, key = new_authority("behind"), new_key()
    files = {
        "root": certificate_pem(authority.certificate).encode(),
        "certificate": certificate_pem(issue_server(authority, key, ["localhost"])).encode(),
        "key": key_pem(key),
    }
    for name, content in files.items():
        (home.run / name).write_bytes(content)
    governance = grpc.server(ThreadPoolExecutor(2), handlers=[Behind()])
    governance.add_insecure_port(f"unix:{home.governance_socket}")
    governance.start()
    port = free_port()
    superlink = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[TELL]),
            port=port,
            log_config=None,
            ws="none",
            ssl_certfile=home.run / "certificate",
            ssl_keyfile=str(home.run / "key"),
        )
    )
    with ThreadPoolExecutor(1) as pool, WebServer(web_app(store), home.web_socket):
        running = pool.submit(superlink.run)
        try:
            wait_for("what is behind", lambda: superlink.started and home.web_socket.exists())
            yield port, home.run / "root"
        finally:
            superlink.should_exit = True
            running.result(10)
            governance.stop(None).wait(10)


@dataclass(frozen=True)
class World:
    """A gateway with everything behind it, and two sites and an auditor that joined."""

    folder: Path
    home: CoordinatorHome
    store: Store
    alder: Party
    birch: Party
    auditor: Party
    gateway: Gateway

    @property
    def authority(self) -> Authority:
        return self.home.authority()

    @contextmanager
    def client(self, party: Party | None = None) -> Iterator[httpx.Client]:
        """A connection of ``party``, or of somebody without a certificate."""
        if party is None:
            root = certificate_pem(self.authority.certificate)
            context = ssl.create_default_context(cadata=root)
        else:
            context = party.context(self.authority)
        with httpx.Client(
            base_url=self.home.address, verify=context, trust_env=False, timeout=30
        ) as made:
            yield made

    def channel(self, party: Party) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(
            certificate_pem(self.authority.certificate).encode(),
            (party.folder / "tls.key").read_bytes(),
            (party.folder / "certificate.pem").read_bytes(),
        )
        return grpc.secure_channel(f"127.0.0.1:{self.home.settings.port}", credentials)

    def newcomer(self, name: str) -> Party:
        """A site that has keys and no certificate."""
        return Party.make(self.folder / name, name)


def shown_key(party: Party) -> dict[str, str]:
    """Flower's header with the party's node key."""
    assert party.request.node_key is not None
    return {KEY_HEADER: base64.b64encode(flower_key(party.request.node_key)).decode()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("gateway")
    home = new_home(folder / "c", port=free_port(), requests_per_second=1000)
    with home.store() as store:
        parties = [
            Party.make(folder / "alder", "alder"),
            Party.make(folder / "birch", "birch"),
            Party.make(folder / "auditor", "auditor", "auditor"),
        ]
        for party in parties:
            party.join(home, store)
        with everything_behind(home, store) as place, Gateway(home, *place) as gateway:
            wait_for("the gateway", lambda: listens(home, gateway))
            yield World(folder, home, store, *parties, gateway)


def listens(home: CoordinatorHome, gateway: Gateway) -> bool:
    assert gateway.problem is None, gateway.problem
    try:
        socket.create_connection(("127.0.0.1", home.settings.port), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_site_reaches_every_path_that_a_supernode_needs(world: World) -> None:
    with world.client(world.alder) as client:
        for name in FLEET_PATHS:
            answer = client.post(f"/v1/fleet/{name}", headers=shown_key(world.alder), content=b"x")
            assert answer.status_code == 200, name
            told = answer.json()
            assert (told["path"], told["bytes"]) == (f"/v1/fleet/{name}", 1)


FORBIDDEN = [
    "/v1/control/start-run",
    "/v1/control/list-nodes",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages/x",
    "/v1/fleet/Pull-Messages",
    "/v1/responses",
    "/v1/",
    "/_authorise",
    "/%5Fauthorise",
]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_no_other_path_of_superlink_exists_even_for_a_site(world: World, path: str) -> None:
    with world.client(world.alder) as client:
        assert client.post(path, headers=shown_key(world.alder)).status_code == 404


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/health", "/V1/control/start-run"])
def test_what_is_no_flower_path_goes_to_the_dashboard_not_to_superlink(
    world: World, path: str
) -> None:
    with world.client(world.alder) as client:
        told = client.get(path).json()
    assert told["headers"]["x-fedcmr-verified"] == "SUCCESS", "only the dashboard gets this header"


@pytest.mark.parametrize(
    "raw",
    [
        "/v1/control/start-run/../../fleet/pull-messages",
        "/v1/fleet/%70ull-messages",
        "//v1//fleet//pull-messages",
        "/v1/fleet/pull-messages?path=/v1/control/start-run",
        "/v1/fleet/pull-messages#/../../control/start-run",
    ],
)
def test_superlink_gets_the_path_that_was_allowed_however_it_was_written(
    world: World, raw: str
) -> None:
    key = shown_key(world.alder)[KEY_HEADER]
    answer = raw_request(
        world, f"POST {raw} HTTP/1.1\r\nHost: x\r\n{KEY_HEADER}: {key}\r\nContent-Length: 0"
    )
    told = json.loads(answer[answer.index("{") :])
    assert (told["path"], told["query"]) == (PULL, "")


def raw_request(world: World, head: str) -> str:
    """Send a request as it is written, and read the answer to its end."""
    context = world.alder.context(world.authority)
    address = ("127.0.0.1", world.home.settings.port)
    with (
        socket.create_connection(address, timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as stream,
    ):
        stream.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: stream.recv(65_536), b"")).decode()


def test_only_post_reaches_superlink(world: World) -> None:
    with world.client(world.alder) as client:
        for method in ("GET", "PUT", "DELETE", "OPTIONS"):
            assert client.request(method, PULL, headers=shown_key(world.alder)).status_code == 403


def test_whoever_shows_no_certificate_reaches_the_dashboard_alone(world: World) -> None:
    with world.client() as client:
        assert client.post(PULL, headers=shown_key(world.alder)).status_code == 403
        assert client.post(GOVERNANCE).status_code == 403
        assert client.post("/grpc.health.v1.Health/Check").status_code == 403
        assert client.get("/").json()["headers"]["x-fedcmr-verified"] == "NONE"


def foreign(world: World, party: Party) -> None:
    party.take(pem(issue_member(new_authority("heart"), asked(party), party.request.member)))


def expired(world: World, party: Party) -> None:
    now = datetime.now(UTC) - timedelta(days=400)
    certificate = issue_member(world.authority, asked(party), party.request.member, now)
    Members(world.store).add(party.request.member, "ab" * 32, party.request.node_key)
    Certificates(world.store).add(party.name, certificate)
    party.take(pem(certificate))


def self_signed(world: World, party: Party) -> None:
    made = new_authority("heart")
    (party.folder / "tls.key").write_bytes(key_pem(made.key))
    party.take(pem(made.certificate))


def server_certificate(world: World, party: Party) -> None:
    shutil.copy(world.home.keys / "server.pem", party.folder / "tls.key")
    party.take((world.home.keys / "server.crt").read_text())


def pem(certificate: Any) -> str:
    return certificate_pem(certificate)


def asked(party: Party) -> str:
    return party.request.certificate_request


@pytest.mark.parametrize("take", [foreign, expired, self_signed, server_certificate])
def test_other_certificates_reach_nothing(
    world: World, take: Callable[[World, Party], None]
) -> None:
    party = world.newcomer(take.__name__.replace("_", "-"))
    take(world, party)
    with world.client(party) as client:
        for path in (PULL, "/"):
            assert client.post(path, headers=shown_key(party)).status_code == 400
    with world.channel(party) as channel:
        call = channel.unary_unary(GOVERNANCE)
        with pytest.raises(grpc.RpcError):
            call(b"", timeout=20)


def test_the_authority_s_word_is_not_enough_the_database_must_know_the_certificate(
    world: World,
) -> None:
    party = world.newcomer("unknown")
    party.take(pem(issue_member(world.authority, asked(party), party.request.member)))
    with world.client(party) as client:
        assert client.post(PULL, headers=shown_key(party)).status_code == 403


def test_revocation_holds_from_the_next_message_on_over_the_same_connection(world: World) -> None:
    party = world.newcomer("cedar")
    party.join(world.home, world.store)
    with world.client(party) as client:
        first = client.post(PULL, headers=shown_key(party))
        connection = first.extensions["network_stream"]
        end_membership(world.home, world.store, "cedar", "revoked", "a test")
        second = client.post(PULL, headers=shown_key(party))
        assert connection is second.extensions["network_stream"]
    assert (first.status_code, second.status_code) == (200, 403)


def test_a_site_comes_with_its_own_node_key_alone(world: World) -> None:
    with world.client(world.alder) as client:
        assert client.post(PULL, headers=shown_key(world.birch)).status_code == 403
        assert client.post(PULL).status_code == 403
        assert client.post(PULL, headers={KEY_HEADER: "no base64!"}).status_code == 403
        both = [*shown_key(world.birch).items(), *shown_key(world.alder).items()]
        assert client.post(PULL, headers=both).status_code == 403


def test_an_auditor_is_no_site(world: World) -> None:
    with world.client(world.auditor) as client:
        assert client.post(PULL, headers=shown_key(world.alder)).status_code == 403


SPOOFED = {
    "x-fedcmr-certificate": "of somebody else",
    "x-fedcmr-verified": "SUCCESS",
    "x-fedcmr-address": "10.0.0.1",
}


def test_a_client_cannot_say_who_it_is(world: World) -> None:
    with world.client() as client:
        headers = client.get("/", headers=SPOOFED).json()["headers"]
    assert headers["x-fedcmr-verified"] == "NONE"
    assert headers["x-fedcmr-address"] == "127.0.0.1"
    assert "x-fedcmr-certificate" not in headers
    with world.client(world.auditor) as client:
        headers = client.get("/", headers=SPOOFED).json()["headers"]
        assert client.post(PULL, headers=shown_key(world.alder) | SPOOFED).status_code == 403
    assert headers["x-fedcmr-certificate"].startswith("-----BEGIN%20CERTIFICATE")
    with world.client(world.alder) as client:
        headers = client.post(PULL, headers=shown_key(world.alder) | SPOOFED).json()["headers"]
    assert not SPOOFED.keys() & headers.keys(), "SuperLink gets none of them"


def test_governance_learns_the_verified_certificate_and_nothing_that_a_client_says(
    world: World,
) -> None:
    with world.channel(world.auditor) as channel:
        call = channel.unary_unary(GOVERNANCE)
        answer = call(b"", metadata=list(SPOOFED.items()), timeout=20, wait_for_ready=True)
    metadata = [tuple(pair) for pair in json.loads(answer)]
    certificates = [value for name, value in metadata if name == "x-fedcmr-certificate"]
    assert ("x-fedcmr-address", "127.0.0.1") in metadata
    assert ("x-fedcmr-address", "10.0.0.1") not in metadata
    assert len(certificates) == 1
    assert certificates[0].startswith("-----BEGIN%20CERTIFICATE")


def test_governance_is_not_reached_over_http_1_which_the_fleet_s_door_speaks(
    world: World,
) -> None:
    # At a hospital every program may knock at that door, and has the site's certificate behind it.
    def ask() -> int:
        try:
            with world.client(world.alder) as client:
                assert client.post(PULL, headers=shown_key(world.alder)).status_code == 200
                health = client.post("/grpc.health.v1.Health/Check", headers=GRPC, content=EMPTY)
                assert client.post(GOVERNANCE, headers=GRPC, content=EMPTY).status_code == (
                    health.status_code
                )
                return health.status_code
        except httpx.TransportError:  # the worker that ends after a reload
            return 0

    assert ask() == 403
    settings = world.home.run / "nginx.conf"
    written = settings.read_text()
    rule = "if ($server_protocol != HTTP/2.0) { return 403; }"
    assert rule in written
    try:
        settings.write_text(written.replace(rule, ""))
        world.gateway.reload()
        wait_for("what would happen without the rule", lambda: ask() == 200)
    finally:
        settings.write_text(written)
        world.gateway.reload()
    wait_for("the rule", lambda: ask() == 403)


def test_no_http_2_hides_behind_a_handshake_for_http_1(world: World) -> None:
    context = world.alder.context(world.authority)
    context.set_alpn_protocols(["http/1.1"])
    address = ("127.0.0.1", world.home.settings.port)
    with (
        socket.create_connection(address, timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as stream,
    ):
        stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        answer = b"".join(iter(lambda: stream.recv(65_536), b""))
    assert answer.startswith((b"<html>", b"HTTP/1.1 4")), answer[:40]


def test_bodies_have_a_size(world: World) -> None:
    with world.client(world.alder) as client:
        piece = b"x" * (6 << 20)
        answer = client.post(PULL, headers=shown_key(world.alder), content=piece)
        assert answer.json()["bytes"] == len(piece)
        too_much = b"x" * (17 << 20)
        answer = client.post(PULL, headers=shown_key(world.alder), content=too_much)
        assert answer.status_code == 413
        assert client.post("/", content=b"x" * (2 << 20)).status_code == 413


def test_evidence_of_64_mib_gets_through_and_not_much_more(world: World) -> None:
    piece = bytes(1 << 20)
    with world.channel(world.alder) as channel:
        count = channel.stream_unary(COUNT)
        largest = count(repeat(piece, evidence_files.LARGEST >> 20), timeout=120)
        assert int(largest) == evidence_files.LARGEST
        with pytest.raises(grpc.RpcError):
            count(repeat(piece, 90), timeout=120)


def test_one_certificate_cannot_ask_without_end_and_takes_nothing_from_others(
    tmp_path: Path, world: World
) -> None:
    home = new_home(tmp_path / "c", port=free_port(), requests_per_second=5)
    with home.store() as store, everything_behind(home, store) as place:
        alder, birch = (Party.make(tmp_path / name, name) for name in ("alder", "birch"))
        for party in (alder, birch):
            party.join(home, store)
        with Gateway(home, *place) as gateway:
            wait_for("the gateway", lambda: listens(home, gateway))
            small = World(tmp_path, home, store, alder, birch, birch, gateway)
            with small.client(alder) as one, small.client(birch) as other:

                def ask(_: int) -> int:
                    return one.post(PULL, headers=shown_key(alder)).status_code

                with ThreadPoolExecutor(40) as pool:
                    codes = Counter(pool.map(ask, range(40)))
                    answer = other.post(PULL, headers=shown_key(birch))
    assert answer.status_code == 200
    assert set(codes) == {200, 503}, "after a 503 a SuperNode tries again"
    assert codes[200] >= 20


def test_while_nobody_can_say_who_may_pass_sites_are_told_to_come_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnreachable("the database is away")

    with world.client(world.alder) as client:
        monkeypatch.setattr("fedcmr_server.authoriser.fleet_refusal", fail)
        assert client.post(PULL, headers=shown_key(world.alder)).status_code == 503
        monkeypatch.undo()
        assert client.post(PULL, headers=shown_key(world.alder)).status_code == 200


def test_old_tls_is_refused_and_nginx_does_not_tell_its_version(world: World) -> None:
    context = world.alder.context(world.authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    address = ("127.0.0.1", world.home.settings.port)
    with socket.create_connection(address, timeout=30) as plain:
        context.wrap_socket(plain, server_hostname="127.0.0.1").close()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(address, timeout=30) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")
    with world.client() as client:
        assert client.get("/v1/").headers["server"] == "nginx"


def test_a_renewed_certificate_is_shown_without_a_restart(world: World) -> None:
    before = shown_certificate(world)
    assert not world.home.renew_server_certificate()
    (world.home.keys / "server.crt").unlink()
    assert world.home.renew_server_certificate()
    world.gateway.reload()
    wait_for("the new certificate", lambda: shown_certificate(world) != before)


def shown_certificate(world: World) -> bytes | None:
    address = ("127.0.0.1", world.home.settings.port)
    with (
        socket.create_connection(address, timeout=30) as plain,
        world.alder.context(world.authority).wrap_socket(
            plain, server_hostname="127.0.0.1"
        ) as stream,
    ):
        return stream.getpeercert(binary_form=True)


def test_logs_hold_no_query_strings(caplog: pytest.LogCaptureFixture, world: World) -> None:
    with caplog.at_level(logging.INFO, "fedcmr.gateway"), world.client() as client:
        client.get("/login?token=secret")
        wait_for("the line", lambda: "/login" in caplog.text)
    assert "secret" not in caplog.text
    line = json.loads(JsonLines().format(caplog.records[-1]))
    assert (line["path"], line["status"], line["verified"]) == ("/login", 200, "NONE")
    with caplog.at_level(logging.INFO, "fedcmr.gateway"):
        take_line('[error] failed, request: "GET /login?token=hidden HTTP/1.1", host: "x"')
    assert "hidden" not in caplog.text
    assert '"GET /login?… HTTP/1.1"' in caplog.text


def test_what_is_missing_or_taken_gets_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="install nginx"):
        find_nginx("no-such-nginx")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match="another program has it"):
            require_port("127.0.0.1", port, patience_s=0)
        home = new_home(tmp_path / "c", port=port)
        with pytest.raises(ConfigurationError, match=f"port {port}"):
            Gateway(home, 1, home.keys / "authority.crt").start()
    with pytest.raises(ConfigurationError, match="change `listen`"):
        require_port("192.0.2.1", port, patience_s=0)


def test_a_real_superlink_is_reached_by_its_sites_for_fleet_requests_alone(
    tmp_path: Path, world: World
) -> None:
    home = new_home(tmp_path / "c", port=free_port())
    with home.store() as store, SuperLink(home) as superlink:
        alder = Party.make(tmp_path / "alder", "alder")
        alder.join(home, store)
        with (
            WebServer(web_app(store), home.web_socket),
            Gateway(home, superlink.port, superlink.root) as gateway,
        ):
            real = World(tmp_path, home, store, alder, alder, alder, gateway)
            wait_for("SuperLink", lambda: superlink_answers(superlink))
            wait_for("the gateway", lambda: listens(home, gateway))
            with superlink.control() as control:
                assert reconcile_nodes(control, Members(store).active()) == []
                assert len(control.nodes()) == 1
            with real.client(alder) as client:
                answer = activate(client, alder)
                assert answer.status_code == 200
                assert ActivateNodeResponse.FromString(answer.content).node_id != 0
                for path in FORBIDDEN[:6]:
                    assert client.post(path).status_code == 404
                Members(store).end("alder", "revoked", "a test")
                assert activate(client, alder).status_code == 403
            with superlink.control() as control:
                # Positive control: what the gateway keeps out is there, and asks for no account.
                assert control.runs() == []
                assert reconcile_nodes(control, Members(store).active()) == []
                assert control.nodes() == {}
                with pytest.raises(KeyUsed, match="new keys"):
                    control.register(flower_key(str(alder.request.node_key)))
                start_and_stop_a_run(control)


def start_and_stop_a_run(control: Control) -> None:
    run = control.start_run(app_bundle(), {"job": "a job"})
    started = control.run(run)
    assert started is not None
    assert (started.job, started.over) == ("a job", False)
    assert [each.id for each in control.runs()] == [run]
    control.stop_run(run)
    stopped = control.run(run)
    assert stopped is not None
    assert (stopped.over, stopped.ending) == (True, "stopped")
    control.stop_run(run)  # of a run that is over: nothing happens
    assert control.run("12345") is None
    with pytest.raises(FederationError, match="did not start a run"):
        control.start_run(b"no bundle", {})


def superlink_answers(superlink: SuperLink) -> bool:
    assert superlink.problem is None, superlink.problem
    try:
        with superlink.control() as control:
            control.nodes()
    except SuperLinkUnreachable:
        return False
    return True


def activate(client: httpx.Client, party: Party) -> httpx.Response:
    """Send what a SuperNode sends first, signed by the party's node key."""
    assert party.request.node_key is not None
    key = load_ssh_private_key((party.folder / "node.key").read_bytes(), None)
    message = ActivateNodeRequest(
        public_key=flower_key(party.request.node_key), heartbeat_interval=30
    )
    request = client.build_request(
        "POST",
        "/v1/fleet/activate-node",
        content=message.SerializeToString(),
        headers={"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE},
    )
    context = ProtobufRequestContext("/flwr.proto.Fleet/ActivateNode", message, request)
    signer = NodeAuthHttpInterceptor(key, key.public_key())
    return signer.intercept(context, lambda signed: client.send(signed.request))
