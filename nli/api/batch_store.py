"""Where the jobs of Mistral's Batch API stand, beside the requests in the ledger's file.

    store = BatchStore(Path("data/ledger"))
    batch = store.add("data/original_thoughts/train.jsonl")       Batch(id="5c0f…", state="planning", …): nothing was sent, and nothing is lost
    store.update(batch, "uploaded", file_id="file-1")             on disk when it returns
    store.list_open("data/original_thoughts/train.jsonl")         what a run that follows a killed one takes up

    planning ─▶ planned ─▶ uploaded ─▶ creating ─▶ created ─▶ ended ─▶ taken
        └──────────┴──── dropped: no job was made, its requests are free again

A batch's requests are those whose owner in the ledger is `batch:<id>`; they stay claimed while the process that made the batch is dead, since the job at the
server lives on. The process that works on a batch holds a lock on its requests file, so that no other one does.
"""

import contextlib
import fcntl
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nli.api.ledger import BATCH_OWNER
from nli.api.ledger_file import connect
from nli.runtime.errors import StorageError

CLOSED = ("taken", "dropped")


@dataclass
class Batch:
    """One job at the server, or the intent to make one. `detail` holds what is worth keeping of it: counts, how it ended, where its results are."""

    id: str
    run: str
    state: str = "planning"
    file_id: str | None = None
    job_id: str | None = None
    detail: dict = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The owner of its requests in the ledger."""
        return BATCH_OWNER + self.id


@dataclass(frozen=True)
class OpenRequest:
    """A request that a batch has claimed and that has no answer yet; `num_sends` is what the ledger counts, `reserved` nano-dollars."""

    key: bytes
    state: str
    num_sends: int
    reserved: int


class BatchStore:
    """The batches of a ledger folder, whose file a `Ledger` has made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "batches"
        self._db = connect(folder / "ledger.sqlite")
        self._locks: dict[str, IO] = {}

    def close(self) -> None:
        """Close the file and give up the locks."""
        self._db.close()
        for file in self._locks.values():
            file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"{self.folder}: cannot be written ({error}). Free space or mend the disk; the same command goes on with its jobs."
            ) from None

    def add(self, run: str, **detail: object) -> Batch:
        """A new batch, locked for this process."""
        batch = Batch(secrets.token_hex(8), run, detail=detail)
        if not self.lock(batch):
            raise StorageError(f"{self.folder}: a new file there is locked; the file system does not keep locks apart.")
        with self._writing():
            self._db.execute(
                "INSERT INTO batches VALUES (?, ?, ?, NULL, NULL, ?, ?)",
                (batch.id, run, batch.state, json.dumps(detail), time.time()),
            )
        return batch

    def update(
        self, batch: Batch, state: str, file_id: str | None = None, job_id: str | None = None, **detail: object
    ) -> None:
        """Record how a batch stands now; what is not given stays."""
        batch.state, batch.file_id, batch.job_id = state, file_id or batch.file_id, job_id or batch.job_id
        batch.detail |= detail
        values = (state, batch.file_id, batch.job_id, json.dumps(batch.detail), time.time(), batch.id)
        with self._writing():
            self._db.execute(
                "UPDATE batches SET state = ?, file_id = ?, job_id = ?, detail = ?, changed_at = ? WHERE id = ?", values
            )

    def list_all(self, run: str | None = None) -> list[Batch]:
        """All batches, oldest first; with `run`, those of one output."""
        rows = self._db.execute(
            "SELECT id, run, state, file_id, job_id, detail FROM batches ORDER BY changed_at, id"
        ).fetchall()
        return [Batch(*row[:5], json.loads(row[5])) for row in rows if run in (None, row[1])]

    def list_open(self, run: str | None = None) -> list[Batch]:
        """The batches that somebody has to finish."""
        return [batch for batch in self.list_all(run) if batch.state not in CLOSED]

    def lock(self, batch: Batch) -> bool:
        """Whether this process may work on a batch: no other one does."""
        if batch.id in self._locks:
            return True
        with self._writing():
            self.folder.mkdir(exist_ok=True)
            file = open(self.path(batch, "lock"), "a", encoding="utf-8")  # noqa: SIM115  (held as long as the store is open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._locks[batch.id] = file
        return True

    def clear(self, batch: Batch) -> None:
        """Remove the files of a batch that is closed."""
        for path in self.folder.glob(f"*nli-{batch.id}.*"):  # parts that a killed process left among them
            path.unlink(missing_ok=True)

    def path(self, batch: Batch, kind: str) -> Path:
        """The place of one of a batch's files."""
        return self.folder / f"nli-{batch.id}.{kind}"

    def list_requests(self, batch: Batch) -> list[OpenRequest]:
        """The batch's requests without an answer."""
        query = "SELECT key, state, sends, reserved FROM requests WHERE run = ? AND state IN ('claimed', 'sent') AND owner = ?"
        return [OpenRequest(*row) for row in self._db.execute(query, (batch.run, batch.owner))]

    def find_requests(self, keys: Sequence[bytes]) -> dict[bytes, OpenRequest]:
        """How requests stand, by key, at most some hundreds at a time."""
        marks = ",".join("?" * len(keys))
        rows = self._db.execute(f"SELECT key, state, sends, reserved FROM requests WHERE key IN ({marks})", list(keys))
        return {row[0]: OpenRequest(*row) for row in rows}

    def find_owners(self, keys: Sequence[bytes]) -> Iterator[str]:
        """The ids of open batches that have claimed some of the keys."""
        marks = ",".join("?" * len(keys))
        query = f"SELECT DISTINCT owner FROM requests WHERE key IN ({marks}) AND state IN ('claimed', 'sent') AND owner LIKE '{BATCH_OWNER}%'"
        return (owner.removeprefix(BATCH_OWNER) for (owner,) in self._db.execute(query, list(keys)))
