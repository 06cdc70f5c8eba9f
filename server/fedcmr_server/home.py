"""The coordinator's folder: settings, keys, and where everything else lies.

::

    coordinator.yaml               settings, see :class:`CoordinatorSettings`
    coordinator.sqlite             the database, unless the settings name another one
    keys/      identity.pem        Ed25519: signs jobs, rosters and releases
               authority.pem .crt  signs certificates
               server.pem .crt     what the gateway shows; renewed by itself
    run/       sockets, nginx.conf and SuperLink's state, only while and as long as it runs
    logs/      one JSON object a line
    jobs/      models, one folder a job
    releases/  released models
    evidence/  the sites' evidence, one folder a site; made when the first comes

Only the owner may enter it. It appears complete or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

from cryptography import x509
from pydantic import BaseModel, ConfigDict, Field

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import (
    WARNING_DAYS,
    Authority,
    certificate_pem,
    days_left,
    fingerprint,
    fits_key,
    is_issued_by,
    issue_server,
    key_pem,
    new_authority,
    new_key,
    read_certificate,
    read_key,
)
from fedcmr_shared.identity.enrolment import Host, StartupKit
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.schemas.explained import explained_yaml
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.schemas.yaml_files import parse, read_yaml

if TYPE_CHECKING:
    from fedcmr_server.store import Store

FOLDER_VARIABLE: Final = "FEDCMR_COORDINATOR"
"""Names the environment variable with the coordinator's folder."""

SETTINGS_FILE: Final = "coordinator.yaml"

_LONGEST_SOCKET: Final = 107  # bytes of a Unix socket's path on Linux
_SOCKETS: Final = ("governance.sock", "web.sock")
_HEADER: Final = (
    "How this coordinator runs. Changes hold from the next start. Members know `federation`, "
    "`name`, `host` and `port` from their startup kits: once somebody has joined, leave these."
)

Port = Annotated[int, Field(ge=1, le=65535)]


