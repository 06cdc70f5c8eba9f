"""The newest head of the log, kept outside of it: what betrays a restored old backup."""

from __future__ import annotations

from pathlib import Path

from fedcmr_client.ledger.place import write_durably
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.schemas.ledger import Checkpoint


class SecondPlace:
    """A file that holds one signed head as JSON; in an existing folder it is ``ledger.head``."""

    def __init__(self, path: Path) -> None:
        self.path = path / "ledger.head" if path.is_dir() else path

    def read(self) -> Checkpoint:
        """Return the head.

        Raises:
            LedgerError: the file is absent, unreadable or holds no head.
        """
        try:
            return Checkpoint.model_validate_json(self.path.read_bytes())
        except FileNotFoundError as error:
            message = (
                "the ledger's newest head is missing: mount the disk or share that holds it; if "
                "it is lost for good and the ledger is surely the newest, make it anew with "
                "`fedcmr site second-place`"
            )
            raise LedgerError(f"{self.path}: {message}") from error
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            message = "does not hold a ledger's head: restore it, or move it away if it is lost"
            raise LedgerError(f"{self.path}: {message}") from error

    def write(self, head: Checkpoint) -> None:
        """Keep ``head`` from now on, to last once this returns.

        Raises:
            LedgerError: it cannot be written. What the log holds stays charged.
        """
        try:
            write_durably(self.path, head.model_dump_json().encode() + b"\n")
        except OSError as error:
            message = "the ledger's newest head must be kept there before training begins"
            raise LedgerError(f"{self.path}: {error.strerror}: {message}") from error

    def require_absent(self) -> None:
        """Raise LedgerError when the file exists or the folder for it does not."""
        if self.path.exists():
            message = "it holds the head of an earlier ledger: restore that one from backup"
            raise LedgerError(f"{self.path} exists: {message}, or name another second place")
        if not self.path.parent.is_dir():
            # Made here it might lie below the mount point of a share that is not mounted.
            raise LedgerError(f"{self.path.parent} is no folder: mount or make the second place")
