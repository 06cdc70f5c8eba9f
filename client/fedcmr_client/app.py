"""Flower ClientApp of a site.

The site tells the app where its policy is; nothing of that comes from the coordinator. A deployed
site sets ``FEDCMR_POLICY`` to its policy file, see `fedcmr site init`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedcmr_client.agent import SiteAgent
from fedcmr_client.site_home import SiteHome
from fedcmr_client.ticks import hold_until_tick
from fedcmr_shared.errors import ConfigurationError, FederationError, JobRefused
from fedcmr_shared.federation.messages import Refusal, Scores, Task, Update
from fedcmr_shared.schemas.refusals import RefusalCode
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.messages import STEPS, Step

_log = logging.getLogger("fedcmr.site")


class SiteWork(Protocol):
    """Who answers a site's tasks: `SiteAgent` at a hospital."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def reply_tick_s(self) -> float:
        """Every reply leaves at a multiple of this many seconds."""

    @property
    def threads(self) -> int | None:
        """Threads to compute with; None for torch's choice."""

    def train(self, task: Task) -> Update:
        """Train one round."""

    def evaluate(self, task: Task) -> Scores:
        """Score a model."""

    def secure_answer(self, step: Step, content: RecordDict) -> RecordDict:
        """Answer a step of a secure sum."""


def create_client_app(
    site_of: Callable[[Context], SiteWork], mods: Sequence[Mod] = ()
) -> ClientApp:
    """Return a ClientApp that works for the site that ``site_of`` finds.

    ``mods`` are Flower's, around every message; a hospital has none.
    """
    client_app = ClientApp(mods=list(mods))

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        site = site_of(context)
        return _answer(message, site, site.train)

    @client_app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site = site_of(context)
        return _answer(message, site, site.evaluate)

    for step in STEPS:
        for decorate in (client_app.train, client_app.evaluate):
            decorate(step)(_secure_step(site_of, step))
    return client_app


def _secure_step(
    site_of: Callable[[Context], SiteWork], step: Step
) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        site = site_of(context)
        reply = _guarded(site, lambda: site.secure_answer(step, message.content))
        if step == "update":  # the other steps' time depends on no data
            hold_until_tick(site.reply_tick_s)
        return Message(reply, reply_to=message)

    return answer


def _answer(message: Message, site: SiteWork, work: Callable[[Task], Update | Scores]) -> Message:
    reply = _guarded(site, lambda: work(_task(message)).pack())
    hold_until_tick(site.reply_tick_s)
    return Message(reply, reply_to=message)


def _guarded(site: SiteWork, work: Callable[[], RecordDict]) -> RecordDict:
    if site.threads is not None:
        torch.set_num_threads(site.threads)
    try:
        return work()
    except Exception as error:  # noqa: BLE001  # Flower would send the text of any other error
        code = _code(error)
        # The text may describe data and stays here; the coordinator learns the code alone.
        _log.error("site %s refuses (%s): %s", site.name, code, error, exc_info=code == "failed")
        return Refusal(site.name, code).pack()


def _task(message: Message) -> Task:
    try:
        return Task.unpack(message.content)
    except FederationError as error:
        raise JobRefused("malformed", "message", str(error)) from error


def _code(error: Exception) -> RefusalCode:
    if isinstance(error, ProtocolError):
        return "protocol"
    return error.code if isinstance(error, JobRefused) else "failed"


def _site_from_environment(context: Context) -> SiteAgent:
    try:
        policy = os.environ["FEDCMR_POLICY"]
    except KeyError as error:
        raise ConfigurationError("set the environment variable FEDCMR_POLICY") from error
    home = SiteHome.open(Path(policy))
    return SiteAgent(home, pinned=home.membership.pinned)


app = create_client_app(_site_from_environment)
