"""The ledger's file: its tables, its lock, the keys of its rows, and reading it while others write.

reader = LedgerReader(Path("data/ledger"))
reader.read_entries([key])      -> {key: (Entry(state="done", reply=b'{"choices": …}', prompt_tokens=212, …), None, False)}
reader.read_totals(run)         -> Totals(done=1982, failed=0, ambiguous_sends=3, cost=79_901_400, held=0, …)
"""

import contextlib
import fcntl
import json
import platform
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TextIO

from nli.runtime.errors import StorageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key BLOB PRIMARY KEY, run TEXT, state TEXT, owner TEXT,
    sends INTEGER DEFAULT 0, ambiguous_sends INTEGER DEFAULT 0, is_unsure INTEGER DEFAULT 0, reserved INTEGER DEFAULT 0,
    prompt_tokens INTEGER, completion_tokens INTEGER, cost INTEGER, reply INTEGER,
    repair BLOB, settled INTEGER DEFAULT 0, kind TEXT, problem TEXT, claimed_at REAL, sent_at REAL, ended_at REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (id INTEGER PRIMARY KEY, body BLOB);
CREATE TABLE IF NOT EXISTS owners (owner TEXT PRIMARY KEY, beat REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, max_cost INTEGER, halted TEXT,
    done INTEGER DEFAULT 0, failed INTEGER DEFAULT 0, ambiguous_sends INTEGER DEFAULT 0, repairs INTEGER DEFAULT 0,
    prompt_tokens INTEGER DEFAULT 0, completion_tokens INTEGER DEFAULT 0,
    cost INTEGER DEFAULT 0, held INTEGER DEFAULT 0, reserved INTEGER DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, run TEXT, state TEXT, file_id TEXT, job_id TEXT, detail TEXT, changed_at REAL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS requests_by_run ON requests (run, state);
"""


@dataclass(frozen=True)
class Entry:
    """What the ledger knows of one request. `reply` is the raw body of the server's answer, None unless `state` is done."""

    state: str
    reply: bytes | None
    prompt_tokens: int | None
    completion_tokens: int | None
    kind: str | None
    problem: str | None


@dataclass(frozen=True)
class Totals:
    """One run's sums. `held` is what ambiguous sends may have cost at most, `reserved` what calls under way may cost at most; money in nano-dollars."""

    done: int = 0
    failed: int = 0
    ambiguous_sends: int = 0
    repairs: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0
    held: int = 0
    reserved: int = 0


def request_key(url: str, body: bytes, sample_index: int = 0) -> bytes:
    """16 bytes that stand for a request: the address, the body with model, messages, parameters and schema, and which of several samples it is."""
    return sha256(b"\0".join([url.encode(), body, str(sample_index).encode()])).digest()[:16]


def encode_body(body: Mapping) -> bytes:
    """A request body as the bytes that are both sent and hashed."""
    return json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def connect(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        connection.execute("PRAGMA cache_size=-8000")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(
            "PRAGMA wal_autocheckpoint=4000"
        )  # pages: keys are hashes, so a checkpoint writes to most of the file
        for statement in _SCHEMA.split(";"):  # each a transaction of its own, and none where the table is there
            connection.execute(statement)
        found = _list_columns(connection)
    except sqlite3.Error as error:
        raise StorageError(
            f"{path}: the ledger cannot be opened ({error}). Give --ledger-dir a folder on a disk that this machine can write to."
        ) from None
    if found != _own_columns():
        connection.close()
        names = ", ".join(sorted(f"{table}.{column}" for table, column in found ^ _own_columns()))
        raise StorageError(
            f"{path}: a ledger of another version of this project (they differ in {names}). Use that version, or give another --ledger-dir."
        )
    return connection


def _list_columns(db: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(
        db.execute(
            "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%'"
        )
    )


@lru_cache(maxsize=1)
def _own_columns() -> set[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_SCHEMA)
        return _list_columns(db)


class LedgerReader:
    """Reads a ledger that others may be writing, on the same host. Raises StorageError if there is none."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"
        if not self.path.exists():
            raise StorageError(f"{self.path}: no ledger there.")
        *self._locks, self._db = open_ledger(
            folder
        )  # a reader of a WAL database writes its -shm file, and so must be of the same host
        self._db.execute("PRAGMA query_only=ON")

    def close(self) -> None:
        """Close the file."""
        self._db.close()
        for lock in self._locks:
            lock.close()

    def read_totals(self, run: str) -> Totals:
        """A run's sums."""
        return read_totals(self._db, self.path, run)

    def read_entries(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Entry, bytes | None, bool]]:
        """(entry, key of its repair, whether it is settled) of each known key, at most some hundreds at a time."""
        marks = ",".join("?" * len(keys))
        with reading(self.path):
            rows = self._db.execute(
                "SELECT r.key, r.state, b.body, r.prompt_tokens, r.completion_tokens, r.kind, r.problem, r.repair, r.settled"
                f" FROM requests r LEFT JOIN replies b ON b.id = r.reply WHERE r.key IN ({marks})",
                list(keys),
            ).fetchall()
        return {row[0]: (Entry(*row[1:7]), row[7], bool(row[8])) for row in rows}

    def count_states(self, run: str) -> dict[str, int]:
        """How many of a run's requests are in which state."""
        with reading(self.path):
            return dict(
                self._db.execute(
                    "SELECT state, COUNT(*) FROM requests WHERE run = ? GROUP BY state ORDER BY state", (run,)
                )
            )

    def list_rows(self) -> Iterator[dict]:
        """Every request without its reply, for people and tests."""
        cursor = self._db.execute("SELECT * FROM requests")
        names = [column[0] for column in cursor.description]
        return (dict(zip(names, row, strict=True)) for row in cursor)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """SQLite's errors in the block become StorageErrors."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"{path}: cannot be read ({error}).") from None


def read_totals(db: sqlite3.Connection, path: Path, run: str) -> Totals:
    """A run's sums, by an open connection. Raises StorageError."""
    names = list(Totals.__dataclass_fields__)
    with reading(path):
        found = db.execute(f"SELECT {', '.join(names)} FROM runs WHERE run = ?", (run,)).fetchone()
    return Totals(*found) if found else Totals()


def read_reply_body(db: sqlite3.Connection, reply_id: int) -> bytes:
    """The raw body of a stored reply."""
    return db.execute("SELECT body FROM replies WHERE id = ?", (reply_id,)).fetchone()[0]


def open_ledger(folder: Path) -> tuple[TextIO, TextIO, sqlite3.Connection]:
    """A folder's ledger, with the lock that keeps other hosts from it and the one for `in_turn`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock_for_host(folder)
        turn = open(folder / "turn.lock", "a", encoding="utf-8")  # noqa: SIM115  (as long as the ledger)
    except OSError as error:
        raise StorageError(f"{folder}: the ledger cannot be kept there ({error.strerror}).") from None
    try:
        with in_turn(turn):  # of several that make the file at once, SQLite lets all but one fail
            return lock, turn, connect(folder / "ledger.sqlite")
    except StorageError:
        lock.close()
        turn.close()
        raise


@contextlib.contextmanager
def in_turn(file: TextIO) -> Iterator[None]:
    """Hold the lock that a folder's writers take one after the other. Who waits is woken at once; SQLite would only look again every few milliseconds."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _lock_for_host(folder: Path) -> TextIO:
    """A shared lock that all processes of one host can hold, and none of another."""
    file = open(folder / "host.lock", "a+", encoding="utf-8")  # noqa: SIM115  (held while the ledger is open)
    me = _this_host()
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        file.truncate()
        file.write(me)
        file.flush()
    fcntl.flock(file, fcntl.LOCK_SH)  # not in one step with the lock before, so who holds the folder is read only now
    file.seek(0)
    holder = file.read().strip()
    if holder.split(" ")[-1] != me.split(" ")[-1]:
        file.close()
        name = holder.split(" ")[0] or "another machine"
        raise StorageError(
            f"{folder}: the ledger is in use on {name}; run the job on that machine's cluster, or give another --ledger-dir."
        )
    return file


def _this_host() -> str:
    """This machine's name, and what tells it from another of the same name: containers on one kernel share locks and memory, other machines do not."""
    with contextlib.suppress(OSError):
        return f"{platform.node()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return platform.node()
