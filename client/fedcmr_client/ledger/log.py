"""The signed log: entries in one Merkle tree, each append under a signed head.

An append runs in this order: lock, fold in what other processes appended, check the clock, the
entries and the second place, insert, sign the new head, commit, write the head to the second
place. Killed before the commit, nothing happened; killed after it, the charge stands.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, Engine, Row, Table, func, insert, inspect, select

from fedcmr_client.ledger import database
from fedcmr_client.ledger.second_place import SecondPlace
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature
from fedcmr_shared.privacy.budget import Budget, fold
from fedcmr_shared.privacy.merkle import Frontier, leaf_hash
from fedcmr_shared.schemas.ledger import Checkpoint, Entry, Leaf, Opened

Clock = Callable[[], int]
_SALT_BYTES: Final = 32
_TOLERANCE_MS: Final = 1000
"""Machines that share a ledger may differ by this much; time in the log still never falls."""


def wall_clock() -> int:
    """Return the machine's time: UTC, milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class LogState:
    """What is known of a log: the right edge of its tree, and what its entries add up to."""

    frontier: Frontier = field(default_factory=Frontier)
    budget: Budget = field(default_factory=Budget)

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.frontier.size

    def extend(self, leaves: Iterable[bytes], entries: Iterable[Entry]) -> LogState:
        """Return the state after ``entries`` with leaf hashes ``leaves``; see `Budget.apply`."""
        return LogState(self.frontier.extend(leaves), fold(self.budget, entries))


class Transaction:
    """The log while nobody else writes it; what is appended is committed as one or not at all."""

    def __init__(self, connection: Connection, state: LogState, now: int) -> None:
        self.connection = connection
        self.state = state
        self.wall_clock = now
        self.rows: list[dict[str, Any]] = []

    @property
    def budget(self) -> Budget:
        """What all entries add up to, those appended here included."""
        return self.state.budget

    @property
    def now(self) -> int:
        """Time for a new entry: the clock's, and never before the last entry's.

        Raises:
            LedgerError: the clock is behind the last entry.
        """
        behind = self.budget.clock - self.wall_clock
        if behind > _TOLERANCE_MS:
            raise LedgerError(
                f"the clock is behind the last entry by {behind / 1000:.0f} s: set the machine's "
                "clock; if the last entry was written with a wrong one, `fedcmr site set-clock`"
            )
        return max(self.wall_clock, self.budget.clock)

    def append(self, entry: Entry) -> None:
        """Add ``entry`` under a fresh salt.

        Raises:
            LedgerError: the entry cannot follow the ones before; see `Budget.apply`.
        """
        content = Leaf(entry=entry, salt=secrets.token_hex(_SALT_BYTES)).content()
        leaf = leaf_hash(content)
        number = self.state.size
        self.state = self.state.extend([leaf], [entry])
        self.rows.append({"number": number, "leaf": content.decode(), "leaf_hash": leaf.hex()})


