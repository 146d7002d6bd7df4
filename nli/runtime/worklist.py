"""The rows of one run, on disk: what a generation stage goes through more than once without holding it in memory.

    with Worklist(folder / ".train.jsonl.rows.sqlite") as worklist:
        worklist.fill((row, key) for …)             # in input order; refuses two rows of one row key
        worklist.list_pending(is_done)              # the first row of each request that is not done
        for row, key in worklist.iterate(): …

One SQLite file without durability: a run that is killed makes it anew.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from nli.runtime.errors import DataError, StorageError
from nli.task.records import row_key

CHUNK = 500  # rows in one statement


class Worklist:
    """A file of rows with their request keys, removed at the end of the `with` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}).") from None
        with self._writing():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-8000;"
                "CREATE TABLE rows (n INTEGER PRIMARY KEY, row TEXT, key BLOB, row_key TEXT);"
                "CREATE TABLE pending (i INTEGER PRIMARY KEY, n INTEGER, target INTEGER);"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(
                f"{self.path}: cannot be written ({error}). Free space, or set TMPDIR to a folder with more of it."
            ) from None

    def __enter__(self) -> "Worklist":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()
        self.path.unlink(missing_ok=True)

    def fill(self, rows: Iterable[tuple[Mapping, bytes]], source: Path) -> int:
        """Store rows with the key of each one's request; returns how many. Raises DataError if two rows share id and pair."""
        numbered = ((json.dumps(row, ensure_ascii=False), key, row_key(row)) for row, key in rows)
        while chunk := list(islice(numbered, CHUNK)):
            with self._writing():
                self._db.execute("BEGIN")
                self._db.executemany("INSERT INTO rows (row, key, row_key) VALUES (?, ?, ?)", chunk)
                self._db.execute("COMMIT")
        with self._writing():
            self._db.execute("CREATE INDEX rows_by_key ON rows (key)")
            self._db.execute("CREATE INDEX rows_by_row_key ON rows (row_key)")
            repeated = self._db.execute(
                "SELECT MAX(n), row FROM rows GROUP BY row_key HAVING COUNT(*) > 1 ORDER BY 1 LIMIT 1"
            ).fetchone()
        if repeated:
            raise DataError(
                f"{source}: row {repeated[0]} repeats the id {json.loads(repeated[1])['id']!r} and the pair of an earlier row; remove one of them."
            )
        return self._db.execute("SELECT COUNT(*) FROM rows").fetchone()[0]

    def count_requests(self) -> int:
        """How many different requests the rows make."""
        with self._writing():  # what is sorted may need room too
            return self._db.execute("SELECT COUNT(DISTINCT key) FROM rows").fetchone()[0]

    def list_pending(self, are_done: Callable[[list[bytes]], set[bytes]], target: int = 0) -> int:
        """Put the first row of each request that is not done among the pending ones of a target; returns how many these are.

        `target` tells apart what is asked about the same rows several times, such as of several models.
        """
        with self._writing():
            requests = self._db.execute("SELECT MIN(n), key FROM rows GROUP BY key ORDER BY 1")
            writing = self._db.cursor()
            writing.execute("DELETE FROM pending WHERE target = ?", (target,))
            while chunk := requests.fetchmany(CHUNK):
                done = are_done([key for _, key in chunk])
                writing.executemany(
                    "INSERT INTO pending (n, target) VALUES (?, ?)",
                    [(n, target) for n, key in chunk if key not in done],
                )
        return self._db.execute("SELECT COUNT(*) FROM pending WHERE target = ?", (target,)).fetchone()[0]

    def iterate_pending_keys(self) -> Iterator[list[bytes]]:
        """Chunks of the keys of pending rows."""
        cursor = self._db.execute("SELECT key FROM pending JOIN rows USING (n) ORDER BY i")
        while chunk := cursor.fetchmany(CHUNK):
            yield [key for (key,) in chunk]

    def iterate(self) -> Iterator[list[tuple[dict, bytes]]]:
        """Chunks of (row, key), in input order."""
        cursor = self._db.execute("SELECT row, key FROM rows ORDER BY n")
        while chunk := cursor.fetchmany(CHUNK):
            yield [(json.loads(row), key) for row, key in chunk]


def read_pending(path: str, first: int, last: int) -> list[str]:
    """Pending rows `first` to `last` (from 1, both included) of a worklist, as JSON."""
    with _reading(path) as db:
        return [
            row
            for (row,) in db.execute(
                "SELECT row FROM pending JOIN rows USING (n) WHERE i BETWEEN ? AND ? ORDER BY i", (first, last)
            )
        ]


def read_pending_work(path: str, numbers: Sequence[int]) -> Iterator[tuple[int, int, str, dict]]:
    """(number, target, row key, row) of pending rows, by their numbers from 1."""
    with _reading(path) as db:
        for start in range(0, len(numbers), CHUNK):
            part = numbers[start : start + CHUNK]
            query = f"SELECT i, target, row_key, row FROM pending JOIN rows USING (n) WHERE i IN ({','.join('?' * len(part))}) ORDER BY i"
            for number, target, key, row in db.execute(query, part):
                yield number, target, key, json.loads(row)


def count_pending(path: str) -> int:
    """How many rows are pending in a worklist, over all its targets."""
    with _reading(path) as db:
        return db.execute("SELECT COUNT(*) FROM pending").fetchone()[0]


@contextlib.contextmanager
def _reading(path: str) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(sqlite3.connect(f"{Path(path).as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            yield db
    except sqlite3.Error as error:
        raise StorageError(
            f"{path}: cannot be read ({error}). It goes with its driver, or was removed; run the command again."
        ) from None
