"""One limiter for an account: requests and tokens per minute and calls in flight, shared by all workers of all jobs that use the same server and key.

    limiter = AccountLimiter(Limits(requests_per_minute=300, tokens_per_minute=500_000, max_in_flight=64))
    limiter.sync("worker-1", wants=[412, 398], ended=[])         -> Grants(numbers=[7, 8], delays=[0.0, 0.2], …)    when the two calls may go out
    limiter.sync("worker-1", [], [Ended(7, 371, "ok")])          the call has ended; what it used replaces what it was taken for

Requests are spaced 60.5 s / limit apart (98 % of the limit from 200 a minute on, the other 2 % making up for workers that ask late), so that no 60 seconds
hold more than the limit as long as the ways of two calls to the server differ by less than about half a second, and a limiter that starts anew needs no
memory of the minute before. Tokens are counted from the grant until 60 seconds after the reply, at
their upper bound while the call is under way: whichever of the moments between a server counts at, no 60 seconds hold more than the limit. They are spaced
by what calls use on average as well, so that a minute's use is even, and a limiter that follows another may take it for that.

A worker says with each `sync` which grants it holds. So a grant whose answer was lost on the way does not stay in flight for ever, and a new limiter learns
of the calls that its predecessor let go.

On a 429 the calls in flight are halved, once for all calls that were sent before the cut, and grow again by one for each round of good replies (additive
increase, multiplicative decrease); `Retry-After` pauses the account. Failures in a row open a circuit breaker, which then lets single calls through.
"""

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nli.runtime.config import CountOrZero, NonNegative, config_class

