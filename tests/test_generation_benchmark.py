"""The generation benchmark: its callers do what they time, and its tables say what was measured."""

import asyncio

import pytest

from benchmarks.callers import run_bare, run_sdk, run_teacher
from benchmarks.generation import render_tables
from benchmarks.ray_run import MemorySampler
from benchmarks.teacher_server import start_teacher_server

MACHINE = {
    "at": "2026-11-25T14:00:00+00:00",
    "cpu": "2 x Some CPU",
    "python": "3.11.7",
    "aiohttp": "3.14.5",
    "mistralai": "3.7.0",
    "ray": "2.60.0",
}


@pytest.fixture(scope="module")
def server():
    with start_teacher_server() as running:
        yield running


@pytest.mark.parametrize("run", [run_bare, run_sdk, run_teacher])
def test_every_way_makes_each_call_once_and_the_same_calls(server, run, tmp_path):
    server.reset_bill()
    seconds = asyncio.run(run(server.base_url, 40, 8, *((tmp_path / "ledger",) if run is run_teacher else ())))
    bill = server.bill(calls=True)
    assert (bill["billed"], bill["distinct"]) == (40, 40)
    assert seconds > 0
    server.reset_bill()
    asyncio.run(run_bare(server.base_url, 40, 8))
    assert server.bill(calls=True)["calls"] == bill["calls"]


def test_the_tables_show_medians_ratios_and_what_was_asked():
    rates = {
        "bare": [4000.0, 5000.0, 9000.0],
        "sdk": [100.0, 150.0, 200.0],
        "teacher": [2600.0, 2400.0, 2500.0],
        "ray": [2000.0, 1900.0, 1700.0],
    }
    speeds = [
        {"kind": "speed", "round": number + 1, "way": way, "calls": 500, "calls_per_second": rate} | MACHINE
        for way, values in rates.items()
        for number, rate in enumerate(values)
    ]
    peaks = {10_000: (200.0, 400.0), 200_000: (210.0, 460.0)}
    memory = [
        {
            "kind": "memory",
            "rows": rows,
            "peak_megabytes": {role: {"pss": size, "rss": size + 50} for role, size in zip(roles, sizes, strict=True)},
        }
        | MACHINE
        for rows, values in peaks.items()
        for roles, sizes in [(("driver", "workers", "ledger", "limiter"), (*values, 90.0, 80.0))]
    ]
    text = render_tables(speeds + memory)
    assert "| bare aiohttp loop | 5,000 | 4,000 to 9,000 | 500 |" in text
    assert "| this project, one process, ledger on, calls a second | ≥ 1,000 | 2,500 | |" in text
    assert "| this project, one process, ledger on ÷ bare aiohttp loop | ≥ 0.5 | 0.5 | 0.48 |" in text
    assert "| driver | 200 / 250 | 210 / 260 | 1.05 | ≤ 1.15 |" in text
    assert "| workers | 400 / 450 | 460 / 510 | 1.15 | ≤ 1.15 |" in text
    assert text.endswith("2 x Some CPU; Python 3.11.7, aiohttp 3.14.5, mistralai 3.7.0, Ray 2.60.0; 2026-11-25.")


def test_the_sampler_sees_the_process_that_it_watches(monkeypatch):
    import os
    import time

    monkeypatch.setattr("benchmarks.ray_run.SAMPLE_SECONDS", 0.02)
    sampler, until = MemorySampler(os.getpid()), time.monotonic() + 60
    while "driver" not in sampler._peaks and time.monotonic() < until:
        time.sleep(0.01)
    peaks = sampler.stop()
    assert 0 < peaks["driver"]["pss"] <= peaks["driver"]["rss"] < 100_000
