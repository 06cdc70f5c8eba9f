"""Fresh databases in SQLite and in a real PostgreSQL server, as fixtures."""

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

__all__ = ["NewDatabase", "create_database", "new_database", "postgresql"]

NewDatabase = Callable[[], str]


def postgresql_binaries() -> Path:
    program = shutil.which("pg_config")
    if program is not None:
        asked = subprocess.run([program, "--bindir"], capture_output=True, text=True, check=True)
        if Path(asked.stdout.strip(), "initdb").exists():
            return Path(asked.stdout.strip())
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not installed:
        pytest.skip("no PostgreSQL server is installed")
    return installed[-1].parent


def server_account() -> str | None:
    """Account to run the server under; it refuses to run as root."""
    if os.getuid() != 0:
        return None
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL cannot run as root and there is no account postgres")
    return "postgres"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Host (socket folder) of a server that lives as long as the test session."""
    binaries, account = postgresql_binaries(), server_account()
    # Not tmp_path: a socket's path must be short, and the server's account must reach it.
    with tempfile.TemporaryDirectory(prefix="pg") as name:
        folder = Path(name)
        if account is not None:
            shutil.chown(folder, account)

        def run(program: str, *arguments: str) -> None:
            subprocess.run(
                [binaries / program, "-D", folder / "data", *arguments],
                user=account,
                group=account,
                extra_groups=None if account is None else [],
                cwd=folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        run("initdb", "--no-sync", "--auth=trust", "--username=fedcmr", "--encoding=UTF8")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        # Stopped at once, a server would leave its segments in /dev/shm.
        options += " -c dynamic_shared_memory_type=mmap"
        run("pg_ctl", "start", "--wait", "--silent", "-l", f"{folder}/log", "-o", options)
        try:
            yield str(folder)
        finally:
            run("pg_ctl", "stop", "--mode=immediate", "--silent")


@pytest.fixture
def create_database(postgresql: str) -> Callable[[], str]:
    """Return a function that makes an empty database in the server and returns its name."""

    def create() -> str:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(
            host=postgresql, user="fedcmr", dbname="postgres", autocommit=True
        ) as admin:
            admin.execute(f"CREATE DATABASE {name}".encode())
        return name

    return create


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> NewDatabase:
    """Return a function that gives the URL of a fresh, empty database."""

    def sqlite() -> str:
        return f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.sqlite"

    if request.param == "sqlite":
        return sqlite
    host: str = request.getfixturevalue("postgresql")
    create: Callable[[], str] = request.getfixturevalue("create_database")
    return lambda: f"postgresql+psycopg://fedcmr@/{create()}?host={host}"
