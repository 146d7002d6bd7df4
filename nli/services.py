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
from hashlib import sha256
from pathlib import Path

from nli.errors import NLIError, StorageError
from nli.ledger import LEASE_SECONDS, Ledger, Operation
from nli.limiter import LOOKAHEAD_SECONDS, AccountLimiter, Ended, Grants, Limits

NAMESPACE = "nli"
GATHER_SECONDS = 0.005  # operations that come within so long are flushed together; the contract is at most 0.05
IDLE_SECONDS = 120.0  # an actor that nobody has called for so long ends; longer than the limiter's window
LEDGER_PATIENCE_SECONDS = 120.0
HOLD_OFF_SECONDS = 3.0  # a new limiter waits so long for workers to leave their local shares
FREE_SECONDS = 1.0  # how long a worker takes "no limit" for granted


class Gatherer:
    """Collects items while the last flush runs, then flushes them together: one flush at a time, on one event loop."""

    def __init__(self, flush: Callable[[list], Awaitable[list]]) -> None:
        self._flush = flush
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
            await asyncio.sleep(GATHER_SECONDS)
            taken, self._waiting = self._waiting, []
            try:
                answers = await self._flush([item for item, _ in taken])
            except Exception as error:  # every waiter learns of it
                for _, future in taken:
                    if not future.cancelled():
                        future.set_exception(error)
                continue
            for (_, future), answer in zip(taken, answers, strict=True):
                if not future.cancelled():
                    future.set_result(answer)


class GroupCommit:
    """A Ledger on an event loop: what owners post is committed by one thread, many posts to a flush."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._gatherer = Gatherer(self._commit)

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
            with contextlib.suppress(NLIError):  # whoever needs the ledger meets the error
                await self.call("beat")


class LimiterClient:
    """One worker's way to the account's limiter. `sync` is an actor's; None for a limiter of this worker alone.

    While `sync` fails, the worker keeps to 1/(2 x num_workers) of the limits by itself, and tries again every second.
    """

    def __init__(
        self,
        sync: Callable[..., Awaitable[tuple[Grants, float, Limits]]] | None,
        worker: str,
        limits: Limits,
        num_workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.failing_seconds = 0.0
        self._sync = sync
        self._version, self._limits = 0.0, limits
        self._num_workers = num_workers
        self._clock = clock
        self._own = None if sync else AccountLimiter(limits, clock)
        self._try_again_at = 0.0
        self._wants: deque[tuple[int, asyncio.Future]] = deque()
        self._ended: list[Ended] = []
        self._free_until = 0.0
        self._num_under_way = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task | None = None

    async def acquire(self, most_tokens: int) -> int:
        """Wait until a call of at most so many tokens may go out; returns the number to end it with."""
        if self._clock() < self._free_until and not self._wants:
            number = 0
            self._start()
        else:
            future = asyncio.get_running_loop().create_future()
            self._wants.append((most_tokens, future))
            self._start()
            number, delay = await future
            if delay > 0:
                await asyncio.sleep(delay)
        self._num_under_way += 1
        return number

    def end(self, ended: Ended) -> None:
        """Say how a call that `acquire` let go has ended."""
        self._num_under_way -= 1
        if ended.number or ended.ending != "ok":
            self._ended.append(ended)
        if ended.ending in ("limited", "failed"):
            self._free_until = 0.0
            self._wake.set()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())
        elif self._wants:
            self._wake.set()

    async def _run(self) -> None:
        while self._wants or self._ended or self._num_under_way:
            self._wake.clear()
            wants = [tokens for tokens, _ in list(self._wants)[:64]]
            ended, self._ended = self._ended, []
            grants = await self._ask(wants, ended)
            self.failing_seconds = grants.failing_seconds
            if grants.is_free:
                self._free_until = self._clock() + FREE_SECONDS
                while self._wants:
                    self._let_go(0, 0.0)
                wait = FREE_SECONDS
            else:
                self._free_until = 0.0
                for number, delay in zip(grants.numbers, grants.delays, strict=True):
                    self._let_go(number, delay)
                wait = min(1.0, max(0.02, grants.wait_seconds - LOOKAHEAD_SECONDS / 2)) if self._wants else 1.0
            with contextlib.suppress(TimeoutError):
                # A call that ends may make room for the next one, so it wakes this loop only when one waits.
                await asyncio.wait_for(self._wake.wait(), wait)
                await asyncio.sleep(0.01)

    def _let_go(self, number: int, delay: float) -> None:
        _, future = self._wants.popleft()
        if not future.cancelled():
            future.set_result((number, delay))

    async def _ask(self, wants: list[int], ended: list[Ended]) -> Grants:
        now = self._clock()
        if self._sync is not None and now >= self._try_again_at:
            try:
                answer = await asyncio.wait_for(self._sync(self.worker, wants, ended, self._num_under_way, self._version, self._limits), 5.0)
            except Exception:  # the actor died, or its node: whatever it is, the worker goes on by itself
                self._try_again_at = now + 1.0
                if self._own is None:
                    self._own = AccountLimiter(self._share(), self._clock)
            else:
                grants, self._version, self._limits = answer
                self._own = None
                return grants
        return self._own.sync(self.worker, wants, ended, self._num_under_way)

    def _share(self) -> Limits:
        part = 1 / (2 * self._num_workers)
        limits = self._limits
        in_flight = max(1, int(limits.max_in_flight * part)) if limits.max_in_flight else 0
        return Limits(requests_per_minute=limits.requests_per_minute * part, tokens_per_minute=limits.tokens_per_minute * part, max_in_flight=in_flight)


class _Service:
    """What both actors have in common: they end when nobody has called them for IDLE_SECONDS."""

    _called_at = 0.0
    _watch: asyncio.Task | None = None

    def _note_call(self) -> None:
        self._called_at = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.get_running_loop().create_task(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        import ray

        while time.monotonic() - self._called_at < IDLE_SECONDS:
            await asyncio.sleep(5)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def process_id(self) -> int:
        """The actor's process."""
        self._note_call()
        return os.getpid()


