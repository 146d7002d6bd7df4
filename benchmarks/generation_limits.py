"""Does generation keep within an account's limits, on the server's own count? Eight workers through Ray Data, the limiter killed on the way.

    python -m benchmarks.generation_limits requests       1,200 requests a minute: no sliding minute above it, 95 % of it reached (--keep-limiter: no kill)
    python -m benchmarks.generation_limits tokens         a limit of tokens a minute: no sliding minute above it
    python -m benchmarks.generation_limits budget         --max-cost with eight workers: never above it
    python -m benchmarks.generation_limits dry-run        tokens and cost that a dry run foretells, before and after 50 replies, against the bill

Each prints one JSON line with what the server saw, and ends with 1 if a bound was broken.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.generation_faults import TITLES, find_processes
from benchmarks.ray_run import write_rows
from benchmarks.teacher_server import RunningServer, start_teacher_server

MODEL = "mistral-small-2409"  # one whose tokenizer mistral-common knows for its own
PRICE = {"price-input-per-million": 0.15, "price-output-per-million": 0.60}


def run_job(
    server: RunningServer, folder: Path, num_rows: int, kills_limiter_at: float = 0.0, **flags: object
) -> tuple[int, str]:
    """(exit status, console) of the thoughts job on so many rows; the limiter is killed after so many seconds of calls."""
    if not (folder / "rows.csv").exists():
        write_rows(folder / "rows.csv", num_rows)
    values = {
        "input-csv": folder / "rows.csv",
        "output-jsonl": folder / "thoughts.jsonl",
        "ledger-dir": folder / "ledger",
        "base-url": server.base_url,
    }
    values |= {"model": MODEL, "workers": 8, "max-in-flight": 16} | {
        name.replace("_", "-"): value for name, value in flags.items()
    }
    argv = [
        part
        for name, value in values.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    log = folder / "log"
    with open(log, "a", encoding="utf-8") as file:
        environment = os.environ | {"MISTRAL_API_KEY": "key-of-the-limits"}
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.generate_thoughts", *argv],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    started_at = None
    while process.poll() is None:
        if started_at is None and server.bill()["requests"]:
            started_at = time.monotonic()
        if kills_limiter_at and started_at is not None and time.monotonic() - started_at > kills_limiter_at:
            for victim in find_processes(TITLES["limiter"]):
                os.kill(victim, signal.SIGKILL)
                print(f"limiter {victim} killed", file=sys.stderr, flush=True)
            kills_limiter_at = 0.0
        time.sleep(0.2)
    return process.returncode, log.read_text(encoding="utf-8")


def measure_requests(folder: Path, limit: int, minutes: float, kills: bool) -> dict:
    """The fullest sliding minute and the rate reached, with the limiter killed in the middle if so asked."""
    num_rows = int(limit * minutes)
    with start_teacher_server(latency_seconds=0.5) as server:
        status, text = run_job(
            server, folder, num_rows, kills_limiter_at=60 * minutes / 2 if kills else 0.0, requests_per_minute=limit
        )
        bill = server.bill()
    rate = 60 * (num_rows - 1) / bill["seconds"]
    result = {
        "limit": limit,
        "kills": kills,
        "status": status,
        "calls": bill["billed"],
        "seconds": bill["seconds"],
        "windows": bill["windows"],
    }
    result |= {"requests_per_minute": rate, "share": rate / limit}
    result["holds"] = (
        status == 0
        and max(bill["windows"][name] for name in bill["windows"] if "request" in name) <= limit
        and rate >= 0.95 * limit
    )
    return result if status == 0 else result | {"console": text[-1500:]}


def measure_tokens(folder: Path, limit: int, num_rows: int) -> dict:
    """The fullest sliding minute of tokens, with the limiter killed on the way."""
    with start_teacher_server(latency_seconds=0.5, count="exact") as server:
        status, text = run_job(server, folder, num_rows, kills_limiter_at=40.0, tokens_per_minute=limit, max_tokens=400)
        bill = server.bill()
    tokens = bill["prompt_tokens"] + bill["completion_tokens"]
    result = {
        "limit": limit,
        "status": status,
        "calls": bill["billed"],
        "tokens": tokens,
        "seconds": bill["seconds"],
        "windows": bill["windows"],
    }
    result |= {"tokens_per_minute": 60 * tokens / bill["seconds"]}
    result["holds"] = status == 0 and max(bill["windows"][name] for name in bill["windows"] if "token" in name) <= limit
    return result if status == 0 else result | {"console": text[-1500:]}


def measure_budget(folder: Path, dollars: float, num_rows: int) -> dict:
    """What the server charged under a budget that is too small, in several attempts."""
    with start_teacher_server({"rate": 0.1, "late_seconds": 8.0}, latency_seconds=0.05, count="exact") as server:
        statuses = [
            run_job(server, folder, num_rows, max_cost=dollars, timeout_seconds=5.0, **PRICE)[0] for _ in range(2)
        ]
        bill = server.bill()
    charged = charge(bill)
    return {
        "max_cost": dollars,
        "statuses": statuses,
        "calls": bill["billed"],
        "charged": charged,
        "holds": charged <= dollars and statuses == [2, 2],
    }


def measure_dry_run(folder: Path, num_rows: int) -> dict:
    """A dry run before anything, one after 50 rows, and the bill."""
    with start_teacher_server(count="exact") as server:
        before = run_job(server, folder, num_rows, dry_run=True, **PRICE)[1]
        sent_by_dry_run = server.bill()["requests"]
        write_rows(folder / "rows.csv", num_rows)
        run_job(server, folder, num_rows, max_rows=50, **PRICE)
        first = server.bill()
        (folder / "log").unlink()
        after = run_job(server, folder, num_rows, dry_run=True, **PRICE)[1]
        run_job(server, folder, num_rows, **PRICE)
        bill = server.bill()
    rest = {name: bill[name] - first[name] for name in ("prompt_tokens", "completion_tokens")}
    costs = [
        (
            part["prompt_tokens"] * PRICE["price-input-per-million"]
            + part["completion_tokens"] * PRICE["price-output-per-million"]
        )
        / 1e6
        for part in (bill, rest)
    ]
    told_prompt, told_cost = read_number(before, "prompt tokens"), read_number(after, "cost")
    result = {
        "sent_by_dry_run": sent_by_dry_run,
        "told_prompt_tokens": told_prompt,
        "billed_prompt_tokens": bill["prompt_tokens"],
    }
    result |= {
        "prompt_error": told_prompt / bill["prompt_tokens"] - 1,
        "told_cost_before": read_number(before, "cost"),
        "billed_cost": costs[0],
    }
    result |= {
        "told_cost_of_the_rest": told_cost,
        "billed_cost_of_the_rest": costs[1],
        "cost_error": told_cost / costs[1] - 1,
    }
    result["holds"] = sent_by_dry_run == 0 and abs(result["prompt_error"]) <= 0.02 and abs(result["cost_error"]) <= 0.10
    return result


def charge(bill: dict) -> float:
    """Dollars for a bill's tokens."""
    return (
        bill["prompt_tokens"] * PRICE["price-input-per-million"]
        + bill["completion_tokens"] * PRICE["price-output-per-million"]
    ) / 1e6


def read_number(text: str, name: str) -> float:
    """The figure of a line of a dry run."""
    return float(re.search(rf"^ *{name} +\$?([\d.,]*\d)", text, re.MULTILINE).group(1).replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure, at the server, what limits and budgets hold.")
    parser.add_argument("what", choices=("requests", "tokens", "budget", "dry-run"))
    parser.add_argument("--requests-per-minute", type=int, default=1200)
    parser.add_argument("--keep-limiter", action="store_true")
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--tokens-per-minute", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--dollars", type=float, default=0.05)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nli-limits-") as place:
        folder = Path(place)
        if arguments.what == "requests":
            result = measure_requests(
                folder, arguments.requests_per_minute, arguments.minutes, not arguments.keep_limiter
            )
        elif arguments.what == "tokens":
            result = measure_tokens(folder, arguments.tokens_per_minute, arguments.rows)
        elif arguments.what == "budget":
            result = measure_budget(folder, arguments.dollars, arguments.rows)
        else:
            result = measure_dry_run(folder, arguments.rows)
    print(json.dumps({"what": arguments.what, **result}))
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()
