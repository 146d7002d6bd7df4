"""Commands as arms of a comparison: each in a new process with its own caches, time limit and line of results.

    board = Board(Path("/tmp/b"), budget_seconds=590)
    board.run_bare("bf16")                      -> {"arm": "bare-vllm", "precision": "bf16", "wall_seconds": 120.3, "load_seconds": 69.2, …}
    board.run_job("job", precision="bf16")      the same from `python -m ray_jobs.run_inference`

Every result is printed as it is there and added to results.jsonl in $OUT and in the folder, so that a later command compares with an earlier one's arms. What
an arm prints goes to {$OUT or the folder}/arms.log. An arm that fails or takes too long is a result too, and the others go on.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LOG_BYTES = 12 * 2**20


class Board:
    """Runs arms below one time budget and keeps their results."""

    def __init__(self, folder: Path, budget_seconds: float = 590.0, gpu: bool | None = None) -> None:
        self.folder, self.deadline = folder, time.monotonic() + budget_seconds
        self.out = Path(os.environ.get("OUT") or folder)
        self.gpu = shutil.which("nvidia-smi") is not None if gpu is None else gpu
        self.base, self.data = folder / "base", folder / "pairs.csv"
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, result: Mapping) -> dict:
        """Print a result and keep it."""
        line = json.dumps(dict(result))
        print("RESULT", line, flush=True)
        for path in {self.out / "results.jsonl", self.folder / "results.jsonl"}:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        return dict(result)

    def run_process(
        self, name: str, command: Sequence[str], limit_seconds: float, environment: Mapping[str, str] | None = None
    ) -> dict:
        """Run a command; {"exit_status", "wall_seconds", "peak_gpu_gb", "output"}, where exit status 124 means that its time ran out."""
        limit = min(limit_seconds, self.deadline - time.monotonic())
        if limit < 5:
            return {
                "exit_status": 124,
                "wall_seconds": 0.0,
                "peak_gpu_gb": None,
                "output": "no time left in this command's budget",
            }
        with (
            own_caches(self.folder) as caches,
            GPUSampler(self.gpu) as sampler,
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file,
        ):
            started = time.monotonic()
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=REPOSITORY,
                env=os.environ | caches | dict(environment or {}),
                stdout=file,  # a pipe would stay open as long as any process that the arm left behind
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = 124
            wall = time.monotonic() - started
            end_group(process.pid)
            process.wait()
            file.seek(0)
            output = file.read()
        self._log(
            f"==== {name}: {' '.join(map(str, command))}\n{output}\n==== {name}: exit status {status}, {wall:.1f} s\n"
        )
        return {"exit_status": status, "wall_seconds": round(wall, 2), "peak_gpu_gb": sampler.peak_gb, "output": output}

    def run_bare(self, precision: str, limit_seconds: float = 330) -> dict:
        """vLLM with nothing around it."""
        return self._run_arm("bare-vllm", precision, [*self._options("bare-vllm", precision)], limit_seconds)

    def run_original(self, max_rows: int = 0, limit_seconds: float = 240) -> dict:
        """The original's way."""
        return self._run_arm(
            "original",
            "nf4",
            [*self._options("original", "nf4"), *(["--max-rows", max_rows] if max_rows else [])],
            limit_seconds,
        )

    def _options(self, arm: str, precision: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "benchmarks.inference_arms",
            arm,
            "--model",
            self.base,
            "--data",
            self.data,
            "--precision",
            precision,
        ]

    def _run_arm(self, arm: str, precision: str, command: Sequence[str], limit_seconds: float) -> dict:
        done = self.run_process(f"{arm} {precision}", command, limit_seconds)
        line = next((line for line in reversed(done["output"].splitlines()) if line.startswith("RESULT ")), None)
        result = {
            "arm": arm,
            "precision": precision,
            "wall_seconds": done["wall_seconds"],
            "peak_gpu_gb": done["peak_gpu_gb"],
        }
        if line is None:
            return self.record(result | explain(done))
        return self.record(add_rates(result | json.loads(line.removeprefix("RESULT "))))

    def run_job(
        self,
        arm: str = "job",
        *,
        precision: str,
        options: Sequence[str] = (),
        forced: bool = True,
        limit_seconds: float = 330,
        **named,
    ) -> dict:
        """`python -m ray_jobs.run_inference` as a user types it. `named` replaces model and data; results lie in the result's "folder"."""
        results = self.folder / "results" / f"{arm}-{precision}-{time.time_ns()}"
        command = [
            sys.executable,
            "-m",
            "ray_jobs.run_inference",
            "--model",
            named.get("model", self.base),
            "--data",
            named.get("data", self.data),
        ]
        weights, _, cache = precision.partition("-kv_")
        settings = ["--precision", weights, *(["--kv-cache-dtype", cache] if cache else [])]
        command += [
            "--results-dir",
            results,
            *settings,
            *(["--completion-length-column", "num_tokens"] if forced else []),
            *options,
        ]
        done = self.run_process(f"{arm} {precision}", command, limit_seconds)
        result = {
            "arm": arm,
            "precision": precision,
            "wall_seconds": done["wall_seconds"],
            "peak_gpu_gb": done["peak_gpu_gb"],
            "folder": str(results),
        }
        files = sorted(path for path in results.glob("*.json") if not path.name.endswith(".manifest.json"))
        if done["exit_status"] or not files:
            return self.record(result | explain(done))
        return self.record(add_rates(result | read_job(files)))

    def _log(self, text: str) -> None:
        path = self.out / "arms.log"
        size = path.stat().st_size if path.exists() else 0
        with open(path, "a", encoding="utf-8") as file:
            file.write(text[-max(2000, min(3 * 2**20, LOG_BYTES - size)) :])


