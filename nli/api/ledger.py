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
keeps what was flushed. Only the processes of one host open it, and write in turn (workers elsewhere go through `nli.api.services`), since WAL does not reach across
hosts. Money is in whole nano-dollars.
"""

import contextlib
import math
import os
import platform
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nli.api.ledger_file import Totals, in_turn, open_ledger, read_reply_body, read_totals
from nli.api.prices import Price
from nli.runtime.errors import StorageError

LEASE_SECONDS = 10.0  # a worker that was not heard of for so long is taken for dead
LOST_WORKER = ("lost_worker", "the worker that sent it died before an answer came")
BATCH_OWNER = "batch:"  # owners of this prefix are jobs at the server, which outlive every process here

Operation = tuple


class Ledger:
    """The one writer's side of a ledger folder; several processes of one host may each have one. Raises StorageError if another host has it open."""

    def __init__(
        self, folder: Path, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = folder / "ledger.sqlite"
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._beats: dict[str, float] = {}  # when an owner's beat was last written
        self._heard: dict[
            str, float
        ] = {}  # when the last commit ended that an owner took part in: a slow disk is no sign of its death
        self._runs: set[str] = set()  # that have a row
        self._changes: dict[str, Counter] = {}  # of runs' sums in this transaction
        self._budgets: dict[str, tuple] = {}  # of runs, as this transaction found them
        self._swept: dict[str, float] = {}  # when a run was last searched for the sends of dead owners
        self._patient_until = -math.inf  # time.monotonic() until which nobody is taken for dead
        self._lock, self._turn, self._db = open_ledger(folder)

    def close(self) -> None:
        """Close the file. What was committed is on disk already."""
        self._db.close()
        self._lock.close()
        self._turn.close()

    def commit(self, batches: Sequence[tuple[str, Sequence[Operation]]]) -> list[list[tuple]]:
        """Apply each owner's operations in one transaction and flush it; returns each operation's answer. Raises StorageError, with nothing applied.

        Operations, and their answers:
            ("claim", key, run, policy, parent)  ("go", sends) | ("done", reply, settled, repair) | ("wait",) another works on it | ("held", problem)
            ("open", key, run, policy, parent, reserve)     claim and send in one: ("go", n), or else what claim or send answer
            ("send", key, n, reserve)            ("go",) | ("full",) ask again when calls have ended | ("over",) | ("halted", reason) | ("lost",)
            ("done", key, n, reply, num_prompt_tokens, num_completion_tokens, cost)                                                     ("ok",)
            ("fail", key, n, kind, problem, is_final)      the server answered, and did not bill                                        ("ok",)
            ("lose", key, n, kind, problem, is_final)      sent, and no answer came                                                     ("ok",)
            ("halt", run, reason)  no call of the run is sent any more                                                                  ("ok",)
            ("beat", run)          the owner is alive                                                                      ("ok",) | ("halted", reason)
        `parent` is the key of the request that this one repairs; `n` counts a request's sends from 1. Repeating an operation changes nothing. What is said of
        a request that the ledger lost or gave to another worker is answered with ("ok",) as well, and changes only what is still open.
        """
        with self._transaction():
            now = self._clock()
            for owner, _ in batches:  # before any operation: nobody in this batch is dead
                self._beat(owner, now)
            answers = [
                [_APPLY[operation[0]](self, owner, now, *operation[1:]) for operation in operations]
                for owner, operations in batches
            ]
        self._heard.update(dict.fromkeys((owner for owner, _ in batches), self._clock()))
        return answers

    def begin_run(self, run: str, max_cost: int | None, price: Price | None = None) -> Totals:
        """Open a run for sending, with its budget in nano-dollars; what dead workers left under way becomes ambiguous. Returns its sums so far.

        Under a budget, replies of earlier attempts that knew no price are charged at `price`.
        """
        with self._transaction():
            self._open_run(run)
            self._db.execute("UPDATE runs SET max_cost = ?, halted = NULL WHERE run = ?", (max_cost, run))
            if max_cost is not None and price is not None:
                self._charge_unpriced(run, price)
            self._sweep(run, self._clock())
        return self.read_totals(run)

    def _charge_unpriced(self, run: str, price: Price) -> None:
        self._db.create_function("price_of", 2, price.cost_nanodollars)
        unpriced = "WHERE run = ? AND state = 'done' AND cost = 0 AND prompt_tokens + completion_tokens > 0"
        (owed,) = self._db.execute(
            f"SELECT SUM(price_of(prompt_tokens, completion_tokens)) FROM requests {unpriced}", (run,)
        ).fetchone()
        if owed:
            self._db.execute(
                f"UPDATE requests SET cost = price_of(prompt_tokens, completion_tokens) {unpriced}", (run,)
            )
            self._add(run, cost=owed)

    def settle(self, keys: Iterable[bytes]) -> None:
        """Mark first replies as judged for good: a later parser reads them anew and asks for no repair."""
        with self._transaction():
            self._db.executemany(
                "UPDATE requests SET settled = 1 WHERE key = ? AND state = 'done' AND settled = 0",
                ((key,) for key in keys),
            )

    def read_totals(self, run: str) -> Totals:
        """A run's sums."""
        return read_totals(self._db, self.path, run)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block on disk when it ends, or nothing of it when it or the commit raises."""
        came_at = time.monotonic()
        try:
            with in_turn(self._turn):
                self._forgive(came_at)
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._write_sums()
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # SQLite itself has rolled back after some errors of the disk
                        self._db.execute("ROLLBACK")
                    self._beats.clear()
                    self._runs.clear()
                    raise
                finally:
                    self._changes.clear()
                    self._budgets.clear()
                    self._forgive(came_at)
        except sqlite3.Error as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error}). Free space or mend the disk; what was stored before is kept."
            ) from None

    def _forgive(self, came_at: float) -> None:
        """After a long wait for the disk or for who holds it, let the other writers, which may have waited too, be heard of before they are taken for dead."""
        now = time.monotonic()
        if now - came_at > self.lease_seconds / 5:
            self._patient_until = now + self.lease_seconds

    def _beat(self, owner: str, now: float) -> None:
        if abs(now - self._beats.get(owner, 0)) > self.lease_seconds / 10:
            self._beats[owner] = now
            self._db.execute("INSERT OR REPLACE INTO owners VALUES (?, ?)", (owner, now))

    def _is_alive(self, owner: str, now: float) -> bool:
        # A beat far ahead of the clock is one from before the clock was set back.
        if (
            owner.startswith(BATCH_OWNER)
            or time.monotonic() < self._patient_until
            or abs(now - self._heard.get(owner, -math.inf)) < self.lease_seconds
        ):
            return True
        beat = self._db.execute("SELECT beat FROM owners WHERE owner = ?", (owner,)).fetchone()
        return beat is not None and abs(now - beat[0]) < self.lease_seconds

    def _open_run(self, run: str) -> None:
        if run not in self._runs:
            self._db.execute("INSERT OR IGNORE INTO runs (run) VALUES (?)", (run,))
            self._runs.add(run)

    def _add(self, run: str, **amounts: int) -> None:
        """Change a run's sums; they are written once, when the transaction ends."""
        changes = self._changes.setdefault(run, Counter())
        for name, amount in amounts.items():
            changes[name] += amount

    def _write_sums(self) -> None:
        for run, changes in self._changes.items():
            sums = ", ".join(f"{name} = {name} + ?" for name in changes)
            self._db.execute(f"UPDATE runs SET {sums} WHERE run = ?", (*changes.values(), run))
        self._changes.clear()

    def _read_budget(self, run: str) -> tuple[int | None, str | None, int, int]:
        """(most cost, why the run is halted, spent, reserved) as they stand in this transaction."""
        if run not in self._budgets:
            self._budgets[run] = self._db.execute(
                "SELECT max_cost, halted, cost + held, reserved FROM runs WHERE run = ?", (run,)
            ).fetchone()
        max_cost, halted, spent, reserved = self._budgets[run]
        changes = self._changes.get(run, {})
        return (
            max_cost,
            halted,
            spent + changes.get("cost", 0) + changes.get("held", 0),
            reserved + changes.get("reserved", 0),
        )

    def _sweep(self, run: str, now: float) -> None:
        """Make the sends of dead owners ambiguous, so that what they reserved counts as held and nobody waits for them."""
        self._swept[run] = now
        for (owner,) in self._db.execute(
            "SELECT DISTINCT owner FROM requests WHERE run = ? AND state = 'sent'", (run,)
        ).fetchall():
            if not self._is_alive(owner, now):
                rows = self._db.execute(
                    "SELECT key, reserved FROM requests WHERE run = ? AND state = 'sent' AND owner = ?", (run, owner)
                ).fetchall()
                for key, reserved in rows:
                    self._mark_ambiguous(key, run, reserved, *LOST_WORKER, "ambiguous", now)

    def _mark_ambiguous(
        self, key: bytes, run: str, reserved: int, kind: str, problem: str, state: str, now: float
    ) -> None:
        """Count a send as one without answer. Its row keeps what was reserved, by which `_resolve` takes it back if an answer comes after all."""
        self._db.execute(
            "UPDATE requests SET state = ?, kind = ?, problem = ?, is_unsure = 1, ambiguous_sends = ambiguous_sends + 1, ended_at = ? WHERE key = ?",
            (state, kind, problem, now, key),
        )
        self._add(run, reserved=-reserved, held=reserved, ambiguous_sends=1)

    def _resolve(self, found: "_Found") -> None:
        """Take back that the last send is one without answer."""
        self._db.execute(
            "UPDATE requests SET is_unsure = 0, ambiguous_sends = ambiguous_sends - 1, reserved = 0 WHERE key = ?",
            (found.key,),
        )
        self._add(found.run, held=-found.reserved, ambiguous_sends=-1)

    def _find(self, key: bytes) -> "_Found | None":
        row = self._db.execute(_FIND, (key,)).fetchone()
        return _Found(*row) if row else None

    def _claim(self, owner: str, now: float, key: bytes, run: str, policy: str, parent: bytes | None) -> tuple:
        if parent is not None:
            other = self._find_other_repair(parent, key)
            if other is not None:
                return (
                    "done",
                    read_reply_body(self._db, other),
                    False,
                    None,
                )  # another worker has had the parent repaired, by another reply of its own
            self._db.execute("UPDATE requests SET repair = ? WHERE key = ?", (key, parent))
        insert = "INSERT OR IGNORE INTO requests (key, run, state, owner, claimed_at) VALUES (?, ?, 'claimed', ?, ?)"
        if self._db.execute(insert, (key, run, owner, now)).rowcount:
            self._open_run(run)
            self._add(run, repairs=int(parent is not None))
            return ("go", 0)
        found = self._find(key)
        if found.state == "done":
            return ("done", read_reply_body(self._db, found.reply), bool(found.settled), found.repair)
        if found.state in ("claimed", "sent") and found.owner != owner and self._is_alive(found.owner, now):
            return ("wait",)
        if found.state == "sent":
            self._mark_ambiguous(key, found.run, found.reserved, *LOST_WORKER, "ambiguous", now)
            found = self._find(key)
        if found.state == "failed":
            self._add(found.run, failed=-1)
        if found.is_unsure and policy == "hold":
            self._db.execute("UPDATE requests SET state = 'ambiguous' WHERE key = ?", (key,))
            return ("held", found.problem)
        if found.run != run:
            # What the last send may have cost stays with its run, whatever becomes of it.
            self._open_run(run)
            self._db.execute("UPDATE requests SET is_unsure = 0, reserved = 0 WHERE key = ?", (key,))
            self._add(found.run, repairs=-int(parent is not None))
            self._add(run, repairs=int(parent is not None))
        self._db.execute(
            "UPDATE requests SET state = 'claimed', owner = ?, run = ?, claimed_at = ? WHERE key = ?",
            (owner, run, now, key),
        )
        return ("go", found.sends)

    def _find_other_repair(self, parent: bytes, key: bytes) -> int | None:
        """The reply of a repair of `parent` other than `key`, if it has one."""
        found = self._db.execute(
            "SELECT r.reply FROM requests p JOIN requests r ON r.key = p.repair WHERE p.key = ? AND r.key != ? AND r.state = 'done'",
            (parent, key),
        ).fetchone()
        return found[0] if found else None

    def _send(self, owner: str, now: float, key: bytes, n: int, reserve: int) -> tuple:
        found = self._find(key)
        if found is None or found.owner != owner or found.state not in ("claimed", "sent"):
            return ("lost",)
        if found.state == "sent":
            return ("go",) if found.sends == n else ("lost",)
        if n != found.sends + 1:
            return ("lost",)
        max_cost, halted, spent, reserved = self._read_budget(found.run)
        if halted is not None:
            return ("halted", halted)
        if max_cost is not None and spent + reserved + reserve > max_cost:
            if reserved > 0 and now - self._swept.get(found.run, -math.inf) > self.lease_seconds / 10:
                self._sweep(found.run, now)
            return ("full",) if reserved > 0 else ("over",)
        self._db.execute(
            "UPDATE requests SET state = 'sent', sends = ?, is_unsure = 0, reserved = ?, sent_at = ? WHERE key = ?",
            (n, reserve, now, key),
        )
        self._add(found.run, reserved=reserve)
        return ("go",)

    def _open(
        self, owner: str, now: float, key: bytes, run: str, policy: str, parent: bytes | None, reserve: int
    ) -> tuple:
        if parent is None and self._open_new(owner, now, key, run, reserve):
            return ("go", 1)
        found = self._find(key)
        if found is not None and found.state == "sent" and found.owner == owner:
            return ("go", found.sends)  # repeated: a worker has one call of a request under way at most
        claimed = self._claim(owner, now, key, run, policy, parent)
        if claimed[0] != "go":
            return claimed
        n = claimed[1] + 1
        sent = self._send(owner, now, key, n, reserve)
        return ("go", n) if sent[0] == "go" else sent

    def _open_new(self, owner: str, now: float, key: bytes, run: str, reserve: int) -> bool:
        """The common case of `_open` in one statement: a request that the ledger does not know, and room for it in the budget."""
        self._open_run(run)
        max_cost, halted, spent, reserved = self._read_budget(run)
        if halted is not None or (max_cost is not None and spent + reserved + reserve > max_cost):
            return False
        insert = "INSERT OR IGNORE INTO requests (key, run, state, owner, sends, reserved, claimed_at, sent_at) VALUES (?, ?, 'sent', ?, 1, ?, ?, ?)"
        if not self._db.execute(insert, (key, run, owner, reserve, now, now)).rowcount:
            return False
        self._add(run, reserved=reserve)
        return True

    def _done(
        self,
        owner: str,
        now: float,
        key: bytes,
        n: int,
        reply: bytes,
        num_prompt_tokens: int,
        num_completion_tokens: int,
        cost: int,
    ) -> tuple:
        found = self._find(key)
        is_last = found is not None and found.sends == n
        if found is None or found.state == "done" or (found.state == "sent" and not is_last):
            return ("ok",)  # a send after this one is under way, and its reply will be kept
        if found.state == "sent":
            self._add(found.run, reserved=-found.reserved)
        elif is_last and found.is_unsure:  # it was taken for lost
            self._resolve(found)
        elif not is_last or owner != found.owner:
            cost = 0  # held where it was counted as lost
        reply_id = self._db.execute("INSERT INTO replies (body) VALUES (?)", (reply,)).lastrowid
        self._db.execute(
            "UPDATE requests SET state = 'done', owner = ?, reserved = 0, prompt_tokens = ?, completion_tokens = ?, cost = ?, reply = ?, kind = NULL,"
            " problem = NULL, ended_at = ? WHERE key = ?",
            (owner, num_prompt_tokens, num_completion_tokens, cost, reply_id, now, key),
        )
        used = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_completion_tokens, "cost": cost}
        self._add(found.run, done=1, failed=-(found.state == "failed"), **used)
        return ("ok",)

    def _fail(self, owner: str, now: float, key: bytes, n: int, kind: str, problem: str, is_final: bool) -> tuple:
        found = self._find(key)
        if found is None or found.owner != owner:
            return ("ok",)
        is_unsent = (
            found.state == "claimed" and is_final and n in (found.sends, found.sends + 1)
        )  # given up: an earlier send stays what it is
        if not is_unsent and (found.sends != n or found.state not in ("sent", "ambiguous")):
            return ("ok",)
        state = "failed" if is_final else "claimed"
        self._db.execute(
            "UPDATE requests SET state = ?, kind = ?, problem = ?, ended_at = ? WHERE key = ?",
            (state, kind, problem, now, key),
        )
        if found.state == "sent":
            self._db.execute("UPDATE requests SET reserved = 0 WHERE key = ?", (key,))
            self._add(found.run, reserved=-found.reserved)
        elif found.state == "ambiguous":  # it was taken for lost
            self._resolve(found)
        self._add(found.run, failed=int(is_final))
        return ("ok",)

    def _lose(self, owner: str, now: float, key: bytes, n: int, kind: str, problem: str, is_final: bool) -> tuple:
        found = self._find(key)
        if found is not None and found.owner == owner and found.state == "sent" and found.sends == n:
            self._mark_ambiguous(
                key, found.run, found.reserved, kind, problem, "ambiguous" if is_final else "claimed", now
            )
        return ("ok",)

    def _note_beat(self, owner: str, now: float, run: str = "") -> tuple:
        """`commit` has noted the beat."""
        found = self._db.execute("SELECT halted FROM runs WHERE run = ? AND halted IS NOT NULL", (run,)).fetchone()
        return ("halted", found[0]) if found else ("ok",)

    def _halt(self, owner: str, now: float, run: str, reason: str) -> tuple:
        self._db.execute("UPDATE runs SET halted = COALESCE(halted, ?) WHERE run = ?", (reason, run))
        self._budgets.pop(run, None)
        return ("ok",)


_APPLY: dict[str, Callable[..., tuple]] = {
    "claim": Ledger._claim,
    "send": Ledger._send,
    "open": Ledger._open,
    "done": Ledger._done,
    "fail": Ledger._fail,
    "lose": Ledger._lose,
    "halt": Ledger._halt,
    "beat": Ledger._note_beat,
}


class _Found(NamedTuple):
    """A request's columns that decide what an operation does. `is_unsure`: the last send is counted in its run as one without answer."""

    key: bytes
    run: str
    state: str
    owner: str
    sends: int
    is_unsure: int
    reserved: int
    problem: str | None
    settled: int
    repair: bytes | None
    reply: int | None


_FIND = f"SELECT {', '.join(_Found._fields)} FROM requests WHERE key = ?"


def new_owner(name: str) -> str:
    """A name for a worker that no other has had: its host, its process and a random part."""
    return f"{name}@{platform.node()}:{os.getpid()}:{os.urandom(4).hex()}"
