"""One limiter for an account: requests and tokens per minute and calls in flight, shared by all workers of all jobs that use the same server and key.

    limiter = AccountLimiter(Limits(requests_per_minute=300, tokens_per_minute=500_000, max_in_flight=64))
    limiter.sync("worker-1", wants=[412, 398], ended=[])         -> Grants(numbers=[7, 8], delays=[0.0, 0.2], …)    when the two calls may go out
    limiter.sync("worker-1", [], [Ended(7, 371, "ok")])          the call has ended; what it used replaces what it was taken for

Requests are spaced 60.5 s / limit apart, so that no 60 seconds hold more than the limit as long as the ways of two calls to the server differ by less than
half a second, and a limiter that starts anew needs no memory of the minute before. Tokens are counted from the grant until 60 seconds after the reply, at
their upper bound while the call is under way: whichever of the moments between a server counts at, no 60 seconds hold more than the limit.

On a 429 the calls in flight are halved, once for all calls that were sent before the cut, and grow again by one for each round of good replies (additive
increase, multiplicative decrease); `Retry-After` pauses the account. Failures in a row open a circuit breaker, which then lets single calls through.
"""

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nli.config import CountOrZero, NonNegative, config_class

WINDOW_SECONDS = 60.0
MARGIN_SECONDS = 0.5  # by which two calls' ways to the server may differ
LOOKAHEAD_SECONDS = 0.25  # grants may be dated so far ahead, which saves round trips
LONGEST_PAUSE_SECONDS = 600.0
WORKER_LEASE_SECONDS = 15.0  # a worker that was silent for so long is dead, and its calls with it; live ones are heard every second
BREAKER_FAILURES = 20
LONGEST_BREAK_SECONDS = 60.0


@config_class
class Limits:
    """What an account may do. 0 is no limit."""

    requests_per_minute: NonNegative = 0
    """requests in any 60 seconds"""
    tokens_per_minute: NonNegative = 0
    """tokens of prompts and replies in any 60 seconds"""
    max_in_flight: CountOrZero = 0
    """calls under way at once"""

    def is_none(self) -> bool:
        """Whether nothing is limited."""
        return not (self.requests_per_minute or self.tokens_per_minute or self.max_in_flight)


@dataclass(frozen=True)
class Ended:
    """One call that ended: its grant's number (0 if it needed none), the tokens it used, how it ended and how old its send is.

    `ending` is "ok", "limited" (429), "failed" (5xx, no connection, no answer), "refused" (another 4xx: the server works) or "unknown" (a dead worker's).
    """

    number: int
    tokens: int
    ending: str
    sent_seconds_ago: float = 0.0
    retry_after: float = 0.0


@dataclass(frozen=True)
class Grants:
    """What a worker may do: calls of its wants, in order, each after a delay in seconds.

    While `is_free`, calls need no grant. `wait_seconds` is when the next want may fit; `failing_seconds` is for how long every call has failed, once the
    circuit breaker is open.
    """

    numbers: list[int] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    is_free: bool = True
    wait_seconds: float = 0.0
    failing_seconds: float = 0.0


@dataclass
class _Call:
    worker: str
    tokens: int


