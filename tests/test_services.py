"""What workers share, without Ray: gathering, flushing, beats, and the way to the limiter. With Ray: tests/test_service_actors.py.

python -m pytest tests/test_services.py
"""

import asyncio
import itertools
import time

import pytest
from simulated import simulate

from nli.api.ledger import Ledger
from nli.api.ledger_file import LedgerReader
from nli.api.limiter import AccountLimiter, Ended, Grants, Limits
from nli.api.limiter_client import LimiterClient
from nli.api.services import GATHER_SECONDS, Gatherer, GroupCommit, LedgerClient, LimiterService, account_name
from nli.runtime.errors import StorageError


def test_items_that_come_together_are_flushed_together_in_order_and_one_flush_runs_at_a_time():
    flushes, running = [], 0

    async def flush(items):
        nonlocal running
        running += 1
        assert running == 1
        flushes.append(list(items))
        await asyncio.sleep(1)
        running -= 1
        return [item * 10 for item in items]

    async def run():
        gatherer = Gatherer(flush)
        first = [asyncio.create_task(gatherer.submit(item)) for item in (1, 2, 3)]
        await asyncio.sleep(0.5)
        later = [asyncio.create_task(gatherer.submit(item)) for item in (4, 5)]
        answers = await asyncio.gather(*first, *later)
        await asyncio.sleep(5)
        return answers, await gatherer.submit(6)

    assert simulate(run()) == ([10, 20, 30, 40, 50], 60)
    assert flushes == [[1, 2, 3], [4, 5], [6]]


def test_an_error_of_a_flush_reaches_all_who_wait_for_it_and_nobody_else():
    async def flush(items):
        if "bad" in items:
            raise StorageError("the disk is full")
        return items[:-1] if "short" in items else items

    async def run():
        gatherer = Gatherer(flush)
        together = await asyncio.gather(gatherer.submit("good"), gatherer.submit("bad"), return_exceptions=True)
        alone = await gatherer.submit("good")
        too_few = await asyncio.gather(gatherer.submit("good"), gatherer.submit("short"), return_exceptions=True)
        return [str(error) for error in together], alone, [type(error) for error in too_few]

    assert simulate(run()) == (["the disk is full"] * 2, "good", [ValueError] * 2)


def test_one_who_stops_waiting_disturbs_nobody():
    async def flush(items):
        await asyncio.sleep(1)
        return items

    async def run():
        gatherer = Gatherer(flush)
        tasks = [asyncio.create_task(gatherer.submit(item)) for item in (1, 2)]
        await asyncio.sleep(0.5)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    cancelled, answer = simulate(run())
    assert (type(cancelled), answer) == (asyncio.CancelledError, 2)


def test_an_item_waits_for_its_flush_no_longer_than_the_contract_allows():
    waits = []

    async def flush(items):
        now = asyncio.get_running_loop().time()
        waits.extend(now - at for at in items)
        return items

    async def run():
        gatherer, loop = Gatherer(flush), asyncio.get_running_loop()

        async def submit(after):
            await asyncio.sleep(after)
            await gatherer.submit(loop.time())

        await asyncio.gather(*(submit(number * 0.0007) for number in range(1000)))

    simulate(run())
    assert len(waits) == 1000
    assert max(waits) <= 0.05 and GATHER_SECONDS <= 0.05


@pytest.fixture
def commits(tmp_path):
    """A GroupCommit on a ledger of its own, which counts its commits."""
    ledger = Ledger(tmp_path)
    commits = GroupCommit(ledger)
    commits.num_commits = 0
    commit = ledger.commit

    def count(posts):
        commits.num_commits += 1
        return commit(posts)

    ledger.commit = count
    yield commits
    ledger.close()


