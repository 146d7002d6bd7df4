"""The one place where the workers of an inference run get rows and bring answers: an actor on the driver's machine.

    desk = start_desk(worklist.path, [store.path, …], most_held=1536, frames=[…])
    await desk.take.remote(worker, 64, start)        -> [Work(number=17, target=0, key="17:9c…", row={"id": "17", "premise": …}), …]
    await desk.put.remote(worker, [(17, 0, "17:9c…", False, 38, '{"raw_text": …}')])      on disk when it returns

It ends with its driver: the next run's driver starts one of its own, on the same files, at once. If it dies by itself Ray starts it again; what workers had
in their hands then may be given out twice, and what is stored is not.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nli.answer_store import AnswerStore
from nli.answers import to_failed
from nli.errors import NLIError, StorageError
from nli.leases import Leases
from nli.services import Gatherer
from nli.worklist import count_pending, read_pending_work

GATHER_SECONDS = 0.005  # answers of several workers that come within so long are flushed together


class Work(NamedTuple):
    """One row to answer. `target` counts the models of the run, `key` is the row's."""

    number: int
    target: int
    key: str
    row: dict


Finished = tuple[int, int, str, bool, int, str]  # number, target, key, whether it failed, tokens written, the answer as JSON


class Desk:
    """Ray actor: rows out, answers in. Errors of ours come back as values, without Ray's stack traces."""

    def __init__(self, worklist: str, stores: Sequence[str], most_held: int, started_at: float, frames: Sequence[Mapping]) -> None:
        self._worklist = worklist
        self._stores = [AnswerStore(Path(path)) for path in stores]
        self._frames = frames
        self._started_at = started_at
        self._leases = Leases(count_pending(worklist), most_held)
        self._gatherer = Gatherer(self._flush, GATHER_SECONDS)
        self._figures: dict[str, dict] = {}
        self._first_at: float | None = None
        self._last_at: float | None = None
        self._num_stored = [0] * len(stores)  # since this desk was opened, by target
        self._num_tokens = 0
        self._given_up: dict[int, str] = {}  # rows with the reason, until that is stored

    async def begin(self, worker: str, log: str, start: str) -> str | NLIError | None:
        """`Leases.begin`; a row that was given up becomes a failed row. "" if there is nothing to do."""
        reason = self._leases.begin(worker, log, start)
        try:
            self._store_given_up()
        except NLIError as error:
            return error
        return "" if reason is None and self._leases.is_done else reason

    async def bury(self, worker: str, reason: str) -> None:
        """A worker says why it is about to end."""
        self._leases.bury(worker, reason)
        with contextlib.suppress(NLIError):  # whoever stores an answer meets the same error
            self._store_given_up()

    async def take(self, worker: str, most: int, start: str) -> list[Work] | NLIError | None:
        """`Leases.take`, with the rows. Those that are stored already are left out."""
        self._first_at = self._first_at or time.time()
        try:
            while numbers := self._leases.take(worker, most, start):
                work = [Work(*item) for item in read_pending_work(self._worklist, numbers)]
                stored = self._find_stored(work)
                self._leases.finish(worker, [item.number for item in work if item.number in stored])
                if left := [item for item in work if item.number not in stored]:
                    return left
            return numbers
        except NLIError as error:
            return error

    async def put(self, worker: str, finished: list[Finished], figures: dict) -> NLIError | None:
        """Store a worker's answers; they are on disk when it returns."""
        self._figures[worker] = figures
        try:
            return await self._gatherer.submit((worker, finished))
        except NLIError as error:
            return error

    async def describe(self) -> dict:
        """How far the run is: rows stored and deaths since it began, the seconds from the first row to the last, the engines' figures."""
        seconds = self._last_at - self._first_at if self._first_at and self._last_at else 0.0
        return {
            "rows": self._num_stored,
            "tokens": self._num_tokens,
            "deaths": self._leases.num_deaths,
            "seconds": seconds,
            "engines": list(self._figures.values()),
        }

    async def close(self) -> None:
        """Close the files."""
        for store in self._stores:
            store.close()

    async def _flush(self, posts: list[tuple[str, list[Finished]]]) -> list[None]:
        for target, store in enumerate(self._stores):
            entries = [(key, failed, answer) for _, items in posts for _, place, key, failed, _, answer in items if place == target]
            if entries:
                store.put(entries)
                self._num_stored[target] += len(entries)
        for worker, items in posts:
            self._leases.finish(worker, [item[0] for item in items])
            self._num_tokens += sum(item[4] for item in items)
        self._last_at = time.time()
        return [None] * len(posts)

    def _find_stored(self, work: Sequence[Work]) -> set[int]:
        stored = set()
        for target, store in enumerate(self._stores):
            mine = [item for item in work if item.target == target]
            done = store.find_done([item.key for item in mine], failed_since=self._started_at) if mine else set()
            stored.update(item.number for item in mine if item.key in done)
        return stored

    def _store_given_up(self) -> None:
        self._given_up |= self._leases.pop_given_up()
        given_up = dict(self._given_up)
        for item in (Work(*item) for item in read_pending_work(self._worklist, list(given_up))):
            answer = to_failed(self._frames[item.target], given_up[item.number])
            self._stores[item.target].put([(item.key, True, json.dumps(answer, ensure_ascii=False))])
            self._num_stored[item.target] += 1
            del self._given_up[item.number]


def start_desk(worklist: Path, stores: Sequence[Path], most_held: int, frames: Sequence[Mapping]):
    """The desk of a run, on this machine. Raises StorageError if it cannot open its files."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Task events would tell the dashboard of each of many messages a second.
    options = {"scheduling_strategy": here, "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 1000, "enable_task_events": False}
    desk = ray.remote(Desk).options(**options).remote(str(worklist), [str(path) for path in stores], most_held, time.time(), list(frames))
    try:
        ray.get(desk.describe.remote())
    except ray.exceptions.RayActorError as error:
        raise StorageError(f"the process that keeps {stores[0]} does not start: {str(error).strip().splitlines()[-1]}") from None
    return desk
