"""One Ray for all tests that need it, one sample teacher, and small inputs."""

import os
from pathlib import Path

import pytest

# Before anything imports Ray or a Hugging Face library.
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
os.environ |= {"MISTRAL_API_KEY": "test-key-of-no-account", "WANDB_MODE": "disabled"}
for name in ("RAY_ADDRESS", "NLI_STORAGE_ROOT", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
    os.environ.pop(name, None)

REPOSITORY = Path(__file__).resolve().parent.parent
TINY_BASE = str(REPOSITORY / "data/sample/tiny-mistral")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a cluster of their own come last: two Rays at once on a machine confuse each other."""
    items.sort(key=lambda item: item.get_closest_marker("own_cluster") is not None)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray with its dashboard, as the sweeps need it."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def no_ray():
    """Ends this process's Ray, if it has one, so that the test can start a cluster of its own."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def teacher_url():
    """The address of a running sample teacher."""
    from nli.sample.server import start_server

    with start_server(latency_seconds=0) as url:
        yield url


@pytest.fixture
def repository(monkeypatch) -> Path:
    """The repository's root, as the current folder."""
    monkeypatch.chdir(REPOSITORY)
    return REPOSITORY