def test_what_many_owners_post_at_once_is_flushed_in_few_commits_and_is_on_disk_when_they_hear_of_it(commits, tmp_path):
    async def run():
        clients = [LedgerClient(commits.post, f"owner-{number}") for number in range(10)]
        reader = LedgerReader(tmp_path)

        async def ask(client, number):
            key = bytes([clients.index(client), number])
            assert await client.call("claim", key, "run", "retry", None) == ("go", 0)
            assert await client.call("send", key, 1, 5) == ("go",)
            assert await client.call("done", key, 1, key, 1, 1, 5) == ("ok",)
            assert reader.read_entries([key])[key][0].reply == key

        await asyncio.gather(*(ask(client, number) for client in clients for number in range(20)))
        reader.close()

    asyncio.run(run())
    assert commits.ledger.read_totals("run").done == 200
    assert commits.num_commits <= 60  # of 600 operations


def test_one_operation_is_flushed_within_fifty_milliseconds(commits):
    async def run():
        client = LedgerClient(commits.post, "owner")
        await client.call("beat")
        times = []
        for _ in range(9):
            started = time.perf_counter()
            await client.call("beat")
            times.append(time.perf_counter() - started)
        return sorted(times)[4]

    assert asyncio.run(run()) <= 0.05


def test_a_worker_beats_while_a_call_takes_its_time_and_also_after_the_ledger_was_away(monkeypatch):
    posts = []

    async def post(owner, operations):
        now = asyncio.get_running_loop().time() - 1000
        if 10 < now < 20:
            raise StorageError("away")
        if 30 < now < 40:
            raise ConnectionError("Ray says something unexpected")
        posts.append((now, owner, list(operations)))
        return [("ok",)] * len(operations)

    async def run():
        client = LedgerClient(post, "worker")
        with client.alive():
            with client.alive():
                await asyncio.sleep(30)
            await asyncio.sleep(30)
        await asyncio.sleep(30)
        assert client._beating.done()

    simulate(run())
    assert all(each[1:] == ("worker", [("beat", "")]) for each in posts)
    times = [at for at, _, _ in posts]
    assert 15 <= len(times) <= 26
    assert 57 <= max(times) <= 63
    assert max(after - before for before, after in itertools.pairwise(times)) <= 14


class Limiter:
    """An account's limiter as an actor's client sees it; counts syncs, and fails while `is_away`."""

    def __init__(self, limits=None) -> None:
        self.clock = asyncio.get_running_loop().time
        self.limiter = AccountLimiter(limits or Limits(), self.clock)
        self.syncs = []
        self.away = None

    async def sync(self, worker, wants, ended, held, num_free, num_unseen, version, limits):
        self.syncs.append((self.clock(), wants, ended, dict(held), num_free, num_unseen))
        await asyncio.sleep(0.005)
        if self.away == "dead":
            raise ConnectionError("the actor died")
        if self.away == "hangs":
            await asyncio.sleep(1e9)
        return self.limiter.sync(worker, wants, ended, held, num_free, num_unseen), 0.0, self.limiter.limits

    def client(self, num_workers=1, name="worker"):
        return LimiterClient(self.sync, name, self.limiter.limits, num_workers, self.clock)


async def call(client, seconds=1.0, tokens=10, ending="ok"):
    """One call: waits for its grant, takes some time, and ends. Returns when it went out."""
    loop = asyncio.get_running_loop()
    number = await client.acquire(tokens)
    at = loop.time()
    await asyncio.sleep(seconds)
    client.end(Ended(number, tokens, ending))
    return at


def test_without_limits_a_thousand_calls_take_a_few_syncs_and_the_loop_ends_with_the_last_call():
    async def run():
        limiter = Limiter()
        client = limiter.client()
        for _ in range(100):
            await asyncio.gather(*(call(client, 0.1) for _ in range(10)))
        await asyncio.sleep(2)
        return len(limiter.syncs), client._task.done(), client._num_free, limiter.limiter.num_in_flight

    num_syncs, is_done, *under_way = simulate(run())
    assert num_syncs <= 25
    assert (is_done, under_way) == (True, [0, 0])


def test_the_loop_lives_as_long_as_a_call_is_under_way_and_what_it_used_is_told():
    async def run():
        limiter = Limiter(Limits(max_in_flight=2))
        client = limiter.client()
        await call(client, 40)
        heard = [at for at, *_ in limiter.syncs]
        await asyncio.sleep(3)
        return (
            max(b - a for a, b in itertools.pairwise(heard)),
            limiter.limiter.num_in_flight,
            client._task.done(),
            client._held,
        )

    longest, in_flight, is_done, held = simulate(run())
    assert longest <= 1.5  # the limiter takes a worker for dead after fifteen
    assert (in_flight, is_done, held) == (0, True, {})


