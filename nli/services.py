"""The two things that all workers of a cluster share, each behind an actor that outlives jobs and ends by itself: the ledger, and the account's limiter.

    ledger = LedgerClient(post, new_owner("worker"))
    answer = await ledger.call("send", key, 1, 412_000)      # on disk when it returns; operations of many calls travel and are flushed together
    limiter = LimiterClient(sync, "worker", num_workers=4)
    number = await limiter.acquire(412)                      # returns when the call may go out
    limiter.end(Ended(number, 371, "ok"))

`post` and `sync` lead to an object of this process (`GroupCommit.post`, `sync_locally`) or to an actor (`connect_ledger`, `connect_limiter`). Without its
actor, a LedgerClient waits until it is back, since nothing may be sent unclaimed; a LimiterClient goes on with a small share of the limits.
"""

import asyncio
import contextlib
import os
import time
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from nli.chat_api import chat_url
from nli.errors import NLIError, StorageError
from nli.ledger import LEASE_SECONDS, Ledger, Operation
from nli.limiter import FREE_SECONDS, LOOKAHEAD_SECONDS, MARGIN_SECONDS, WINDOW_SECONDS, AccountLimiter, Ended, Grants, Limits

NAMESPACE = "nli"
GATHER_SECONDS = 0.003  # operations that come within so long are flushed together; the contract is at most 0.05
IDLE_SECONDS = 120.0  # an actor that nobody has called for so long ends; longer than the limiter's window
LEDGER_PATIENCE_SECONDS = 120.0
START_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries to start an actor
HOLD_OFF_SECONDS = 3.0  # a new limiter waits so long for workers to leave their local shares
SYNC_SECONDS = 5.0  # without answer for so long, the limiter is taken for dead
STALE_SECONDS = 0.25  # by which a call may go out later than it was granted for; half of the limiter's margin
MOST_WANTS = 64  # calls that a worker asks for at a time


class Gatherer:
    """Collects items while the last flush runs, then flushes them together: one flush at a time, on one event loop."""

    def __init__(self, flush: Callable[[list], Awaitable[list]], gather_seconds: float = GATHER_SECONDS) -> None:
        self._flush = flush
        self._gather_seconds = gather_seconds
        self._waiting: list[tuple[object, asyncio.Future]] = []
        self._task: asyncio.Task | None = None

    async def submit(self, item: object) -> object:
        """The flush's answer to the item, or its error."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append((item, future))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._gather_seconds)
            taken, self._waiting = self._waiting, []
            try:
                answers = list(zip(taken, await self._flush([item for item, _ in taken]), strict=True))
            except Exception as error:  # every waiter learns of it
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in answers:
                if not future.done():
                    future.set_result(answer)


class GroupCommit:
    """A Ledger on an event loop: what owners post is committed by one thread, many posts to a flush."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._gatherer = Gatherer(self._commit, gather_seconds=0)  # what workers post has been gathered already

    async def post(self, owner: str, operations: Sequence[Operation]) -> list[tuple]:
        """The answers to an owner's operations; they are on disk when it returns."""
        return await self._gatherer.submit((owner, operations))

    async def _commit(self, posts: list) -> list:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.ledger.commit, posts)


