"""How fast the job answers a whole test set, against the engine alone and the original's way, and whether the engines agree.

    python -m benchmarks.inference model --adapters 3 --merged 3         a random Mistral in the 7B's shape, adapters, merged copies; once a machine
    python -m benchmarks.inference compare bare-vllm:bf16 job:bf16       each arm in a new process: seconds, ratios, a table in Markdown
    python -m benchmarks.inference compare bare-vllm:fp8 job:fp8
    python -m benchmarks.inference compare original:nf4 transformers:nf4 --max-rows 512
    python -m benchmarks.inference scaling                               one GPU and two, on a machine with two
    python -m benchmarks.inference adapters                              three adapters in one pass against the merged jobs (of one, extrapolated)
    python -m benchmarks.inference agree --model models/reflected --base data/sample/tiny-mistral --data data/sample/test.csv
    python -m benchmarks.inference memory                                peak memory of 100,000 rows against 10,000, tiny model, no GPU needed

`--shape tiny` runs the same with a tiny model, on a CPU too: does it run at all? Models, workload, results.jsonl and arms.log lie in --folder; with $OUT set,
results.jsonl and arms.log go there as well. A command stops by itself after --budget seconds, and what it has measured by then is printed.

Both sides of a comparison read the same CSV of 1,977 pairs, with Mistral's v3 tokenizer, write the same forced lengths and detokenise. `whole` is the wall time
of the process from its start; `load` the engine's construction, compiling included; `rows` from then until the last text is there.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks.inference_agree import run_agree
from benchmarks.inference_memory import run_memory
from benchmarks.inference_report import find_ratios, render_table
from benchmarks.inference_runs import Board
from benchmarks.inference_workload import ROWS, write_workload

BUDGET_SECONDS = 590.0
ARMS = "of compare: bare-vllm, job, transformers or original, with bf16, fp8, nf4 or fp32; with -kv_fp8 after it, the KV cache in fp8"
ENGINES = [
    "vllm:bf16",
    "transformers:bf16",
    "transformers:bf16:7:reversed",
    "transformers:fp32",
    "transformers:fp32:7:reversed",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("model", "compare", "table", "scaling", "adapters", "agree", "memory"))
    parser.add_argument("arms", nargs="*", metavar="ARM:PRECISION", help=ARMS)
    parser.add_argument("--folder", type=Path, default=None, help="default: /tmp/nli-inference/SHAPE")
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--rows", type=int, default=0, help="rows of the workload; default 1,977, of scaling 12,000")
    parser.add_argument("--longest", type=int, default=512, help="most tokens of a forced completion, for trials")
    parser.add_argument("--max-rows", type=int, default=0, help="rows that transformers and original take")
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--merged", type=int, default=0)
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of the v3 tokenizer, where sentencepiece is not installed"
    )
    parser.add_argument("--precision", default="bf16", help="of scaling and adapters")
    parser.add_argument("--engines", nargs="+", default=ENGINES, help="of agree")
    parser.add_argument("--options", default="", help="further flags of the job: --options=--no-cot")
    parser.add_argument("--model", default="", help="of agree: the adapter")
    parser.add_argument("--base", default="data/sample/tiny-mistral")
    parser.add_argument("--data", default="data/sample/test.csv")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS)
    arguments = parser.parse_args(argv)
    board = Board(arguments.folder or Path("/tmp/nli-inference") / arguments.shape, arguments.budget)
    commands = {
        "model": make_model,
        "compare": compare,
        "table": show_table,
        "scaling": measure_scaling,
        "adapters": measure_adapters,
    }
    if arguments.command in commands:
        commands[arguments.command](board, arguments)
    elif arguments.command == "agree":
        run_agree(board, arguments.model, arguments.base, arguments.data, arguments.engines, arguments.options.split())
    else:
        run_memory(board, arguments.rows or 10_000, arguments.options.split())


def make_model(board: Board, arguments: argparse.Namespace) -> None:
    """Base, adapters, merged copies and the workload, each in a process of its own so that the GPU is free afterwards."""
    tokenizer = f"Path({str(arguments.tokenizer)!r})" if arguments.tokenizer else "None"
    head = "from pathlib import Path; from benchmarks import inference_model as made; "
    steps = {"base": f"made.build_base(Path({str(board.base)!r}), {arguments.shape!r}, {tokenizer})"}
    for number in range(1, max(arguments.adapters, arguments.merged) + 1):
        adapter = str(board.folder / f"adapter-{number}")
        steps[f"adapter-{number}"] = f"made.build_adapter(Path({str(board.base)!r}), Path({adapter!r}), {number})"
    for number in range(1, arguments.merged + 1):
        places = ", ".join(
            f"Path({str(board.folder / name)!r})" for name in ("base", f"adapter-{number}", f"merged-{number}")
        )
        steps[f"merged-{number}"] = f"made.merge({places})"
    for name, step in steps.items():
        done = board.run_process(name, [sys.executable, "-c", head + step], 300)
        failed = {"failed_with": done["exit_status"], "end": done["output"][-1500:]} if done["exit_status"] else {}
        board.record({"made": name, "wall_seconds": done["wall_seconds"], **failed})
    write_workload(board.data, arguments.rows or ROWS, arguments.longest)


def compare(board: Board, arguments: argparse.Namespace) -> None:
    """Run the arms, then show all that this folder has seen."""
    if not board.data.exists():
        write_workload(board.data, arguments.rows or ROWS, arguments.longest)
    few = ["--max-rows", arguments.max_rows] if arguments.max_rows else []
    for arm in arguments.arms:
        name, _, precision = arm.partition(":")
        options = arguments.options.split()
        if name == "bare-vllm":
            board.run_bare(precision)
        elif name == "original":
            board.run_original(arguments.max_rows)
        elif name == "transformers":
            board.run_job("transformers", precision=precision, options=["--engine", "transformers", *few, *options])
        else:
            board.run_job(name, precision=precision, options=options)
    show_table(board, arguments)


def show_table(board: Board, arguments: argparse.Namespace) -> None:
    """The table and the ratios, in Markdown."""
    lines = (board.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    results = [result for result in map(json.loads, lines) if "arm" in result and "precision" in result]
    print("\n" + render_table(results) + "\n", flush=True)
    for name, value in find_ratios(results).items():
        print(f"- {name}: {value}", flush=True)


def measure_scaling(board: Board, arguments: argparse.Namespace) -> None:
    """The job on one GPU, then on two of the same machine. With few rows the last ones, too few to fill an engine, decide the ratio."""
    data = board.folder / "pairs-scaling.csv"
    write_workload(data, arguments.rows or 12_000, arguments.longest)
    found = {}
    for workers in (1, 2):
        options = ["--num-workers", workers, *arguments.options.split()]
        found[workers] = board.run_job(f"job-{workers}-gpu", precision=arguments.precision, options=options, data=data)
    rates = [result.get("rows_per_second") for result in found.values()]
    if all(rates):
        board.record({"scaling": round(rates[1] / rates[0], 3), "rows_per_second": rates})


def measure_adapters(board: Board, arguments: argparse.Namespace) -> None:
    """Three adapters in one pass of one engine, and the merged models that were made, one after another: seconds of the whole jobs."""
    first, *others = (board.folder / f"adapter-{number}" for number in (1, 2, 3))
    extra = arguments.options.split()
    hot = board.run_job(
        "three-adapters", precision=arguments.precision, options=["--adapters", *others, *extra], model=first
    )
    made = [number for number in (1, 2, 3) if (board.folder / f"merged-{number}" / "config.json").exists()]
    merged = [
        board.run_job(
            f"merged-{number}",
            precision=arguments.precision,
            options=extra,
            model=board.folder / f"merged-{number}",
            limit_seconds=200,
        )
        for number in made
    ]
    good = [result for result in merged if "failed_with" not in result]
    if "failed_with" in hot or not good:
        return
    total = sum(result["wall_seconds"] for result in good) * 3 / len(good)
    note = {} if len(good) == 3 else {"note": f"three merged jobs extrapolated from {len(good)}"}
    board.record(
        {
            "adapters": round(hot["wall_seconds"] / total, 3),
            "hot_seconds": hot["wall_seconds"],
            "merged_seconds": round(total, 1),
            **note,
        }
    )


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"# {time.monotonic() - started:.0f} s", flush=True)
