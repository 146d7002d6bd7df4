"""One worker's way to the account's limiter, which may be slow, gone for a while, or a new one.

    client = LimiterClient(sync, "worker", Limits(requests_per_minute=300), num_workers=4)
    number = await client.acquire(412)                       # returns when the call may go out
    client.end(Ended(number, 371, "ok"))

`sync` is an actor's (`nli.api.services.sync_with_actor`), or None for a limiter of this worker alone. One loop asks for all calls of the worker together, as long
as any waits or is under way. Without the actor, the worker goes on with a small share of the limits.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

from nli.api.limiter import (
    FREE_SECONDS,
    LOOKAHEAD_SECONDS,
    MARGIN_SECONDS,
    WINDOW_SECONDS,
    AccountLimiter,
    Ended,
    Grants,
    Limits,
)

SYNC_SECONDS = 5.0  # without answer for so long, the limiter is taken for dead
STALE_SECONDS = 0.25  # by which a call may go out later than it was granted for; half of the limiter's margin
MOST_WANTS = 64  # calls that a worker asks for at a time

Sync = Callable[..., Awaitable[tuple[Grants, float, Limits]]]


class LimiterClient:
    """One worker's way to the account's limiter. `sync` is an actor's; None for a limiter of this worker alone.

    While `sync` fails, the worker keeps to 1/(2 x num_workers) of the limits by itself, and looks every second whether the limiter is back.
    """

    def __init__(
        self,
        sync: Sync | None,
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
        self._probe: asyncio.Task | None = None
        self._probed_at = 0.0
        self._let_go_alone: deque[float] = deque()  # when calls went out on the local share
        self._wants: deque[tuple[int, asyncio.Future]] = deque()
        self._ended: deque[tuple[float, Ended]] = deque()  # that the limiter has not heard of, with when it was
        self._ended_alone: list[Ended] = []  # the same for the local share
        self._held: dict[
            int, tuple[int, float]
        ] = {}  # grants that have not ended: (most tokens, when the call may go out)
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

    def turn_away(self, error: Exception) -> None:
        """Raise an error for all who wait in `acquire`: a limit, or the circuit breaker, may hold them up for long."""
        for _, future in self._wants:
            if not future.done():
                future.set_exception(error)

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
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
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
            return 0.75 * FREE_SECONDS  # it is renewed before it runs out
        self._free_until = 0.0
        for number, delay in zip(grants.numbers, grants.delays, strict=True):
            self._let_go(number, delay, asked_at)
        return min(1.0, max(0.02, grants.wait_seconds - LOOKAHEAD_SECONDS / 2)) if self._wants else 1.0

    def _let_go(self, number: int, delay: float, asked_at: float) -> None:
        tokens, future = self._wants.popleft()
        if number:
            # How long the answer took is the grant's age at most. What is usual on a busy machine is not held against it.
            now = self._clock()
            self._held[number] = (
                tokens,
                delay + (asked_at if now - asked_at > 4 * STALE_SECONDS else max(asked_at, now - STALE_SECONDS / 2)),
            )
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
                answer = await self._sync_in_time(wants, ended, num_alone)
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

    async def _sync_in_time(self, wants: list[int], ended: list[Ended], num_alone: int) -> tuple[Grants, float, Limits]:
        # Not wait_for: Python 3.11's swallows a cancellation that comes with the answer, and the loop would go on for ever.
        async with asyncio.timeout(SYNC_SECONDS):
            return await self._sync(
                self.worker, wants, ended, *self._under_way(), num_alone, self._version, self._limits
            )

    def _under_way(self) -> tuple[dict[int, int], int]:
        return {number: tokens for number, (tokens, _) in self._held.items()}, self._num_free

    def _is_back(self) -> bool:
        """Whether the limiter answers again; it is asked in the background, so that one that hangs holds up nobody."""
        now = self._clock()
        if self._probe is None and now - self._probed_at >= 1.0:
            self._probed_at = now
            self._probe = asyncio.get_running_loop().create_task(self._sync_in_time([], [], 0))
            self._probe.add_done_callback(self._note_probe)
        if self._probe is None or not self._probe.done():
            return False
        probe, self._probe = self._probe, None
        return not probe.cancelled() and probe.exception() is None

    def _note_probe(self, probe: asyncio.Task) -> None:
        if (
            not probe.cancelled() and probe.exception() is None
        ):  # asked for here, since nobody may be left to look at it
            self._wake.set()

    def _note(self, answer: tuple[Grants, float, Limits]) -> None:
        grants, self._version, self._limits = answer
        self._num_workers = max(self._num_workers, grants.num_workers)  # other jobs have workers too

    def _make_own(self) -> AccountLimiter:
        """A limiter of this worker's share. Its first call waits a full space: the limiter before may have granted one just now, to every worker."""
        part = 1 / (2 * self._num_workers)
        limits = self._limits
        in_flight = max(1, int(limits.max_in_flight * part)) if limits.max_in_flight else 0
        share = Limits(
            requests_per_minute=limits.requests_per_minute * part,
            tokens_per_minute=limits.tokens_per_minute * part,
            max_in_flight=in_flight,
        )
        space = (WINDOW_SECONDS + MARGIN_SECONDS) / share.requests_per_minute if share.requests_per_minute else 1.0
        return AccountLimiter(share, self._clock, hold_off_seconds=0.0 if share.is_none() else space)


def _age(ended: Ended, seconds: float) -> Ended:
    """What is told later than it happened. What the server said a while ago says nothing of now; the tokens count all the same."""
    if seconds > SYNC_SECONDS:
        return replace(ended, ending="unknown", retry_after=0.0)
    return replace(ended, sent_seconds_ago=ended.sent_seconds_ago + seconds)
