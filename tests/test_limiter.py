"""The account's limiter: what a server sees in any 60 seconds, whatever becomes of workers, limiter and replies. On a clock that the test turns.

python -m pytest tests/test_limiter.py
"""

import asyncio
import math
import random

import pytest
from simulated import simulate

from nli.api.limiter import BREAKER_FAILURES, WORKER_LEASE_SECONDS, AccountLimiter, Ended, Grants, Limits
from nli.api.limiter_client import LimiterClient


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def limiter_of(clock, hold_off_seconds=0.0, **limits):
    return AccountLimiter(Limits(**limits), clock, hold_off_seconds)


def ok(number, tokens=0):
    return Ended(number, tokens, "ok")


# --- one limiter, call by call ---


def test_without_limits_calls_need_no_grant(clock):
    assert limiter_of(clock).sync("a", [10**9], []) == Grants()


def test_requests_are_spaced_evenly_and_dated_a_little_ahead(clock):
    spacing = 60.5 / (605 - 12)  # 2 % are left for making up
    limiter = limiter_of(clock, requests_per_minute=605)
    first = limiter.sync("a", [1] * 10, [])
    assert first.delays == pytest.approx([0.0, spacing, 2 * spacing])
    assert first.wait_seconds == pytest.approx(3 * spacing)
    assert not first.is_free
    clock.now += 3 * spacing
    assert limiter.sync("b", [1], []).delays == [pytest.approx(0.0)]


def test_workers_that_ask_late_make_up_for_two_percent_of_a_minute_and_no_more(clock):
    limiter = limiter_of(clock, requests_per_minute=605)
    limiter.sync("a", [1], [])
    clock.now += 30
    assert sum(delay == 0 for delay in limiter.sync("a", [1] * 50, []).delays) == 1 + 12
    small = limiter_of(clock, requests_per_minute=60)
    clock.now += 30
    assert small.sync("a", [1] * 50, []).delays == [0.0]


def test_numbers_are_never_those_of_another_limiter(clock):
    numbers = [limiter_of(clock, max_in_flight=5).sync("a", [1], []).numbers[0] for _ in range(20)]
    assert len(set(numbers)) == 20 and 0 not in numbers


def test_tokens_count_at_their_most_until_the_call_ends_and_then_for_a_minute_as_they_were(clock):
    limiter = limiter_of(clock, tokens_per_minute=1000)
    (number,) = limiter.sync("a", [900], []).numbers
    clock.now += 58
    assert limiter.sync("a", [200], []).numbers == []
    assert limiter.sync("a", [200], [ok(number, 100)]).numbers != []
    clock.now += 30
    assert limiter.sync("a", [701], []).numbers == []
    clock.now += 30.6
    assert len(limiter.sync("a", [701], []).numbers) == 1


def test_tokens_are_spaced_by_what_a_call_is_expected_to_use_and_by_what_it_used_once_that_is_known(clock):
    limiter = limiter_of(clock, tokens_per_minute=6050)  # a hundred tokens a second
    (number,) = limiter.sync("a", [1000], []).numbers
    assert limiter.sync("a", [1000], []).wait_seconds == pytest.approx(10)
    clock.now += 1
    assert limiter.sync("a", [1000], [ok(number, 300)]).wait_seconds == pytest.approx(2)
    clock.now += 2
    (number,) = limiter.sync("a", [1000], []).numbers
    assert limiter.sync("a", [1000], []).wait_seconds == pytest.approx(3)  # what they use on average
    clock.now += 1
    assert limiter.sync("a", [1000], [ok(number, 900)]).wait_seconds == pytest.approx(8)


def test_a_request_larger_than_the_token_limit_goes_when_nothing_else_counts(clock):
    limiter = limiter_of(clock, tokens_per_minute=100)
    (first,) = limiter.sync("a", [50], []).numbers
    clock.now += 60
    assert limiter.sync("a", [500], []).numbers == []
    assert limiter.sync("a", [500], [ok(first, 50)]).numbers == []
    clock.now += 61
    (large,) = limiter.sync("a", [500, 1], []).numbers
    clock.now += 400
    assert limiter.sync("a", [1], []).numbers == []
    assert limiter.sync("a", [], [ok(large, 90)]).numbers == []
    clock.now += 61
    assert len(limiter.sync("a", [1], []).numbers) == 1


