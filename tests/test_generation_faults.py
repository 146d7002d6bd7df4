"""Generation on two nodes while a driver, a worker, the limiter, the ledger or a node is killed: three seeds of the script that runs as many as one likes.

python -m pytest tests/test_generation_faults.py
"""

import pytest

from benchmarks.generation_faults import run_seed, two_nodes, undisturbed

pytestmark = [pytest.mark.fault, pytest.mark.own_cluster]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    import ray

    ray.shutdown()
    folder = tmp_path_factory.mktemp("faults")
    with two_nodes() as nodes, undisturbed(nodes, folder, num_rows=300) as (server, pairs, expected):
        yield nodes, folder, server, pairs, expected


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_two_kills_lose_no_row_change_no_byte_and_bill_no_more_than_was_under_way(scene, seed):
    result = run_seed(seed, *scene)
    assert len(result.killed_at) == 2, result
    assert result.is_equal, result
    assert result.billed <= result.bound, result
