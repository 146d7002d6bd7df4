"""The ledger of requests: a claim is on disk before its call is sent, a raw reply before it is read.

    ledger = Ledger(Path("data/ledger"))
    ledger.commit([("worker-1", [("claim", key, "thoughts.jsonl", "retry", None)])])      -> [[("go", 0)]]
    ledger.commit([("worker-1", [("send", key, 1, 412_000)])])                            -> [[("go",)]]        now the call may go out
    ledger.commit([("worker-1", [("done", key, 1, b'{"choices": …}', 212, 41, 37_950)])]) -> [[("ok",)]]

A request's key is a hash of all that decides its answer, so a reply is found again whatever the rows, the parser, the labels or the ablation become.

    claimed ──send──▶ sent ──done──▶ done            a reply is stored
       ▲               ├──fail───▶ failed            the server refused it, or every try failed; the next run asks again
       └───retry───────┴──lose───▶ ambiguous         sent, and no answer came: it may have been billed (policy retry: asked again and counted; hold: not)

A worker that dies leaves `claimed` and `sent` behind; after its lease, the first is free again and the second is ambiguous.

It is one SQLite file in WAL mode with synchronous=FULL: what `commit` returned survives the death of every process, and of the machine as far as its disk
keeps what was flushed. Only the processes of one host open it (workers elsewhere go through `nli.services`), since WAL does not reach across hosts. Money is
in whole nano-dollars.
"""

import fcntl
import json
import os
import platform
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from nli.errors import StorageError