class CoordinatorSettings(BaseModel):
    """What can be set, in `coordinator.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: SiteName = Field(description="The federation's name, in every startup kit.")
    name: SiteName = Field(
        default="coordinator",
        description="The coordinator's name: sites name it in their policy's `coordinators`.",
    )
    host: Host = Field(description="Name or IP address by which the sites reach the coordinator.")
    port: Port = Field(default=8443, description="The one public port.")
    listen: IPv4Address | IPv6Address = Field(
        default=IPv4Address("0.0.0.0"),
        description="Address that the public port is opened on; 0.0.0.0 means every one.",
    )
    database_url: str | None = Field(
        default=None,
        description="Database, such as postgresql+psycopg://USER@HOST/DATABASE, without a "
        "password (PGPASSWORD or .pgpass); null means coordinator.sqlite in this folder.",
    )
    jobs_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="So many jobs run side by side; the others wait for their turn."
    )
    stop_patience_s: Annotated[float, Field(ge=0)] = Field(
        default=3600.0,
        description="A job that is to pause may finish its round for so many seconds; then its "
        "run is stopped, and the round is done again when the job resumes.",
    )
    requests_per_second: Annotated[int, Field(ge=1, le=10_000)] = Field(
        default=200,
        description="Requests a second that one certificate may make. Twice as many pass at once, "
        "as many again wait for their turn, and further ones are told to come later.",
    )
    superlink_port: Port | None = Field(
        default=None,
        description="Port of Flower's SuperLink, on the loopback alone; null takes a free one.",
    )
    nginx: str = Field(
        default="nginx", description="The nginx program, by name or path; 1.18 or newer."
    )
    log_files: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=20, description="Old log files of 10 MB that are kept, of each kind."
    )
    access_log_days: Annotated[int, Field(ge=1, le=36_500)] = Field(
        default=365, description="The database forgets after so many days who asked for what."
    )


@dataclass(frozen=True)
class CoordinatorHome:
    """An open coordinator's folder; keys are read when they are asked for."""

    folder: Path
    settings: CoordinatorSettings

    @classmethod
    def create(cls, folder: Path, settings: CoordinatorSettings) -> Self:
        """Make the folder with fresh keys.

        Raises:
            ConfigurationError: it exists, or cannot be made.
        """
        folder = folder.absolute()
        if folder.exists():
            raise ConfigurationError(f"{folder} exists: name a folder that is to be made")
        _require_short(folder)
        _require_database(settings)
        try:
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        except OSError as error:
            raise ConfigurationError(
                f"{folder} cannot be made: {error.strerror}: make {folder.parent}, or check its "
                "owner"
            ) from error
        try:
            _fill(cls(partial, settings))
            os.rename(partial, folder)
        except OSError as error:
            raise ConfigurationError(f"{folder} cannot be made: {error.strerror}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls(folder, settings)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the settings of a folder.

        Raises:
            ConfigurationError: it is none, others may enter it, or its settings are wrong.
        """
        folder = folder.absolute()
        path = folder / SETTINGS_FILE
        if not path.is_file():
            raise ConfigurationError(
                f"{folder} is no coordinator's folder: name it with --coordinator or "
                f"{FOLDER_VARIABLE}, or make one with `fedcmr coordinator init`"
            )
        if folder.stat().st_mode & 0o077:
            raise ConfigurationError(f"{folder} may be entered by others: run chmod 700 {folder}")
        _require_short(folder)
        content = read_yaml(path, "settings")
        settings = parse(CoordinatorSettings, content, f"settings {path}", "correct the file")
        _require_database(settings)
        return cls(folder, settings)

    @property
    def keys(self) -> Path:
        """Folder of keys and certificates."""
        return self.folder / "keys"

    @property
    def run(self) -> Path:
        """Folder of what only a running coordinator needs."""
        return self.folder / "run"

    @property
    def logs(self) -> Path:
        """Folder of logs."""
        return self.folder / "logs"

    @property
    def jobs(self) -> Path:
        """Folder of the jobs' models."""
        return self.folder / "jobs"

    @property
    def releases(self) -> Path:
        """Folder of released models."""
        return self.folder / "releases"

    @property
    def governance_socket(self) -> Path:
        """Where governance listens."""
        return self.run / "governance.sock"

    @property
    def web_socket(self) -> Path:
        """Where the dashboard listens."""
        return self.run / "web.sock"

    @property
    def database_url(self) -> str:
        """URL of the database."""
        return self.settings.database_url or f"sqlite:///{self.folder / 'coordinator.sqlite'}"

    @property
    def address(self) -> str:
        """The URL by which members reach the coordinator."""
        host = self.settings.host
        return f"https://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    def identity(self) -> SiteKey:
        """Read the key that signs jobs, rosters and releases; LedgerError when it is damaged."""
        return SiteKey.load(self.keys / "identity.pem")

    def authority(self) -> Authority:
        """Read the federation's authority.

        Raises:
            ConfigurationError: its files are missing, damaged, or do not belong together.
        """
        key = read_key(_read(self.keys / "authority.pem"))
        certificate = read_certificate(_read(self.keys / "authority.crt"))
        if not fits_key(certificate, key):
            raise ConfigurationError(
                f"{self.keys}: authority.pem and authority.crt do not belong together: restore "
                "both from backup"
            )
        return Authority(key, certificate)

    @property
    def federation_sha256(self) -> str:
        """SHA-256 of the authority's certificate, by which signatures name the federation."""
        return fingerprint(self.authority().certificate)

    def kit(self, certificate: str) -> StartupKit:
        """Return the startup kit of the member with this certificate (PEM)."""
        return StartupKit(**self._kit_values(), certificate=certificate)

    @property
    def fingerprint(self) -> str:
        """What is read out on the telephone: the fingerprint of every member's kit."""
        return StartupKit.model_construct(
            format="fedcmr-kit-1", **self._kit_values(), certificate=""
        ).fingerprint

    def store(self, patience_s: float = 0.0) -> Store:
        """Open the database; see :func:`fedcmr_server.store.open_store`."""
        from fedcmr_server.store import open_store

        return open_store(self.database_url, patience_s)

    def renew_server_certificate(self, now: datetime | None = None) -> bool:
        """Issue the gateway's certificate anew if it cannot be used for another 30 days.

        Returns whether it did.
        """
        authority = self.authority()
        if self._server_problem(authority, now) is None:
            return False
        key = new_key()
        certificate = issue_server(authority, key, [self.settings.host], now)
        # Killed between the two, the next start finds that they do not fit, and renews.
        write_private(self.keys / "server.pem", key_pem(key))
        write_private(self.keys / "server.crt", certificate_pem(certificate).encode())
        return True

    def _server_problem(self, authority: Authority, now: datetime | None) -> str | None:
        try:
            key = read_key(_read(self.keys / "server.pem"))
            certificate = read_certificate(_read(self.keys / "server.crt"))
        except ConfigurationError as error:
            return str(error)
        if not fits_key(certificate, key) or not is_issued_by(certificate, authority.certificate):
            return "key and certificates do not belong together"
        if not _names_host(certificate, self.settings.host):
            return "it was issued for another host"
        return "it expires soon" if days_left(certificate, now) < WARNING_DAYS else None

    def _kit_values(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "federation": settings.federation,
            "coordinator": settings.name,
            "coordinator_key": self.identity().public_key,
            "host": settings.host,
            "port": settings.port,
            "authority": certificate_pem(self.authority().certificate),
        }


def write_private(path: Path, content: bytes) -> None:
    """Give ``path`` the new ``content``, for the owner alone, to last once this returns.

    Whoever reads it, also after a crash, finds the old content or the new one. Raises OSError.
    """
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _fill(home: CoordinatorHome) -> None:
    """Write a new folder's files; whoever opens it later sees all of them."""
    for folder in (home.keys, home.run, home.logs, home.jobs, home.releases):
        folder.mkdir(mode=0o700)
    SiteKey.create(home.keys / "identity.pem")
    authority = new_authority(home.settings.federation)
    write_private(home.keys / "authority.pem", key_pem(authority.key))
    write_private(home.keys / "authority.crt", certificate_pem(authority.certificate).encode())
    home.renew_server_certificate()
    write_private(home.folder / SETTINGS_FILE, explained_yaml(home.settings, _HEADER).encode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}): restore it from backup"
        raise ConfigurationError(message) from error


def _names_host(certificate: x509.Certificate, host: str) -> bool:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return host in (*names.get_values_for_type(x509.DNSName), *addresses)


def _require_short(folder: Path) -> None:
    longest = max(len(os.fsencode(folder / "run" / name)) for name in _SOCKETS)
    if longest > _LONGEST_SOCKET:
        raise ConfigurationError(
            f"{folder}: the path is {longest - _LONGEST_SOCKET} bytes too long for Unix sockets "
            "in it: choose a shorter one"
        )


def _require_database(settings: CoordinatorSettings) -> None:
    if settings.database_url is None:
        return
    from fedcmr_server.store.database import parse_url

    url = parse_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_absolute():
        message = "write sqlite:////FOLDER/FILE, with four slashes"
        raise ConfigurationError(f"database_url names a relative path: {message}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