class LedgerClient:
    """One worker's way to the ledger. `post` is `GroupCommit.post` or an actor's."""

    def __init__(self, post: Callable[[str, Sequence[Operation]], Awaitable[list[tuple]]], owner: str) -> None:
        self.owner = owner
        self._post = post
        self._gatherer = Gatherer(lambda operations: self._post(self.owner, operations))
        self._beating: asyncio.Task | None = None
        self._num_open = 0

    async def call(self, *operation: object) -> tuple:
        """The ledger's answer to one operation of `Ledger.commit`."""
        return await self._gatherer.submit(operation)

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Let the ledger hear of this worker while the block lasts, however long a call takes."""
        self._num_open += 1
        if self._beating is None or self._beating.done():
            self._beating = asyncio.get_running_loop().create_task(self._beat())
        try:
            yield
        finally:
            self._num_open -= 1

    async def _beat(self) -> None:
        while self._num_open:
            await asyncio.sleep(LEASE_SECONDS / 5)
            with contextlib.suppress(Exception):  # whoever needs the ledger meets the error; this goes on, since the worker lives
                await self.call("beat")


Sync = Callable[..., Awaitable[tuple[Grants, float, Limits]]]


class LimiterClient:
    """One worker's way to the account's limiter. `sync` is an actor's; None for a limiter of this worker alone.

    While `sync` fails, the worker keeps to 1/(2 x num_workers) of the limits by itself, and looks every second whether the limiter is back.
    """

    def __init__(self, sync: Sync | None, worker: str, limits: Limits, num_workers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.worker = worker
        self.failing_seconds = 0.0
        self._sync = sync
        self._version, self._limits = 0.0, limits
        self._num_workers = num_workers
        self._clock = clock
        self._own = None if sync else AccountLimiter(limits, clock)
        self._probe: asyncio.Task | None = None
        self._probed_at = 0.0
        self._let_go_alone: deque[float] = deque()  # when calls went out on the local share
        self._wants: deque[tuple[int, asyncio.Future]] = deque()
        self._ended: deque[tuple[float, Ended]] = deque()  # that the limiter has not heard of, with when it was
        self._ended_alone: list[Ended] = []  # the same for the local share
        self._held: dict[int, tuple[int, float]] = {}  # grants that have not ended: (most tokens, when the call may go out)
        self._num_free = 0  # calls under way without grant
        self._is_thought_busy = False  # by the limiter, which must hear that the last call has ended
        self._free_until = 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task | None = None

    async def acquire(self, most_tokens: int) -> int:
        """Wait until a call of at most so many tokens may go out; returns the number to end it with."""
        if self._clock() < self._free_until and not self._wants:
            self._num_free += 1
            self._start()
            return 0
        future = asyncio.get_running_loop().create_future()
        self._wants.append((most_tokens, future))
        self._start()
        try:
            number, delay = await future
            if delay > 0:
                await asyncio.sleep(delay)
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.end(Ended(future.result()[0], 0, "unknown"))
            raise
        return number

    async def renew(self, number: int, most_tokens: int) -> int:
        """The same number if its call can go out now; if its time has long passed, the number of another grant, so that calls held up do not go out at once."""
        if number not in self._held or self._clock() - self._held[number][1] <= STALE_SECONDS:
            return number
        self.end(Ended(number, 0, "unknown"))
        return await self.acquire(most_tokens)

    def end(self, ended: Ended) -> None:
        """Say how a call that `acquire` let go has ended."""
        if ended.number:
            self._held.pop(ended.number, None)
        else:
            self._num_free -= 1
        if ended.number or ended.ending not in ("ok", "unknown"):
            self._ended.append((self._clock(), ended))
            self._ended_alone.append(ended)
            self._start()
        if ended.ending in ("limited", "failed"):
            self._free_until = 0.0
        if ended.ending in ("limited", "failed") or self._wants:  # it may make room for the next one
            self._wake.set()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        elif self._wants:
            self._wake.set()

    async def _run(self) -> None:
        try:
            while self._wants or self._ended or self._held or self._num_free or self._is_thought_busy:
                wait = await self._step()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait)
                    await asyncio.sleep(0.01)  # others that come with it
        except Exception as error:  # none is expected; whoever waits must not wait for ever
            waiting = [future for _, future in self._wants if not future.done()]
            self._wants.clear()
            for future in waiting:
                future.set_exception(error)
            if not waiting:
                raise

    async def _step(self) -> float:
        """Ask once; returns how many seconds to wait before the next time."""
        self._wake.clear()
        self._wants = deque(want for want in self._wants if not want[1].done())
        self._is_thought_busy = bool(self._wants or self._held or self._num_free)
        asked_at = self._clock()
        grants = await self._ask([tokens for tokens, _ in list(self._wants)[:MOST_WANTS]])
        self.failing_seconds = grants.failing_seconds
        if grants.is_free:
            self._free_until = self._clock() + FREE_SECONDS
            while self._wants:
                self._let_go(0, 0.0, asked_at)
            return FREE_SECONDS
        self._free_until = 0.0
        for number, delay in zip(grants.numbers, grants.delays, strict=True):
            self._let_go(number, delay, asked_at)
        return min(1.0, max(0.02, grants.wait_seconds - LOOKAHEAD_SECONDS / 2)) if self._wants else 1.0

    def _let_go(self, number: int, delay: float, asked_at: float) -> None:
        tokens, future = self._wants.popleft()
        if number:
            # How long the answer took is the grant's age at most. What is usual on a busy machine is not held against it.
            now = self._clock()
            self._held[number] = tokens, delay + (asked_at if now - asked_at > 4 * STALE_SECONDS else max(asked_at, now - STALE_SECONDS / 2))
        else:
            self._num_free += 1
        if future.done():  # cancelled
            self.end(Ended(number, 0, "unknown"))
        else:
            future.set_result((number, delay))

    async def _ask(self, wants: list[int]) -> Grants:
        if self._sync is not None and (self._own is None or self._is_back()):
            now = self._clock()
            while self._let_go_alone and now - self._let_go_alone[0] > WINDOW_SECONDS + MARGIN_SECONDS:
                self._let_go_alone.popleft()
            num_ended, num_alone = len(self._ended), len(self._let_go_alone)
            try:
                ended = [_age(each, now - at) for at, each in self._ended]
                answer = await asyncio.wait_for(self._sync(self.worker, wants, ended, *self._under_way(), num_alone, self._version, self._limits), SYNC_SECONDS)
            except Exception:  # the actor died, or its node: whatever it is, the worker goes on by itself
                self._probed_at = self._clock()
                if self._own is None:
                    self._own = self._make_own()
            else:
                for _ in range(num_ended):
                    self._ended.popleft()
                for _ in range(num_alone):
                    self._let_go_alone.popleft()
                self._own = None
                self._ended_alone.clear()
                self._note(answer)
                return answer[0]
        ended, self._ended_alone = self._ended_alone, []
        grants = self._own.sync(self.worker, wants, ended, *self._under_way())
        if self._sync is None:
            self._ended.clear()
        else:
            self._let_go_alone.extend([self._clock()] * len(grants.numbers))
            while self._ended and self._clock() - self._ended[0][0] > WINDOW_SECONDS + MARGIN_SECONDS:
                self._ended.popleft()
        return grants

    def _under_way(self) -> tuple[dict[int, int], int]:
        return {number: tokens for number, (tokens, _) in self._held.items()}, self._num_free

    def _is_back(self) -> bool:
        """Whether the limiter answers again; it is asked in the background, so that one that hangs holds up nobody."""
        now = self._clock()
        if self._probe is None and now - self._probed_at >= 1.0:
            self._probed_at = now
            probing = self._sync(self.worker, [], [], *self._under_way(), 0, self._version, self._limits)
            self._probe = asyncio.get_running_loop().create_task(asyncio.wait_for(probing, SYNC_SECONDS))
            self._probe.add_done_callback(self._note_probe)
        if self._probe is None or not self._probe.done():
            return False
        probe, self._probe = self._probe, None
        return not probe.cancelled() and probe.exception() is None

    def _note_probe(self, probe: asyncio.Task) -> None:
        if not probe.cancelled() and probe.exception() is None:  # asked for here, since nobody may be left to look at it
            self._wake.set()

    def _note(self, answer: tuple[Grants, float, Limits]) -> None:
        grants, self._version, self._limits = answer
        self._num_workers = max(self._num_workers, grants.num_workers)  # other jobs have workers too

    def _make_own(self) -> AccountLimiter:
        """A limiter of this worker's share. Its first call waits a full space: the limiter before may have granted one just now, to every worker."""
        part = 1 / (2 * self._num_workers)
        limits = self._limits
        in_flight = max(1, int(limits.max_in_flight * part)) if limits.max_in_flight else 0
        share = Limits(requests_per_minute=limits.requests_per_minute * part, tokens_per_minute=limits.tokens_per_minute * part, max_in_flight=in_flight)
        space = (WINDOW_SECONDS + MARGIN_SECONDS) / share.requests_per_minute if share.requests_per_minute else 1.0
        return AccountLimiter(share, self._clock, hold_off_seconds=0.0 if share.is_none() else space)