LEASE_SECONDS = 10.0  # a worker that was not heard of for so long is taken for dead
BATCH_OWNER = "batch:"  # owners of this prefix are jobs at the server, which outlive every process here

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    key BLOB PRIMARY KEY, run TEXT, state TEXT, owner TEXT,
    sends INTEGER DEFAULT 0, ambiguous_sends INTEGER DEFAULT 0, reserved INTEGER DEFAULT 0,
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
CREATE TABLE IF NOT EXISTS batch_requests (key BLOB, batch TEXT, PRIMARY KEY (batch, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS requests_by_run ON requests (run, state);
"""

Operation = tuple


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


def _connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    try:
        uri = f"{path.as_uri()}{'?mode=ro' if read_only else ''}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30)
        connection.execute("PRAGMA cache_size=-8000")
        if not read_only:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        return connection
    except sqlite3.Error as error:
        raise StorageError(f"{path}: the ledger cannot be opened ({error}). Give --ledger-dir a folder on a disk that this machine can write to.") from None


class Ledger:
    """The one writer's side of a ledger folder; several processes of one host may each have one. Raises StorageError if another host has it open."""

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.time) -> None:
        self.path = folder / "ledger.sqlite"
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._beats: dict[str, float] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_for_host(folder)
        except OSError as error:
            raise StorageError(f"{folder}: the ledger cannot be kept there ({error.strerror}).") from None
        self._db = _connect(self.path)
        try:
            with _Transaction(self._db):
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: the ledger cannot be used ({error}); nothing in it was changed.") from None

    def close(self) -> None:
        """Close the file. What was committed is on disk already."""
        self._db.close()
        self._lock.close()

    def commit(self, batches: Sequence[tuple[str, Sequence[Operation]]]) -> list[list[tuple]]:
        """Apply each owner's operations in one transaction and flush it; returns each operation's answer. Raises StorageError, with nothing applied.

        Operations, and their answers:
            ("claim", key, run, policy, parent)  ("go", sends) | ("done", reply, settled, repair) | ("wait",) another works on it | ("held", problem)
            ("send", key, n, reserve)            ("go",) | ("full",) ask again when calls have ended | ("over",) | ("halted", reason) | ("lost",)
            ("done", key, n, reply, num_prompt_tokens, num_completion_tokens, cost)                                                     ("ok",)
            ("fail", key, n, kind, problem, is_final)      the server answered, and did not bill                                        ("ok",)
            ("lose", key, n, kind, problem, is_final)      sent, and no answer came                                                     ("ok",)
            ("halt", run, reason)  no call of the run is sent any more                                                                  ("ok",)
            ("beat",)              the owner is alive                                                                                   ("ok",)
        `parent` is the key of the request that this one repairs; `n` counts a request's sends from 1. Repeating an operation changes nothing.
        """
        try:
            with _Transaction(self._db):
                now = self._clock()
                answers = []
                for owner, operations in batches:
                    self._beat(owner, now)
                    answers.append([_APPLY[operation[0]](self, owner, now, *operation[1:]) for operation in operations])
                return answers
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: cannot be written ({error}). Free space or mend the disk; what was stored before is kept.") from None

    def begin_run(self, run: str, max_cost: int | None) -> Totals:
        """Open a run for sending, with its budget in nano-dollars; what dead workers left under way becomes ambiguous. Returns its sums so far."""
        with _Transaction(self._db):
            self._db.execute("INSERT OR IGNORE INTO runs (run) VALUES (?)", (run,))
            self._db.execute("UPDATE runs SET max_cost = ?, halted = NULL WHERE run = ?", (max_cost, run))
            self._sweep(run, self._clock())
        return self.read_totals(run)

    def settle(self, keys: Iterable[bytes]) -> None:
        """Mark first replies as judged for good: a later parser reads them anew and asks for no repair."""
        with _Transaction(self._db):
            self._db.executemany("UPDATE requests SET settled = 1 WHERE key = ? AND state = 'done'", ((key,) for key in keys))

    def read_totals(self, run: str) -> Totals:
        """A run's sums."""
        return _read_totals(self._db, run)

    def _beat(self, owner: str, now: float) -> None:
        if now - self._beats.get(owner, 0) > self.lease_seconds / 10:
            self._beats[owner] = now
            self._db.execute("INSERT OR REPLACE INTO owners VALUES (?, ?)", (owner, now))

    def _is_alive(self, owner: str, now: float) -> bool:
        if owner.startswith(BATCH_OWNER):
            return True
        beat = self._db.execute("SELECT beat FROM owners WHERE owner = ?", (owner,)).fetchone()
        return beat is not None and now - beat[0] < self.lease_seconds

    def _add(self, run: str, **amounts: int) -> None:
        sums = ", ".join(f"{name} = {name} + ?" for name in amounts)
        self._db.execute(f"UPDATE runs SET {sums} WHERE run = ?", (*amounts.values(), run))

    def _sweep(self, run: str, now: float) -> None:
        """Make the sends of dead owners ambiguous, so that what they reserved counts as held and nobody waits for them."""
        for (owner,) in self._db.execute("SELECT DISTINCT owner FROM requests WHERE run = ? AND state = 'sent'", (run,)).fetchall():
            if not self._is_alive(owner, now):
                rows = self._db.execute("SELECT key, reserved FROM requests WHERE run = ? AND state = 'sent' AND owner = ?", (run, owner)).fetchall()
                for key, reserved in rows:
                    self._mark_ambiguous(key, run, reserved, "lost_worker", "the worker that sent it died before an answer came", "ambiguous", now)

    def _mark_ambiguous(self, key: bytes, run: str, reserved: int, kind: str, problem: str, state: str, now: float) -> None:
        self._db.execute(
            "UPDATE requests SET state = ?, kind = ?, problem = ?, reserved = 0, ambiguous_sends = ambiguous_sends + 1, ended_at = ? WHERE key = ?",
            (state, kind, problem, now, key),
        )
        self._add(run, reserved=-reserved, held=reserved, ambiguous_sends=1)

    def _claim(self, owner: str, now: float, key: bytes, run: str, policy: str, parent: bytes | None) -> tuple:
        if parent is not None:
            self._db.execute("UPDATE requests SET repair = ? WHERE key = ?", (key, parent))
        found = self._db.execute(
            "SELECT state, owner, sends, reserved, run, problem, settled, repair, reply FROM requests WHERE key = ?", (key,)
        ).fetchone()
        if found is None:
            self._db.execute(
                "INSERT INTO requests (key, run, state, owner, claimed_at) VALUES (?, ?, 'claimed', ?, ?)", (key, run, owner, now)
            )
            if parent is not None:
                self._add(run, repairs=1)
            return ("go", 0)
        state, holder, sends, reserved, first_run, problem, settled, repair, reply = found
        if state == "done":
            return ("done", _read_reply(self._db, reply), bool(settled), repair)
        if state in ("claimed", "sent") and holder != owner and self._is_alive(holder, now):
            return ("wait",)
        if state == "sent":
            problem = "the worker that sent it died before an answer came"
            self._mark_ambiguous(key, first_run, reserved, "lost_worker", problem, "ambiguous", now)
            state = "ambiguous"
        if state == "ambiguous" and policy == "hold":
            return ("held", problem)
        if state == "failed":
            self._add(first_run, failed=-1)
        self._db.execute("UPDATE requests SET state = 'claimed', owner = ?, run = ?, claimed_at = ? WHERE key = ?", (owner, run, now, key))
        return ("go", sends)

    def _send(self, owner: str, now: float, key: bytes, n: int, reserve: int) -> tuple:
        found = self._db.execute("SELECT state, owner, sends, run FROM requests WHERE key = ?", (key,)).fetchone()
        if found is None or found[1] != owner or found[0] not in ("claimed", "sent"):
            return ("lost",)
        state, _, sends, run = found
        if state == "sent":
            return ("go",) if sends == n else ("lost",)
        max_cost, halted, spent, reserved = self._db.execute("SELECT max_cost, halted, cost + held, reserved FROM runs WHERE run = ?", (run,)).fetchone()
        if halted is not None:
            return ("halted", halted)
        if max_cost is not None and spent + reserved + reserve > max_cost:
            if reserved > 0:
                self._sweep(run, now)
            return ("full",) if reserved > 0 else ("over",)
        self._db.execute("UPDATE requests SET state = 'sent', sends = ?, reserved = ?, sent_at = ? WHERE key = ?", (n, reserve, now, key))
        self._add(run, reserved=reserve)
        return ("go",)

    def _done(self, owner: str, now: float, key: bytes, n: int, reply: bytes, num_prompt_tokens: int, num_completion_tokens: int, cost: int) -> tuple:
        state, holder, sends, reserved, run = self._db.execute("SELECT state, owner, sends, reserved, run FROM requests WHERE key = ?", (key,)).fetchone()
        is_late = holder != owner or sends != n or state == "ambiguous"  # it was taken for lost, and counted as held then
        if state == "done" or (is_late and state == "sent"):
            return ("ok",)
        reply_id = self._db.execute("INSERT INTO replies (body) VALUES (?)", (reply,)).lastrowid
        self._db.execute(
            "UPDATE requests SET state = 'done', owner = ?, reserved = 0, prompt_tokens = ?, completion_tokens = ?, cost = ?, reply = ?, kind = NULL,"
            " problem = NULL, ended_at = ? WHERE key = ?",
            (owner, num_prompt_tokens, num_completion_tokens, cost, reply_id, now, key),
        )
        used = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_completion_tokens, "done": 1}
        self._add(run, **used, cost=0 if is_late else cost, reserved=-reserved, failed=-(state == "failed"))
        return ("ok",)

    def _fail(self, owner: str, now: float, key: bytes, n: int, kind: str, problem: str, is_final: bool) -> tuple:
        state, holder, sends, reserved, run = self._db.execute("SELECT state, owner, sends, reserved, run FROM requests WHERE key = ?", (key,)).fetchone()
        if holder != owner or state not in ("claimed", "sent") or (state == "sent" and sends != n):
            return ("ok",)
        self._db.execute(
            "UPDATE requests SET state = ?, reserved = 0, kind = ?, problem = ?, ended_at = ? WHERE key = ?",
            ("failed" if is_final else "claimed", kind, problem, now, key),
        )
        self._add(run, reserved=-reserved, failed=int(is_final))
        return ("ok",)

    def _lose(self, owner: str, now: float, key: bytes, n: int, kind: str, problem: str, is_final: bool) -> tuple:
        state, holder, sends, reserved, run = self._db.execute("SELECT state, owner, sends, reserved, run FROM requests WHERE key = ?", (key,)).fetchone()
        if holder == owner and state == "sent" and sends == n:
            self._mark_ambiguous(key, run, reserved, kind, problem, "ambiguous" if is_final else "claimed", now)
        return ("ok",)

    def _halt(self, owner: str, now: float, run: str, reason: str) -> tuple:
        self._db.execute("UPDATE runs SET halted = COALESCE(halted, ?) WHERE run = ?", (reason, run))
        return ("ok",)


