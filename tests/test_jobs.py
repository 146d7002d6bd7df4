"""The pipeline as a cluster's users run it: `ray start`, `ray job submit`, an absolute storage root."""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.own_cluster, pytest.mark.timeout(2700)]

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody takes by chance until the head binds them: above those of Ray's workers and below those that Linux gives to whoever asks for any."""
    ports = []
    for port in random.sample(range(20_000, 32_768), 1000):
        with socket.socket() as opened, contextlib.suppress(OSError):
            opened.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no free ports")


class Head:
    """A head node as a child process on ports of its own, ended through its own process group."""

    def __init__(self, folder: Path) -> None:
        gcs, dashboard, client, agent, agent_grpc = free_ports(5)
        self.address, self.agent = f"http://127.0.0.1:{dashboard}", ("127.0.0.1", agent)
        # A job's `python` is the one on the head's path.
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.environment = os.environ | {
            "PATH": path,
            "RAY_AUTH_MODE": "disabled",
            "MISTRAL_API_KEY": "test-key-of-no-account",
        }
        self.log = (folder / "head.log").open("wb")
        command = [
            *(
                BIN / "ray",
                "start",
                "--head",
                "--block",
                "--num-cpus=4",
                "--disable-usage-stats",
                "--node-ip-address=127.0.0.1",
                f"--port={gcs}",
            ),
            *(
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={client}",
                f"--temp-dir={folder / 'ray'}",
            ),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        ]
        self.process = subprocess.Popen(
            list(map(str, command)),
            env=self.environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def submit(self, *job: str, timeout: float) -> subprocess.CompletedProcess:
        command = [
            BIN / "ray",
            "job",
            "submit",
            "--address",
            self.address,
            "--runtime-env",
            "runtime_env.yaml",
            "--",
            "python",
            "-m",
            *job,
        ]
        return subprocess.run(
            list(map(str, command)),
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def wait_until_ready(self) -> None:
        from ray.job_submission import JobSubmissionClient

        deadline = time.monotonic() + 300
        while True:
            try:
                JobSubmissionClient(self.address).list_jobs()
                socket.create_connection(
                    self.agent, timeout=10
                ).close()  # without it, a job is refused after ten seconds
                return
            except (OSError, RuntimeError):
                assert self.process.poll() is None and time.monotonic() < deadline, Path(self.log.name).read_text()
                time.sleep(0.5)

    def stop(self) -> None:
        """End every process that the head started, and only those."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=20)
        self.process.wait(20)
        self.log.close()


@pytest.fixture
def head(no_ray, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    node = Head(tmp_path_factory.mktemp("head"))
    try:
        node.wait_until_ready()
        yield node
    finally:
        node.stop()


def read_table(text: str) -> list[list[str]]:
    """The cells of the printed result table."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:2] == ["model", "n"])
    rows = []
    for line in lines[start + 1 :]:
        if not re.match(r"\w+ +\d+ ", line):
            break
        rows.append(line.split())
    return rows


def test_a_submitted_pipeline_gives_the_table_of_a_local_one_below_an_absolute_storage_root(
    head, teacher_url, tmp_path
):
    """The README's cluster commands: a relative output is refused, an absolute one holds the results, and the same files come of a run without a cluster."""
    small = ["--config", "configs/demo/small.py", "--base-url", teacher_url]
    refused = head.submit("ray_jobs.pipeline", *small, timeout=400)
    assert refused.returncode != 0
    assert "a submitted job runs in a temporary copy of the folder" in refused.stdout + refused.stderr

    started = time.monotonic()
    done = head.submit("ray_jobs.pipeline", *small, "--storage-root", str(tmp_path / "cluster"), timeout=900)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    submitted = read_table(done.stdout)
    assert [row[0] for row in submitted] == ["teacher", "base", "reflected"]
    evaluation = json.loads((tmp_path / "cluster/small/results/evaluation/evaluation.json").read_text())
    assert [(run["run"], run["n"]) for run in evaluation["runs"]] == [(row[0], int(row[1])) for row in submitted]
    assert [f"{run['accuracy']:.3f}" for run in evaluation["runs"]] == [row[3] for row in submitted]
    assert (tmp_path / "cluster/small/results/evaluation/report.html").stat().st_size > 10_000
    print(f"the submitted pipeline took {seconds:.0f} s")

    head.stop()
    head.stop = lambda: None
    local = subprocess.run(
        [sys.executable, "-m", "ray_jobs.pipeline", *small, "--storage-root", str(tmp_path / "local")],
        cwd=REPOSITORY,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert local.returncode == 0, local.stdout[-4000:] + local.stderr[-4000:]
    assert read_table(local.stdout) == submitted
