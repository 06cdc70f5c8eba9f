"""No code of a coordinator's bundle is executed at a site, over a real SuperLink and SuperNode.

The same bundles are executed by Flower's SuperNode as it comes: the positive control.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
from flower_parties import (
    SuperLink,
    grid_of_run,
    new_node_key,
    plain_supernode,
    superlink,
    wait_for,
)
from flwr.app import ConfigRecord, Message, RecordDict
from joined_site import join, make_task

from fedcmr_client.policy import policy_text
from fedcmr_client.runner import Runner
from fedcmr_client.site_home import SiteHome
from fedcmr_client.supernode import SuperNode, SuperNodeSettings
from fedcmr_shared.federation.flower_app import APP_PROJECT, app_bundle
from fedcmr_shared.federation.messages import Refusal, Update, unpack_answer
from fedcmr_shared.schemas.policy import SitePolicy

NONSENSE = RecordDict({"header": ConfigRecord({"x": 1})})
EVIL_PROJECT = APP_PROJECT.replace("fedcmr_client.app:app", "evil:app")

Entries = list[tuple[str | zipfile.ZipInfo, bytes]]


def code(canary: Path) -> bytes:
    """A client app that leaves a file when it is imported."""
    return f"""
from pathlib import Path
Path({str(canary)!r}).write_text("executed")
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
""".encode()


def bundle(project: str, more: Entries) -> bytes:
    """Return a bundle as Flower takes it, with ``more`` entries."""
    entries: Entries = [("pyproject.toml", project.encode()), *more]
    lines = []
    for name, content in entries:
        path = name if isinstance(name, str) else name.filename
        lines.append(f"{path},{sha256(content).hexdigest()},{8 * len(content)}")
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in [*entries, (".info/CONTENT", "\n".join(lines).encode())]:
            archive.writestr(name, content)
    return buffer.getvalue()


def shadowing(canary: Path) -> bytes:
    """A module in place of the site's own."""
    own: Entries = [("fedcmr_client/__init__.py", b""), ("fedcmr_client/app.py", code(canary))]
    return bundle(APP_PROJECT, own)


def another_entry_point(canary: Path) -> bytes:
    return bundle(EVIL_PROJECT, [("evil.py", code(canary))])


def to_install(canary: Path) -> bytes:
    """A dependency whose build leaves a file."""
    needs = APP_PROJECT.replace('"flwr==1.41.0",', '"flwr==1.41.0", "evil @ file:evil",')
    backend = f'open({str(canary)!r}, "w").write("executed")'
    setup: Entries = [("evil/setup.py", backend.encode())]
    return bundle(needs, setup)


def slipping(canary: Path) -> bytes:
    """Entries that leave the folder into which they are unpacked."""
    outside = "../" * 20 + str(canary).lstrip("/")
    return bundle(APP_PROJECT, [(outside, b"slipped"), (str(canary), b"slipped")])


def linking(canary: Path) -> bytes:
    """A link out of the folder, and an entry behind it."""
    link = zipfile.ZipInfo("data")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    return bundle(
        APP_PROJECT, [(link, str(canary.parent).encode()), (f"data/{canary.name}", b"linked")]
    )


ATTACKS: dict[str, Callable[[Path], bytes]] = {
    each.__name__: each for each in (shadowing, another_entry_point, to_install, slipping, linking)
}
EXECUTED = ("shadowing", "another_entry_point")


@dataclass(frozen=True)
class Site:
    """A protected site, connected to a SuperLink."""

    link: SuperLink
    supernode: SuperNode
    node: int

    def ask(self, made: bytes, content: RecordDict, kind: str = "train") -> Message:
        with grid_of_run(self.link, made) as run:
            return run.ask(self.node, kind, content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def link(folder: Path) -> Iterator[SuperLink]:
    with superlink(folder / "superlink") as running:
        yield running


@pytest.fixture(scope="module")
def plain(link: SuperLink, folder: Path) -> Iterator[int]:
    """An unprotected node of the same federation."""
    node = link.register(new_node_key(folder / "plain.key"))
    with plain_supernode(link, folder / "plain.key", folder / "plain"):
        yield node


@pytest.fixture(scope="module")
def site(link: SuperLink, plain: int, folder: Path) -> Iterator[Site]:
    node = link.register(new_node_key(folder / "site.key"))
    settings = SuperNodeSettings(link.address, link.authority, folder / "site.key", folder / "node")
    with SuperNode(settings) as supernode:
        wait_for("the site", lambda: supernode.node_id == node and link.online(node))
        yield Site(link, supernode, node)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Path:
    path = folder / "policy.yaml"
    rules = {"site": "alder", "store": "store", "ledger": {"folder": "a", "second_place": "b"}}
    path.write_text(policy_text(SitePolicy.model_validate({**rules, "reply_tick_s": 0.01})))
    return path


@dataclass(frozen=True)
class Outcome:
    """What became of the bundles at the protected site, by name."""

    replies: dict[str, Message]
    canaries: dict[str, bool]
    refused: list[str]


@pytest.fixture(scope="module")
def outcome(site: Site, policy: Path, folder: Path) -> Outcome:
    refused: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(Runner(site.supernode, "alder", policy, record_refusal=refused.append))
        sent = {}
        for name, attack in ATTACKS.items():
            made = attack(folder / f"canary-{name}")
            run = stack.enter_context(grid_of_run(site.link, made))
            sent[name] = (run, run.push(site.node, "train", NONSENSE))
        replies = {name: run.reply(message) for name, (run, message) in sent.items()}
    canaries = {name: (folder / f"canary-{name}").exists() for name in ATTACKS}
    return Outcome(replies, canaries, refused)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_site_refuses_every_other_bundle_and_executes_nothing(
    outcome: Outcome, name: str
) -> None:
    assert unpack_answer(outcome.replies[name].content) == Refusal("alder", "bundle")
    assert not outcome.canaries[name]


def test_every_refused_bundle_is_written_down(outcome: Outcome) -> None:
    assert outcome.refused == ["entries"] * len(ATTACKS)


@pytest.mark.parametrize("name", EXECUTED)
def test_flowers_own_supernode_executes_the_same_bundle(
    link: SuperLink, plain: int, outcome: Outcome, folder: Path, name: str
) -> None:
    canary = folder / f"canary-{name}"
    assert not canary.exists()
    wait_for("the plain node", lambda: link.online(plain))
    with grid_of_run(link, ATTACKS[name](canary)) as run:
        reply = run.ask(plain, "train", NONSENSE)
    assert reply.content == NONSENSE
    assert canary.read_text() == "executed"


def test_with_the_code_free_app_a_joined_site_trains_what_its_coordinator_signed(
    site: Site, make_home: Callable[..., SiteHome], tmp_path: Path
) -> None:
    home, refused = make_home(), list[str]()
    signed = join(home, tmp_path)
    tasks = make_task(), replace(make_task(), authorisation=signed)
    with Runner(site.supernode, home.policy.site, home.path, record_refusal=refused.append):
        unread, unsigned, trained = (
            unpack_answer(site.ask(app_bundle(), content).content)
            for content in (NONSENSE, *(task.pack() for task in tasks))
        )
    assert unread == Refusal(home.policy.site, "malformed")
    assert unsigned == Refusal(home.policy.site, "signature")
    assert isinstance(trained, Update)
    assert trained.site == home.policy.site
    assert refused == []
