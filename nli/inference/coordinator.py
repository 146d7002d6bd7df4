"""The one place where the workers of an inference run get rows and bring answers: an actor on the driver's machine.

    desk = start_desk(worklist.path, [store.path, …], most_held=1536, frames=[…], num_workers=2)
    await ask(desk.take.remote(worker, 64, start, 0))        -> [Work(number=17, target=0, key="17:9c…", row={"id": "17", "premise": …}), …]
    await ask(desk.put.remote(worker, [(17, 0, "17:9c…", False, 38, '{"raw_text": …}')], {}))      on disk when it returns

It ends with its driver: the next run's driver starts one of its own, on the same files, at once. If it dies by itself Ray starts it again; what workers had
in their hands then may be given out twice, and what is stored is not. It also looks which machines are there: what a lost one had in its hands is for the
workers that are left, which have their engines; Ray may take long to find a place for another worker, or never find one.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nli.api.services import Gatherer
from nli.inference.answer_store import AnswerStore
from nli.inference.answers import to_failed
from nli.inference.leases import ENDED, Leases
from nli.runtime.errors import ModelError, NLIError, StorageError
from nli.runtime.worklist import count_pending, read_pending_work

GATHER_SECONDS = 0.005  # answers of several workers that come within so long are flushed together
LOOK_SECONDS = 2.0  # between two looks at the cluster's machines, and at workers that were not heard of for so long
SILENT_SECONDS = 60.0  # nobody waits for the rows of a worker that was not heard of for so long
IDLE_SECONDS = 60.0  # without any worker, until a line says so, and between two such lines
STALLED_SECONDS = 600.0  # the same where no row ends


class Work(NamedTuple):
    """One row to answer. `target` counts the models of the run, `key` is the row's."""

    number: int
    target: int
    key: str
    row: dict


Finished = tuple[
    int, int, str, bool, int, str
]  # number, target, key, whether it failed, tokens written, the answer as JSON


