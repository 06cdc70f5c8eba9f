"""Virtual sites that are killed in the middle of a round, as `fedcmr simulate run --drop` asks.

A process of its own does the step's work for the site and dies by SIGKILL before the answer leaves:
what a hospital's machine keeps on its disk is there, and nothing else. The coordinator gets
Flower's error for a site that broke down. The site is back for the next step that it is asked for.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.secagg.messages import STEPS, Step

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.clientapp.typing import ClientAppCallable, Mod

_PARTS: Final = re.compile(r"(?P<site>[^:]+):(?P<round>[1-9][0-9]{0,4})(:(?P<step>.+))?")
_FORM: Final = "write SITE:ROUND or SITE:ROUND:STEP, such as cedar:2:update"


@dataclass(frozen=True)
class Drop:
    """The site named ``site`` dies once, in ``step`` of training round ``round``."""

    site: str
    round: int
    step: Step = "update"

    @classmethod
    def parse(cls, text: str) -> Drop:
        """Read SITE:ROUND or SITE:ROUND:STEP.

        Raises:
            ConfigurationError: the text is neither, or the step is unknown.
        """
        parts = _PARTS.fullmatch(text)
        if parts is None:
            raise ConfigurationError(f"--drop {text}: {_FORM}")
        for known in STEPS:
            if (parts["step"] or "update") == known:
                return cls(parts["site"], int(parts["round"]), known)
        raise ConfigurationError(f"--drop {text}: the steps are {', '.join(STEPS)}")


class SiteDied(Exception):
    """A virtual site was killed; Flower tells the coordinator, as of any site that breaks down."""


def dropping(drops: Sequence[Drop], policies: Sequence[Path]) -> Mod:
    """Return a Flower mod that kills sites where ``drops`` say.

    ``policies`` are the sites' policy files by Flower's partition number.
    """

    def mod(message: Message, context: Context, answer: ClientAppCallable) -> Message:
        policy = policies[int(context.node_config["partition-id"])]
        for drop in drops:
            if _strikes(drop, message, policy) and _first(drop, policy):
                _work_and_die(policy, drop.step, message.content)
                raise SiteDied(f"{drop.site} was killed in step {drop.step}")
        return answer(message, context)

    return mod


def _strikes(drop: Drop, message: Message, policy: Path) -> bool:
    from fedcmr_shared.federation.secure_messages import QUESTIONS, read_record

    if message.metadata.message_type != f"train.{drop.step}" or policy.parent.name != drop.site:
        return False
    return read_record(message.content, QUESTIONS[drop.step]).session.round == drop.round


def _first(drop: Drop, policy: Path) -> bool:
    """Whether the site has not died there before; a marker beside its policy remembers it."""
    try:
        (policy.parent / f"died-{drop.round}-{drop.step}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _work_and_die(policy: Path, step: Step, content: RecordDict) -> None:
    with TemporaryDirectory(prefix="fedcmr-drop-") as folder:
        question = Path(folder) / "question"
        question.write_bytes(pickle.dumps(content))
        command = [sys.executable, "-m", __name__, str(policy), step, str(question)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != -signal.SIGKILL:
        raise FederationError(f"the site that was to die did not get so far: {ended.stderr}")


def main(policy: Path, step: Step, question: Path) -> None:
    """Do the step's work for a site and die."""
    from fedcmr_client.agent import SiteAgent
    from fedcmr_client.site_home import SiteHome

    content: RecordDict = pickle.loads(question.read_bytes())  # our parent wrote it
    SiteAgent(SiteHome.open(policy), threads=1).secure_answer(step, content)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), next(s for s in STEPS if s == sys.argv[2]), Path(sys.argv[3]))