def test_calls_in_flight_are_bounded_and_one_that_ends_makes_room(clock):
    limiter = limiter_of(clock, max_in_flight=2)
    first = limiter.sync("a", [1, 1, 1], []).numbers
    assert len(first) == 2
    assert limiter.num_in_flight == 2
    assert limiter.sync("b", [1], []).numbers == []
    assert (
        len(limiter.sync("b", [1], [ok(number) for number in first[:1]]).numbers) == 0
    )  # another worker's number is not b's to end
    limiter.sync("a", [], [ok(first[0])])
    assert len(limiter.sync("b", [1], []).numbers) == 1


def test_while_others_wait_no_worker_has_more_than_its_share(clock):
    limiter = limiter_of(clock, max_in_flight=8)
    mine = limiter.sync("greedy", [1] * 64, []).numbers
    assert len(mine) == 8
    assert limiter.sync("poor", [1] * 64, []).numbers == []
    assert len(limiter.sync("greedy", [1] * 64, [ok(number) for number in mine[:6]]).numbers) == 2
    theirs = limiter.sync("poor", [1] * 64, []).numbers
    assert len(theirs) == 4
    limiter.sync("poor", [], [ok(number) for number in theirs])
    assert len(limiter.sync("greedy", [1] * 64, []).numbers) == 4


def test_a_wave_of_429_is_one_cut_and_good_replies_raise_the_ceiling_by_one_a_round(clock):
    limiter = limiter_of(clock, max_in_flight=100)
    numbers = limiter.sync("a", [1] * 64, []).numbers
    clock.now += 0.5
    limiter.sync("a", [], [Ended(number, 0, "limited", sent_seconds_ago=0.5) for number in numbers[:10]])
    assert limiter.ceiling == 32
    clock.now += 2
    limiter.sync("a", [], [Ended(number, 0, "limited", sent_seconds_ago=2.4) for number in numbers[10:20]])
    assert limiter.ceiling == 32
    limiter.sync("a", [], [ok(number) for number in numbers[20:52]])
    assert limiter.ceiling == pytest.approx(33, abs=0.02)
    late = numbers[52]
    limiter.sync("a", [], [Ended(late, 0, "limited", sent_seconds_ago=0.1)])
    assert limiter.ceiling == pytest.approx((12) / 2)  # twelve were under way, this one included


def test_a_wave_among_calls_without_grants_is_one_cut_too_and_they_count_as_under_way(clock):
    limiter = limiter_of(clock)
    limiter.sync("b", [], [], num_free=20)
    limiter.sync("a", [], [Ended(0, 0, "limited", sent_seconds_ago=0.3)], num_free=19)
    assert limiter.ceiling == 20
    clock.now += 0.9  # b had not heard of it and sent on
    assert limiter.sync("b", [1], [Ended(0, 0, "limited", sent_seconds_ago=0.1)], num_free=19).numbers == []
    assert limiter.ceiling == 20
    assert limiter.sync("b", [1], [], num_free=0).numbers != []


def test_retry_after_pauses_the_whole_account(clock):
    limiter = limiter_of(clock)
    limiter.sync("a", [], [Ended(0, 0, "limited", retry_after=30)], num_free=3)
    assert limiter.sync("b", [1], []).wait_seconds == 30
    clock.now += 29
    assert limiter.sync("b", [1], []).numbers == []
    clock.now += 1
    assert len(limiter.sync("b", [1], []).numbers) == 1
    limiter.sync("a", [], [Ended(0, 0, "limited", retry_after=10**9)], num_free=3)
    assert limiter.sync("b", [1], []).wait_seconds == 600


