"""The worker of an inference run: keeps one engine full of rows, and brings each answer to the desk as it finishes.

Ray Data gives out tickets, each worth a number of rows; which rows they are, the desk says when a worker has room. A ticket ends when its worker has finished
that many rows since, whichever they are, so the engine stays as full at the end of a ticket as in its middle, and no worker is bound to rows that another one
could take. A ticket also ends when nothing is left.
"""

import asyncio
import contextlib
import json
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nli.api.services import Gatherer
from nli.engines.interface import Engine, EngineSettings, Generation, Request
from nli.engines.vllm.setup import MOST_ROWS
from nli.inference.answers import derive_seed, to_answer, to_failed
from nli.inference.coordinator import Work, ask, ask_now
from nli.runtime.errors import EngineDead, NLIError
from nli.task.prompts import render_prompt

PUT_SECONDS = 0.02  # answers that finish within so long travel together; a row is on disk within 50 ms of its end
ASK_AGAIN_SECONDS = 0.05  # between two requests for rows where the desk gave fewer than there is room for
FIGURES_SECONDS = 1.0
BURY_SECONDS = 10.0  # for the desk to learn why this process ends
RESIGNED_SECONDS = 0.5  # between two looks of a worker without an engine at whether the others are done
TICKETS_AT_ONCE = 13  # of one worker: all but one are always whole
MOST_TICKETS = 500  # of one run, as far as its length goes: each costs Ray Data some milliseconds


@dataclass(frozen=True)
class Target:
    """One of the models that a run asks: an adapter on the base, or the base itself."""

    adapter: str | None
    template: str
    frame: Mapping
    """fields that are the same in all its answers"""


@dataclass(frozen=True)
class Asking:
    """How rows become requests."""

    targets: tuple[Target, ...]
    num_samples: int = 1
    length_column: str = ""


@dataclass
class _Ticket:
    num_left: int
    done: asyncio.Future


