"""Apps that a site's worker calls in tests instead of the installed one; see `test_runner`.

The content of a message names a folder in which an app may leave a note.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.runtime import RuntimeHttpClient

from fedcmr_client import worker

SECRET_TEXT = "patient 4711 has no scan"


def question(folder: Path) -> RecordDict:
    return RecordDict({"note": ConfigRecord({"folder": str(folder)})})


def _folder(message: Message) -> Path:
    return Path(str(message.content.config_records["note"]["folder"]))


def _note(message: Message, name: str, text: str) -> None:
    partial = _folder(message) / f".{name}"
    partial.write_text(text)
    partial.rename(_folder(message) / name)


def answer(message: Message, context: Context) -> Message:
    """Answer with what the worker is and may do."""
    _note(message, "called", str(os.getpid()))
    own = {
        "process": os.getpid(),
        "group": os.getpgid(0),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "memory": resource.getrlimit(resource.RLIMIT_DATA)[0],
        "policy": os.environ["FEDCMR_POLICY"],
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
        "imported": "torch" in sys.modules,
    }
    return Message(RecordDict({"own": ConfigRecord({"json": json.dumps(own)})}), reply_to=message)


def fail(message: Message, context: Context) -> Message:
    raise ValueError(SECRET_TEXT)


def die(message: Message, context: Context) -> Message:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hoard(message: Message, context: Context) -> Message:
    """Allocate more than a limit of a few GiB allows; nothing is written, so nothing is used."""
    kept = bytearray(8 << 30)
    return answer(message, context) if kept else message


def hang(message: Message, context: Context) -> Message:
    """Start a process, note both numbers and wait for ever."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    _note(message, "called", f"{os.getpid()} {child.pid}")
    time.sleep(600)
    raise AssertionError


def wait(message: Message, context: Context) -> Message:
    """Note the call and answer once there is a file `go`."""
    _note(message, f"called-{message.metadata.run_id}", "")
    while not (_folder(message) / "go").exists():
        time.sleep(0.02)
    return answer(message, context)


def die_while_pushing(message: Message, context: Context) -> Message:
    """Hand over a reply without its content."""

    def push_half(client: RuntimeHttpClient, reply: Message, context: Context) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree = get_object_tree(reply)
        client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(reply)], message_object_trees=[tree]
            )
        )
        os.kill(os.getpid(), signal.SIGKILL)

    worker.push_message = push_half  # type: ignore[assignment]  # this process ends here
    return answer(message, context)
