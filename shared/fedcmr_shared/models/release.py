"""Released models: one signed file with the weights and what is claimed about them.

::

    model.safetensors   a bundle, see :mod:`fedcmr_shared.models.bundle`
    card.json           the model card (canonical JSON)
    card.md             the same card for people
    signature.json      the coordinator's signature over the SHA-256 of the three

The file is a zip of the strict kind of :mod:`fedcmr_shared.models.archive`. Nothing in it is run,
and nothing is loaded before its signature and size are checked.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcmr_shared.errors import LedgerError, ModelError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.models.archive import Member, read_archive, write_archive
from fedcmr_shared.models.bundle import Bundle, load_bundle
from fedcmr_shared.models.card import ModelCard
from fedcmr_shared.models.card_text import card_text
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.ledger import Hash
from fedcmr_shared.schemas.problems import problems

MODEL: Final = "model.safetensors"
CARD: Final = "card.json"
TEXT: Final = "card.md"
SIGNATURE: Final = "signature.json"

LARGEST: Final = {MODEL: 4 * 10**9, CARD: 2**23, TEXT: 2**23, SIGNATURE: 2**12}
"""Members in their order, with the most bytes of each."""

_FIRST_BYTES: Final = b"PK\x03\x04"


class ReleaseSignature(BaseModel):
    """The signature of ``key`` (Ed25519) over the format and the SHA-256 of each other member."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["fedcmr-release-1"] = "fedcmr-release-1"
    key: Hash
    members: dict[Literal["model.safetensors", "card.json", "card.md"], Hash]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def sign(cls, members: dict[str, str], key: SiteKey) -> Self:
        """Return the signature over ``members`` (SHA-256 by name)."""
        values = {"key": key.public_key, "members": members, "signature": "0" * 128}
        unsigned = cls.model_validate(values)
        return unsigned.model_copy(update={"signature": key.sign(unsigned.signed_bytes())})

    def signed_bytes(self) -> bytes:
        """What the coordinator signs."""
        content = self.model_dump(mode="json", exclude={"signature"})
        return b"fedcmr release 1\n" + canonical_json(content)