WINDOW_SECONDS = 60.0
MARGIN_SECONDS = 0.5  # by which two calls' ways to the server may differ
CATCH_UP_SHARE = 0.02  # of the requests of a minute that may go out at once, later than they could have
FEWEST_TO_CATCH_UP = 200  # requests per minute
LOOKAHEAD_SECONDS = 0.25  # grants may be dated so far ahead, which saves round trips
FREE_SECONDS = 1.0  # how long a worker takes "no limit" for granted
LONGEST_PAUSE_SECONDS = 600.0
WORKER_LEASE_SECONDS = (
    15.0  # a worker that was silent for so long is dead, and its calls with it; live ones are heard every second
)
WAITING_SECONDS = 2.0  # a worker that waits for a grant asks at least every second
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

    def changed(
        self, requests_per_minute: float | None, tokens_per_minute: float | None, max_in_flight: int | None
    ) -> "Limits":
        """These limits with the given ones in their place; None leaves one as it is."""
        given = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "max_in_flight": max_in_flight,
        }
        return replace(self, **{name: value for name, value in given.items() if value is not None})


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
    circuit breaker is open; `num_workers` is how many workers were heard lately.
    """

    numbers: list[int] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    is_free: bool = True
    wait_seconds: float = 0.0
    failing_seconds: float = 0.0
    num_workers: int = 1


@dataclass
class _Call:
    most_tokens: int
    expected_tokens: float  # that its place in the tokens' schedule was made for


@dataclass
class _Worker:
    heard_at: float
    calls: dict[int, _Call] = field(default_factory=dict)
    num_free: int = 0  # its calls under way without grant
    is_waiting: bool = False  # it got less than it wanted


class AccountLimiter:
    """The limits of one account, for the callers of one event loop.

    `hold_off_seconds`: nothing is granted for so long, and the minute before is taken for a full one: what a limiter does that follows one that died.
    """

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.monotonic, hold_off_seconds: float = 0.0
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._first_number = self._next_number = 1 + secrets.randbits(48)  # none that an earlier limiter gave
        self._workers: dict[str, _Worker] = {}
        self._ended: deque[tuple[float, int]] = deque()  # (when they no longer count, tokens)
        self._num_tokens = 0  # of calls under way, at most, and of ended ones
        self._mean_tokens: float | None = None
        now = clock()
        self._next_request_at = now + hold_off_seconds
        self._next_tokens_at = now
        self._ceiling = 0.0  # most calls under way after a 429; 0: never cut
        self._cut_at = -math.inf
        self._paused_until = now + hold_off_seconds
        self._num_failures = 0  # in a row
        self._failing_since = now
        self._break_until = now
        self._break_seconds = 1.0
        if hold_off_seconds and limits.tokens_per_minute:
            share = math.ceil(limits.tokens_per_minute / WINDOW_SECONDS)
            self._ended.extend((now + second, share) for second in range(1, int(WINDOW_SECONDS) + 1))
            self._num_tokens = share * len(self._ended)

    @property
    def limits(self) -> Limits:
        """The limits in force. Set anew while calls are under way, they hold from the next grant on; what is owed to the schedules keeps its share."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        now, before = self._clock(), self._limits
        self._next_request_at = now + _rescale(
            self._next_request_at - now, before.requests_per_minute, limits.requests_per_minute
        )
        self._next_tokens_at = now + _rescale(
            self._next_tokens_at - now, before.tokens_per_minute, limits.tokens_per_minute
        )
        self._limits = limits

    @property
    def num_in_flight(self) -> int:
        """Calls under way, with and without grants, as far as their workers were heard."""
        return sum(len(worker.calls) + worker.num_free for worker in self._workers.values())

    @property
    def num_workers(self) -> int:
        """Workers that were heard lately."""
        return len(self._workers)

    @property
    def ceiling(self) -> float:
        """Most calls under way, after 429s have cut it; 0 while nothing bounds them."""
        return min((bound for bound in (self._ceiling, self.limits.max_in_flight) if bound), default=0)

    def sync(
        self,
        name: str,
        wants: Sequence[int],
        ended: Sequence[Ended],
        held: Mapping[int, int] | None = None,
        num_free: int = 0,
        num_unseen: int = 0,
    ) -> Grants:
        """Take note of calls that ended and grant what fits of those wanted, each given by the most tokens that it may use.

        `held`: all grants that the worker has not ended, with their most tokens; None: it does not say. `num_free`: its calls under way that needed no grant.
        `num_unseen`: calls of the last minute that it let go by itself while it heard of no limiter.
        """
        now = self._clock()
        worker = self._workers.setdefault(name, _Worker(now))
        worker.heard_at, worker.num_free = now, num_free
        for call in ended:
            self._end(worker, call, now)
        if held is not None:
            self._compare(worker, held, now)
        if num_unseen and self.limits.requests_per_minute:
            self._next_request_at = (
                max(now, self._next_request_at) + num_unseen * _request_spacing(self.limits.requests_per_minute)[0]
            )
        self._forget_the_silent(now)
        if self._is_free(now):
            worker.is_waiting = False
            worker.num_free += len(wants)  # they go out now
            return Grants(num_workers=self.num_workers)
        numbers, delays, wait = [], [], 0.0
        for tokens in wants:
            wait = self._seconds_to_wait(worker, tokens, now)
            if wait > LOOKAHEAD_SECONDS:
                break
            numbers.append(self._grant(worker, tokens, now))
            delays.append(wait)
        worker.is_waiting = len(numbers) < len(wants)
        return Grants(
            numbers, delays, False, wait, now - self._failing_since if self._is_broken() else 0.0, self.num_workers
        )

    def _grant(self, worker: _Worker, tokens: int, now: float) -> int:
        number, self._next_number = self._next_number, self._next_number + 1
        expected = tokens if self._mean_tokens is None else min(tokens, self._mean_tokens)
        worker.calls[number] = _Call(tokens, expected)
        self._num_tokens += tokens
        spacing, num_late = _request_spacing(self.limits.requests_per_minute)
        self._next_request_at = max(now - num_late * spacing, self._next_request_at) + spacing
        self._next_tokens_at = max(now, self._next_tokens_at) + expected * _spacing(self.limits.tokens_per_minute)
        return number

    def _compare(self, worker: _Worker, held: Mapping[int, int], now: float) -> None:
        """Drop grants that never reached the worker, and take over those of a limiter before this one."""
        for number in worker.calls.keys() - held.keys():
            self._end(worker, Ended(number, 0, "unknown"), now)
        for number in held.keys() - worker.calls.keys():
            worker.calls[number] = _Call(held[number], 0)
            self._num_tokens += held[number]

    def _is_broken(self) -> bool:
        return self._num_failures >= BREAKER_FAILURES

    def _is_free(self, now: float) -> bool:
        return self.limits.is_none() and not self._ceiling and now >= self._paused_until and not self._is_broken()

    def _seconds_to_wait(self, worker: _Worker, tokens: int, now: float) -> float:
        waits = [0.0, self._paused_until - now, self._next_request_at - now, self._next_tokens_at - now]
        if self._is_broken():
            waits.append(1.0 if self._has_grants_out() else self._break_until - now)  # one call at a time
        if self.ceiling and not self._has_room(worker, max(1, int(self.ceiling)), now):
            waits.append(1.0)
        if self.limits.tokens_per_minute:
            waits.append(self._seconds_until_tokens_fit(tokens, now))
        return max(waits)

    def _has_grants_out(self) -> bool:
        return any(worker.calls for worker in self._workers.values())

    def _has_room(self, worker: _Worker, most: int, now: float) -> bool:
        """Whether one more call may be under way. While others wait, no worker has more than its share: one that asks first each time would have all."""
        num_others = sum(
            other.is_waiting and now - other.heard_at <= WAITING_SECONDS
            for other in self._workers.values()
            if other is not worker
        )
        return self.num_in_flight < most and (not num_others or len(worker.calls) < math.ceil(most / (1 + num_others)))

    def _seconds_until_tokens_fit(self, tokens: int, now: float) -> float:
        while self._ended and self._ended[0][0] <= now:
            self._num_tokens -= self._ended.popleft()[1]
        over = self._num_tokens + tokens - self.limits.tokens_per_minute
        if over <= 0 or (not self._ended and not self._has_grants_out()):
            return 0.0  # a request that alone exceeds the limit goes when nothing else counts, rather than never
        for expiry, amount in self._ended:
            over -= amount
            if over <= 0:
                return expiry - now
        return 1.0  # calls under way must end first

    def _end(self, worker: _Worker, ended: Ended, now: float) -> None:
        call = worker.calls.pop(ended.number, None)
        if call is not None:
            self._num_tokens -= call.most_tokens
            self._next_tokens_at += (ended.tokens - call.expected_tokens) * _spacing(self.limits.tokens_per_minute)
        elif self._first_number <= ended.number < self._next_number:
            return  # it was told already, or its worker was taken for dead
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
            self._cut(ended, now)
        elif ended.ending == "ok":
            self._mean_tokens = (
                ended.tokens if self._mean_tokens is None else 0.95 * self._mean_tokens + 0.05 * ended.tokens
            )
            if self._ceiling:
                self._ceiling += 1 / self._ceiling

    def _cut(self, ended: Ended, now: float) -> None:
        self._paused_until = max(self._paused_until, now + min(ended.retry_after, LONGEST_PAUSE_SECONDS))
        unaware = LOOKAHEAD_SECONDS + (
            0.0 if ended.number else FREE_SECONDS
        )  # for so long calls go out whose worker has not heard of a cut
        if now - ended.sent_seconds_ago <= self._cut_at + unaware:
            return  # of the same wave
        under_way = self.num_in_flight + 1
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
        for name, worker in list(self._workers.items()):
            if now - worker.heard_at > WORKER_LEASE_SECONDS:
                for number, call in list(worker.calls.items()):
                    self._end(worker, Ended(number, call.most_tokens, "unknown"), now)
                del self._workers[name]


def _request_spacing(per_minute: float) -> tuple[float, int]:
    """(seconds between two requests, how many may be made up for at once when workers asked late).

    60 s hold at most 1 + num_late + 60 / seconds of them. For 0.02 of the limit that stays below it from about 120 a minute; the rest of 60.5 s is for jitter.
    """
    num_late = int(CATCH_UP_SHARE * per_minute) if per_minute >= FEWEST_TO_CATCH_UP else 0
    return (_spacing(per_minute - num_late) if per_minute else 0.0), num_late


def _spacing(per_minute: float) -> float:
    """Seconds between two of what a minute may hold so many of; 0 without limit."""
    return (WINDOW_SECONDS + MARGIN_SECONDS) / per_minute if per_minute else 0.0


def _rescale(seconds: float, before: float, after: float) -> float:
    """A wait until a schedule's next place, under another limit."""
    return seconds * before / after if seconds > 0 and after else 0.0
