"""The demo's promises, on `make demo` itself: time, memory, table, report, and a second run that repeats nothing."""

import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from nli.runtime.manifest import read_manifest
from tests.conftest import REPOSITORY
from tests.test_jobs import read_table

pytestmark = [pytest.mark.slow, pytest.mark.own_cluster]


class Demo:
    """One run of `make demo`, with the seconds until its first line and its end, and the peak of the sum of PSS over its processes, in bytes."""

    def __init__(self, storage_root: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "MISTRAL_API_KEY"}
        started = time.monotonic()
        self.process = subprocess.Popen(
            ["make", "demo"],
            cwd=REPOSITORY,
            env=environment | {"NLI_STORAGE_ROOT": str(storage_root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.peak_bytes = 0
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        lines, self.first_output_seconds = [], None
        for line in self.process.stdout:
            if "== 1 thoughts" in line and self.first_output_seconds is None:
                self.first_output_seconds = time.monotonic() - started
            lines.append(line)
        self.status = self.process.wait()
        watcher.join()
        self.output, self.seconds = "".join(lines), time.monotonic() - started

    def _watch(self) -> None:
        while self.process.poll() is None:
            total = 0
            try:
                processes = psutil.Process(self.process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    import ray

    ray.shutdown()
    subprocess.run(["make", "install"], cwd=REPOSITORY, check=True)
    root = tmp_path_factory.mktemp("demo")
    return root, Demo(root), Demo(root)


def read_evaluation(root: Path) -> dict:
    return json.loads((root / "demo/results/evaluation/evaluation.json").read_text(encoding="utf-8"))


def test_it_runs_in_ten_minutes_and_eight_gigabytes(demo):
    _, first, _ = demo
    print(
        f"demo: {first.seconds:.0f} s, first stage after {first.first_output_seconds:.0f} s, peak {first.peak_bytes / 1e9:.2f} GB"
    )
    assert first.status == 0, first.output[-4000:]
    assert first.seconds <= 600
    assert first.first_output_seconds <= 60
    assert 0 < first.peak_bytes <= 8e9


def test_it_prints_the_table_and_the_report_with_the_numbers_of_the_json_file(demo):
    root, first, _ = demo
    table = read_table(first.output)
    assert [row[0] for row in table] == ["teacher", "base", "correct_only", "reflected", "unmodified"]
    runs = read_evaluation(root)["runs"]
    assert [(row[0], int(row[1]), int(row[2]), row[3]) for row in table] == [
        (run["run"], run["n"], run["unparsed"], f"{run['accuracy']:.3f}") for run in runs
    ]
    assert {int(row[1]) for row in table} == {400}
    report = Path(re.search(r"^report: (.+)$", first.output, flags=re.M)[1])
    assert report.is_file() and report.parent == root / "demo/results/evaluation"


def test_what_is_learnt_shows(demo):
    root, _, _ = demo
    evaluation = read_evaluation(root)
    accuracy = {run["run"]: run["accuracy"] for run in evaluation["runs"]}
    assert 0.40 <= accuracy["base"] <= 0.60
    assert accuracy["reflected"] >= 0.85
    assert accuracy["reflected"] > accuracy["unmodified"]
    pair = next(
        item for item in evaluation["comparisons"] if {item["run"], item["other"]} == {"reflected", "unmodified"}
    )
    assert pair["p_value"] < 0.05


def test_a_second_run_repeats_no_finished_work_and_ends_within_a_minute(demo):
    root, first, second = demo
    assert second.status == 0, second.output[-4000:]
    assert second.seconds <= 60
    assert read_table(second.output) == read_table(first.output)
    assert re.findall(r"(\d+) to ask", second.output) == ["0"] * 5
    assert re.search(r"sweep: (\d+) trials, \1 finished already", second.output)
    # What tasks on other processes print may be lost when a quick run ends; the manifests are not.
    for ablation in ("correct_only", "reflected", "unmodified"):
        assert len(read_manifest(root / "demo/models" / ablation / "manifest.json")["attempts"]) == 1
    for name in ("base", "correct_only", "reflected", "unmodified"):
        manifest = read_manifest(root / f"demo/results/{name}.manifest.json")
        assert (len(manifest["attempts"]), manifest["counts"]["rows_computed"]) == (2, 0)
