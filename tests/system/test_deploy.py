"""What lies in `deploy/`: units, images, compose files, the chart, and the list of parts."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from configparser import ConfigParser
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import click
import jsonschema
import pytest
import yaml
from deployment import ENVIRONMENT, FEDCMR, Federation, free_port, missing_programs, until

from fedcmr_client.agent_settings import AgentSettings
from fedcmr_client.membership import Membership
from fedcmr_client.store.site_store import SiteStore
from fedcmr_shared import __version__
from fedcmr_shared.cli import cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = Path(sys.executable).parent
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
ANSWERS = DEPLOY / "docker" / "answers.py"
COMPOSE = DEPLOY / "compose"
CHART = DEPLOY / "helm" / "fedcmr"
PAGES = [
    *(ROOT / "docs" / "sites" / name for name in ("running.md", "it-checklist.md")),
    ROOT / "docs" / "coordinators" / "running.md",
]

STATE, STORE, SECOND = "/var/lib/fedcmr", "/srv/fedcmr/store", "/srv/fedcmr/second-place"
MOUNTS = {"site": {STATE, STORE, SECOND}, "coordinator": {STATE}}
INSTALLED = "/opt/fedcmr/bin/fedcmr"


def program(name: str) -> str:
    """Return the path of a program; skip the test where it is missing."""
    found = shutil.which(name, path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def require_command(words: Sequence[str]) -> None:
    """Fail unless ``words`` are a command of `fedcmr` with options that it has."""
    context, command = click.Context(cli, info_name="fedcmr"), None
    rest, group = list(words), cli
    while rest and isinstance(group, click.Group):
        command = group.get_command(context, rest.pop(0))
        assert command is not None, words
        group = command
    assert command is not None
    assert not isinstance(command, click.Group), words
    command = copy.copy(command)  # commands are global, and other tests run them
    command.params = [copy.copy(parameter) for parameter in command.params]
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type = click.STRING  # the files are elsewhere
    command.make_context(command.name, rest, parent=context, resilient_parsing=not rest)


# systemd


def unit(path: Path) -> dict[str, list[str]]:
    """The settings of a unit, each with all its values."""
    parser = ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # keys have capitals
    parser.read_string(path.read_text())
    return {
        key: shlex.split(value) for part in parser.sections() for key, value in parser[part].items()
    }


def exec_start(name: str) -> list[str]:
    return unit(DEPLOY / "systemd" / f"fedcmr-{name}.service")["ExecStart"]


def verify(folder: Path, *units: str) -> str:
    """What `systemd-analyze verify` has to say about units."""
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", *units],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stdout + done.stderr).splitlines()
    # Other packages' units on this machine are not ours to judge.
    return "\n".join(line for line in lines if "fedcmr" in line)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Copies of the units whose program exists here."""
    for path in UNITS:
        copied = tmp_path / path.name
        copied.write_text(path.read_text().replace(INSTALLED, str(FEDCMR)))
    drop_in = tmp_path / "fedcmr-site.service.d"
    drop_in.mkdir()
    shutil.copy(DEPLOY / "systemd" / "gpu.conf", drop_in)
    return tmp_path


def test_systemd_accepts_the_units(units: Path) -> None:
    assert verify(units, *(path.name for path in UNITS)) == ""


