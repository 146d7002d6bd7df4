"""Generation while things die: seeded runs on two nodes, each with two kills, compared with a run that nothing disturbs.

    python -m benchmarks.generation_faults --seeds 20

Each seed asks 300 rows of a teacher that misbehaves as scripted (429 in three forms, 500, 502, 503, 529, resets before and after billing, late answers,
truncated bodies, bodies that are no JSON, slow drips, contents that do not fit), draws two of {driver, worker, limiter, ledger, node}, kills them by SIGKILL
after random numbers of billed calls, and runs the same command again until it ends well. Then it must hold that

    the output equals the undisturbed run's, byte for byte, and
    calls billed <= distinct requests + calls under way at each kill + ambiguous sends that the ledger counted.
"""

import argparse
import csv
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import psutil

from benchmarks.teacher_server import RunningServer, start_teacher_server

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("driver", "worker", "limiter", "ledger", "node")
TITLES = {"worker": "ray::MapWorker", "limiter": "ray::LimiterService", "ledger": "ray::LedgerService"}
FAULTS = {"rate": 0.12, "attempts": 2, "content_rate": 0.05, "late_seconds": 4.0, "drip_seconds": 0.5}
RUN_SECONDS = 600.0
MOST_RUNS = 6


@dataclass
class Result:
    """What one seed showed."""

    seed: int
    targets: tuple[str, ...]
    killed_at: list[int] = field(default_factory=list)
    under_way: list[int] = field(default_factory=list)
    runs: int = 0
    billed: int = 0
    distinct: int = 0
    ambiguous: int = 0
    is_equal: bool = False
    rows: int = 0
    seconds: float = 0.0

    @property
    def bound(self) -> int:
        """The most calls that may have been billed."""
        return self.distinct + sum(self.under_way) + self.ambiguous

    @property
    def holds(self) -> bool:
        return self.is_equal and self.billed <= self.bound


class TwoNodes:
    """A Ray cluster of a head and one more node on this machine; the second can be killed and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self._second = self._cluster.add_node(num_cpus=2)

    @property
    def address(self) -> str:
        return self._cluster.address

    def kill_second(self) -> None:
        """SIGKILL the second node's raylet, which takes its workers along, and join a fresh node."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = self._cluster.add_node(num_cpus=2)

    def stop(self) -> None:
        self._cluster.shutdown()


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """The cluster for the length of the block."""
    with patch.dict(os.environ, {"RAY_AUTH_MODE": "disabled", "MISTRAL_API_KEY": "key-of-the-fault-runs"}):
        nodes = TwoNodes()
        try:
            yield nodes
        finally:
            nodes.stop()


def write_pairs(path: Path, num_rows: int) -> None:
    """So many different pairs."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "premise", "hypothesis", "label"])
        writer.writerows(
            [f"r{index}", f"Person {index} walks home.", f"Person {index} moves.", index % 2]
            for index in range(num_rows)
        )


def command(server: RunningServer, pairs: Path, root: Path) -> list[str]:
    """The job that is run and killed."""
    flags = {
        "input-csv": pairs,
        "output-jsonl": "thoughts.jsonl",
        "storage-root": root,
        "base-url": server.base_url,
        "workers": 4,
        "max-in-flight": 8,
    }
    flags |= {"timeout-seconds": 2.0, "max-attempts": 8, "model": "ministral-8b-2512"}
    return [
        sys.executable,
        "-m",
        "ray_jobs.generate_thoughts",
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
    ]


def start(argv: Sequence[str], nodes: TwoNodes, log: Path) -> subprocess.Popen:
    """A driver on the cluster, in a process group of its own."""
    environment = os.environ | {"RAY_ADDRESS": nodes.address, "PYTHONPATH": str(ROOT)}
    with open(log, "a", encoding="utf-8") as file:
        return subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def run_undisturbed(server: RunningServer, pairs: Path, root: Path, nodes: TwoNodes) -> bytes:
    """The output of a run that nothing kills; the server's bill is forgotten afterwards."""
    log = root / "log"
    process = start(command(server, pairs, root), nodes, log)
    if process.wait(timeout=RUN_SECONDS):
        raise RuntimeError(log.read_text(encoding="utf-8")[-3000:])
    server.reset_bill()
    return (root / "thoughts.jsonl").read_bytes()


