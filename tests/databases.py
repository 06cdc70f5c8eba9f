"""Fresh databases in SQLite and in a real PostgreSQL server, as fixtures."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

__all__ = ["NewDatabase", "PostgresqlServer", "create_database", "new_database", "postgresql"]

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


@dataclass(frozen=True)
class PostgresqlServer:
    """A PostgreSQL server; clients reach it by the socket in ``folder``."""

    folder: Path
    binaries: Path
    account: str | None

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[PostgresqlServer]:
        """Make an empty server and start it; nothing of it is left afterwards."""
        # Not tmp_path: a socket's path must be short, and the server's account must reach it.
        with tempfile.TemporaryDirectory(prefix="pg") as name:
            server = cls(Path(name), postgresql_binaries(), server_account())
            if server.account is not None:
                shutil.chown(server.folder, server.account)
            server._run("initdb", "--no-sync", "--auth=trust", "-U", "fedcmr", "--encoding=UTF8")
            server.start()
            try:
                yield server
            finally:
                server.stop("immediate")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-k {self.folder} -c listen_addresses='' -c fsync=off"
        # Stopped at once, a server would leave its segments in /dev/shm.
        options += " -c dynamic_shared_memory_type=mmap"
        log = f"{self.folder}/log"
        self._run("pg_ctl", "start", "--wait", "--silent", "-l", log, "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` ends all connections, `immediate` is a crash."""
        self._run("pg_ctl", "stop", f"--mode={mode}", "--silent")

    def create_database(self) -> str:
        """Make an empty database and return its name."""
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(
            host=str(self.folder), user="fedcmr", dbname="postgres", autocommit=True
        ) as admin:
            admin.execute(f"CREATE DATABASE {name}".encode())
        return name

    def url(self, database: str) -> str:
        """Return the URL of a database."""
        return f"postgresql+psycopg://fedcmr@/{database}?host={self.folder}"

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self.binaries / program, "-D", self.folder / "data", *arguments],
            user=self.account,
            group=self.account,
            extra_groups=None if self.account is None else [],
            cwd=self.folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """Host (socket folder) of a server that lives as long as the test session."""
    with PostgresqlServer.open() as server:
        yield str(server.folder)


@pytest.fixture
def create_database(postgresql: str) -> Callable[[], str]:
    """Return a function that makes an empty database in the server and returns its name."""
    return PostgresqlServer(Path(postgresql), postgresql_binaries(), None).create_database


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