def test_failures_in_a_row_open_the_breaker_single_calls_try_it_and_one_good_reply_closes_it(clock):
    limiter = limiter_of(clock)
    failed = Ended(0, 0, "failed")
    limiter.sync("a", [], [failed] * (BREAKER_FAILURES - 1))
    assert limiter.sync("a", [], []).is_free
    limiter.sync("a", [], [failed])
    grants = limiter.sync("a", [1], [])
    assert (grants.is_free, grants.numbers, grants.wait_seconds) == (False, [], 1.0)
    for wait in (1, 2, 4, 8, 16, 32, 60, 60):
        clock.now += wait - 0.3
        assert limiter.sync("a", [1], []).numbers == []
        clock.now += 0.3
        (number,) = limiter.sync("a", [1, 1], []).numbers
        assert limiter.sync("b", [1], []).numbers == []
        clock.now += 0.1
        grants = limiter.sync("a", [], [Ended(number, 0, "failed")])
    assert grants.failing_seconds == pytest.approx(183.8)
    clock.now += 60
    (number,) = limiter.sync("b", [1], []).numbers
    assert limiter.sync("b", [], [ok(number)]) == Grants(num_workers=1)


@pytest.mark.parametrize("ending", ["limited", "refused", "ok"])
def test_an_answer_of_any_kind_ends_a_row_of_failures(clock, ending):
    limiter = limiter_of(clock)
    limiter.sync(
        "a",
        [],
        [Ended(0, 0, "failed")] * (BREAKER_FAILURES - 1)
        + [Ended(0, 0, ending)]
        + [Ended(0, 0, "failed")] * (BREAKER_FAILURES - 1),
    )
    assert limiter.sync("a", [], []).failing_seconds == 0


def test_limits_change_while_calls_are_under_way(clock):
    limiter = limiter_of(clock, requests_per_minute=1)
    limiter.sync("a", [1], [])
    assert limiter.sync("a", [1], []).wait_seconds == 60.5
    limiter.limits = Limits(requests_per_minute=605)
    assert limiter.sync("a", [1], []).delays == [pytest.approx(0.1)]
    limiter.limits = Limits(requests_per_minute=1)
    assert 121 <= limiter.sync("a", [1], []).wait_seconds < 123
    limiter.limits = Limits(max_in_flight=3)
    assert len(limiter.sync("a", [1] * 9, []).numbers) == 1
    limiter.limits = Limits()
    assert limiter.sync("a", [1], []).is_free


def test_silent_workers_are_forgotten_and_their_tokens_count_for_a_minute_more(clock):
    limiter = limiter_of(clock, max_in_flight=1, tokens_per_minute=1000)
    assert len(limiter.sync("dead", [900], []).numbers) == 1
    for _ in range(int(WORKER_LEASE_SECONDS)):
        clock.now += 1
        assert limiter.sync("a", [50], []).numbers == []
    assert (limiter.num_in_flight, limiter.num_workers) == (1, 2)
    clock.now += 1
    limiter.sync("a", [], [])
    assert (limiter.num_in_flight, limiter.num_workers) == (0, 1)
    clock.now += 60
    assert limiter.sync("a", [200], []).numbers == []
    clock.now += 1
    assert len(limiter.sync("a", [200], []).numbers) == 1


def test_what_a_forgotten_worker_says_afterwards_counts_once(clock):
    limiter = limiter_of(clock, max_in_flight=5, tokens_per_minute=1000)
    (number,) = limiter.sync("slow", [400], []).numbers
    clock.now += WORKER_LEASE_SECONDS + 1
    limiter.sync("a", [], [])
    assert limiter._num_tokens == 400
    limiter.sync("slow", [], [Ended(number, 300, "limited")], held={})
    assert (limiter._num_tokens, limiter.ceiling) == (400, 5)


def test_grants_that_never_reached_their_worker_are_free_again(clock):
    limiter = limiter_of(clock, max_in_flight=3, tokens_per_minute=1000)
    (known,) = limiter.sync("a", [300], [], held={}).numbers
    clock.now += 60
    limiter.sync("a", [300, 300], [], held={known: 300})  # the answer is lost
    limiter.sync("a", [], [], held={known: 300})
    assert (limiter.num_in_flight, limiter._num_tokens) == (1, 300)


def test_a_report_that_is_told_twice_counts_once(clock):
    limiter = limiter_of(clock, max_in_flight=8, tokens_per_minute=1000)
    (number,) = limiter.sync("a", [300], []).numbers
    for _ in range(3):
        limiter.sync("a", [], [Ended(number, 200, "limited")], held={})
    assert (limiter._num_tokens, limiter.num_in_flight, limiter.ceiling) == (200, 0, 1)