def test_a_call_that_ends_makes_room_at_once_for_one_that_waits():
    async def run():
        client = Limiter(Limits(max_in_flight=1)).client()
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(call(client, 0.2) for _ in range(20)))
        return asyncio.get_running_loop().time() - started

    assert simulate(run()) <= 20 * 0.25


@pytest.mark.parametrize("after", [0.0, 0.001, 0.006, 0.1, 0.5])
def test_calls_that_are_cancelled_at_any_moment_keep_no_place(after):
    async def run():
        limiter = Limiter(Limits(max_in_flight=3, requests_per_minute=600))
        client = limiter.client()
        tasks = [asyncio.create_task(client.acquire(10)) for _ in range(9)]
        await asyncio.sleep(after)
        granted = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in granted:
            client.end(Ended(task.result(), 0, "unknown"))
        await asyncio.sleep(3)
        in_flight, is_done = limiter.limiter.num_in_flight, client._task is None or client._task.done()
        await asyncio.wait_for(call(client), 3)
        return in_flight, is_done

    assert simulate(run()) == (0, True)


def test_a_429_among_free_calls_ends_the_freedom_of_all_workers():
    async def run():
        limiter = Limiter()
        clients = [limiter.client(name=name) for name in "ab"]
        others = [asyncio.create_task(call(client, 5)) for client in clients for _ in range(8)]
        await asyncio.sleep(0.5)
        await call(clients[0], 0.1, ending="limited")
        await asyncio.sleep(1.5)
        ceiling = limiter.limiter.ceiling
        waiting = asyncio.create_task(clients[1].acquire(10))  # sixteen free calls are under way, twice the ceiling
        await asyncio.sleep(1)
        was_waiting = not waiting.done()
        await asyncio.gather(*others)
        number = await waiting
        clients[1].end(Ended(number, 1, "ok"))
        return ceiling, was_waiting, number > 0

    assert simulate(run()) == (8.5, True, True)


def test_a_limit_that_is_set_while_calls_are_free_holds_within_a_second_or_so():
    async def run():
        limiter = Limiter()
        client, loop = limiter.client(), asyncio.get_running_loop()
        times = []

        async def forever():
            while True:
                times.append(await call(client, 0.05))

        tasks = [asyncio.create_task(forever()) for _ in range(4)]
        await asyncio.sleep(3)
        limiter.limiter.limits = Limits(requests_per_minute=60)
        changed_at = loop.time()
        await asyncio.sleep(20)
        for task in tasks:
            task.cancel()
        return sum(at > changed_at + 1.2 for at in times), sum(at < changed_at for at in times)

    limited, free = simulate(run())
    assert 17 <= limited <= 20
    assert free > 150


@pytest.mark.parametrize("away", ["dead", "hangs"])
def test_while_the_limiter_is_away_a_worker_keeps_to_its_share_and_then_comes_back(away):
    async def run():
        limiter = Limiter(Limits(requests_per_minute=605))
        client, loop = limiter.client(num_workers=5), asyncio.get_running_loop()
        times = []

        async def forever():
            while True:
                times.append(await call(client, 0.5) - 1000)

        tasks = [asyncio.create_task(forever()) for _ in range(30)]
        await asyncio.sleep(20)
        limiter.away = away
        await asyncio.sleep(40)
        limiter.away, limiter.limiter = (
            None,
            AccountLimiter(limiter.limiter.limits, limiter.clock, hold_off_seconds=3.0),
        )
        before = len(limiter.syncs)
        await asyncio.sleep(20)
        for task in tasks:
            task.cancel()
        assert loop.time() < 1100
        return times, [num_unseen for *_, num_unseen in limiter.syncs[before:]]

    times, unseen = simulate(run())
    assert 190 <= sum(at < 20 for at in times) <= 202
    assert 25 <= sum(27 < at < 60 for at in times) <= 34  # a tenth of ten a second
    assert sum(60 <= at < 63 for at in times) <= 8
    assert sum(unseen) >= 25 and unseen[-1] == 0
    assert sum(70 <= at < 80 for at in times) >= 85