_APPLY: dict[str, Callable[..., tuple]] = {
    "claim": Ledger._claim,
    "send": Ledger._send,
    "done": Ledger._done,
    "fail": Ledger._fail,
    "lose": Ledger._lose,
    "halt": Ledger._halt,
    "beat": lambda ledger, owner, now: ("ok",),  # `commit` has noted the owner's beat
}


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK when the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


class LedgerReader:
    """Reads a ledger that others may be writing, on the same host. Raises StorageError if there is none."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"
        if not self.path.exists():
            raise StorageError(f"{self.path}: no ledger there.")
        self._db = _connect(self.path)  # a reader of a WAL database needs to write its -shm file
        self._db.execute("PRAGMA query_only=ON")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def read_totals(self, run: str) -> Totals:
        """A run's sums."""
        return _read_totals(self._db, run)

    def read_entries(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Entry, bytes | None, bool]]:
        """(entry, key of its repair, whether it is settled) of each known key, at most some hundreds at a time."""
        marks = ",".join("?" * len(keys))
        rows = self._db.execute(
            "SELECT r.key, r.state, b.body, r.prompt_tokens, r.completion_tokens, r.kind, r.problem, r.repair, r.settled"
            f" FROM requests r LEFT JOIN replies b ON b.id = r.reply WHERE r.key IN ({marks})",
            list(keys),
        )
        return {row[0]: (Entry(*row[1:7]), row[7], bool(row[8])) for row in rows}

    def count_states(self, run: str) -> dict[str, int]:
        """How many of a run's requests are in which state."""
        return dict(self._db.execute("SELECT state, COUNT(*) FROM requests WHERE run = ? GROUP BY state ORDER BY state", (run,)))

    def list_rows(self) -> Iterator[dict]:
        """Every request without its reply, for people and tests."""
        cursor = self._db.execute("SELECT * FROM requests")
        names = [column[0] for column in cursor.description]
        return (dict(zip(names, row, strict=True)) for row in cursor)


def _read_totals(db: sqlite3.Connection, run: str) -> Totals:
    names = list(Totals.__dataclass_fields__)
    found = db.execute(f"SELECT {', '.join(names)} FROM runs WHERE run = ?", (run,)).fetchone()
    return Totals(*found) if found else Totals()


def _read_reply(db: sqlite3.Connection, reply_id: int) -> bytes:
    return db.execute("SELECT body FROM replies WHERE id = ?", (reply_id,)).fetchone()[0]


def _lock_for_host(folder: Path):
    """A shared lock that all processes of one host can hold, and none of another."""
    file = open(folder / "host.lock", "a+", encoding="utf-8")  # noqa: SIM115  (held while the ledger is open)
    me = platform.node()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        file.truncate()
        file.write(me)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_SH)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        if holder and holder != me:
            file.close()
            raise StorageError(
                f"{folder}: the ledger is in use on {holder}; run the job on that machine's cluster, or give another --ledger-dir."
            ) from None
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


def new_owner(name: str) -> str:
    """A name for a worker that no other has had: its host, its process and a random part."""
    return f"{name}@{platform.node()}:{os.getpid()}:{os.urandom(4).hex()}"