class SignedLog:
    """A log in a database, signed by ``key``; several processes may append to it."""

    def __init__(
        self, engine: Engine, key: SiteKey, second_place: SecondPlace, clock: Clock = wall_clock
    ) -> None:
        self.engine = engine
        self.key = key
        self._second_place = second_place
        self._clock = clock
        self._state = LogState()

    @property
    def site(self) -> str:
        """Name of the log's site."""
        return self._state.budget.opened.site

    def begin(self, first: Opened) -> None:
        """Make the tables and the first entry.

        Cut off in between, it can be called again with the same settings.

        Raises:
            LedgerError: there is a log or a second place already, or they cannot be written.
        """
        self._second_place.require_absent()
        with database.exclusive(self.engine) as connection:
            database.metadata.create_all(connection)
            if connection.scalar(select(database.entries.c.number).limit(1)) is not None:
                self._require_just_begun(connection, first)
                work = Transaction(connection, self._state, first.at)
            else:
                work = Transaction(connection, self._state, first.at)
                work.append(first)
                self._insert(work)
        self._state = work.state
        self.keep_newest_head()

    def verify(self) -> None:
        """Read the whole log and check leaves, heads, signatures and the order of the entries.

        Raises:
            LedgerError: something does not fit; names what.
        """
        with database.exclusive(self.engine) as connection:
            if not inspect(connection).has_table(database.entries.name):
                raise LedgerError(f"{self.engine.url!r} holds no ledger: restore it from backup")
            self._refresh(connection)
            for row in connection.execute(select(database.checkpoints)):
                head = self._head(row)
                verify_signature(self.key.public_key, head.signature, head.signed_bytes())

    def verify_second_place(self) -> None:
        """Raise LedgerError unless the second place holds one of this log's heads."""
        with database.exclusive(self.engine) as connection:
            self._require_kept_head(connection)

    def keep_newest_head(self) -> None:
        """Write the newest head to the second place.

        Raises:
            LedgerError: it cannot be written.
        """
        # Under the lock, so that a slower process never puts back an older head.
        with database.exclusive(self.engine) as connection:
            self._second_place.write(self._newest(connection))

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Read and append; what was appended is on disk and in the second place afterwards.

        Raises:
            LedgerError: the log cannot be read, trusted or written, or, after the commit, the
                second place cannot be written.
        """
        with database.exclusive(self.engine) as connection:
            self._refresh(connection)
            work = Transaction(connection, self._state, self._clock())
            yield work
            if work.rows:
                if self._require_kept_head(connection).size < self._state.size:
                    # A write failed before: try it again now, while nothing more is charged.
                    self._second_place.write(self._newest(connection))
                self._insert(work)
        self._state = work.state
        if work.rows:
            self.keep_newest_head()

    def head(self) -> Checkpoint:
        """Return the newest signed head, which covers all entries."""
        with database.exclusive(self.engine) as connection:
            self._refresh(connection)
            return self._newest(connection)

    def leaves(self) -> list[Leaf]:
        """Return all entries with their salts."""
        with database.exclusive(self.engine) as connection:
            self._refresh(connection)
            return [_leaf(row) for row in _rows_from(connection, 0)]

    def checkpoints(self) -> list[Checkpoint]:
        """Return the outward checkpoints, oldest first."""
        table = database.checkpoints
        with database.exclusive(self.engine) as connection:
            return [self._head(row) for row in connection.execute(select(table).order_by("at"))]

    def newest_checkpoint(self, work: Transaction) -> Checkpoint | None:
        """Return the last outward checkpoint, if there is one."""
        table = database.checkpoints
        row = work.connection.execute(select(table).order_by(table.c.at.desc()).limit(1)).first()
        return None if row is None else self._head(row)

    def sign_checkpoint(self, work: Transaction, size: int, at: int) -> Checkpoint:
        """Sign and keep an outward checkpoint over the first ``size`` entries."""
        frontier = work.state.frontier
        if size != frontier.size:
            frontier = _frontier_at(work, size)
        return self._sign(work, database.checkpoints, frontier, at)

    def _insert(self, work: Transaction) -> None:
        work.connection.execute(insert(database.entries), work.rows)
        self._sign(work, database.heads, work.state.frontier, work.budget.clock)

    def _sign(self, work: Transaction, table: Table, frontier: Frontier, at: int) -> Checkpoint:
        unsigned = Checkpoint(
            site=work.budget.opened.site,
            size=frontier.size,
            root=frontier.root().hex(),
            at=at,
            signature="0" * 128,
        )
        head = unsigned.model_copy(update={"signature": self.key.sign(unsigned.signed_bytes())})
        columns = {column.name for column in table.columns}
        work.connection.execute(insert(table), head.model_dump(include=columns))
        return head

    def _refresh(self, connection: Connection) -> None:
        """Fold in what the log holds beyond what is known; checks all of it."""
        state = self._state
        roots = _signed_roots(connection, state.size)
        _require_root(state, roots)
        for rows in _parts(_rows_from(connection, state.size), roots):
            leaves = (_checked_hash(row) for row in rows)
            state = state.extend(leaves, (_leaf(row).entry for row in rows))
            _require_root(state, roots)
        covered = connection.scalar(select(func.max(database.heads.c.size))) or 0
        if covered != state.size or covered == 0:
            raise LedgerError(
                f"{self.engine.url!r}: the newest head covers {covered} entries and the log has "
                f"{state.size}: entries were removed or added; restore the newest backup"
            )
        if state.size > self._state.size:
            self._require_own(connection, state.budget.opened)
        self._state = state

    def _require_own(self, connection: Connection, opened: Opened) -> None:
        if opened.site_key != self.key.public_key:
            message = f"the ledger of site {opened.site} was made with another key"
            raise LedgerError(f"{message}: restore ledger and site.key from one backup")
        head = self._newest(connection, opened.site)
        verify_signature(self.key.public_key, head.signature, head.signed_bytes())

    def _require_just_begun(self, connection: Connection, first: Opened) -> None:
        self._refresh(connection)
        begun = self._state.budget.opened
        if self._state.size > 1 or begun != first.model_copy(update={"at": begun.at}):
            message = "open it, or choose another folder and second place"
            raise LedgerError(f"{self.engine.url!r} holds a ledger already: {message}")

    def _require_kept_head(self, connection: Connection) -> Checkpoint:
        kept = self._second_place.read()
        table = database.heads
        row = connection.execute(select(table).where(table.c.size == kept.size)).first()
        if row is not None and self._head(row) == kept:
            return kept
        size = self._state.size
        what = "an older copy was restored" if size < kept.size else "the ledger was forked"
        raise LedgerError(
            f"{self._second_place.path} keeps a head over {kept.size} entries that this ledger of "
            f"{size} entries does not have: {what}, and charges would be lost. Restore the newest "
            "copy; if there is none, make a new ledger for patients that no job has used"
        )

    def _newest(self, connection: Connection, site: str | None = None) -> Checkpoint:
        table = database.heads
        query = select(table).order_by(table.c.size.desc()).limit(1)
        return self._head(connection.execute(query).one(), site)

    def _head(self, row: Row[Any], site: str | None = None) -> Checkpoint:
        try:
            return Checkpoint(site=site or self.site, **row._mapping)
        except ValidationError as error:
            raise LedgerError(f"{self.engine.url!r}: a signed head was changed") from error


def _rows_from(connection: Connection, number: int) -> Iterator[Row[Any]]:
    """Yield the rows of the log from entry ``number`` on; LedgerError when one is missing."""
    table = database.entries
    query = select(table).where(table.c.number >= number).order_by(table.c.number)
    for expected, row in enumerate(connection.execute(query), start=number):
        if row.number != expected:
            raise LedgerError(
                f"entry {expected} of the ledger is missing: restore the newest backup"
            )
        yield row


def _parts(rows: Iterable[Row[Any]], ends: Collection[int]) -> Iterator[list[Row[Any]]]:
    """Yield ``rows`` in parts that end where the log's size is one of ``ends``, and the rest."""
    part = []
    for row in rows:
        part.append(row)
        if row.number + 1 in ends:
            yield part
            part = []
    yield part