def test_other_jobs_workers_make_a_share_smaller():
    async def run():
        limiter = Limiter(Limits(requests_per_minute=605))
        for name in "abcdefghi":
            limiter.limiter.sync(name, [], [])
        client = limiter.client(num_workers=2)
        await call(client)
        return client._make_own().limits.requests_per_minute

    assert simulate(run()) == pytest.approx(605 / 20)


def test_what_was_said_while_the_limiter_was_away_is_told_when_it_is_back_and_old_news_are_no_alarm():
    async def run():
        limiter = Limiter(Limits(tokens_per_minute=100_000))
        client = limiter.client()
        numbers = [await client.acquire(100) for _ in range(2)]
        limiter.away = "dead"
        client.end(Ended(numbers[0], 70, "limited", 0.2, 30.0))
        await asyncio.sleep(10)
        client.end(Ended(numbers[1], 80, "ok", 0.2))
        limiter.away = None
        limiter.syncs.clear()
        await asyncio.sleep(3)
        told = [each for _, _, ended, *_ in limiter.syncs for each in ended]
        return (
            [(each.number, each.tokens, each.ending, each.retry_after) for each in told],
            numbers,
            limiter.limiter.ceiling,
            client._task.done(),
        )

    told, numbers, ceiling, is_done = simulate(run())
    assert told == [(numbers[0], 70, "unknown", 0.0), (numbers[1], 80, "ok", 0.0)]
    assert (ceiling, is_done) == (0, True)


def test_a_grant_whose_time_has_passed_is_exchanged_for_another_and_a_fresh_or_free_one_is_kept():
    async def run():
        limiter = Limiter(Limits(requests_per_minute=605))
        client = limiter.client()
        number = await client.acquire(10)
        kept = await client.renew(number, 10) == number
        await asyncio.sleep(2)
        other = await client.renew(number, 10)
        in_flight = limiter.limiter.num_in_flight
        client.end(Ended(other, 1, "ok"))
        return kept, other != number, in_flight, await client.renew(0, 10), client._held

    assert simulate(run()) == (True, True, 1, 0, {})


def test_an_error_inside_the_loop_reaches_who_waits_instead_of_letting_them_wait_for_ever():
    async def run():
        async def sync(*_):
            return Grants(numbers=[1], delays=[], is_free=False), 0.0, Limits()

        client = LimiterClient(sync, "worker", Limits(), 1, asyncio.get_running_loop().time)
        return await asyncio.gather(client.acquire(1), client.acquire(1), return_exceptions=True)

    assert [type(error) for error in simulate(run())] == [ValueError] * 2


@pytest.mark.parametrize("turns", range(6))
def test_the_loop_ends_when_it_is_cancelled_just_as_an_answer_or_a_wake_up_comes(turns):
    async def run():
        loop = asyncio.get_running_loop()
        limiter = Limiter(Limits(requests_per_minute=605))
        client = limiter.client()
        await client.acquire(10)  # under way for good: the loop has something to look after
        await asyncio.sleep(0.5)
        client._wake.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        client._task.cancel()
        until = loop.time() + 30
        while not client._task.done() and loop.time() < until:
            await asyncio.sleep(0.1)
        return client._task.cancelled()

    assert simulate(run())


def test_an_account_is_its_server_however_the_address_is_written_and_its_key_which_the_name_does_not_show():
    name = account_name("https://api.mistral.ai", "secret-key")
    assert name == account_name("https://api.mistral.ai/v1/", "secret-key")
    assert name != account_name("https://api.mistral.ai", "another-key")
    assert name != account_name("https://other.ai", "secret-key")
    assert "secret" not in name


def test_limits_that_are_set_after_the_clock_was_set_back_are_newer_all_the_same():
    service = LimiterService.__new__(LimiterService)
    service._limiter, service._version, service._note_call = AccountLimiter(Limits()), time.time() + 3600, lambda: None
    before = service._version
    asyncio.run(service.set_limits(Limits(max_in_flight=1)))
    assert service._version > before