def run_disturbed(
    seed: int, server: RunningServer, nodes: TwoNodes, pairs: Path, root: Path, expected: bytes, num_rows: int
) -> Result:
    """One seed's run with its two kills, and as many further runs as it takes."""
    draw = random.Random(seed)
    result = Result(seed, tuple(draw.sample(TARGETS, 2)))
    points = sorted(draw.randint(num_rows // 20, int(num_rows * 0.8)) for _ in result.targets)
    waiting = list(zip(result.targets, points, strict=True))
    started = time.monotonic()
    argv, log = command(server, pairs, root), root / "log"
    while result.runs < MOST_RUNS:
        result.runs += 1
        process = start(argv, nodes, log)
        while process.poll() is None:
            if time.monotonic() - started > RUN_SECONDS:
                process.kill()
                raise RuntimeError(f"seed {seed} does not end:\n{log.read_text(encoding='utf-8')[-3000:]}")
            billed = server.bill()["billed"]
            if waiting and billed >= waiting[0][1]:
                target, _ = waiting.pop(0)
                under_way = count_under_way(root)
                kill(target, process, nodes)
                result.killed_at.append(billed)
                result.under_way.append(max(under_way, count_under_way(root)))
            time.sleep(0.02)
        if process.returncode == 0 and (root / "thoughts.jsonl").exists():
            break
    result.seconds = round(time.monotonic() - started, 1)
    output = root / "thoughts.jsonl"
    result.is_equal = output.exists() and output.read_bytes() == expected
    result.rows = output.read_bytes().count(b"\n") if output.exists() else 0
    bill = server.bill()
    result.billed, result.distinct = bill["billed"], bill["distinct"]
    result.ambiguous = read_ledger(root, "SELECT SUM(ambiguous_sends) FROM requests") or 0
    return result


def kill(target: str, driver: subprocess.Popen, nodes: TwoNodes) -> None:
    """SIGKILL one of TARGETS."""
    if target == "driver":
        driver.kill()
        driver.wait()
    elif target == "node":
        nodes.kill_second()
    else:
        victims = find_processes(TITLES[target])
        if victims:
            with suppress(ProcessLookupError):
                os.kill(random.choice(victims), signal.SIGKILL)


def find_processes(title: str) -> list[int]:
    """Processes of this machine whose title starts so, as Ray names its workers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if words[0].startswith(title):
            found.append(process.pid)
    return found


def count_under_way(root: Path) -> int:
    """Calls that the ledger knows as sent and without answer at this moment."""
    return read_ledger(root, "SELECT COUNT(*) FROM requests WHERE state = 'sent'") or 0


def read_ledger(root: Path, query: str) -> int | None:
    """One number from the ledger of a run."""
    path = root / "data/ledger/ledger.sqlite"
    if not path.exists():
        return None
    db = sqlite3.connect(path, timeout=30)
    try:
        return db.execute(query).fetchone()[0]
    finally:
        db.close()


@contextmanager
def undisturbed(nodes: TwoNodes, folder: Path, num_rows: int) -> Iterator[tuple[RunningServer, Path, bytes]]:
    """A teacher, the pairs, and the output of a run on them that nothing kills."""
    pairs, root = folder / "pairs.csv", folder / "undisturbed"
    write_pairs(pairs, num_rows)
    root.mkdir()
    with start_teacher_server(FAULTS, seed=7, latency_seconds=0.25) as server:
        yield server, pairs, run_undisturbed(server, pairs, root, nodes)


def run_seed(seed: int, nodes: TwoNodes, folder: Path, server: RunningServer, pairs: Path, expected: bytes) -> Result:
    """One disturbed run; the bill and the script's attempts start anew."""
    root = folder / f"seed-{seed}"
    root.mkdir()
    server.reset_bill()
    return run_disturbed(seed, server, nodes, pairs, root, expected, expected.count(b"\n"))


def describe(results: Sequence[Result]) -> str:
    """A Markdown table."""
    lines = [
        "| seed | killed | at billed calls | runs | rows | output equal | distinct | billed | under way at the kills | ambiguous sends | bound | holds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        killed, at, under_way = (
            ", ".join(result.targets),
            ", ".join(map(str, result.killed_at)),
            " + ".join(map(str, result.under_way)),
        )
        facts = [
            result.seed,
            killed,
            at,
            result.runs,
            result.rows,
            "yes" if result.is_equal else "NO",
            result.distinct,
            result.billed,
            under_way,
        ]
        facts += [result.ambiguous, result.bound, "yes" if result.holds else "NO"]
        lines.append("| " + " | ".join(map(str, facts)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill parts of generation runs at random and count what was paid.")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds, from --first")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--rows", type=int, default=300)
    arguments = parser.parse_args()
    results = []
    with (
        two_nodes() as nodes,
        tempfile.TemporaryDirectory(prefix="nli-faults-") as folder,
        undisturbed(nodes, Path(folder), arguments.rows) as (server, pairs, expected),
    ):
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            results.append(run_seed(seed, nodes, Path(folder), server, pairs, expected))
            print(
                json.dumps(results[-1].__dict__ | {"bound": results[-1].bound, "holds": results[-1].holds}), flush=True
            )
    print(describe(results))
    sys.exit(0 if all(result.holds for result in results) else 1)


if __name__ == "__main__":
    main()
