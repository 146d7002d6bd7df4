"""The sliding minute, on a clock that the test turns.

python -m pytest tests/test_limiter.py
"""

import asyncio

import pytest

from nli.limiter import MinuteLimiter


class Clock:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("nli.limiter.asyncio.sleep", clock.sleep)
    return clock


def grant_times(limiter, tokens):
    """When each of the requests, one after another, is let go, in seconds from the first."""

    async def run():
        return [(await limiter.acquire(count)).at - 1000.0 for count in tokens]

    return asyncio.run(run())


def test_requests_up_to_the_limit_go_at_once_and_the_next_waits_for_the_first_to_leave(clock):
    assert grant_times(MinuteLimiter(requests_per_minute=3, clock=clock), [1] * 7) == [0, 0, 0, 60, 60, 60, 120]


def test_tokens_count_with_the_request_that_asks(clock):
    assert grant_times(MinuteLimiter(tokens_per_minute=100, clock=clock), [60, 40, 1, 99, 1]) == [0, 0, 60, 60, 120]


def test_both_limits_hold_together(clock):
    assert grant_times(MinuteLimiter(requests_per_minute=2, tokens_per_minute=100, clock=clock), [80, 30, 10, 10]) == [0, 60, 60, 120]


def test_without_limits_nothing_waits_and_nothing_is_kept(clock):
    limiter = MinuteLimiter(clock=clock)
    assert grant_times(limiter, [10**9] * 50) == [0] * 50
    assert clock.slept == []


def test_a_request_larger_than_the_limit_goes_when_the_window_is_empty(clock):
    assert grant_times(MinuteLimiter(tokens_per_minute=100, clock=clock), [50, 500, 1]) == [0, 60, 120]


def test_what_a_reply_really_used_replaces_the_estimate(clock):
    limiter = MinuteLimiter(tokens_per_minute=100, clock=clock)

    async def run():
        limiter.settle(await limiter.acquire(90), used_tokens=20)
        second = await limiter.acquire(80)
        limiter.settle(second, used_tokens=200)
        third = await limiter.acquire(10)
        return second.at - 1000, third.at - 1000

    assert asyncio.run(run()) == (0, 60)


def test_no_sixty_seconds_hold_more_than_the_limit_not_only_no_clock_minute(clock):
    limiter = MinuteLimiter(requests_per_minute=10, clock=clock)

    async def run():
        times = []
        for step in range(40):
            clock.now += 2.5 if step % 10 else 21
            times.append((await limiter.acquire(1)).at)
        return times

    times = asyncio.run(run())
    for start in times:
        assert sum(start <= time < start + 60 for time in times) <= 10


def test_callers_side_by_side_share_one_window_and_go_in_turn(clock):
    limiter = MinuteLimiter(requests_per_minute=2, clock=clock)

    async def run():
        order = []

        async def call(name):
            order.append((name, (await limiter.acquire(1)).at - 1000))

        await asyncio.gather(*(call(name) for name in "abcde"))
        return order

    assert asyncio.run(run()) == [("a", 0), ("b", 0), ("c", 60), ("d", 60), ("e", 120)]


def test_half_a_request_a_minute_is_one_in_two_minutes(clock):
    assert grant_times(MinuteLimiter(requests_per_minute=0.5, clock=clock), [1, 1, 1]) == [0, 120, 240]


def test_the_wait_is_known_before_asking(clock):
    limiter = MinuteLimiter(requests_per_minute=1, clock=clock)
    assert limiter.seconds_to_wait(1) == 0
    asyncio.run(limiter.acquire(1))
    clock.now += 12.5
    assert limiter.seconds_to_wait(1) == 47.5
    clock.now += 47.5
    assert limiter.seconds_to_wait(1) == 0