def test_a_new_limiter_learns_of_the_calls_that_the_one_before_let_go(clock):
    before = limiter_of(clock, max_in_flight=4, tokens_per_minute=1000)
    numbers = before.sync("a", [100, 100, 100, 100], []).numbers
    clock.now += 60
    numbers += before.sync("a", [100] * 3, []).numbers
    held = dict.fromkeys(numbers, 100)
    after = limiter_of(clock, hold_off_seconds=3.0, max_in_flight=len(numbers), tokens_per_minute=10_000)
    after.sync("a", [], [], held=held)
    clock.now += 3
    assert after.sync("a", [1], [], held=held).numbers == []
    assert len(after.sync("a", [1], [ok(numbers[0], 70)], held=dict.fromkeys(numbers[1:], 100)).numbers) == 1


def test_calls_that_a_worker_let_go_by_itself_take_their_places_in_the_schedule(clock):
    limiter = limiter_of(clock, requests_per_minute=10)
    assert limiter.sync("a", [1], [], num_unseen=3).wait_seconds == pytest.approx(3 * 6.05)


# --- eight workers and a server, in simulated time ---


class Server:
    """Notes when calls come in and are answered, and what they use."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.replies: list[tuple[float, int]] = []
        self.in_flight = self.most_in_flight = 0

    def worst_minute(self, events="arrivals") -> tuple[int, int]:
        """The most calls and the most tokens in any 60 seconds."""
        found = sorted(getattr(self, events))
        most_calls = most_tokens = tokens = first = 0
        for index, (at, used) in enumerate(found):
            tokens += used
            while found[first][0] <= at - 60:
                tokens -= found[first][1]
                first += 1
            most_calls, most_tokens = max(most_calls, index - first + 1), max(most_tokens, tokens)
        return most_calls, most_tokens


class Account:
    """A limiter that may die and come back, as workers reach it: with latency, and with answers that get lost."""

    def __init__(self, limits: Limits, chance: random.Random, lost: float = 0.0) -> None:
        self.limits, self.chance, self.lost = limits, chance, lost
        self.clock = asyncio.get_running_loop().time
        self.limiter: AccountLimiter | None = AccountLimiter(limits, self.clock)

    async def sync(self, worker, wants, ended, held, num_free, num_unseen, version, limits):
        await asyncio.sleep(self.chance.uniform(0.001, 0.03))
        if self.limiter is None:
            raise ConnectionError("dead")
        answer = self.limiter.sync(worker, wants, ended, dict(held), num_free, num_unseen), 0.0, self.limiter.limits
        if self.chance.random() < self.lost:
            await asyncio.sleep(1e6)
        await asyncio.sleep(self.chance.uniform(0.001, 0.03))
        return answer

    async def restart(self, after: float, away: float) -> None:
        await asyncio.sleep(after)
        self.limiter = None
        await asyncio.sleep(away)
        self.limiter = AccountLimiter(self.limits, self.clock, hold_off_seconds=3.0)


async def ask_for(
    seconds,
    limits,
    seed=0,
    restarts=(),
    lost=0.0,
    num_workers=8,
    tasks=16,
    latency=(0.3, 3.0),
    tokens=(200, 600),
    stalls=(),
):
    """Let workers ask for so long; returns the server and the clients. `stalls`: moments at which the ledger answers nobody for five seconds."""
    chance = random.Random(seed)
    loop, server = asyncio.get_running_loop(), Server()
    start, account = loop.time(), Account(limits, chance, lost)
    clients = [
        LimiterClient(account.sync, f"worker-{index}", limits, num_workers, loop.time) for index in range(num_workers)
    ]
    lives = [asyncio.create_task(account.restart(*restart)) for restart in restarts]

    async def one_by_one(client):
        while loop.time() < start + seconds:
            used = chance.randint(*tokens)
            number = await client.acquire(2 * used)
            await asyncio.sleep(
                chance.uniform(0.005, 0.05)
                + max([0.0, *(at + 5 - (loop.time() - start) for at in stalls if 0 <= loop.time() - start - at < 5)])
            )
            number = await client.renew(number, 2 * used)
            await asyncio.sleep(chance.uniform(0.0, 0.1))
            server.arrivals.append((loop.time(), used))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            await asyncio.sleep(chance.uniform(*latency))
            server.in_flight -= 1
            server.replies.append((loop.time(), used))
            client.end(Ended(number, used, "ok"))

    workers = [asyncio.create_task(one_by_one(client)) for client in clients for _ in range(tasks)]
    await asyncio.sleep(seconds)
    server.arrivals_in_time = len(server.arrivals)
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await asyncio.gather(*lives)
    server.account = account
    return server, clients


@pytest.mark.parametrize("limit", [1, 10, 60, 1200])
def test_no_sixty_seconds_at_the_server_hold_more_requests_than_the_limit_and_nearly_as_many_go(limit):
    seconds = {1: 1200, 10: 600, 60: 300, 1200: 130}[limit]
    server, _ = simulate(ask_for(seconds, Limits(requests_per_minute=limit)))
    assert server.worst_minute()[0] <= limit
    assert len(server.arrivals) >= math.floor(0.95 * limit * seconds / 60)


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_no_sixty_seconds_hold_more_tokens_than_the_limit_whether_counted_at_the_call_or_the_reply(limit):
    server, _ = simulate(ask_for(300, Limits(tokens_per_minute=limit)))
    assert server.worst_minute("arrivals")[1] <= limit
    assert server.worst_minute("replies")[1] <= limit
    assert sum(used for _, used in server.arrivals) >= 0.6 * limit * 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_minute": 10},
        {"requests_per_minute": 1200},
        {"tokens_per_minute": 50_000},
        {"requests_per_minute": 120, "tokens_per_minute": 40_000},
    ],
    ids=["10 requests", "1200 requests", "50k tokens", "both"],
)
def test_nor_do_they_when_the_limiter_dies_and_comes_back(limits, seed):
    restarts = [(37 + 5 * seed, 2.5), (70, 30 if seed == 2 else 1)]
    server, _ = simulate(ask_for(200, Limits(**limits), seed, restarts))
    worst = [server.worst_minute(events) for events in ("arrivals", "replies")]
    assert worst[0][0] <= limits.get("requests_per_minute", math.inf)
    assert max(tokens for _, tokens in worst) <= limits.get("tokens_per_minute", math.inf)


def test_nor_do_they_when_the_ledger_holds_up_all_calls_for_a_while():
    server, _ = simulate(ask_for(130, Limits(requests_per_minute=300), stalls=(40, 80)))
    assert server.worst_minute()[0] <= 300


def test_without_the_limiter_workers_go_on_at_half_the_limit():
    server, _ = simulate(ask_for(200, Limits(requests_per_minute=1200), restarts=[(0.5, 1000)]))
    assert 0.4 * 1200 * 3 <= len(server.arrivals) <= 0.5 * 1200 * 200 / 60 + 20


def test_calls_in_flight_stay_below_their_limit_through_restarts_and_their_places_are_used():
    server, _ = simulate(ask_for(60, Limits(max_in_flight=20), restarts=[(10, 2), (30, 0.5)], latency=(1.0, 1.0)))
    assert server.most_in_flight <= 20
    assert len(server.arrivals) >= 0.6 * 20 * 45


def test_answers_that_get_lost_hold_no_place_for_ever():
    server, _ = simulate(ask_for(300, Limits(max_in_flight=8), lost=0.05, num_workers=2, latency=(0.5, 0.5)))
    assert (
        server.most_in_flight <= 8 + 2 * 2
    )  # a worker that hears nothing goes on with its share, a quarter, while the others have the whole
    late = [at for at, _ in server.arrivals if at > 1000 + 250]
    assert len(late) > 50


def test_all_workers_get_their_turn():
    counts = {}

    async def run():
        chance, loop = random.Random(1), asyncio.get_running_loop()
        account = Account(Limits(max_in_flight=16), chance)
        clients = [LimiterClient(account.sync, str(index), account.limits, 4, loop.time) for index in range(4)]

        async def ask(client):
            while True:
                number = await client.acquire(1)
                await asyncio.sleep(1.0)
                counts[client.worker] = counts.get(client.worker, 0) + 1
                client.end(ok(number))

        tasks = [asyncio.create_task(ask(client)) for client in clients for _ in range(16)]
        await asyncio.sleep(60)
        for task in tasks:
            task.cancel()

    simulate(run())
    assert len(counts) == 4
    assert min(counts.values()) > 0.5 * max(counts.values())
