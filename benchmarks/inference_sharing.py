"""Do the workers of a run share its rows well? The job with engines that only keep time, against a perfect queue; no GPU needed.

    python -m benchmarks.inference_sharing --rows 4000 8000 16000
    -> {"rows": 4000, "workers": 2, "seconds": 16.5, "perfect_seconds": 16.4, "rows_per_second": 242.4}, …, {"rows": 4000, "ratio": 1.82, "perfect_ratio": 1.84}

An engine here goes in steps, as vLLM does: each writes one token of every row that runs, and lasts `fixed` of --step-seconds plus the rest in proportion to how
many rows run. What is measured is the job's own part: its store, its desk and its tickets. How two GPUs scale, `benchmarks.inference scaling` measures.
"""

import argparse
import csv
import functools
import heapq
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from benchmarks.inference_workload import REPOSITORY, draw_lengths
from nli.engines.interface import EngineSettings, Generation, Request
from nli.engines.vllm.setup import MOST_ROWS
from nli.task.prompts import render_completion


@dataclass(frozen=True)
class Pace:
    """How long a step takes."""

    step_seconds: float = 0.041
    """with as many rows as an engine takes"""
    fixed: float = 0.18
    """share of a step that does not depend on how many rows run"""
    at_once: int = MOST_ROWS
    load_seconds: float = 3.0

    def step(self, num_rows: int) -> float:
        """Seconds of one step."""
        return self.step_seconds * (self.fixed + (1 - self.fixed) * num_rows / self.at_once)


class StepEngine:
    """Answers each request after as many steps as it has tokens."""

    description = "steps"

    def __init__(self, pace: Pace) -> None:
        time.sleep(pace.load_seconds)
        self._pace = pace
        self._waiting: list[tuple[int, Future]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request: Request) -> Future[Generation]:
        future: Future[Generation] = Future()
        with self._changed:
            self._waiting.append((request.num_tokens, future))
            self._changed.notify()
        return future

    def _run(self) -> None:
        running: list[tuple[int, int, int, Future]] = []
        step, order, due = 0, itertools.count(), time.monotonic()
        while True:
            with self._changed:
                while not self._waiting and not running:
                    self._changed.wait()
                    due = time.monotonic()
                room = self._pace.at_once - len(running)
                taken, self._waiting = self._waiting[:room], self._waiting[room:]
            for length, future in taken:
                heapq.heappush(running, (step + length, next(order), length, future))
            due += self._pace.step(len(running))
            step += 1
            time.sleep(max(0.0, due - time.monotonic()))
            while running and running[0][0] <= step:
                _, _, length, future = heapq.heappop(running)
                future.set_result(Generation(render_completion("so " * length, 1), "stop", 60, length, probability=0.9))

    def figures(self) -> dict:
        return {
            "load_seconds": self._pace.load_seconds,
            "compile_seconds": None,
            "peak_memory_gb": None,
            "batch_size": self._pace.at_once,
        }

    def close(self) -> None:
        pass


def build_step_engine(pace: Pace, name: str, settings: EngineSettings) -> StepEngine:
    """In the place of `nli.engines.interface.build_engine`."""
    return StepEngine(pace)


def find_perfect_seconds(lengths: Sequence[int], num_engines: int, pace: Pace) -> float:
    """Seconds of engines that take rows from one queue without delay, and near its end no more than their share."""
    queue = list(reversed(lengths))
    running: list[list[int]] = [[] for _ in range(num_engines)]
    clocks, steps = [0.0] * num_engines, [0] * num_engines
    while queue or any(running):
        index = min((index for index in range(num_engines) if queue or running[index]), key=lambda index: clocks[index])
        mine = running[index]
        share = -(-(len(queue) + sum(map(len, running))) // num_engines)
        for _ in range(min(pace.at_once - len(mine), max(0, share - len(mine)), len(queue))):
            heapq.heappush(mine, steps[index] + queue.pop())
        clocks[index] += pace.step(len(mine))
        steps[index] += 1
        while mine and mine[0] <= steps[index]:
            heapq.heappop(mine)
    return max(clocks)


def measure(lengths: Sequence[int], num_workers: int, pace: Pace, folder: Path) -> dict:
    """The job's seconds of rows, from the first one that is taken to the last that is stored."""
    from nli.inference import run as inference

    data = folder / f"pairs-{len(lengths)}.csv"
    with open(data, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["premise", "hypothesis", "label", "num_tokens"])
        writer.writerows(
            [f"Person {index} walks home.", "Somebody moves.", index % 2, length]
            for index, length in enumerate(lengths)
        )
    values = {
        "model": str(REPOSITORY / "data/sample/tiny-mistral"),
        "data": str(data),
        "results_dir": str(folder),
        "precision": "bf16",
        "use_gpu": False,
    }
    values |= {
        "run_name": f"{len(lengths)}-{num_workers}",
        "num_workers": num_workers,
        "completion_length_column": "num_tokens",
    }
    path = inference.run(inference.InferenceConfig(**values))
    timing = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["timing"]
    found = {"rows": len(lengths), "workers": num_workers, "seconds": timing["row_seconds"]}
    return found | {
        "perfect_seconds": round(find_perfect_seconds(lengths, num_workers, pace), 2),
        "rows_per_second": timing["rows_per_second"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--step-seconds", type=float, default=Pace.step_seconds)
    parser.add_argument("--fixed", type=float, default=Pace.fixed)
    arguments = parser.parse_args(argv)
    import ray

    from nli.inference import run as inference

    pace = Pace(arguments.step_seconds, arguments.fixed)
    inference.build_engine = functools.partial(build_step_engine, pace)
    inference.choose_engine = lambda *_: "vllm"  # tickets of its size
    ray.init(address="local", num_cpus=max(arguments.workers) + 1, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="nli-sharing-") as folder:
        for rows in arguments.rows:
            found = [measure(draw_lengths(rows), workers, pace, Path(folder)) for workers in arguments.workers]
            for result in found:
                print(json.dumps(result), flush=True)
            first, last = found[0], found[-1]
            ratios = {
                "ratio": first["seconds"] / last["seconds"],
                "perfect_ratio": first["perfect_seconds"] / last["perfect_seconds"],
            }
            print(
                json.dumps(
                    {"rows": rows, "workers": last["workers"]}
                    | {name: round(value, 3) for name, value in ratios.items()}
                ),
                flush=True,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
