"""The agent's log: text on standard error, and JSON lines in files that are put aside when full.

Pseudonyms, keys and passwords in URLs are blotted out on the way, whoever wrote them. What the
workers write to standard error becomes part of the log, so that one file tells all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import Final

from fedcmr_client.agent_settings import AgentSettings
from fedcmr_client.ledger.place import make_folder
from fedcmr_shared.errors import ConfigurationError

FILE: Final = "agent.jsonl"

_workers = logging.getLogger("fedcmr.workers")

_SECRETS: Final = (
    (re.compile(r"\bp-[a-z2-7]{26}\b"), "<patient>"),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*KEY-----|\Z)", re.DOTALL
        ),
        "<key>",
    ),
    (re.compile(r"(://[^\s/:@]*):[^\s/@]+@"), r"\1:<password>@"),
    (re.compile(r"(?i)\b(basic|bearer) [a-z0-9+/=_.-]{8,}"), r"\1 <secret>"),
)


def blot(text: str) -> str:
    """Return ``text`` without pseudonyms, private keys and passwords."""
    for pattern, mark in _SECRETS:
        text = pattern.sub(mark, text)
    return text


class JsonLines(logging.Formatter):
    """One JSON object a line: at, level, part, text and, if there is one, trace."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        values = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "part": record.name.removeprefix("fedcmr."),
            "text": blot(record.getMessage()),
        }
        if record.exc_info:
            values["trace"] = blot(self.formatException(record.exc_info))
        return json.dumps(values, ensure_ascii=False)


class PlainLines(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        return blot(super().format(record))


@contextmanager
def agent_log(settings: AgentSettings) -> Iterator[None]:
    """Write the log as ``settings`` say while inside; standard error is taken over.

    Raises:
        ConfigurationError: the log's folder cannot be written.
    """
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as terminal:
        shown = logging.StreamHandler(terminal)
        shown.setFormatter(PlainLines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        with _handled([shown, *_files(settings)]), _standard_error_logged():
            yield


@contextmanager
def _handled(handlers: list[logging.Handler]) -> Iterator[None]:
    root = logging.getLogger()
    before, loud = root.level, logging.raiseExceptions
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk's trace would come back through standard error
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(before)
        logging.raiseExceptions = loud


@contextmanager
def _standard_error_logged() -> Iterator[None]:
    """Log what arrives at standard error, also from processes that are started inside."""
    reading, writing = os.pipe()
    before = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    reader = threading.Thread(target=_repeat, args=(reading,), name="log", daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        reader.join(0.5)  # a helper process may hold the other end until this one ends


def _repeat(reading: int) -> None:
    with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.strip():
                _workers.info("%s", line.rstrip())


def _files(settings: AgentSettings) -> list[logging.Handler]:
    folder = settings.log_folder
    if folder is None:
        return []
    try:
        make_folder(folder)
        handler = RotatingFileHandler(
            folder / FILE,
            maxBytes=settings.log_megabytes * 1_000_000,
            backupCount=settings.log_files,
            encoding="utf-8",
        )
    except OSError as error:
        raise ConfigurationError(
            f"log_folder: {folder} cannot be written ({error.strerror}): choose another one"
        ) from error
    handler.setFormatter(JsonLines())
    return [handler]
