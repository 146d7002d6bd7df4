"""Batch mode through the official client, against a server that bills: no job made twice, no result lost, only what failed asked again."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.teacher_server import start_teacher_server
from nli.api import batch_client
from nli.api.batch_store import BatchStore
from nli.api.ledger import Ledger
from nli.api.ledger_file import LedgerReader
from nli.runtime.errors import ConfigError, StorageError, TeacherError
from nli.runtime.worklist import Worklist
from nli.teacher.batch import refuse_open_batches
from tests.batch_worker import PROMPT, RUN, make_config, make_rows, run_batches

STEPS = (
    *(
        "planning",
        "claimed",
        "file_written",
        "planned",
        "file_uploaded",
        "file_recorded",
        "creating",
        "job_created",
        "job_recorded",
    ),
    *("job_ended", "end_recorded", "output_downloaded", "results_in_part", "results_stored", "taken"),
)
NUM_ROWS, NUM_REQUESTS = 40, 36


@pytest.fixture(scope="module")
def calm():
    with start_teacher_server(batch_polls=2) as server:
        yield server


@pytest.fixture
def server(calm):
    calm.change(faults={}, refuse_after=None, key="")
    calm.forget_batches()
    calm.reset_bill()
    return calm


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_client, "ORPHAN_WAITS", (0.0, 0.05))
    monkeypatch.setattr(batch_client, "RETRY_SECONDS", 0.01)
    return tmp_path / "ledger"


def _jobs(server):
    return server.bill()["batch"]["jobs"]


def _run_process(folder, server, **arguments):
    command = {"folder": str(folder), "base_url": server.base_url, "num_rows": NUM_ROWS, **arguments}
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, "-m", "tests.batch_worker", json.dumps(command)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_rows_are_answered_by_jobs_of_the_set_size_and_billed_once_at_half_the_price(server, folder):
    config = make_config(server.base_url)
    result = run_batches(folder, config, NUM_ROWS)
    assert [status for status, _, _ in result["answers"].values()] == ["ok"] * NUM_ROWS
    assert result["answers"]["8"] == result["answers"]["9"]  # the same pair, asked once
    assert [(job["requests"], job["status"]) for job in _jobs(server)] == [(12, "SUCCESS")] * 3
    bill = server.bill()
    assert (bill["billed"], bill["distinct"], bill["half_price_tokens"]) == (
        NUM_REQUESTS,
        NUM_REQUESTS,
        bill["total_tokens"],
    )
    assert result["totals"]["done"] == NUM_REQUESTS
    assert bill["nanodollars"] <= result["totals"]["cost"] <= bill["nanodollars"] + NUM_REQUESTS
    assert (result["totals"]["reserved"], result["totals"]["held"]) == (0, 0)


def test_a_second_run_makes_no_call(server, folder):
    config = make_config(server.base_url)
    first = run_batches(folder, config, NUM_ROWS)
    calls = server.bill()["batch"]["calls"]
    assert run_batches(folder, config, NUM_ROWS) == first
    assert server.bill()["batch"]["calls"] == calls


def test_batch_and_online_replies_are_the_same_request_in_the_ledger(server, folder):
    run_batches(folder, make_config(server.base_url), NUM_ROWS)
    calls = server.bill()["batch"]["calls"]
    online = make_config(server.base_url, mode="online")
    assert run_batches(folder, online, NUM_ROWS)["failed"] == 0
    assert server.bill()["batch"]["calls"] == calls


def test_only_the_requests_that_failed_are_asked_again(server, folder):
    server.change(faults={"batch_rate": 0.3})
    result = run_batches(folder, make_config(server.base_url, batch_max_requests=100), NUM_ROWS)
    assert result["failed"] == 0
    first, second = _jobs(server)
    assert first["requests"] == NUM_REQUESTS
    assert 2 <= second["requests"] <= 20
    assert (server.bill()["billed"], server.bill()["repeated"], result["totals"]["failed"]) == (NUM_REQUESTS, 0, 0)


def test_a_reply_that_cannot_be_read_is_repaired_by_another_job(server, folder):
    server.change(faults={"content_rate": 0.3, "content_kinds": ["wrong_schema", "invalid_json"]})
    result = run_batches(folder, make_config(server.base_url, batch_max_requests=100), NUM_ROWS)
    first, repairs = _jobs(server)
    assert first["requests"] == NUM_REQUESTS
    assert repairs["requests"] == result["totals"]["repairs"] > 3
    statuses = [status for status, _, _ in result["answers"].values()]
    assert NUM_ROWS - 8 <= statuses.count("ok") < NUM_ROWS  # a third of the repairs cannot be read either
    assert server.bill()["repeated"] == 0


def test_a_job_that_timed_out_keeps_its_replies_and_one_that_failed_is_made_anew(server, folder):
    server.change(faults={"batch_jobs": ["TIMEOUT_EXCEEDED", "FAILED"]})
    result = run_batches(folder, make_config(server.base_url, batch_max_requests=100), NUM_ROWS)
    assert result["failed"] == 0
    jobs = [(job["status"], job["requests"]) for job in _jobs(server)]
    assert [status for status, _ in jobs] == ["TIMEOUT_EXCEEDED", "FAILED", "SUCCESS"]
    assert jobs[1][1] == jobs[2][1] < NUM_REQUESTS
    assert (server.bill()["billed"], server.bill()["repeated"], result["totals"]["ambiguous_sends"]) == (
        NUM_REQUESTS,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("policy", "num_failed", "billed"), [("retry", 0, 2 * NUM_REQUESTS), ("hold", NUM_ROWS, NUM_REQUESTS)]
)
def test_results_that_are_gone_are_ambiguous_and_the_policy_decides(server, folder, policy, num_failed, billed):
    server.change(faults={"batch_jobs": ["EXPIRED"]})
    result = run_batches(folder, make_config(server.base_url, batch_max_requests=100, ambiguous=policy), NUM_ROWS)
    assert result["failed"] == num_failed
    assert result["totals"]["ambiguous_sends"] == NUM_REQUESTS
    assert server.bill()["billed"] == billed
    if policy == "hold":
        assert "results are not at the server" in result["answers"]["0"][2]


def test_a_cancelled_job_ends_the_run_and_the_next_one_asks_for_the_rest(server, folder):
    server.change(faults={"batch_jobs": ["CANCELLED"]})
    config = make_config(server.base_url, batch_max_requests=100)
    with pytest.raises(TeacherError, match="job-1 was cancelled.*same command"):
        run_batches(folder, config, NUM_ROWS)
    assert run_batches(folder, config, NUM_ROWS)["failed"] == 0
    assert (len(_jobs(server)), server.bill()["billed"], server.bill()["repeated"]) == (2, NUM_REQUESTS, 0)


def test_jobs_that_fail_again_and_again_end_the_run(server, folder):
    server.change(faults={"batch_jobs": ["FAILED"] * 9})
    with pytest.raises(TeacherError, match="3 batch jobs in a row ended without a reply"):
        run_batches(folder, make_config(server.base_url, batch_max_requests=100), NUM_ROWS)
    assert (len(_jobs(server)), server.bill()["billed"]) == (3, 0)


def test_a_job_whose_making_was_not_answered_is_found_by_its_metadata(server, folder):
    server.change(faults={"batch_lost_creates": 1})
    assert run_batches(folder, make_config(server.base_url), NUM_ROWS)["failed"] == 0
    assert [job["requests"] for job in _jobs(server)] == [12, 12, 12]
    assert server.bill()["billed"] == NUM_REQUESTS


def test_a_refused_key_stops_at_once_and_the_right_one_goes_on(server, folder):
    server.change(key="another")
    with pytest.raises(TeacherError, match="refuses the API key .HTTP 401."):
        run_batches(folder, make_config(server.base_url), NUM_ROWS)
    server.change(key="")
    assert run_batches(folder, make_config(server.base_url), NUM_ROWS)["failed"] == 0
    assert server.bill()["billed"] == NUM_REQUESTS


def test_an_unreachable_server_loses_nothing(server, folder):
    config = make_config(server.base_url)
    with pytest.raises(TeacherError, match="does not answer in 6 tries"):
        run_batches(folder, make_config("http://127.0.0.1:9"), NUM_ROWS)
    assert run_batches(folder.with_name("other"), config, NUM_ROWS)["failed"] == 0


def test_the_budget_is_reserved_before_a_job_is_made(server, folder):
    whole = run_batches(folder.with_name("whole"), make_config(server.base_url), NUM_ROWS)["totals"]["cost"] / 1e9
    server.reset_bill()
    with pytest.raises(TeacherError, match="--max-cost .* is used up"):
        run_batches(folder, make_config(server.base_url, max_cost=whole / 2), NUM_ROWS)
    assert 0 < server.bill()["nanodollars"] <= whole / 2 * 1e9
    assert run_batches(folder, make_config(server.base_url, max_cost=100.0), NUM_ROWS)["failed"] == 0
    assert (server.bill()["billed"], server.bill()["repeated"]) == (NUM_REQUESTS, 0)


def test_online_calls_are_refused_while_a_job_is_asking(server, folder, tmp_path):
    killed = _run_process(folder, server, kill_at="job_recorded")
    assert killed.returncode == -signal.SIGKILL
    with Worklist(tmp_path / "rows.sqlite") as worklist:
        from nli.teacher.requests import first_key

        config = make_config(server.base_url, mode="online")
        worklist.fill(((row, first_key(config, PROMPT, row)) for row in make_rows(NUM_ROWS)), Path("rows.csv"))
        worklist.list_pending(lambda keys: set())
        with pytest.raises(TeacherError, match="batch job job-1 is asking for these rows.*--mode batch"):
            refuse_open_batches(folder, worklist)
        run_batches(folder, make_config(server.base_url), NUM_ROWS)
        refuse_open_batches(folder, worklist)


def test_two_processes_never_work_on_one_batch(server, folder):
    assert _run_process(folder, server, kill_at="job_recorded").returncode == -signal.SIGKILL
    other = BatchStore(folder)
    assert other.lock(other.list_open(RUN)[0])
    with pytest.raises(TeacherError, match="another process is working on a batch job"):
        run_batches(folder, make_config(server.base_url), NUM_ROWS)
    other.close()
    assert run_batches(folder, make_config(server.base_url), NUM_ROWS)["failed"] == 0


def test_batch_mode_is_refused_for_servers_that_have_none():
    with pytest.raises(ConfigError, match="Batch API"):
        make_config("http://127.0.0.1:9", api="openai").check()


@pytest.mark.parametrize(
    ("step", "nth"),
    [
        *[(step, 1) for step in STEPS],
        *[pytest.param(step, nth, marks=pytest.mark.fault) for step in STEPS for nth in (2, 3)],
    ],
)
def test_a_kill_after_any_step_makes_no_job_twice_and_loses_no_result(server, folder, step, nth):
    calm = run_batches(folder.with_name("calm"), make_config(server.base_url), NUM_ROWS)
    server.forget_batches()
    server.reset_bill()
    server.change(faults={"batch_rate": 0.2})
    killed = _run_process(folder, server, kill_at=step, nth=nth)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = _run_process(folder, server)
    assert resumed.returncode == 0, resumed.stderr
    result = json.loads(resumed.stdout.splitlines()[-1])
    assert result["answers"] == calm["answers"]
    bill = server.bill()
    assert (bill["billed"], bill["distinct"], bill["repeated"]) == (NUM_REQUESTS, NUM_REQUESTS, 0)
    ids = [job["metadata"]["nli_batch"] for job in bill["batch"]["jobs"]]
    assert len(set(ids)) == len(ids)
    asked_first = sum(job["requests"] for job in bill["batch"]["jobs"]) - NUM_REQUESTS
    assert 0 < asked_first <= NUM_REQUESTS // 2  # what was asked again is what failed, not what the kill left
    ledger = Ledger(folder)
    totals = ledger.read_totals(RUN)
    assert (totals.done, totals.failed, totals.ambiguous_sends, totals.reserved) == (NUM_REQUESTS, 0, 0, 0)
    assert bill["nanodollars"] <= totals.cost <= bill["nanodollars"] + NUM_REQUESTS
    assert {row["state"] for row in LedgerReader(folder).list_rows()} == {"done"}
    assert BatchStore(folder).list_open() == []
    assert list((folder / "batches").iterdir()) == []
    ledger.close()


@pytest.mark.fault
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_while_replies_are_repaired_asks_no_repair_twice(server, folder, step):
    server.change(faults={"content_rate": 0.3, "content_kinds": ["wrong_schema", "length"]})
    calm = run_batches(folder.with_name("calm"), make_config(server.base_url, batch_max_requests=100), NUM_ROWS)
    num_billed = server.bill()["billed"]
    server.forget_batches()
    server.reset_bill()
    killed = _run_process(
        folder, server, kill_at=step, nth=2, config={"batch_max_requests": 100}
    )  # the second job is the one of the repairs
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    result = json.loads(_run_process(folder, server, config={"batch_max_requests": 100}).stdout.splitlines()[-1])
    assert result["answers"] == calm["answers"]
    assert result["totals"]["repairs"] == calm["totals"]["repairs"] == num_billed - NUM_REQUESTS
    assert (server.bill()["billed"], server.bill()["repeated"], len(_jobs(server))) == (num_billed, 0, 2)


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(8))
def test_kills_at_random_moments_make_no_job_twice_and_lose_no_result(server, folder, seed):
    server.change(faults={"batch_rate": 0.2, "content_rate": 0.1}, latency_seconds=0.0)
    calm = run_batches(folder.with_name("calm"), make_config(server.base_url), NUM_ROWS)
    num_billed = server.bill()["billed"]
    server.forget_batches()
    server.reset_bill()
    chance = random.Random(seed)
    root = Path(__file__).resolve().parent.parent
    command = [
        sys.executable,
        "-m",
        "tests.batch_worker",
        json.dumps({"folder": str(folder), "base_url": server.base_url, "num_rows": NUM_ROWS}),
    ]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.4, 1.6))
        process.kill()
        process.wait()
    resumed = _run_process(folder, server)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout.splitlines()[-1])["answers"] == calm["answers"]
    bill = server.bill()
    assert (bill["billed"], bill["repeated"]) == (num_billed, 0)
    ids = [job["metadata"]["nli_batch"] for job in bill["batch"]["jobs"]]
    assert len(set(ids)) == len(ids)


def test_a_step_that_cannot_be_recorded_is_said_to_be_so(tmp_path):
    Ledger(tmp_path).close()
    with contextlib.closing(BatchStore(tmp_path)) as store:
        batch = store.add("thoughts.jsonl", num_requests=1)
        store._db.execute("PRAGMA query_only=ON")
        with pytest.raises(StorageError, match=r"batches: cannot be written .* the same command goes on with its jobs"):
            store.update(batch, "planned")


def test_an_answer_that_cannot_be_unpacked_is_tried_again_and_then_said(monkeypatch):
    from httpx2 import DecodingError

    monkeypatch.setattr(batch_client, "pause", lambda attempt: None)

    def fail():
        raise DecodingError("incorrect header check")

    with pytest.raises(TeacherError, match=r"does not answer in 6 tries \(DecodingError: incorrect header check\)"):
        batch_client.BatchClient("http://127.0.0.1:9", "key")._try(fail)


def test_a_batch_whose_file_is_gone_before_it_was_sent_is_made_anew(server, folder):
    def stop(step):
        if step == "planned":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batches(folder, make_config(server.base_url), NUM_ROWS, stop)
    for path in (folder / "batches").glob("*.requests.jsonl"):
        path.unlink()
    assert run_batches(folder, make_config(server.base_url), NUM_ROWS)["failed"] == 0
    assert (server.bill()["billed"], server.bill()["repeated"]) == (NUM_REQUESTS, 0)