class Student:
    """Ray Data actor: tickets in, how many rows were finished out; loads its engine once."""

    def __init__(
        self,
        desk,
        build: Callable[[str, EngineSettings], Engine],
        engine_name: str,
        settings: EngineSettings,
        asking: Asking,
    ) -> None:
        import ray

        self._desk, self._asking = desk, asking
        self._worker = ray.get_runtime_context().get_actor_id()
        self._start = f"{os.getpid()} at {time.time()}"
        reason = ask_now(
            desk.begin.remote(self._worker, describe_log(), self._start, ray.get_runtime_context().get_node_id())
        )
        self._engine = None
        self._problem = f"The engine {engine_name} cannot work: {reason}" if reason else ""  # why there is no engine
        if reason is None:  # else nothing is left to do
            try:
                self._engine = build(engine_name, settings)
            except NLIError as error:
                self._problem = str(error)
            except Exception as error:
                traceback.print_exc()
                self._problem = f"The engine {engine_name} cannot load {settings.base} ({type(error).__name__}: {error}). Its log: {describe_log()}"
        self._puts = Gatherer(self._put, PUT_SECONDS)
        self._tickets: deque[_Ticket] = deque()
        self._num_running = 0
        self._is_dying = False
        self._tasks: set[asyncio.Task] = set()
        self._feeder: asyncio.Task | None = None
        self._changed = asyncio.Event()
        self._figures: dict = {}
        self._figures_at = 0.0

    async def __call__(self, tickets: list[dict]) -> list[dict]:
        if self._problem:
            await self._leave_to_others()
        if self._engine is None:
            return []
        return [{"num_rows": await self._work_off(ticket["num_rows"])} for ticket in tickets]

    async def _leave_to_others(self) -> None:
        """Keep the tickets, which others have enough of, until the rows are done. Raises ModelError if no worker has an engine."""
        while await ask(self._desk.resign.remote(self._worker, self._problem)) is None:
            await asyncio.sleep(RESIGNED_SECONDS)

    async def _work_off(self, num_rows: int) -> int:
        """Wait until so many rows are finished, or nothing is left; returns how many were."""
        loop = asyncio.get_running_loop()
        ticket = _Ticket(num_rows, loop.create_future())
        self._tickets.append(ticket)
        self._changed.set()
        if self._feeder is None or self._feeder.done():
            self._feeder = loop.create_task(self._feed())
        await ticket.done
        return num_rows - ticket.num_left

    async def _feed(self) -> None:
        """Keep as many rows running as the open tickets are worth."""
        try:
            while self._tickets:
                self._changed.clear()  # before the look: what changes while the desk answers is seen
                room = sum(ticket.num_left for ticket in self._tickets) - self._num_running
                work = (
                    await ask(self._desk.take.remote(self._worker, room, self._start, self._num_running))
                    if room > 0
                    else []
                )
                for item in work or ():
                    self._num_running += 1
                    task = asyncio.get_running_loop().create_task(self._answer(Work(*item)))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                if work is None and not self._num_running:
                    self._end_tickets()
                    return
                is_short = room > len(work or ())
                with contextlib.suppress(
                    TimeoutError
                ):  # not wait_for, which in Python 3.11 swallows a cancellation that comes with the change
                    async with asyncio.timeout(ASK_AGAIN_SECONDS if is_short else None):
                        await self._changed.wait()
        except Exception as error:  # every ticket's caller learns of it
            self._end_tickets(error)

    async def _answer(self, work: Work) -> None:
        """Have one row answered and stored."""
        target = self._asking.targets[work.target]
        try:
            answer = to_answer(
                target.frame, await asyncio.gather(*[self._generate(request) for request in self._render(work, target)])
            )
            text = _dump(answer)
        except EngineDead as error:
            await self._die(str(error))
        except Exception as error:  # a row that breaks the engine's code is a failed row
            answer = to_failed(target.frame, f"{type(error).__name__}: {error}".encode(errors="replace").decode())
            text = _dump(answer)
        failed = answer["parse_status"] == "request_failed"
        try:
            await self._puts.submit(
                (work.number, work.target, work.key, failed, answer["num_completion_tokens"] or 0, text)
            )
        except Exception as error:
            self._end_tickets(error)
        self._num_running -= 1
        if self._tickets:
            self._tickets[0].num_left -= 1
            if not self._tickets[0].num_left:
                self._tickets.popleft().done.set_result(None)
        if not self._num_running:
            self._changed.set()

    def _render(self, work: Work, target: Target) -> list[Request]:
        prompt = render_prompt(target.template, work.row["premise"], work.row["hypothesis"])
        length = int(work.row[self._asking.length_column]) if self._asking.length_column else None
        return [
            Request(prompt, target.adapter, derive_seed(work.key, sample), length)
            for sample in range(self._asking.num_samples)
        ]

    async def _generate(self, request: Request) -> Generation:
        return await asyncio.wrap_future(self._engine.submit(request))

    async def _put(self, finished: Sequence[tuple]) -> list[None]:
        if time.monotonic() - self._figures_at > FIGURES_SECONDS or not self._num_running - len(finished):
            with contextlib.suppress(Exception):  # a figure is not worth the rows
                # In a thread: an engine in another process answers between two of its steps, and rows come in meanwhile.
                self._figures = {"engine": self._engine.description, **await asyncio.to_thread(self._engine.figures)}
            self._figures_at = time.monotonic()
        await ask(self._desk.put.remote(self._worker, list(finished), self._figures))
        return [None] * len(finished)

    async def _die(self, reason: str) -> None:
        """End this process, so that Ray starts a new one with an engine that works."""
        if self._is_dying:  # every row in the engine's hands learns of it
            await asyncio.Event().wait()
        self._is_dying = True
        print(f"inference: the engine is dead ({reason}); this worker starts again", flush=True)
        try:
            await asyncio.sleep(3 * PUT_SECONDS)  # what is finished is stored
            async with asyncio.timeout(BURY_SECONDS):
                await self._desk.bury.remote(self._worker, reason)
        finally:
            os._exit(1)

    def _end_tickets(self, error: Exception | None = None) -> None:
        while self._tickets:
            done = self._tickets.popleft().done
            if not done.done():
                done.set_exception(error) if error else done.set_result(None)


def plan_ticket(engine: str, settings: EngineSettings, num_samples: int, num_pending: int) -> tuple[int, int]:
    """(rows that one ticket is worth, most rows that one worker holds): all its tickets together are worth what it may hold, or more in a long run.

    vLLM needs a quarter more rows than it works on at once to be full at all times, transformers several times as many to sort by length. Without thoughts rows
    pass by in no time.
    """
    at_once = (
        settings.batch_size or {"vllm": MOST_ROWS, "transformers": 32 if settings.device == "cpu" else 256}[engine]
    )
    share = 4 if engine == "transformers" else 2 if settings.decoding.no_cot else 1.25
    rows = share * at_once / num_samples
    size = max(1, round(rows / (TICKETS_AT_ONCE - 1)))
    return max(size, num_pending // MOST_TICKETS), size * TICKETS_AT_ONCE


def describe_log() -> str:
    """Where this worker's process writes what its engine says, and on which machine."""
    import platform

    import ray

    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    return f"{folder}/worker-{ray.get_runtime_context().get_worker_id()}-*.err on {platform.node()}"


def _dump(answer: Mapping) -> str:
    """An answer as JSON. Raises ValueError if it holds half of a surrogate pair, which can be stored nowhere."""
    text = json.dumps(answer, ensure_ascii=False)
    text.encode()
    return text