class LedgerService(_Service):
    """Ray actor on the machine where the ledger lies."""

    def __init__(self, folder: str) -> None:
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

    def __init__(self, limits: Limits) -> None:
        import ray

        with warnings.catch_warnings(action="ignore"):  # of a deprecated call inside Ray's own property
            follows_another = ray.get_runtime_context().was_current_actor_reconstructed
        self._limiter = AccountLimiter(limits, hold_off_seconds=HOLD_OFF_SECONDS if follows_another else 0.0)
        self._version = 0.0

    async def sync(self, worker: str, wants: list[int], ended: list[Ended], num_under_way: int, version: float, limits: Limits):
        """`AccountLimiter.sync`, and the limits in force with their version. A worker that knows newer ones (this actor may be a new one) brings them."""
        self._note_call()
        if version > self._version:
            self._version, self._limiter.limits = version, limits
        return self._limiter.sync(worker, wants, ended, num_under_way), self._version, self._limiter.limits

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
    """The name of an account's limiter: its server, and a fingerprint of its key that the key cannot be found from."""
    fingerprint = sha256(b"nli account\0" + base_url.encode() + b"\0" + api_key.encode()).hexdigest()[:12]
    return f"limiter:{base_url}:{fingerprint}"


def start_ledger_service(folder: Path):
    """The actor of a ledger folder, on this node; one that is there already is taken. Raises StorageError if the ledger cannot be opened."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": f"ledger:{folder}", "scheduling_strategy": here, "max_task_retries": -1}
    return ray.remote(LedgerService).options(**options, **_shared_options()).remote(str(folder))


def start_limiter_service(base_url: str, api_key: str, limits: Limits):
    """The limiter actor of an account; one that is there already is taken, with the limits that it has."""
    import ray

    return ray.remote(LimiterService).options(name=account_name(base_url, api_key), max_task_retries=0, **_shared_options()).remote(limits)


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