def test_systemd_reports_a_broken_unit(units: Path) -> None:
    path = units / "fedcmr-site.service"
    path.write_text(path.read_text().replace("RestartSec=10", "RestartSecs=10"))
    assert "RestartSecs" in verify(units, path.name)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_little_exposure(path: Path) -> None:
    done = subprocess.run(
        [program("systemd-analyze"), "security", "--offline=true", "--threshold=20", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_unit_starts_an_existing_command_as_nobody_special(path: Path) -> None:
    settings = unit(path)
    executable, *words = settings["ExecStart"]
    assert executable == INSTALLED
    require_command(words)
    assert settings["User"] == settings["Group"] == ["fedcmr"]
    assert settings["CapabilityBoundingSet"] == []
    assert settings["KillMode"] == ["mixed"]
    assert settings["Restart"] == ["always"]
    role = path.stem.removeprefix("fedcmr-")
    written = {f"/var/lib/{settings['StateDirectory'][0]}", *settings.get("ReadWritePaths", [])}
    assert written == MOUNTS[role] == set(settings["RequiresMountsFor"])


def test_service_outlasts_the_patience_of_the_agent() -> None:
    patience = AgentSettings().stop_seconds
    (stop,) = unit(DEPLOY / "systemd" / "fedcmr-site.service")["TimeoutStopSec"]
    assert stop == "2min"
    assert compose("site.yaml")["services"]["site"]["stop_grace_period"] == "2m"
    assert patience + 30 <= 120


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    """A federation with one hospital, `alder`, which has joined; nothing of it runs."""
    if missing := missing_programs():
        pytest.skip(missing)
    # A short path, for the sockets below it.
    with TemporaryDirectory(prefix="fc") as folder, Federation.open(Path(folder)) as made:
        store = Path(folder) / "store"
        SiteStore.create(store).close()
        made.add_site("alder", store).join()
        yield made


@contextmanager
def started(
    words: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A process of a unit's command, as systemd starts it; killed at the end at the latest."""
    process = subprocess.Popen(
        words,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answers(url: str) -> bool:
    done = subprocess.run([sys.executable, str(ANSWERS), url], timeout=60, check=False)
    return done.returncode == 0


def listening(process: int) -> set[str]:
    """Addresses (hexadecimal, as the kernel writes them) on which a process tree listens."""
    parents = {
        int(stat.parent.name): int(stat.read_text().rpartition(")")[2].split()[1])
        for stat in Path("/proc").glob("[0-9]*/stat")
    }
    tree = {process}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    held = {
        os.readlink(link)
        for each in tree
        for link in Path(f"/proc/{each}/fd").iterdir()
        if os.path.lexists(link)
    }
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
    ]
    # Fields: number, local address, remote address, state (0A listens), …, inode.
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in held}


def test_unit_of_the_site_tells_systemd_how_it_is(federation: Federation) -> None:
    policy = federation.sites["alder"].policy
    with ExitStack() as stack:
        port, notify = free_port(), policy.parent / "notify"
        settings = AgentSettings.load(policy.parent).model_copy(update={"health_port": port})
        (policy.parent / "agent.yaml").write_text(settings.text())
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(notify))
        manager.settimeout(120)
        words = [str(FEDCMR), *exec_start("site")[1:]]
        words[words.index("--policy") + 1] = str(policy)
        agent = stack.enter_context(started(words, {"NOTIFY_SOCKET": str(notify)}))

        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"WATCHDOG=1"
        # Alive, and not ready: there is no coordinator.
        assert answers(f"http://127.0.0.1:{port}/healthz")
        assert not answers(f"http://127.0.0.1:{port}/readyz")
        # The tunnel, the health page and SuperNode, each reached from this machine alone.
        until(lambda: len(listening(agent.pid)) == 3, "three listeners")
        assert all(address.startswith("0100007F:") for address in listening(agent.pid))
        agent.send_signal(signal.SIGTERM)
        until(lambda: manager.recv(100) == b"STOPPING=1", "the agent to say that it stops")
        assert agent.wait(60) == 0


def test_site_that_left_is_not_started_again(federation: Federation, tmp_path: Path) -> None:
    (condition,) = unit(DEPLOY / "systemd" / "fedcmr-site.service")["ConditionPathExists"]
    assert condition.startswith("!")
    mark = Path(condition.removeprefix("!")).relative_to(f"{STATE}/site")
    shutil.copytree(federation.sites["alder"].policy.parent / mark.parent, tmp_path / mark.parent)
    Membership(tmp_path / mark.parent).leave()
    assert (tmp_path / mark).is_file()


def test_keys_of_a_site_are_its_own(federation: Federation) -> None:
    site = federation.sites["alder"]
    folder = site.policy.parent
    for private in (folder, folder / "federation", folder / "ledger", site.store):
        assert private.stat().st_mode & 0o777 == 0o700, private
    keys = [folder / name for name in ("federation/tls.key", "federation/node.key")]
    for key in (*keys, folder / "ledger" / "site.key", site.store / "site.secret"):
        assert key.stat().st_mode & 0o777 == 0o600, key


def test_unit_of_the_coordinator_serves_its_health(federation: Federation) -> None:
    words = [str(FEDCMR), *exec_start("coordinator")[1:]]
    words[words.index("--coordinator") + 1] = str(federation.home)
    with started(federation.host.command(words), {}) as coordinator:
        assert coordinator.stdout is not None
        assert "ready" in coordinator.stdout.readline()
        url = f"https://127.0.0.1:{federation.port}/healthz"
        asked = federation.host.command([sys.executable, str(ANSWERS), url])
        assert subprocess.run(asked, timeout=60, check=False).returncode == 0
        coordinator.send_signal(signal.SIGTERM)
        assert coordinator.wait(60) == 0


class Page(BaseHTTPRequestHandler):
    """Answers with the status that the path names."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def test_health_check_believes_200_alone() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert answers(f"{address}/200")
        assert not answers(f"{address}/204")
        assert not answers(f"{address}/503")
        server.shutdown()
    assert not answers(f"{address}/200")


def test_health_check_asks_this_machine_alone() -> None:
    done = subprocess.run(
        [sys.executable, str(ANSWERS), "https://example.org/"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "usage" in done.stderr


# Images


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^\s*#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ")
    found = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in found]


def target(role: str) -> dict[str, str]:
    """The instructions of a stage; of several of one kind the last."""
    found: dict[str, str] = {}
    stage = ""
    for name, rest in instructions():
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
        elif stage == role:
            found[name] = rest
    return found


def test_hadolint_has_no_objection() -> None:
    done = subprocess.run(
        [program("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_base_image_has_a_version_and_is_the_only_one() -> None:
    (default,) = (rest for name, rest in instructions() if (name, rest[:6]) == ("ARG", "PYTHON"))
    assert re.fullmatch(r"PYTHON=python:3\.11-slim-\w+", default)
    stages = [rest.split(" AS ") for name, rest in instructions() if name == "FROM"]
    known = {"${PYTHON}", *(stage for _, stage in stages)}
    assert {base for base, _ in stages} <= known
    assert not any(name == "ADD" for name, _ in instructions())


@pytest.mark.parametrize("role", ["site", "coordinator"])
def test_image_runs_an_existing_command_as_nobody_special(role: str) -> None:
    stage = target(role)
    assert stage["USER"] == "10001:10001"
    executable, *words = json.loads(stage["CMD"])
    assert executable == "fedcmr"
    require_command(words)
    assert "/healthz" in stage["HEALTHCHECK"]
    assert target("runtime")["STOPSIGNAL"] == "SIGTERM"
    extra = {"site": "client", "coordinator": "server"}[role]
    assert f"--constraint constraints.txt '.[{extra}," in target(f"build-{role}")["RUN"]


def test_build_sees_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    copied: set[str] = set()
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            words = [word for word in rest.split() if not word.startswith("--")]
            copied |= set(words[:-1])
    assert copied == admitted
    assert all((ROOT / name).exists() for name in copied)


# Compose


def compose(name: str, **environment: str) -> dict[str, Any]:
    """A compose file after interpolation; KeyError names a variable that must be set."""

    def value(found: re.Match[str]) -> str:
        variable, kind, default = found.groups()
        if variable in environment:
            return environment[variable]
        if kind == "?":
            raise KeyError(variable)
        return default

    given = {"FEDCMR_STORE": "/disk/scans", "FEDCMR_SECOND_PLACE": "/share/heads"}
    environment = environment or given
    text = re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, (COMPOSE / name).read_text())
    return dict(yaml.safe_load(text))


COMPOSE_FILES = sorted(path.name for path in COMPOSE.glob("*.yaml"))
SERVICES = [
    pytest.param(file, name, id=f"{file}-{name}")
    for file in ("coordinator.yaml", "site.yaml")
    for name in compose(file)["services"]
]


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_file_follows_the_specification(name: str) -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    content = compose(name)
    assert compose_spec.PyCompose.from_json(json.dumps(content)).service_names()
    content["services"][next(iter(content["services"]))]["read_onyl"] = True
    with pytest.raises(ValueError, match="read_onyl"):
        compose_spec.PyCompose.from_json(json.dumps(content))


@pytest.mark.parametrize(("file", "name"), SERVICES)
def test_service_has_no_privileges(file: str, name: str) -> None:
    service = compose(file)["services"][name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert not {"cap_add", "devices", "ipc", "network_mode", "pid", "privileged"} & service.keys()
    assert re.fullmatch(r"[\w-]+:\d[\w.-]+", service["image"])


@pytest.mark.parametrize("role", ["site", "coordinator"])
def test_compose_file_builds_and_mounts_what_there_is(role: str) -> None:
    content = compose(f"{role}.yaml")
    service = content["services"][role]
    assert service["image"] == f"fedcmr-{role}:{__version__}"
    build = service["build"]
    assert (COMPOSE / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]) == DOCKERFILE
    assert target(build["target"])["USER"] == service["user"]
    mounts = dict(volume.split(":")[::-1] for volume in service["volumes"])
    assert mounts.keys() == MOUNTS[role]
    assert len(set(mounts.values())) == len(mounts)  # the second place lies elsewhere
    for each in content["services"].values():
        named = {volume.split(":")[0] for volume in each["volumes"]} - set(mounts.values())
        assert named <= content["volumes"].keys() | set(mounts.values())
        for kind in ("secrets", "networks"):
            assert set(each.get(kind, ())) <= content.get(kind, {}).keys()


def test_site_opens_no_port_and_the_coordinator_one() -> None:
    assert "ports" not in compose("site.yaml")["services"]["site"]
    services = compose("coordinator.yaml")["services"]
    assert services["coordinator"]["ports"] == ["8443:8443"]
    assert "ports" not in services["postgres"]
    assert services["postgres"]["networks"] == ["database"]
    assert compose("coordinator.yaml")["networks"]["database"] == {"internal": True}


def test_passwords_stand_in_no_compose_file() -> None:
    postgres = compose("coordinator.yaml")["services"]["postgres"]["environment"]
    assert "POSTGRES_PASSWORD" not in postgres
    assert postgres["POSTGRES_PASSWORD_FILE"].startswith("/run/secrets/")
    site = compose("site.yaml")["services"]["site"]["environment"]
    assert site["FEDCMR_PROXY_PASSWORD"] is site["PGPASSWORD"] is None


@pytest.mark.parametrize("missing", ["FEDCMR_STORE", "FEDCMR_SECOND_PLACE"])
def test_places_of_a_site_have_no_default(missing: str) -> None:
    given = {"FEDCMR_STORE": "/disk/scans", "FEDCMR_SECOND_PLACE": "/share/heads"}
    given.pop(missing)
    with pytest.raises(KeyError, match=missing):
        compose("site.yaml", **given)


# Helm

SITE: dict[str, Any] = {"egress": {"cidr": "203.0.113.10/32", "port": 8443}}
CHARTS: dict[str, dict[str, Any]] = {
    "site": SITE,
    "site with GPUs": {
        **SITE,
        "dns": False,
        "gpu": {"count": 2, "runtimeClass": "nvidia"},
        "image": {"tag": f"sha256:{'0' * 64}", "pullSecrets": ["registry"]},
        "passwords": "site-passwords",
    },
    "site to be set up": {**SITE, "setUp": True},
    "coordinator": {"role": "coordinator"},
    "coordinator with PostgreSQL": {
        "role": "coordinator",
        "egress": {"cidr": "10.20.0.5/32", "port": 5432},
        "service": {"type": "ClusterIP"},
    },
}
WRONG: dict[str, dict[str, Any]] = {
    "a site that may call nobody": {},
    "a site that may call anybody": {"egress": {"cidr": "0.0.0.0/0", "port": 8443}},
    "an unknown role": {**SITE, "role": "auditor"},
    "a coordinator with GPUs": {"role": "coordinator", "gpu": {"count": 1}},
    "a moving tag": {**SITE, "image": {"tag": "latest"}},
    "an unknown value": {**SITE, "replicas": 2},
    "a size without a unit": {**SITE, "volumes": {"store": {"size": "500"}}},
}


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``changes``, as Helm merges them."""
    found = dict(values)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if both else value
    return found


def validate(changes: Mapping[str, Any]) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(merged(values, changes), schema)


def rendered(changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind, as Helm's own library makes them."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(dict(changes))
        texts = chart.render(dict(changes), name="north", namespace="fedcmr")
    objects = [
        each
        for name, text in texts.items()
        if name.endswith(".yaml")
        for each in yaml.safe_load_all(text)
        if each
    ]
    return {each["kind"]: each for each in objects}


@pytest.mark.parametrize("changes", CHARTS.values(), ids=list(CHARTS))
def test_schema_takes_sensible_values(changes: dict[str, Any]) -> None:
    validate(changes)


@pytest.mark.parametrize("changes", WRONG.values(), ids=list(WRONG))
def test_schema_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(changes)


def test_helm_refuses_what_the_schema_refuses() -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    with helm.Chart.load(CHART) as chart:
        for changes in WRONG.values():
            with pytest.raises(helm.HelmValuesError):
                chart.validate_schema(changes)


@pytest.mark.parametrize("changes", CHARTS.values(), ids=list(CHARTS))
def test_helm_has_no_objection(changes: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    assert helm.lint(CHART, changes)["errors"] == []


@pytest.mark.parametrize("changes", CHARTS.values(), ids=list(CHARTS))
def test_kubernetes_accepts_what_helm_makes(changes: dict[str, Any]) -> None:
    objects = rendered(changes)
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for each in objects.values():
        kubernetes.validate(each, kubernetes.latest_version(), strict=True)
    objects["StatefulSet"]["spec"]["replica"] = 2
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(objects["StatefulSet"], kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize("changes", CHARTS.values(), ids=list(CHARTS))
def test_pod_is_restricted_and_alone(changes: dict[str, Any]) -> None:
    role = changes.get("role", "site")
    spec = rendered(changes)["StatefulSet"]["spec"]
    assert spec["replicas"] == 1
    claims = {each["metadata"]["name"]: each["spec"] for each in spec["volumeClaimTemplates"]}
    assert {tuple(claim["accessModes"]) for claim in claims.values()} == {("ReadWriteOncePod",)}
    assert set(spec["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}
    pod = spec["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    # What Kubernetes' Pod Security Standard "restricted" asks for, and a read-only root.
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == target(role)["USER"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert {path for path, name in mounts.items() if name in claims} == MOUNTS[role]


@pytest.mark.parametrize("changes", CHARTS.values(), ids=list(CHARTS))
def test_network_policy_names_all_that_passes(changes: dict[str, Any]) -> None:
    objects = rendered(changes)
    policy = objects["NetworkPolicy"]["spec"]
    labels = objects["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    egress = changes.get("egress")
    addresses = [
        (peer["ipBlock"]["cidr"], port["port"])
        for rule in policy["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
        for port in rule["ports"]
    ]
    assert addresses == ([(egress["cidr"], egress["port"])] if egress else [])
    asks_names = bool(egress) and changes.get("dns", True)
    assert len(policy["egress"]) == len(addresses) + asks_names
    if changes.get("role", "site") == "site":
        assert policy["ingress"] == []
        assert "Service" not in objects
    else:
        assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [8443]


def test_chart_is_of_this_version_and_probes_what_there_is() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert f":{values['healthPort']}/healthz" in target("site")["HEALTHCHECK"]


# The list of parts


def test_list_of_parts_names_every_library(tmp_path: Path) -> None:
    made = tmp_path / "sbom.json"
    done = subprocess.run(
        [
            *(program("cyclonedx-py"), "environment", "--pyproject", "pyproject.toml"),
            # The command in the site's page also checks CycloneDX' schema, which takes ten seconds.
            *("--no-validate", "--output-reproducible", "--output-file", str(made)),
            str(SCRIPTS.parent),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(made.read_text())
    assert parts["bomFormat"] == "CycloneDX"
    root = parts["metadata"]["component"]
    assert (root["name"], root["version"]) == ("fedcmr", __version__)
    found = {part["name"].lower(): part["version"] for part in parts["components"]}
    assert found["torch"].split("+")[0] == "2.13.0"
    assert {"cryptography", "flwr", "grpcio", "pydantic"} <= found.keys()
    assert str(ROOT) not in made.read_text()


# Documents


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_files_and_commands_that_exist(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for name in re.findall(r"(?<![\w/])deploy/[\w./-]*[\w]", text):
        assert (ROOT / name).exists(), name
    # Commands behind sudo, docker or kubectl; test_docs checks the others.
    shown = re.findall(r"(?m)^\$ .*?(?: |/)fedcmr ((?:site|coordinator|data) [^#\n]*)", text)
    for words in shown:
        require_command(shlex.split(words))


def test_pages_show_such_commands_at_all() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert "sudo -u fedcmr /opt/fedcmr/bin/fedcmr site init" in text