def _age(ended: Ended, seconds: float) -> Ended:
    """What is told later than it happened. What the server said a while ago says nothing of now; the tokens count all the same."""
    if seconds > SYNC_SECONDS:
        return replace(ended, ending="unknown", retry_after=0.0)
    return replace(ended, sent_seconds_ago=ended.sent_seconds_ago + seconds)


class _Service:
    """What both actors have in common: they end when nobody has called them for a while."""

    _called_at = 0.0
    _watch: asyncio.Task | None = None

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds

    def _note_call(self) -> None:
        self._called_at = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        import ray

        while (rest := self._called_at + self._idle_seconds - time.monotonic()) > 0:
            await asyncio.sleep(rest)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def process_id(self) -> int:
        """The actor's process."""
        self._note_call()
        return os.getpid()


class LedgerService(_Service):
    """Ray actor on the machine where the ledger lies."""

    def __init__(self, folder: str, idle_seconds: float) -> None:
        super().__init__(idle_seconds)
        self._commits = GroupCommit(Ledger(Path(folder)))

    async def post(self, owner: str, operations: Sequence[Operation]) -> list[tuple] | NLIError:
        """`GroupCommit.post`; an error of ours comes back as a value, without Ray's stack traces."""
        self._note_call()
        try:
            return await self._commits.post(owner, operations)
        except NLIError as error:
            return error

    async def read_rows(self, worklist: str, first: int, last: int) -> list[str]:
        """Rows `first` to `last` of the pending ones in a worklist, as JSON."""
        from nli.worklist import read_pending

        self._note_call()
        return await asyncio.get_running_loop().run_in_executor(None, read_pending, worklist, first, last)


