"""Inference on a cluster whose machines come and go: small clusters on this machine, with an engine that notes what it is asked.

python -m pytest tests/test_inference_nodes.py
"""

import functools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nli.inference import run as inference
from nli.inference.run import InferenceConfig
from tests.conftest import TINY_BASE
from tests.fake_engine import FakeSettings, build_fake_engine
from tests.test_inference import NUM_ROWS, Asked, check_complete, write_pairs

pytestmark = [pytest.mark.fault, pytest.mark.own_cluster, pytest.mark.usefixtures("no_ray")]
AT_ONCE = 4
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster():
    """A cluster of one machine that has no place for a worker; each that `add` adds has one."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK_TO_NOTICE})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add(cluster):
    return cluster.add_node(num_cpus=1)


@pytest.fixture
def asked(tmp_path) -> Asked:
    return Asked(tmp_path / "asked.txt")


@pytest.fixture
def fake(monkeypatch, asked):
    """Put an engine in the place of the real ones that takes so long for a row, and begins when two are there."""

    def choose(seconds: float) -> None:
        settings = FakeSettings(log=str(asked.path), seconds=seconds, at_once=AT_ONCE, company=2)
        monkeypatch.setattr(inference, "build_engine", functools.partial(build_fake_engine, settings))

    return choose


def run_while(config: InferenceConfig, meddle: Callable[[], None]) -> list[dict]:
    """The rows of a run during which something happens to its cluster, which only a main thread can do."""
    running = threading.Thread(target=inference.run, args=(config,), daemon=True)
    running.start()
    meddle()
    running.join(300)
    assert not running.is_alive(), "the run does not end"
    return check_complete(Path(config.results_dir) / "run.jsonl")


@pytest.fixture
def config(tmp_path) -> InferenceConfig:
    write_pairs(tmp_path / "pairs.csv")
    paths = {"data": str(tmp_path / "pairs.csv"), "results_dir": str(tmp_path / "results")}
    return InferenceConfig(model=TINY_BASE, run_name="run", use_gpu=False, batch_size=AT_ONCE, num_workers=2, **paths)


def wait_for_workers(asked: Asked, number: int) -> None:
    while len(asked.processes()) < number:
        asked.wait(len(asked.lines()) + 1)


def test_a_machine_that_is_lost_for_good_costs_the_rows_in_its_worker_s_hands_which_another_takes(
    cluster, config, fake, asked
):
    fake(seconds=0.2)
    add(cluster)
    lost = add(cluster)

    def lose() -> None:
        wait_for_workers(asked, 2)
        cluster.remove_node(lost, allow_graceful=False)

    rows = run_while(config, lose)
    assert {row["parse_status"] for row in rows} == {"ok"}
    counts = asked.count()
    assert (
        len(counts) == NUM_ROWS and sum(counts.values()) - NUM_ROWS <= 2 * AT_ONCE
    )  # what the lost engine had answered and was not stored yet
    assert len(asked.processes()) == 2  # no third engine was loaded for a few rows
    timing = json.loads((Path(config.results_dir) / "run.json").read_text())["timing"]
    assert (timing["worker_deaths"], timing["rows_computed"]) == (1, NUM_ROWS)


def test_workers_are_added_where_there_are_places_up_to_as_many_as_are_allowed(cluster, config, fake, asked):
    fake(seconds=0.3)
    for _ in range(3):
        add(cluster)
    run_while(replace(config, num_workers=1, max_workers=2), lambda: None)
    assert set(asked.count().values()) == {1}
    assert len(asked.processes()) == 2
