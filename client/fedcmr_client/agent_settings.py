"""How a site's agent runs on its machine: `agent.yaml` beside the policy.

Nothing here changes a result or a rule: that is the policy's. Without the file all defaults hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fedcmr_shared.schemas.explained import explained_yaml
from fedcmr_shared.schemas.policy import Folder, Real, Whole
from fedcmr_shared.schemas.yaml_files import parse, read_yaml

if TYPE_CHECKING:
    from fedcmr_client.tunnel import Proxy

FILE: Final = "agent.yaml"
"""Name of the file, in the policy's folder."""

_MIB: Final = 1024  # in a GiB
_HEADER: Final = (
    "How the agent runs on this machine. Nothing here changes what jobs may do or what they "
    "compute: that is policy.yaml. Paths are relative to this file. Restart the agent afterwards."
)


def _no_password(url: str) -> str:
    user = url.rpartition("@")[0].rpartition("/")[2]
    if ":" in user:
        raise ValueError("it holds a password: leave it out and set FEDCMR_PROXY_PASSWORD")
    return url


class AgentSettings(BaseModel):
    """Speed and operation of the agent."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    proxy: Annotated[str, AfterValidator(_no_password)] | None = Field(
        default=None,
        description="The forward proxy on the way out, as http://HOST:PORT or https://…, with "
        "USER@ before the host if it asks for one; its password comes from FEDCMR_PROXY_PASSWORD. "
        "Null connects directly: variables such as https_proxy do not count.",
    )
    proxy_authority: Folder | None = Field(
        default=None,
        description="File (PEM) of the authority that signed the certificate of an https:// proxy. "
        "Null trusts the system's authorities for that; the coordinator's is never among them.",
    )
    gpus: tuple[Annotated[Whole, Field(ge=0)], ...] | None = Field(
        default=None,
        description="Numbers of the GPUs that training may use, such as [0, 1]; null for all. The "
        "policy says whether GPUs are used at all (device), and how many by one job (processes). "
        "Jobs side by side share none: one waits for those of another.",
    )
    workers: Annotated[Whole, Field(ge=1, le=64)] = Field(
        default=4,
        description="Most tasks at once, each in a process of its own. Those of one job come one "
        "after another; more are for several jobs at a time.",
    )
    memory_gib: Annotated[Real, Field(ge=1)] | None = Field(
        default=None, description="Most memory of one worker, in GiB; null for no bound."
    )
    supernode_memory_gib: Annotated[Real, Field(ge=0.5)] | None = Field(
        default=8.0,
        description="Most memory of the process that receives messages, in GiB; null for no bound.",
    )
    nice: Annotated[Whole, Field(ge=0, le=19)] = Field(
        default=10,
        description="How far workers stand back behind other programs: 0 (not at all) to 19.",
    )
    stop_seconds: Annotated[Real, Field(ge=0, le=86400)] = Field(
        default=60.0,
        description="How long a stopping agent lets running tasks finish. What is cut off costs "
        "its job a spare round.",
    )
    sync_minutes: Annotated[Real, Field(ge=0.05, le=1440)] = Field(
        default=5.0,
        description="Every so many minutes the agent reports its state, and fetches news about "
        "jobs, roster and checkpoints.",
    )
    health_port: Annotated[Whole, Field(ge=0, le=65535)] = Field(
        default=0,
        description="Port on 127.0.0.1 for /healthz and /readyz, for the site's own monitoring; "
        "0 for none.",
    )
    log_folder: Folder | None = Field(
        default=Path("logs"),
        description="Folder of the agent's log, JSON lines; null for none. The log also goes to "
        "standard error, as text.",
    )
    log_megabytes: Annotated[Whole, Field(ge=1, le=1000)] = Field(
        default=10, description="A log file that has grown so large is put aside."
    )
    log_files: Annotated[Whole, Field(ge=1, le=100)] = Field(
        default=10, description="So many log files that were put aside are kept."
    )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``folder``/agent.yaml, or return the defaults where there is none.

        Paths in it are relative to the file and come back absolute.

        Raises:
            ConfigurationError: the file is no YAML or a field is unknown or wrong.
        """
        path = folder / FILE
        content = read_yaml(path, "agent settings") if path.exists() else {}
        settings = parse(cls, content, f"agent settings {path}", "correct them")
        return settings.model_copy(update=dict(settings._absolute(folder.absolute())))

    def _absolute(self, base: Path) -> Iterator[tuple[str, Path]]:
        for name in ("log_folder", "proxy_authority"):
            path: Path | None = getattr(self, name)
            if path is not None:
                yield name, (base / path).resolve()

    def text(self) -> str:
        """Return the content of an agent.yaml with every field explained."""
        return explained_yaml(self, _HEADER)

    def forward_proxy(self) -> Proxy | None:
        """Return the proxy; ConfigurationError when it cannot be used."""
        from fedcmr_client.tunnel import Proxy

        return None if self.proxy is None else Proxy.parse(self.proxy, self.proxy_authority)

    @property
    def worker_memory_mib(self) -> int | None:
        """`memory_gib` in MiB."""
        return None if self.memory_gib is None else round(self.memory_gib * _MIB)

    @property
    def supernode_memory_mib(self) -> int | None:
        """`supernode_memory_gib` in MiB."""
        given = self.supernode_memory_gib
        return None if given is None else round(given * _MIB)
