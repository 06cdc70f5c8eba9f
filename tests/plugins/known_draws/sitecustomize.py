"""Known draws at a site, in place of the operating system's: for comparing two runs exactly.

Python imports this file by its name when its folder is on PYTHONPATH. Sampling, noise and
rounding then follow from the site's name, the job, the phase and the round. There is no other way
to make them known: the product has no seed, and this folder is in no wheel.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


class Draws:
    """Bytes that follow from the work at hand."""

    def __init__(self) -> None:
        self._work = ""
        self._count = 0

    def begin(self, *work: object) -> None:
        self._work = repr(work)
        self._count = 0

    def urandom(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._work}{self._count}".encode()).digest(size)


def install(agent: ModuleType) -> None:
    """Replace the sources of whatever a site draws for its results."""
    from fedcmr_client import private_trainer, secure_site
    from fedcmr_shared.privacy import discrete_noise, noise

    draws = Draws()
    known = SimpleNamespace(urandom=draws.urandom)
    for module in (private_trainer, noise, discrete_noise):
        vars(module)["os"] = known
    for phase in ("_train", "_evaluate"):
        setattr(agent.SiteAgent, phase, _beginning(draws, phase, getattr(agent.SiteAgent, phase)))

    def rounding_key(state: Any) -> bytes:
        session = state.header.session
        place = (state.site, session.job, session.phase, session.round)
        return hashlib.sha256(repr(place).encode()).digest()

    vars(secure_site)["rounding_key"] = rounding_key


def _beginning(draws: Draws, phase: str, work: Any) -> Any:
    def begin_and_work(site: Any, task: Any, model: Any, records: Any) -> Any:
        draws.begin(site.name, task.job.sha256, phase, task.round)
        return work(site, task, model, records)

    return begin_and_work


class _WhenTheAgentIsImported(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "fedcmr_client.agent":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            install(module)

        vars(spec.loader)["exec_module"] = exec_module
        return spec


sys.meta_path.insert(0, _WhenTheAgentIsImported())