def read_job(files: Sequence[Path]) -> dict:
    """What the job's result files say of their run: rows, tokens, seconds of load and rows, engines."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    answers = [row for content in contents for row in content["rows"]]
    timing = contents[0].get("timing") or {}
    found = {"rows": len(answers), "failed": sum(row["parse_status"] == "request_failed" for row in answers)}
    found |= {
        f"{kind}_tokens": sum(row.get(f"num_{name}_tokens") or 0 for row in answers)
        for kind, name in (("output", "completion"), ("prompt", "prompt"))
    }
    found |= {name: timing.get(name) for name in ("load_seconds", "compile_seconds", "peak_memory_gb", "engines")}
    return found | {"rows_seconds": timing.get("row_seconds"), "job_seconds": timing.get("seconds")}


def add_rates(result: dict) -> dict:
    """Rows and output tokens a second of the rows' phase."""
    seconds, counts = result.get("rows_seconds"), {"rows_per_second": "rows", "tokens_per_second": "output_tokens"}
    rates = {name: round(result[count] / seconds, 2) if seconds else None for name, count in counts.items()}
    return result | rates


def explain(done: Mapping) -> dict:
    """Why a process gave no result: its exit status and the end of its output."""
    return {"failed_with": done["exit_status"], "end": done["output"][-1500:]}


def end_group(process_id: int) -> None:
    """Kill a process and what it started, if they are still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process_id, signal.SIGKILL)


@contextlib.contextmanager
def own_caches(folder: Path) -> Iterator[dict[str, str]]:
    """Compile caches of one arm alone, so that none profits from another's."""
    place = folder / f"caches-{time.time_ns()}"
    names = {"VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    try:
        yield {name: str(place / part) for name, part in names.items()}
    finally:
        shutil.rmtree(place, ignore_errors=True)


class GPUSampler:
    """The peak of the memory used on the fullest GPU, in GiB, by nvidia-smi every two seconds; None without a GPU."""

    def __init__(self, gpu: bool) -> None:
        self.peak_gb: float | None = None
        self._gpu, self._done = gpu, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "GPUSampler":
        if self._gpu:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._gpu:
            self._thread.join(10)

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._done.wait(2):
            shown = subprocess.run(command, capture_output=True, text=True, check=False)
            used = [int(line) / 1024 for line in shown.stdout.split() if line.isdigit()]
            if used:
                self.peak_gb = round(max(self.peak_gb or 0.0, *used), 1)