@dataclass(frozen=True)
class ReleaseBundle:
    """A released model with its card; ``size`` and ``sha256`` are those of the file."""

    card: ModelCard
    bundle: Bundle
    signature: ReleaseSignature
    size: int
    sha256: str

    @staticmethod
    def write(path: Path, model: Path, card: ModelCard, key: SiteKey) -> None:
        """Release the bundle file ``model``: ``path`` is complete or not there at all.

        Raises:
            ModelError: the file exists, is not what the card says, or cannot be written.
        """
        if path.exists():
            raise ModelError(f"{path} exists: a release is never replaced, choose another name")
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            with partial.open("xb") as file:
                write_archive(file, _contents(model, card, key))
                file.flush()
                os.fsync(file.fileno())
            # What cannot be read must not come out: this finds a card that does not fit its model.
            ReleaseBundle.verify(partial, key.public_key)
            os.link(partial, path)  # unlike a rename, never replaces a file
            _sync(path.parent)
        except OSError as error:
            raise ModelError(f"{path}: cannot write the release: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a release and check that it is whole; whose it is stands in `signature`.

        Raises:
            ModelError: as `verify`, but any key may have signed.
        """
        return cls._open(path, None)

    @classmethod
    def verify(cls, path: Path, trusted_key: str) -> Self:
        """Read a release that ``trusted_key`` (Ed25519, hexadecimal) signed.

        Checked are, in this order: the archive, the signature, the SHA-256 of each member, the card
        (its job, the authorisation, the privacy claim computed again from the job, lineage, gates,
        its text), and the weights, which must be those at the end of the lineage.

        Raises:
            ModelError: with the first thing that is wrong.
        """
        return cls._open(path, trusted_key)

    @classmethod
    def _open(cls, path: Path, trusted_key: str | None) -> Self:
        with TemporaryDirectory(prefix="fedcmr-release-") as folder, _named(path, folder):
            # A copy that nobody else can change between the check and the use.
            model = Path(folder) / MODEL
            content, members, whole = _read(path, model)
            signature = _signature(content[SIGNATURE])
            _check_signature(signature, members, trusted_key)
            card = _card(content[CARD], signature.key)
            if content[TEXT] != card_text(card).encode():
                raise ModelError(f"{TEXT} is not the text that belongs to {CARD}")
            bundle = load_bundle(model)
            _check_model(bundle, card)
        return cls(card, bundle, signature, *whole)


def is_release(path: Path) -> bool:
    """Whether the file looks like a release rather than a bundle; it may still be a bad one."""
    try:
        with path.open("rb") as file:
            return file.read(len(_FIRST_BYTES)) == _FIRST_BYTES
    except OSError:
        return False


def load_model(path: Path, trusted_key: str | None = None) -> Bundle:
    """Load the model in a bundle or in a release, which ``trusted_key`` must have signed if given.

    Raises:
        ModelError: the file is neither, or is a bundle although a key is given.
    """
    if is_release(path):
        return ReleaseBundle._open(path, trusted_key).bundle
    if trusted_key is not None:
        raise ModelError(f"{path} is no release: only releases are signed")
    return load_bundle(path)


def _contents(model: Path, card: ModelCard, key: SiteKey) -> dict[str, bytes | Path]:
    contents: dict[str, bytes | Path] = {
        MODEL: model,
        CARD: _json(card),
        TEXT: card_text(card).encode(),
    }
    digests = {name: _sha256(content) for name, content in contents.items()}
    return {**contents, SIGNATURE: _json(ReleaseSignature.sign(digests, key))}


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(document: BaseModel) -> bytes:
    return canonical_json(document.model_dump(mode="json")) + b"\n"


def _read(path: Path, model: Path) -> tuple[dict[str, bytes], dict[str, Member], tuple[int, str]]:
    """Return the small members, what all are, and size and SHA-256 of the file."""
    if not path.is_file():
        raise ModelError("there is no such file")
    small = {name: BytesIO() for name in LARGEST if name != MODEL}
    with path.open("rb") as file, model.open("wb") as copy:
        counted = _Counted(file)
        copies: dict[str, IO[bytes]] = {MODEL: copy, **small}
        members = read_archive(counted, LARGEST, copies)
    contents = {name: buffer.getvalue() for name, buffer in small.items()}
    return contents, members, (counted.size, counted.digest.hexdigest())


class _Counted:
    """Hashes what is read, so that the hash is that of the bytes that were checked."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self.size += len(piece)
        self.digest.update(piece)
        return piece


def _signature(content: bytes) -> ReleaseSignature:
    try:
        signature = ReleaseSignature.model_validate_json(content)
    except ValidationError as error:
        raise ModelError(f"{SIGNATURE}: {problems(error)}") from error
    if _json(signature) != content:
        raise ModelError(f"{SIGNATURE} is not written as releases are")
    return signature


def _check_signature(
    signature: ReleaseSignature, members: dict[str, Member], trusted_key: str | None
) -> None:
    if trusted_key is not None and signature.key != trusted_key:
        raise ModelError(
            f"key {signature.key[:16]}… signed it, and you trust {trusted_key[:16]}…: it is of "
            "another coordinator, or forged"
        )
    try:
        verify_signature(signature.key, signature.signature, signature.signed_bytes())
    except LedgerError as error:
        raise ModelError(str(error)) from error
    for name in (MODEL, CARD, TEXT):
        if signature.members.get(name) != members[name].sha256:
            raise ModelError(f"{name} is not what was signed: fetch the release again")


def _card(content: bytes, key: str) -> ModelCard:
    try:
        card = ModelCard.model_validate_json(content)
    except ValidationError as error:
        raise ModelError(f"{CARD}: {problems(error)}") from error
    if _json(card) != content:
        raise ModelError(f"{CARD} is not written as releases are")
    signed = card.authorisation
    try:
        verify_signature(key, signed.signature, signed.signed_bytes())
    except LedgerError as error:
        raise ModelError(f"{CARD}: authorisation: {error}") from error
    return card


def _check_model(bundle: Bundle, card: ModelCard) -> None:
    if bundle.spec != card.job.model:
        raise ModelError(f"{MODEL} is {bundle.spec.name}, not the model of the card's job")
    if bundle.sha256 != card.lineage.model_sha256:
        raise ModelError(
            f"{MODEL} has state {bundle.sha256[:16]}…, and the lineage ends with "
            f"{card.lineage.model_sha256[:16]}…"
        )


@contextmanager
def _named(path: Path, folder: str) -> Iterator[None]:
    """Have errors name the release, not the copy in ``folder``."""
    try:
        yield
    except ModelError as error:
        reason = str(error).replace(f"{folder}{os.sep}", "")
        raise ModelError(f"release {path}: {reason}") from error
    except OSError as error:
        raise ModelError(f"release {path} cannot be read: {error.strerror}") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