class AccountLimiter:
    """The limits of one account, for the callers of one event loop.

    `hold_off_seconds`: nothing is granted for so long, and the minute before is taken for a full one: what a limiter does that follows one that died.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic, hold_off_seconds: float = 0.0) -> None:
        self.limits = limits
        self._clock = clock
        self._numbers = itertools.count(secrets.randbits(48))  # none that an earlier limiter gave
        self._calls: dict[int, _Call] = {}  # under way
        self._ended: deque[tuple[float, int]] = deque()  # (when they no longer count, tokens)
        self._num_tokens = 0  # of both
        self._mean_tokens: float | None = None
        now = clock()
        self._next_at = now
        self._workers: dict[str, float] = {}
        self._ceiling = 0.0  # most calls under way after a 429; 0: never cut
        self._cut_at = -float("inf")
        self._paused_until = now + hold_off_seconds
        self._num_failures = 0  # in a row
        self._failing_since = now
        self._break_until = now
        self._break_seconds = 1.0
        if hold_off_seconds and limits.tokens_per_minute:
            share = int(limits.tokens_per_minute / WINDOW_SECONDS)
            self._ended.extend((now + second, share) for second in range(1, int(WINDOW_SECONDS) + 1))
            self._num_tokens = share * len(self._ended)

    @property
    def num_in_flight(self) -> int:
        """Calls that were granted and have not ended; calls that needed no grant are not among them."""
        return len(self._calls)

    @property
    def ceiling(self) -> float:
        """Most calls under way, after 429s have cut it; 0 while nothing bounds them."""
        return min((bound for bound in (self._ceiling, self.limits.max_in_flight) if bound), default=0)

    def sync(self, worker: str, wants: Sequence[int], ended: Sequence[Ended], num_under_way: int = 0, is_leaving: bool = False) -> Grants:
        """Take note of calls that ended and grant what fits of those wanted, each given by the most tokens that it may use.

        `num_under_way`: the worker's calls at this moment, with and without grants.
        """
        now = self._clock()
        self._workers[worker] = now
        for call in ended:
            self._end(call, now, num_under_way)
        self._forget_the_silent(now)
        if is_leaving:
            self._workers.pop(worker, None)
            return Grants()
        if self._is_free(now):
            return Grants()
        numbers, delays, wait = [], [], 0.0
        for tokens in wants:
            wait = self._seconds_to_wait(tokens, now)
            if wait > LOOKAHEAD_SECONDS:
                break
            number = next(self._numbers)
            self._calls[number] = _Call(worker, tokens)
            self._num_tokens += tokens
            self._next_at = max(now, self._next_at) + self._spacing(tokens)
            numbers.append(number)
            delays.append(wait)
        return Grants(numbers, delays, False, wait, now - self._failing_since if self._is_broken() else 0.0)

    def _is_broken(self) -> bool:
        return self._num_failures >= BREAKER_FAILURES

    def _is_free(self, now: float) -> bool:
        return self.limits.is_none() and not self._ceiling and now >= self._paused_until and not self._is_broken()

    def _spacing(self, tokens: int) -> float:
        limits, minute = self.limits, WINDOW_SECONDS + MARGIN_SECONDS
        by_requests = minute / limits.requests_per_minute if limits.requests_per_minute else 0.0
        expected = tokens if self._mean_tokens is None else self._mean_tokens
        by_tokens = minute * expected / limits.tokens_per_minute if limits.tokens_per_minute else 0.0
        return max(by_requests, by_tokens)

    def _seconds_to_wait(self, tokens: int, now: float) -> float:
        waits = [0.0, self._paused_until - now, self._next_at - now]
        if self._is_broken():
            waits.append(1.0 if self._calls else self._break_until - now)  # one call at a time
        if self.ceiling and len(self._calls) >= max(1, int(self.ceiling)):
            waits.append(1.0)
        if self.limits.tokens_per_minute:
            waits.append(self._seconds_until_tokens_fit(tokens, now))
        return max(waits)

    def _seconds_until_tokens_fit(self, tokens: int, now: float) -> float:
        while self._ended and self._ended[0][0] <= now:
            self._num_tokens -= self._ended.popleft()[1]
        over = self._num_tokens + tokens - self.limits.tokens_per_minute
        if over <= 0 or (not self._ended and not self._calls):
            return 0.0  # a request that alone exceeds the limit goes when nothing else counts, rather than never
        for expiry, amount in self._ended:
            over -= amount
            if over <= 0:
                return expiry - now
        return 1.0  # calls under way must end first

    def _end(self, ended: Ended, now: float, num_under_way: int) -> None:
        call = self._calls.pop(ended.number, None)
        if call is not None:
            self._num_tokens -= call.tokens
        if ended.tokens and self.limits.tokens_per_minute:
            self._num_tokens += ended.tokens
            self._ended.append((now + WINDOW_SECONDS + MARGIN_SECONDS, ended.tokens))
        if ended.ending == "unknown":
            return
        if ended.ending == "failed":
            self._count_failure(now)
            return
        self._num_failures, self._failing_since, self._break_seconds = 0, now, 1.0
        if ended.ending == "limited":
            self._cut(ended, now, num_under_way)
        elif ended.ending == "ok":
            self._mean_tokens = ended.tokens if self._mean_tokens is None else 0.95 * self._mean_tokens + 0.05 * ended.tokens
            if self._ceiling:
                self._ceiling += 1 / self._ceiling

    def _cut(self, ended: Ended, now: float, num_under_way: int) -> None:
        self._paused_until = max(self._paused_until, now + min(ended.retry_after, LONGEST_PAUSE_SECONDS))
        if now - ended.sent_seconds_ago <= self._cut_at:
            return  # it was sent before the last cut: of the same wave
        under_way = max(len(self._calls), num_under_way * max(1, len(self._workers))) + 1
        self._ceiling = max(1.0, min(self._ceiling or under_way, under_way) / 2)
        self._cut_at = now

    def _count_failure(self, now: float) -> None:
        self._num_failures += 1
        if self._num_failures == 1:
            self._failing_since = now
        if self._is_broken() and now >= self._break_until:
            self._break_until = now + self._break_seconds
            self._break_seconds = min(LONGEST_BREAK_SECONDS, 2 * self._break_seconds)

    def _forget_the_silent(self, now: float) -> None:
        silent = {worker for worker, heard_at in self._workers.items() if now - heard_at > WORKER_LEASE_SECONDS}
        for number, call in list(self._calls.items()) if silent else ():
            if call.worker in silent:
                self._end(Ended(number, call.tokens, "unknown"), now, 0)
        for worker in silent:
            del self._workers[worker]