class Desk:
    """Ray actor: rows out, answers in. Errors of ours come back as values, without Ray's stack traces."""

    def __init__(
        self,
        worklist: str,
        stores: Sequence[str],
        most_held: int,
        started_at: float,
        frames: Sequence[Mapping],
        num_workers: int = 1,
    ) -> None:
        self._worklist = worklist
        self._stores = [AnswerStore(Path(path)) for path in stores]
        self._frames, self._num_workers = frames, num_workers
        self._started_at = started_at
        self._leases = Leases(count_pending(worklist), most_held)
        self._gatherer = Gatherer(self._flush, GATHER_SECONDS)
        self._figures: dict[str, dict] = {}
        before = [store.count_since(started_at) for store in self._stores]  # what a desk that died had stored
        self._num_stored = [rows for rows, _, _ in before]  # in this run, by target
        self._num_tokens = sum(tokens for _, tokens, _ in before)
        self._first_at: float | None = min((first for _, _, first in before if first is not None), default=None)
        self._last_at: float | None = None
        self._given_up: dict[int, str] = {}  # rows with the reason, until that is stored
        self._machines: dict[str, str] = {}  # of the workers
        self._without_engine: set[str] = set()  # workers that live and cannot work
        self._heard_at: dict[str, float] = {}  # of the workers
        self._staffed_at = self._moved_at = time.monotonic()  # when there was a worker, and when a row ended, last
        self._watch: asyncio.Task | None = None

    async def begin(self, worker: str, log: str, start: str, machine: str = "") -> str | NLIError | None:
        """`Leases.begin`; a row that was given up becomes a failed row. "" if there is nothing to do. `machine` is its id in the cluster."""
        await self._bury_lost()  # if it moved for that, its last start is not to blame
        reason = self._leases.begin(worker, log, start)
        self._without_engine.discard(worker)
        if machine:
            self._machines[worker] = machine
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

    async def resign(self, worker: str, problem: str) -> str | NLIError | None:
        """A worker has no engine and gets none. None: others may have one, ask again; "": nothing is left to do; an error: no worker has one."""
        self._note()
        is_new = worker not in self._without_engine
        if is_new:
            self._without_engine.add(worker)
            self._leases.bury(worker, problem)
        if self._leases.is_done:
            return ""
        if len(self._without_engine) >= max(self._num_workers, self._leases.num_workers):
            return ModelError(problem)
        if is_new:
            print(f"inference: a worker stays without an engine, the others go on: {problem}", flush=True)
        return None

    async def take(self, worker: str, most: int, start: str, num_running: int) -> list[Work] | NLIError | None:
        """`Leases.take`, with the rows. Those that are stored already are left out.

        While others work on the last ones nobody is sent away: should they die, whoever has an engine takes their rows.
        """
        self._first_at = self._first_at or time.time()
        self._note(worker)
        try:
            while numbers := self._leases.take(worker, most, start, has_none=not num_running):
                work = [Work(*item) for item in read_pending_work(self._worklist, numbers)]
                stored = self._find_stored(work)
                self._leases.finish(worker, [item.number for item in work if item.number in stored])
                if left := [item for item in work if item.number not in stored]:
                    return left
            return [] if numbers is None and self._may_get_more(worker) else numbers
        except NLIError as error:
            return error

    async def put(self, worker: str, finished: list[Finished], figures: dict) -> NLIError | None:
        """Store a worker's answers; they are on disk when it returns."""
        self._figures[worker] = figures
        self._note(worker)
        try:
            return await self._gatherer.submit((worker, finished))
        except NLIError as error:
            return error

    async def describe(self) -> dict:
        """How far the run is: rows stored and deaths since it began, the seconds from the first row to the last, the engines' figures."""
        self._note()
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
            entries = [
                (key, failed, answer)
                for _, items in posts
                for _, place, key, failed, _, answer in items
                if place == target
            ]
            if entries:
                self._num_stored[target] += store.put(entries)
        for worker, items in posts:
            self._leases.finish(worker, [item[0] for item in items])
            self._num_tokens += sum(item[4] for item in items)
        self._last_at = time.time()
        self._moved_at = time.monotonic()
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
            self._num_stored[item.target] += self._stores[item.target].put(
                [(item.key, True, json.dumps(answer, ensure_ascii=False))]
            )
            del self._given_up[item.number]

    def _note(self, worker: str = "") -> None:
        self._heard_at[worker] = time.monotonic()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(self._look_around())

    def _may_get_more(self, worker: str) -> bool:
        since = time.monotonic() - SILENT_SECONDS
        return any(self._heard_at.get(other, 0) > since for other in self._leases.list_holders() if other != worker)

    async def _look_around(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._bury_lost()
            await self._bury_ended()
            now = time.monotonic()
            if self._leases.num_alive or self._leases.is_done:
                self._staffed_at = now
            elif now - self._staffed_at >= IDLE_SECONDS:
                self._staffed_at = now
                print(
                    "inference: no worker: the cluster has no place for one. Add a machine, or stop; the same command goes on with this run.",
                    flush=True,
                )
            if now - self._moved_at >= STALLED_SECONDS and self._leases.num_alive and not self._leases.is_done:
                self._moved_at = now
                logs = "; ".join(self._leases.list_logs())
                print(
                    f"inference: no row has ended for {STALLED_SECONDS / 60:.0f} minutes. What the workers say: {logs}",
                    flush=True,
                )

    async def _bury_lost(self) -> None:
        """Bury the workers whose machine has left the cluster."""
        known = dict(self._machines)
        if not known:
            return
        try:
            machines = await asyncio.to_thread(list_machines)
        except Exception:  # the cluster's head does not answer: nothing is known
            return
        for worker, machine in known.items():
            if machine not in machines and self._machines.get(worker) == machine:
                del self._machines[worker]
                self._leases.bury(worker, "its machine is gone", machine_lost=True)

    async def _bury_ended(self) -> None:
        """Bury the workers whose process has ended with rows in its hands and whose next one waits for a place, which another worker may have taken."""
        since = time.monotonic() - LOOK_SECONDS
        silent = {
            worker: start for worker, start in self._leases.list_holders().items() if self._heard_at[worker] < since
        }
        with contextlib.suppress(Exception):  # the cluster's head does not answer: nothing is known
            for worker in await asyncio.to_thread(list_ended, silent):
                if self._leases.list_holders().get(worker) == silent[worker]:
                    self._leases.bury(worker, ENDED)
                    self._store_given_up()


def list_machines() -> set[str]:
    """The ids of the machines in the cluster."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def list_ended(workers: Iterable[str]) -> list[str]:
    """Those of the workers that have no process that could work: one that is about to start has no rows yet."""
    from ray._private.state import actors

    return [worker for worker in workers if actors(worker).get("State") in ("RESTARTING", "DEAD")]


async def ask(call: Awaitable) -> object:
    """What the desk answers; its errors are raised. Raises StorageError if it is gone for good."""
    with _naming_its_end():
        return _raise_errors(await call)


def ask_now(call) -> object:
    """`ask` where nothing can be awaited."""
    import ray

    with _naming_its_end():
        return _raise_errors(ray.get(call))


@contextlib.contextmanager
def _naming_its_end() -> Iterator[None]:
    from ray.exceptions import RayActorError

    try:
        yield
    except RayActorError as error:
        cause = str(error).strip().splitlines()[-1]
        raise StorageError(
            f"the process that keeps the answers has ended ({cause}). What it stored is kept; the same command goes on with the rest."
        ) from None


def _raise_errors(answer: object) -> object:
    if isinstance(answer, NLIError):
        raise answer
    return answer


def start_desk(worklist: Path, stores: Sequence[Path], most_held: int, frames: Sequence[Mapping], num_workers: int):
    """The desk of a run that waits for so many workers, on this machine. Raises StorageError if it cannot open its files."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Task events would tell the dashboard of each of many messages a second.
    options = {
        "scheduling_strategy": here,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 1000,
        "enable_task_events": False,
    }
    desk = (
        ray.remote(Desk)
        .options(**options)
        .remote(str(worklist), [str(path) for path in stores], most_held, time.time(), list(frames), num_workers)
    )
    try:
        ray.get(desk.describe.remote())
    except ray.exceptions.RayActorError as error:
        raise StorageError(
            f"the process that keeps {stores[0]} does not start: {str(error).strip().splitlines()[-1]}"
        ) from None
    return desk