class LimiterService(_Service):
    """Ray actor for one account: one server and one key."""

    def __init__(self, limits: Limits, idle_seconds: float) -> None:
        import ray

        super().__init__(idle_seconds)
        with warnings.catch_warnings(action="ignore"):  # of a deprecated call inside Ray's own property
            follows_another = ray.get_runtime_context().was_current_actor_reconstructed
        self._hold_off = HOLD_OFF_SECONDS if follows_another else 0.0
        self._limiter = AccountLimiter(limits, hold_off_seconds=self._hold_off)
        self._version = 0.0

    async def sync(
        self, worker: str, wants: list[int], ended: list[Ended], held: dict[int, int], num_free: int, num_unseen: int, version: float, limits: Limits
    ) -> tuple[Grants, float, Limits]:
        """`AccountLimiter.sync`, and the limits in force with their version. A worker that knows newer ones (this actor may be a new one) brings them."""
        self._note_call()
        if version > self._version and self._hold_off and not self._version:  # those of the one before were not those it was made with
            self._limiter = AccountLimiter(limits, hold_off_seconds=self._hold_off)
        if version > self._version:
            self._version, self._limiter.limits = version, limits
        return self._limiter.sync(worker, wants, ended, held, num_free, num_unseen), self._version, self._limiter.limits

    async def set_limits(self, limits: Limits) -> Limits:
        """Change the limits while jobs run; returns those before."""
        self._note_call()
        before, self._limiter.limits = self._limiter.limits, limits
        if limits != before:
            self._version = time.time()
        return before

    async def describe(self) -> dict:
        """The limits in force, and how the account is doing."""
        self._note_call()
        limiter = self._limiter
        return {"limits": limiter.limits, "in_flight": limiter.num_in_flight, "ceiling": limiter.ceiling, "workers": limiter.num_workers}


def account_name(base_url: str, api_key: str) -> str:
    """The name of an account's limiter: its server, however its address is written, and a fingerprint of its key that the key cannot be found from."""
    url = chat_url(base_url)
    fingerprint = sha256(b"nli account\0" + url.encode() + b"\0" + api_key.encode()).hexdigest()[:12]
    return f"limiter:{url}:{fingerprint}"


def start_ledger_service(folder: Path):
    """The actor of a ledger folder, on this node; one that is there already is taken. Raises StorageError if the ledger cannot be opened."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": f"ledger:{folder}", "scheduling_strategy": here, "max_task_retries": -1}
    return _start(lambda: ray.remote(LedgerService).options(**options, **_shared_options()).remote(str(folder), IDLE_SECONDS), f"the ledger in {folder}")


def start_limiter_service(base_url: str, api_key: str, limits: Limits):
    """The limiter actor of an account; one that is there already is taken, with the limits that it has."""
    import ray

    options = {"name": account_name(base_url, api_key), "max_task_retries": 0}
    return _start(lambda: ray.remote(LimiterService).options(**options, **_shared_options()).remote(limits, IDLE_SECONDS), f"the limiter of {base_url}")


def _start(create: Callable[[], object], what: str):
    """An actor that has answered: one that was about to end for idleness has noted this call, or is replaced."""
    import ray

    waits = iter(START_WAITS)
    while True:
        try:
            actor = create()
            ray.get(actor.process_id.remote())
            return actor
        except ray.exceptions.RayActorError as error:
            wait = next(waits, None)
            if wait is None:
                raise StorageError(f"the process of {what} does not start: {str(error).strip().splitlines()[-1]}") from None
            time.sleep(wait)


def _shared_options() -> dict:
    return {"namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "max_restarts": -1, "num_cpus": 0, "max_concurrency": 1000}


def post_to_actor(actor) -> Callable[[str, Sequence[Operation]], Awaitable[list[tuple]]]:
    """A `post` for LedgerClient that goes to a LedgerService and waits for one that is being restarted. Raises StorageError when it stays away."""
    import ray

    async def post(owner: str, operations: Sequence[Operation]) -> list[tuple]:
        patient_until = time.monotonic() + LEDGER_PATIENCE_SECONDS
        while True:
            try:
                answer = await actor.post.remote(owner, operations)
            except ray.exceptions.RayActorError as error:
                if time.monotonic() > patient_until:
                    raise StorageError(f"the ledger's process is gone and does not come back ({type(error).__name__}); run the command again.") from None
                await asyncio.sleep(0.5)
                continue
            if isinstance(answer, NLIError):
                raise answer
            return answer

    return post


def sync_with_actor(actor) -> Callable[..., Awaitable[tuple[Grants, float, Limits]]]:
    """A `sync` for LimiterClient that goes to a LimiterService."""

    async def sync(*arguments: object) -> tuple[Grants, float, Limits]:
        return await actor.sync.remote(*arguments)

    return sync
