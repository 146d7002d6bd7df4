"""The product on a GPU as a user types it: a head node by `ray start`, every step by `ray job submit`, each job's key lines with seconds.

    python -m benchmarks.product tiny                  sample world, tiny base, the demo's values: SFT data, SFT, inference, evaluation (about 4 minutes)
    python -m benchmarks.product seven-b               random weights in the 7B's shape: SFT of 40 steps, killed and resumed, export, vLLM, evaluation (about 7)
    python -m benchmarks.product tiny seven-b --cpu --steps 6     the same on a CPU with the transformers engine and the tiny base: does it run?

Everything lies in --folder, which is the jobs' storage root: models/tiny is the adapter that benchmarks.inference compares engines on. A job's whole output
goes to product.log, its key lines and seconds to results.jsonl, both in $OUT if it is set. What is finished there is not repeated. The head has ports and a
temporary folder of its own, and at the end only the processes that were started here are ended.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.product_head import REPOSITORY, Head, find_processes

_DEMO = "--compute-dtype fp32 --learning-rate 2e-3 --epochs 2 --eval-steps 0 --per-device-batch-size 32 --max-length 128 --activation-checkpointing False"
DEMO = _DEMO.split()  # configs/demo/pipeline.py
KEY_LINES = (
    "sft",
    "inference",
    "export",
    "thoughts",
    "reflections",
    "sft_data",
    "prepare",
    "evaluation",
    "model ",
    "tiny",
    "seven-b",
    "teacher",
    "  ",
)
NOISE = ("%|", "it/s", "core_worker.cc", "torch.nn.")
COLOUR, WORKER = re.compile(r"\x1b\[\d+m"), re.compile(r"^\([^)]*pid=\d+[^)]*\) ")  # how Ray shows what a worker prints
ROWS_LIMIT = 25  # key lines of one job


class Product:
    """The steps on one head, with what they print kept."""

    def __init__(self, head: Head, folder: Path, arguments: argparse.Namespace) -> None:
        self.head, self.folder, self.arguments = head, folder, arguments
        self.out = Path(os.environ.get("OUT") or folder)
        self.deadline = time.monotonic() + arguments.budget

    def record(self, **result) -> None:
        """Print a result and add it to results.jsonl."""
        line = json.dumps(result)
        print("RESULT", line, flush=True)
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def submit(
        self, job: str, *flags: object, limit_seconds: float = 300, watch: Callable[[], bool] | None = None
    ) -> str:
        """Submit a job and wait. Where `watch` turns true before its end, its driver is killed. Raises RuntimeError if it fails otherwise."""
        command = ["python", "-m", f"ray_jobs.{job}", *map(str, flags), "--storage-root", str(self.folder)]
        print("$ ray job submit --address … --runtime-env runtime_env.yaml --", " ".join(command), flush=True)
        started, killed = time.monotonic(), None
        limit = min(limit_seconds, self.deadline - started)
        path = self.folder / "job.out"
        with open(path, "w", encoding="utf-8") as file:
            process = self.head.submit(command, file)
            while process.poll() is None and time.monotonic() - started < limit:
                if watch is not None and killed is None and watch():
                    drivers = find_processes(f"ray_jobs.{job}", str(self.folder))
                    for driver in drivers:
                        os.kill(driver, signal.SIGKILL)
                    killed = round(time.monotonic() - started, 1)
                    print(f"  {killed} s: SIGKILL to {len(drivers)} processes of the job's driver", flush=True)
                time.sleep(0.2)
            timed_out = process.poll() is None
            if timed_out:
                process.kill()
                process.wait()
        seconds = round(time.monotonic() - started, 1)
        output = path.read_text(encoding="utf-8", errors="replace")
        with open(self.out / "product.log", "a", encoding="utf-8") as file:
            file.write(
                f"==== {' '.join(command)}\n{output[-(2**20) :]}\n==== exit status {process.returncode}, {seconds} s\n"
            )
        lines = pick_lines(output)
        print("\n".join([*(f"  {line}" for line in lines), f"  ({seconds} s)"]), flush=True)
        self.record(
            step=job,
            flags=[str(flag) for flag in flags],
            seconds=seconds,
            killed_after=killed,
            exit_status=process.returncode,
            lines=lines,
        )
        if timed_out or (process.returncode and killed is None):
            raise RuntimeError(
                f"{job}: {'no end' if timed_out else f'exit status {process.returncode}'} after {seconds} s; {output[-1500:]}"
            )
        return output

    def make_sft_data(self) -> None:
        """Thoughts and reflections of the sample teacher, and the rows of the ablation `reflected`."""
        if all((self.folder / f"data/finetune/reflected_{split}.jsonl").exists() for split in ("train", "dev")):
            return
        with sample_teacher(self.folder) as url:
            for split in ("train", "dev"):
                thoughts, reflected = f"data/original_thoughts/{split}.jsonl", f"data/reflected_thoughts/{split}.jsonl"
                shared = ["--base-url", url, "--workers", 2]
                inputs = ["--input-csv", f"data/sample/{split}.csv"]
                self.submit(
                    "generate_thoughts", *inputs, "--output-jsonl", thoughts, "--model", "sample-teacher", *shared
                )
                self.submit(
                    "generate_reflections",
                    "--thoughts",
                    thoughts,
                    "--output-jsonl",
                    reflected,
                    "--model",
                    "sample-teacher-strong",
                    *shared,
                )
                rows = f"data/finetune/reflected_{split}.jsonl"
                self.submit(
                    "prepare_sft_data",
                    "--thoughts",
                    thoughts,
                    "--reflections",
                    reflected,
                    "--ablation",
                    "reflected",
                    "--output-jsonl",
                    rows,
                )

    def run_tiny(self) -> None:
        """The demo's adapter `reflected` trained here, answering the test rows by each engine."""
        self.make_sft_data()
        cpu, base = self.arguments.cpu, REPOSITORY / "data/sample/tiny-mistral"
        steps = ["--max-steps", self.arguments.steps] if self.arguments.steps else []
        recipe = [
            "--config",
            "configs/train/ablation2.py",
            "--base-model",
            base,
            "--output-dir",
            "models/tiny",
            *DEMO,
            "--no-wandb",
        ]
        placed = ["--use-gpu", "False"] if cpu else []
        self.submit("train_sft", *recipe, *placed, *steps)
        done = []
        for name in self.arguments.engines:
            engine, precision = name.split("-")
            if cpu and engine == "vllm":
                continue
            name = f"tiny-{name}"
            settings = [
                "--engine",
                engine,
                "--precision",
                precision,
                *(["--compute-dtype", "fp32"] if engine == "transformers" else []),
            ]
            answering = [
                "--model",
                "models/tiny",
                "--base-model",
                base,
                "--data",
                "data/sample/test.csv",
                "--run-name",
                name,
                "--max-new-tokens",
                96,
            ]
            with self.going_on():
                self.submit("run_inference", *answering, *settings, *placed)
                done.append(name)
        self.evaluate("tiny-evaluation", done)

    def run_seven_b(self) -> None:
        """A base of the 7B's shape: 40 steps, killed after the first checkpoint and resumed, merged, asked by vLLM."""
        self.make_sft_data()
        cpu = self.arguments.cpu
        base = REPOSITORY / "data/sample/tiny-mistral" if cpu else Path(self.arguments.base or self.folder / "base")
        started = time.monotonic()
        if (
            not cpu and not (base / "generation_config.json").exists()
        ):  # in a process of its own, so that the GPU is free afterwards
            making = f"from pathlib import Path; from benchmarks.inference_model import build_base; build_base(Path({str(base)!r}), '7b')"
            subprocess.run([sys.executable, "-c", making], cwd=REPOSITORY, check=True)
        self.record(step="base", seconds=round(time.monotonic() - started, 1))
        steps = self.arguments.steps or 40
        cadence = [
            "--max-steps",
            steps,
            "--eval-steps",
            max(1, steps // 4),
            "--log-steps",
            max(1, steps // 8),
            "--early-stopping-patience",
            0,
            "--watch-rows",
            0,
        ]
        recipe = [
            "--config",
            "configs/train/ablation2.py",
            "--base-model",
            base,
            "--output-dir",
            "models/seven-b",
            *cadence,
            "--no-wandb",
        ]
        if cpu:
            recipe += ["--use-gpu", "False", "--compute-dtype", "fp32", "--activation-checkpointing", "False"]
        run = self.folder / "models/seven-b"
        if not (run / "adapter_model.safetensors").exists():
            self.submit("train_sft", *recipe, watch=lambda: any(run.glob("checkpoint-*/complete.json")))
            self.submit("train_sft", *recipe)
        written = 16 if cpu else 96
        placed = ["--use-gpu", "False"] if cpu else []
        merged = "models/seven-b-merged"
        self.submit(
            "export_model",
            "--model",
            "models/seven-b",
            "--output-dir",
            merged,
            "--check-rows",
            8,
            "--max-new-tokens",
            16,
            *placed,
        )
        engine = (
            ["--engine", "transformers", "--precision", "fp32", "--max-rows", 40]
            if cpu
            else ["--engine", "vllm", "--precision", "bf16"]
        )
        answering = [
            "--model",
            merged,
            "--data",
            "data/sample/test.csv",
            "--run-name",
            "seven-b",
            "--max-new-tokens",
            written,
        ]
        self.submit("run_inference", *answering, *engine, *placed)
        self.evaluate("seven-b-evaluation", ["seven-b"])

    def evaluate(self, output: str, names: Sequence[str]) -> None:
        """Compare result files and print the table."""
        if not names:
            raise RuntimeError("no engine answered")
        files = [f"results/{name}.jsonl" for name in names]
        self.submit(
            "evaluate_predictions", "--predictions", *files, "--names", *names, "--output-dir", f"results/{output}"
        )

    @contextlib.contextmanager
    def going_on(self):
        """A step that fails is recorded, and the next one tried."""
        try:
            yield
        except RuntimeError as error:
            self.record(failed=str(error)[-1500:])


def pick_lines(output: str) -> list[str]:
    """The lines of a job's output that say what it did: its stage's own, without Ray's log and progress."""
    lines = [WORKER.sub("", COLOUR.sub("", line)).rstrip() for line in output.splitlines()]
    own = [
        line
        for line in lines
        if line.startswith(KEY_LINES) and not line.startswith("    ") and not any(map(line.__contains__, NOISE))
    ]
    return [line for line in dict.fromkeys(own) if line.strip()][-ROWS_LIMIT:]


@contextlib.contextmanager
def sample_teacher(folder: Path):
    """The embedded teacher's address while it runs."""
    port_file = folder / "teacher.port"
    port_file.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "nli.sample.server", "--port", "0", "--port-file", str(port_file)], cwd=REPOSITORY
    )
    try:
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().strip()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the sample teacher did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port_file.read_text().strip()}"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("tiny", "seven-b"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nli-product"))
    parser.add_argument(
        "--base", default="", help="of seven-b: a base that benchmarks.inference made; default: made here"
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["transformers-nf4", "vllm-bf16", "vllm-nf4"],
        help="that answer the test rows of tiny",
    )
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--steps", type=int, default=0, help="training steps; default: tiny as in the demo, seven-b 40")
    parser.add_argument("--budget", type=float, default=585)
    arguments = parser.parse_args()
    started, failed = time.monotonic(), []
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with Head(arguments.folder, arguments.cpu) as head:
        product = Product(head, arguments.folder, arguments)
        product.record(step="ray start --head", seconds=round(time.monotonic() - started, 1))
        for part in arguments.parts:
            try:
                {"tiny": product.run_tiny, "seven-b": product.run_seven_b}[part]()
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                failed.append(part)
                product.record(part=part, failed=str(error)[-1500:])
    shutil.rmtree(arguments.folder / "ray", ignore_errors=True)
    print(f"# {time.monotonic() - started:.0f} s{', failed: ' + ', '.join(failed) if failed else ''}", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
