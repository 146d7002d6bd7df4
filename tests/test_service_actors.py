"""The shared actors, on Ray: found by name, back after their process is killed, gone when nobody needs them.

python -m pytest tests/test_service_actors.py
"""

import asyncio
import os
import signal
import time

import psutil
import pytest

from nli.api import services
from nli.api.ledger import Ledger
from nli.api.ledger_file import LedgerReader
from nli.api.limiter import Ended, Limits
from nli.api.limiter_client import LimiterClient
from nli.api.services import (
    LedgerClient,
    account_name,
    open_ledger_client,
    post_to_actor,
    start_ledger_service,
    start_limiter_service,
    sync_with_actor,
)
from nli.runtime.errors import StorageError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
LIMITS = Limits(requests_per_minute=6000.0)


def kill_process(actor) -> None:
    """SIGKILL, as a machine out of memory does it."""
    import ray

    os.kill(ray.get(actor.process_id.remote()), signal.SIGKILL)


def names() -> set[str]:
    import ray

    return {
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == services.NAMESPACE
    }


def wait_until(is_so, seconds=120.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.fixture
def ledger_actor(tmp_path):
    import ray

    actor = start_ledger_service(tmp_path)
    yield actor
    ray.kill(actor)


@pytest.fixture
def limiter_actor(tmp_path):
    import ray

    actor = start_limiter_service(f"http://{tmp_path.name}", "key", LIMITS)
    yield actor
    ray.kill(actor)


def test_a_ledger_s_actor_is_one_for_all_and_loses_nothing_that_it_acknowledged_when_it_is_killed(
    ledger_actor, tmp_path
):
    import ray

    assert ray.get(start_ledger_service(tmp_path).process_id.remote()) == ray.get(ledger_actor.process_id.remote())
    keys = [index.to_bytes(16, "big") for index in range(200)]
    process = ray.get(ledger_actor.process_id.remote())

    async def run():
        client = LedgerClient(post_to_actor(ledger_actor), "worker")
        acknowledged = []

        async def ask(key, after):
            await asyncio.sleep(after)
            assert await client.call("claim", key, "run", "retry", None) == ("go", 0)
            assert await client.call("send", key, 1, 5) == ("go",)
            assert await client.call("done", key, 1, key, 1, 1, 5) == ("ok",)
            acknowledged.append(key)

        with client.alive():
            asking = asyncio.gather(*(ask(key, index * 0.01) for index, key in enumerate(keys)))
            async with asyncio.timeout(120):
                while len(acknowledged) < 20:
                    await asyncio.sleep(0.01)
            before = list(acknowledged)
            os.kill(process, signal.SIGKILL)
            reader = LedgerReader(tmp_path)
            assert all(reader.read_entries([key])[key][0].reply == key for key in before)
            reader.close()
            await asking
        return before

    before = asyncio.run(run())
    assert 0 < len(before) < len(keys)
    reader = LedgerReader(tmp_path)
    totals = reader.read_totals("run")
    reader.close()
    assert (totals.done, totals.cost, totals.reserved, totals.ambiguous_sends) == (200, 1000, 0, 0)


@pytest.mark.parametrize(("num_workers", "is_here", "writes"), [(4, True, True), (5, True, False), (4, False, False)])
def test_few_workers_on_the_ledger_s_node_write_it_themselves_and_all_others_through_its_actor(
    ledger_actor, tmp_path, num_workers, is_here, writes
):
    import ray

    @ray.remote
    class Worker:
        async def claim(self, folder, node):
            client = open_ledger_client(ledger_actor, folder, node, num_workers, "worker")
            answer = await client.call("claim", b"k", "run", "retry", None)
            return answer, any(os.path.basename(file.path) == "ledger.sqlite" for file in psutil.Process().open_files())

    node = ray.get_runtime_context().get_node_id() if is_here else "another"
    assert ray.get(Worker.options(num_cpus=0).remote().claim.remote(tmp_path, node)) == (("go", 0), writes)


def test_an_error_of_the_ledger_comes_back_as_our_own_without_ray_s_pages(ledger_actor, tmp_path, monkeypatch):
    async def run():
        client = LedgerClient(post_to_actor(ledger_actor), "worker")
        assert await client.call("beat") == ("ok",)
        driver = Ledger(tmp_path)
        driver._db.execute("DROP TABLE requests")  # a file that something else spoilt
        with pytest.raises(
            StorageError, match=r"^\S+ledger\.sqlite: cannot be written \(no such table: requests\)\. Free space"
        ):
            await client.call("claim", b"k", "run", "retry", None)
        driver.close()

    asyncio.run(run())


def test_a_ledger_that_cannot_be_opened_is_refused_when_its_actor_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "START_WAITS", (0.1,))
    (tmp_path / "ledger.sqlite").write_bytes(b"this is no database" * 1000)
    with pytest.raises(
        StorageError, match=rf"the process of the ledger in {tmp_path} does not start: .*file is not a database"
    ):
        start_ledger_service(tmp_path)


