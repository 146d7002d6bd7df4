"""Does memory stay flat? The job on many rows and on ten times as many, with the tiny model and without thoughts, its processes' memory sampled.

The driver, the workers and the desk that stores answers are each held against themselves: the peak at ten times the rows over the peak at the rows.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.inference_runs import REPOSITORY, Board, end_group
from benchmarks.inference_workload import write_pairs
from benchmarks.ray_run import MemorySampler

TIMES = 10
ROLES = {"MapWorker(": "worker", "Desk": "desk"}


def run_memory(board: Board, rows: int, options: Sequence[str] = ()) -> None:
    """Run both sizes and record the ratios of the peaks."""
    peaks = {}
    for count in (rows, rows * TIMES):
        data = board.folder / f"short-{count}.csv"
        write_pairs(data, count)
        command = [
            sys.executable,
            "-m",
            "ray_jobs.run_inference",
            "--model",
            "data/sample/tiny-mistral",
            "--data",
            str(data),
            "--no-cot",
        ]
        command += ["--results-dir", str(board.folder / "results" / f"memory-{time.time_ns()}"), *options]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            started = time.monotonic()
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            sampler = MemorySampler(process.pid, ROLES)
            try:
                status = process.wait(max(5.0, board.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status = 124
            peaks[count] = sampler.stop()
            end_group(process.pid)
            log.seek(0)
            text = log.read()
        board.record(
            {
                "arm": "memory",
                "rows": count,
                "exit_status": status,
                "wall_seconds": round(time.monotonic() - started, 1),
                "peak_megabytes": peaks[count],
            }
            | ({"end": text[-1500:]} if status else {})
        )
        if status:
            return
    small, large = peaks.values()
    board.record(
        {
            "memory": {
                role: round(large[role]["pss"] / small[role]["pss"], 3)
                for role in small
                if role in large and small[role]["pss"]
            }
        }
    )
