"""A zip file of which every byte is determined by the content of its members.

Any program for zip files reads it. Members are stored, not compressed, in a given order, with one
fixed date and no other property. The reader writes all that lies between the contents again and
compares: there is no room for a second member of the same name, a path, a comment, a gap, bytes
before or after, or a list of members that disagrees with them.

Offsets are those of PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7, 4.3.12 and 4.3.16.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Protocol

from fedcmr_shared.errors import ModelError

LARGEST: Final = 2**32 - 2**24
"""Bytes of all members together: offsets are 32-bit numbers."""

_VERSION: Final = 20
_MADE_BY: Final = 3 << 8 | _VERSION  # Unix, for the next line
_PLAIN_FILE: Final = 0o100644 << 16
_MIDNIGHT, _FIRST_OF_JANUARY_1980 = 0, 0x21
_HEADER: Final = struct.Struct("<4s5H3L2H")
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_PIECE: Final = 2**20


class Readable(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, ``size`` of them unless the end comes before."""


@dataclass(frozen=True)
class Member:
    """What is in the archive besides the bytes: ``crc`` is the CRC-32, ``sha256`` not part of it."""

    name: str
    crc: int
    size: int
    sha256: str


def write_archive(file: IO[bytes], contents: Mapping[str, bytes | Path]) -> None:
    """Write ``contents``, given as bytes or as files, in their order.

    Raises:
        ModelError: they are too large.
        OSError: a file cannot be read, or ``file`` not written.
    """
    members: list[Member] = []
    for name, content in contents.items():
        header_at = file.tell()
        file.write(bytes(_HEADER.size + len(name)))
        members.append(_copy(name, content, file))
        end = file.tell()
        if end > LARGEST:
            raise ModelError(f"the release would be larger than {LARGEST} bytes")
        file.seek(header_at)
        file.write(_header(members[-1]))
        file.seek(end)
    file.write(_directory(members))


def read_archive(
    file: Readable, largest: Mapping[str, int], copies: Mapping[str, IO[bytes]]
) -> dict[str, Member]:
    """Copy each member to one of ``copies`` and return what it is, all in one pass.

    ``largest`` gives the names of the members, in their order, and the most bytes of each.

    Raises:
        ModelError: the archive is not exactly what `write_archive` makes of such members.
        OSError: ``file`` cannot be read, or a copy not written.
    """
    members = [_read(file, name, most, copies[name]) for name, most in largest.items()]
    expected = _directory(members)
    if file.read(len(expected) + 1) != expected:
        raise ModelError("the list of members at its end is not the one that belongs to them")
    return {member.name: member for member in members}


def _read(file: Readable, name: str, most: int, copy: IO[bytes]) -> Member:
    header = file.read(_HEADER.size + len(name))
    if len(header) < _HEADER.size + len(name):
        raise ModelError(f"it ends before {name}")
    crc, size = _HEADER.unpack_from(header)[6:8]
    expected = Member(name, crc, size, "")
    if header != _header(expected):
        raise ModelError(f"{name} is not where it belongs, or has other properties")
    if size > most:
        raise ModelError(f"{name} has {size} bytes, at most {most} are allowed")
    found = _copied(name, file, copy, size)
    if found.size < size:
        raise ModelError(f"it ends within {name}")
    if found.crc != crc:
        raise ModelError(f"{name} is damaged: its CRC is another one")
    return found


def _copy(name: str, content: bytes | Path, to: IO[bytes]) -> Member:
    if isinstance(content, bytes):
        to.write(content)
        digest = hashlib.sha256(content).hexdigest()
        return Member(name, zlib.crc32(content), len(content), digest)
    with content.open("rb") as file:
        return _copied(name, file, to, LARGEST)


def _copied(name: str, file: Readable, to: IO[bytes], most: int) -> Member:
    """Copy at most ``most`` bytes."""
    digest, crc, size = hashlib.sha256(), 0, 0
    while piece := file.read(min(_PIECE, most - size)):
        to.write(piece)
        digest.update(piece)
        crc = zlib.crc32(piece, crc)
        size += len(piece)
    return Member(name, crc, size, digest.hexdigest())


def _header(member: Member) -> bytes:
    name = member.name.encode("ascii")
    same = (_MIDNIGHT, _FIRST_OF_JANUARY_1980, member.crc, member.size, member.size, len(name))
    return _HEADER.pack(b"PK\x03\x04", _VERSION, 0, 0, *same, 0) + name


def _directory(members: Sequence[Member]) -> bytes:
    entries, offset = b"", 0
    for member in members:
        entries += _entry(member, offset)
        offset += _HEADER.size + len(member.name) + member.size
    count = len(members)
    return entries + _END.pack(b"PK\x05\x06", 0, 0, count, count, len(entries), offset, 0)


def _entry(member: Member, offset: int) -> bytes:
    name = member.name.encode("ascii")
    same = (_MIDNIGHT, _FIRST_OF_JANUARY_1980, member.crc, member.size, member.size, len(name))
    rest = (0, 0, 0, 0, _PLAIN_FILE, offset)
    return _ENTRY.pack(b"PK\x01\x02", _MADE_BY, _VERSION, 0, 0, *same, *rest) + name