def _checked_hash(row: Row[Any]) -> bytes:
    leaf = leaf_hash(row.leaf.encode())
    if not hmac.compare_digest(leaf.hex(), row.leaf_hash):
        raise LedgerError(
            f"entry {row.number} of the ledger was changed: restore the newest backup"
        )
    return leaf


def _leaf(row: Row[Any]) -> Leaf:
    try:
        return Leaf.model_validate_json(row.leaf)
    except ValidationError as error:
        message = "update FedCMR if a newer one wrote it, or restore the newest backup"
        raise LedgerError(f"entry {row.number} of the ledger cannot be read: {message}") from error


def _signed_roots(connection: Connection, size: int) -> dict[int, set[str]]:
    """Return the signed roots of the first ``size`` entries and of all longer beginnings."""
    roots: dict[int, set[str]] = {}
    for table in (database.heads, database.checkpoints):
        query = select(table.c.size, table.c.root).where(table.c.size >= size)
        for covered, root in connection.execute(query):
            roots.setdefault(covered, set()).add(root)
    return roots


def _require_root(state: LogState, roots: Mapping[int, Collection[str]]) -> None:
    expected = roots.get(state.size)
    if expected and set(expected) != {state.frontier.root().hex()}:
        raise LedgerError(
            f"the first {state.size} entries of the ledger do not have the signed root: they or "
            "the head were changed; restore the newest backup"
        )


def _frontier_at(work: Transaction, size: int) -> Frontier:
    table = database.entries
    query = select(table.c.leaf_hash).where(table.c.number < size).order_by(table.c.number)
    hashes = [*work.connection.scalars(query), *(row["leaf_hash"] for row in work.rows)]
    return Frontier().extend(bytes.fromhex(leaf) for leaf in hashes[:size])