def test_a_limiter_is_one_for_an_account_and_workers_go_on_when_it_is_killed(limiter_actor, tmp_path):
    import ray

    same = start_limiter_service(f"http://{tmp_path.name}/v1", "key", Limits())
    assert ray.get(same.process_id.remote()) == ray.get(limiter_actor.process_id.remote())
    newer = Limits(requests_per_minute=12_000.0)
    assert ray.get(same.set_limits.remote(newer)) == LIMITS
    assert ray.get(limiter_actor.describe.remote()) == {"limits": newer, "in_flight": 0, "ceiling": 0, "workers": 0}

    async def run():
        client = LimiterClient(sync_with_actor(limiter_actor), "worker", LIMITS, num_workers=1)
        times = []

        async def ask_forever():
            while True:
                number = await client.acquire(10)
                times.append(time.monotonic())
                await asyncio.sleep(0.05)
                client.end(Ended(number, 10, "ok"))

        tasks = [asyncio.create_task(ask_forever()) for _ in range(8)]
        async with asyncio.timeout(300):
            await asyncio.sleep(1)
            while len(times) <= 10:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(kill_process, limiter_actor)
            killed_at = time.monotonic()
            while client._own is None:
                await asyncio.sleep(0.01)
            while client._own is not None:
                await asyncio.sleep(0.05)
            back_at = time.monotonic()
            await asyncio.sleep(5)
            while sum(at > back_at + 3 for at in times) <= 20:
                await asyncio.sleep(0.05)
        described = await limiter_actor.describe.remote()
        for task in tasks:
            task.cancel()
        return described, killed_at, back_at, times

    described, killed_at, back_at, times = asyncio.run(run())
    assert (described["limits"], described["workers"]) == (newer, 1)  # the worker told the new one what had been set
    assert sum(at < killed_at for at in times) > 10
    assert sum(killed_at < at < back_at for at in times) > 0  # never to none
    assert sum(at > back_at + 3 for at in times) > 20


def test_actors_end_when_nobody_calls_them_and_a_later_job_gets_new_ones(tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(services, "IDLE_SECONDS", 3.0)
    mine = {f"ledger:{tmp_path}", account_name("http://idle", "key")}
    ledger = start_ledger_service(tmp_path)
    assert mine & names() == {f"ledger:{tmp_path}"}
    first = ray.get(ledger.process_id.remote())
    limiter = start_limiter_service("http://idle", "key", LIMITS)  # the ledger's may end meanwhile
    assert account_name("http://idle", "key") in names()
    wait_until(lambda: not mine & names())
    again = start_ledger_service(tmp_path)
    assert ray.get(again.process_id.remote()) != first
    ray.kill(again)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(limiter.process_id.remote())


def test_an_account_s_limits_are_shown_and_changed_while_jobs_run(ray_cluster, tmp_path, capsys):
    from nli.api.account import AccountConfig, run

    key_file = tmp_path / "key"
    key_file.write_text("a-key-of-its-own")
    account = {"base_url": "http://limits.test", "api_key_file": str(key_file)}
    run(AccountConfig(**account, requests_per_minute=600.0, calls_in_flight=8))
    found = run(AccountConfig(**account, requests_per_minute=300.0))
    assert (found["limits"].requests_per_minute, found["limits"].max_in_flight) == (300.0, 8)
    assert (
        "limits 300 requests a minute, 8 calls in flight; in flight 0, cut to 8; workers 0" in capsys.readouterr().out
    )


def test_a_job_leaves_the_limits_that_it_does_not_name_as_another_has_set_them(ray_cluster, capsys):
    import ray

    from nli.api.services import start_limiter_service
    from nli.teacher.requests import TeacherConfig
    from nli.teacher.stage import settle_limits

    limiter = start_limiter_service("http://settled.test", "a-key", Limits())

    def settle(**limits) -> tuple[Limits, str]:
        return settle_limits(TeacherConfig(**limits), limiter, "thoughts"), capsys.readouterr().out

    assert settle() == (Limits(), "")
    first = Limits(requests_per_minute=60.0, max_in_flight=4)
    told = "thoughts: the account's limits are now 60 requests a minute, 4 calls in flight; they were none\n"
    assert settle(requests_per_minute=60.0, calls_in_flight=4) == (first, told)
    told = "thoughts: the account's limits are 60 requests a minute, 4 calls in flight, as another job set them; ray_jobs.account changes them\n"
    assert settle() == (first, told)
    assert settle(requests_per_minute=60.0, calls_in_flight=4) == (first, "")
    assert settle(requests_per_minute=0.0)[0] == ray.get(limiter.describe.remote())["limits"] == Limits(max_in_flight=4)
    assert TeacherConfig().with_limits(first).limits() == first
    ray.kill(limiter)
