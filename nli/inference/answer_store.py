"""The finished rows of one inference run, on disk as they finish: `results/{name}.answers.sqlite`.

    store = AnswerStore(Path("results/reflected.answers.sqlite"))
    store.put([("17:9c…", False, '{"raw_text": "{\\"thought_process\\": …}", "predicted_label": 1, …}')])      on disk when it returns
    store.find_done(["17:9c…", "18:e1…"])      -> {"17:9c…"}
    store.read(["17:9c…", "18:e1…"])           -> {"17:9c…": {"raw_text": …, "predicted_label": 1, …}}

A row's key is its id with a hash of its pair, so an edited row never takes another's answer. A failed row is kept with its reason and asked again by the next
run. It is one SQLite file in WAL mode with synchronous=FULL: what `put` returned survives the death of every process. It stays beside the results as the
record of what was computed; without it, a run reads in its finished output.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nli.runtime.errors import DataError, StorageError
from nli.task.parsing import ParseStatus
from nli.task.records import Answer, Example, row_key

CHUNK = 500  # keys in one statement
_COLUMNS = ["key", "failed", "answer", "stored_at"]

_ANSWER_FIELDS = set(Answer.model_fields) - set(Example.model_fields)

Entry = tuple[str, bool, str]  # key, whether it failed, the answer as JSON


class AnswerStore:
    """One run's file. The process that makes it and the service that fills it are of one host, since WAL does not reach across hosts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started_at = time.time()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}).") from None
        with self._explaining():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
            self._db.executescript("PRAGMA cache_size=-8000; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, failed INTEGER, answer TEXT, stored_at REAL) WITHOUT ROWID"
            )

    def close(self) -> None:
        """Close the file. What was put is on disk already."""
        self._db.close()

    def check(self) -> None:
        """Raise StorageError if the file is damaged, or is not this project's."""
        with self._explaining():
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            columns = [
                name for (name,) in self._db.execute("SELECT name FROM pragma_table_info('answers') ORDER BY cid")
            ]
        if found != "ok":
            raise StorageError(self._cure(found))
        if columns != _COLUMNS:
            raise StorageError(self._cure(f"its columns are {', '.join(columns)}, not {', '.join(_COLUMNS)}"))

    def put(self, entries: Iterable[Entry]) -> int:
        """Store finished rows in one transaction; returns how many. A good answer is never replaced, a failed one by any."""
        now = time.time()
        with self._explaining():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                stored = self._db.executemany(
                    "INSERT INTO answers VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                    "failed = excluded.failed, answer = excluded.answer, stored_at = excluded.stored_at WHERE failed",
                    ((key, int(failed), answer, now) for key, failed, answer in entries),
                ).rowcount
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        return stored

    def find_done(self, keys: Sequence[str], failed_since: float | None = None) -> set[str]:
        """Those of the keys that have an answer; a failed one counts only if it was stored after `failed_since`."""
        since = time.time() + 1e9 if failed_since is None else failed_since
        return {row[0] for row in self._select("key", keys, "AND (NOT failed OR stored_at >= ?)", since)}

    def read(self, keys: Sequence[str]) -> dict[str, dict]:
        """The answers to the keys, as far as there are any."""
        try:
            return {key: json.loads(answer) for key, answer in self._select("key, answer", keys)}
        except ValueError as error:
            raise StorageError(self._cure(f"an answer is not JSON: {error}")) from None

    def count(self) -> int:
        """How many rows are stored."""
        with self._explaining():
            return self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]

    def count_since(self, moment: float) -> tuple[int, int, float | None]:
        """(rows, tokens written, when the first was stored) of what was stored since."""
        tokens = "CASE WHEN json_valid(answer) THEN json_extract(answer, '$.num_completion_tokens') END"
        query = f"SELECT COUNT(*), TOTAL({tokens}), MIN(stored_at) FROM answers WHERE stored_at >= ?"
        with self._explaining():
            rows, tokens, first = self._db.execute(query, (moment,)).fetchone()
        return rows, int(tokens), first

    def read_in(self, output: Path) -> None:
        """Take over the rows of a finished output, all or none. Raises DataError for a line that is none."""
        with open(output, encoding="utf-8", newline="\n") as file:
            self.put(_read_line(output, number, line) for number, line in enumerate(file, start=1))

    def _select(self, columns: str, keys: Sequence[str], condition: str = "", *values: object) -> Iterator[tuple]:
        for start in range(0, len(keys), CHUNK):
            part = keys[start : start + CHUNK]
            with self._explaining():
                yield from self._db.execute(
                    f"SELECT {columns} FROM answers WHERE key IN ({','.join('?' * len(part))}) {condition}",
                    (*part, *values),
                ).fetchall()

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"{self.path}: cannot be read or written ({error}). Free space or mend the disk; what was stored before is kept."
            ) from None
        except sqlite3.DatabaseError as error:
            raise StorageError(self._cure(error)) from None

    def _cure(self, fault: object) -> str:
        return f"{self.path}: damaged ({fault}). Move it away: rows of a finished output beside it are read in again, others are computed anew."


def _read_line(path: Path, number: int, line: str) -> Entry:
    try:
        row = json.loads(line)
        Answer.model_validate(row)
        answer = json.dumps(
            {name: value for name, value in row.items() if name in _ANSWER_FIELDS}, ensure_ascii=False
        )  # other columns are the pair's
        answer.encode()
        return row_key(row), row["parse_status"] == ParseStatus.REQUEST_FAILED, answer
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}:{number}: not a row of this project; repair or remove the line, and only its row is made again."
        ) from None
