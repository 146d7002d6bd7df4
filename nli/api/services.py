"""The two things that all workers of a cluster share, each behind an actor that outlives jobs and ends by itself: the ledger, and the account's limiter.

    ledger = LedgerClient(post, new_owner("worker"))
    answer = await ledger.call("send", key, 1, 412_000)      # on disk when it returns; operations of many calls travel and are flushed together
    limiter = LimiterClient(sync_with_actor(actor), "worker", limits, num_workers=4)

`post` leads to an object of this process (`GroupCommit.post`) or to an actor (`post_to_actor`). Without its actor, a LedgerClient waits until it is back,
since nothing may be sent unclaimed; a LimiterClient (nli.api.limiter_client) goes on with a small share of the limits.
"""

import asyncio
import contextlib
import os
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from nli.api.chat import chat_url
from nli.api.ledger import LEASE_SECONDS, Ledger, Operation
from nli.api.limiter import AccountLimiter, Ended, Grants, Limits
from nli.api.limiter_client import Sync
from nli.runtime.errors import NLIError, StorageError

NAMESPACE = "nli"
GATHER_SECONDS = 0.003  # operations that come within so long are flushed together; the contract is at most 0.05
TRAVEL_GATHER_SECONDS = 0.01  # the same where they travel to an actor: a message costs more than a flush
MOST_DIRECT = 4  # workers of a run that may write the ledger themselves; more would queue for the disk, where the actor flushes once for all
IDLE_SECONDS = 120.0  # an actor that nobody has called for so long ends; longer than the limiter's window
LEDGER_PATIENCE_SECONDS = 120.0
START_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between tries to start an actor
HOLD_OFF_SECONDS = 3.0  # a new limiter waits so long for workers to leave their local shares


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
    """A Ledger on an event loop: many posts to a flush.

    A flush holds up the loop: whoever shares it waits for the disk anyway, and a thread would take longer to get its turn than the disk takes.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._gatherer = Gatherer(self._commit, gather_seconds=0)  # what workers post has been gathered already

    async def post(self, owner: str, operations: Sequence[Operation]) -> list[tuple]:
        """The answers to an owner's operations; they are on disk when it returns."""
        return await self._gatherer.submit((owner, operations))

    async def _commit(self, posts: list) -> list:
        return self.ledger.commit(posts)


class LedgerClient:
    """One worker's way to the ledger. `post` is `GroupCommit.post` or an actor's."""

    def __init__(
        self,
        post: Callable[[str, Sequence[Operation]], Awaitable[list[tuple]]],
        owner: str,
        gather_seconds: float = GATHER_SECONDS,
    ) -> None:
        self.owner = owner
        self._post = post
        self._gatherer = Gatherer(lambda operations: self._post(self.owner, operations), gather_seconds)
        self._beating: asyncio.Task | None = None
        self._num_open = 0

    async def call(self, *operation: object) -> tuple:
        """The ledger's answer to one operation of `Ledger.commit`."""
        return await self._gatherer.submit(operation)

    @contextlib.contextmanager
    def alive(self, run: str = "", on_halt: Callable[[str], object] = str) -> Iterator[None]:
        """Let the ledger hear of this worker while the block lasts, however long a call takes; `on_halt` is told why if the run is halted meanwhile."""
        self._num_open += 1
        if self._beating is None or self._beating.done():
            self._beating = asyncio.get_running_loop().create_task(self._beat(run, on_halt))
        try:
            yield
        finally:
            self._num_open -= 1

    async def _beat(self, run: str, on_halt: Callable[[str], object]) -> None:
        while self._num_open:
            await asyncio.sleep(LEASE_SECONDS / 5)
            with contextlib.suppress(
                Exception
            ):  # whoever needs the ledger meets the error; this goes on, since the worker lives
                answer = await self.call("beat", run)
                if answer[0] == "halted":
                    on_halt(answer[1])


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
        from nli.runtime.worklist import read_pending

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
        self,
        worker: str,
        wants: list[int],
        ended: list[Ended],
        held: dict[int, int],
        num_free: int,
        num_unseen: int,
        version: float,
        limits: Limits,
    ) -> tuple[Grants, float, Limits]:
        """`AccountLimiter.sync`, and the limits in force with their version. A worker that knows newer ones (this actor may be a new one) brings them."""
        self._note_call()
        if (
            version > self._version and self._hold_off and not self._version
        ):  # those of the one before were not those it was made with
            self._limiter = AccountLimiter(limits, hold_off_seconds=self._hold_off)
        if version > self._version:
            self._version, self._limiter.limits = version, limits
        return self._limiter.sync(worker, wants, ended, held, num_free, num_unseen), self._version, self._limiter.limits

    async def set_limits(self, limits: Limits) -> Limits:
        """Change the limits while jobs run; returns those before."""
        self._note_call()
        before, self._limiter.limits = self._limiter.limits, limits
        if limits != before:
            self._version = max(
                time.time(), self._version + 0.001
            )  # workers bring back what is newer, also after the clock was set back
        return before

    async def describe(self) -> dict:
        """The limits in force, and how the account is doing."""
        self._note_call()
        limiter = self._limiter
        return {
            "limits": limiter.limits,
            "in_flight": limiter.num_in_flight,
            "ceiling": limiter.ceiling,
            "workers": limiter.num_workers,
        }


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
    return _start(
        lambda: ray.remote(LedgerService).options(**options, **_shared_options()).remote(str(folder), IDLE_SECONDS),
        f"the ledger in {folder}",
    )


def start_limiter_service(base_url: str, api_key: str, limits: Limits):
    """The limiter actor of an account; one that is there already is taken, with the limits that it has."""
    import ray

    options = {"name": account_name(base_url, api_key), "max_task_retries": 0}
    return _start(
        lambda: ray.remote(LimiterService).options(**options, **_shared_options()).remote(limits, IDLE_SECONDS),
        f"the limiter of {base_url}",
    )


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
                raise StorageError(
                    f"the process of {what} does not start: {str(error).strip().splitlines()[-1]}"
                ) from None
            time.sleep(wait)


def _shared_options() -> dict:
    # Task events would tell the dashboard of each of hundreds of messages a second.
    return {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "num_cpus": 0,
        "max_concurrency": 1000,
        "enable_task_events": False,
    }


def open_ledger_client(actor, folder: Path, node: str, num_workers: int, owner: str) -> LedgerClient:
    """A worker's way to the ledger in a folder of a node: there it writes itself, since a message costs more than a flush; elsewhere the actor does."""
    import ray

    if num_workers <= MOST_DIRECT and ray.get_runtime_context().get_node_id() == node:
        return LedgerClient(GroupCommit(Ledger(folder)).post, owner)
    return LedgerClient(post_to_actor(actor), owner, TRAVEL_GATHER_SECONDS)


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
                    raise StorageError(
                        f"the ledger's process is gone and does not come back ({type(error).__name__}); run the command again."
                    ) from None
                await asyncio.sleep(0.5)
                continue
            if isinstance(answer, NLIError):
                raise answer
            return answer

    return post


def sync_with_actor(actor) -> Sync:
    """A `sync` for LimiterClient that goes to a LimiterService."""

    async def sync(*arguments: object) -> tuple[Grants, float, Limits]:
        return await actor.sync.remote(*arguments)

    return sync
