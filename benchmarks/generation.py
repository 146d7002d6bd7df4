"""How fast generation is, and how much memory it takes: this project's callers beside a bare loop and the official client, against a server in another process.

    python -m benchmarks.generation speed --out bench.jsonl               five rounds, each of the four ways once, in turn (--in-flight 512: calls under way)
    python -m benchmarks.generation memory --rows 10000 200000 --out bench.jsonl
    python -m benchmarks.generation table bench.jsonl                     the Markdown tables of docs/RESULTS.md

    {"kind": "speed", "round": 1, "way": "bare", "calls": 6000, "calls_per_second": 3425.9, …}        one line a measurement, with versions and machine

The ways: `bare`, aiohttp in ten lines; `sdk`, mistralai's asynchronous client; `teacher`, this project's caller in one process with its ledger on disk;
`ray`, the thoughts stage through Ray Data with two workers. All have as many calls under way, and the server is a process of its own on the same machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.ray_run import run_stage
from benchmarks.teacher_server import start_teacher_server

WAYS = ("bare", "sdk", "teacher", "ray")
IN_FLIGHT = 128
WORKERS = 2
NAMES = {
    "bare": "bare aiohttp loop",
    "sdk": "official client (mistralai)",
    "teacher": "this project, one process, ledger on",
    "ray": f"this project, Ray Data, {WORKERS} workers",
}
RATIOS = (("teacher", "bare", 0.5), ("teacher", "sdk", 10.0), ("ray", "teacher", 0.7))
FEWEST_CALLS_PER_SECOND = 1000
MOST_GROWTH = 1.15


def measure_speed(
    rounds: int, calls: int, sdk_calls: int, ray_calls: int, in_flight: int, folder: Path
) -> Iterable[dict]:
    """Measurements of all ways, interleaved: what else the machine does meets them alike."""
    with start_teacher_server() as server:
        for number in range(1, rounds + 1):
            for way in WAYS:
                place = folder / f"{way}-{number}"
                if way == "ray":
                    result = run_stage(server, place, ray_calls, WORKERS, in_flight // WORKERS)
                else:
                    result = _run_caller(way, server.base_url, sdk_calls if way == "sdk" else calls, in_flight, place)
                yield {"kind": "speed", "round": number, "way": way, "in_flight": in_flight, **result}


def _run_caller(way: str, base_url: str, calls: int, in_flight: int, place: Path) -> dict:
    command = [
        sys.executable,
        "-m",
        "benchmarks.callers",
        way,
        f"--base-url={base_url}",
        f"--calls={calls}",
        f"--in-flight={in_flight}",
    ]
    done = subprocess.run([*command, f"--ledger-dir={place}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(sizes: Iterable[int], folder: Path) -> Iterable[dict]:
    """Peaks of one run for each number of rows."""
    for num_rows in sizes:
        with start_teacher_server() as server:
            result = run_stage(
                server, folder / f"memory-{num_rows}", num_rows, WORKERS, IN_FLIGHT // WORKERS, samples_memory=True
            )
        yield {"kind": "memory", "rows": num_rows, **result}


def describe_machine() -> dict:
    """Where and with what a figure was measured."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = {name: version(name) for name in ("aiohttp", "mistralai", "ray")}
    cpu = f"{os.cpu_count()} x {names[0] if names else platform.machine()}"
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "python": platform.python_version(),
        **versions,
    }


def render_tables(records: list[dict]) -> str:
    """The Markdown of all measurements: medians, their spread, ratios and what was aimed at."""
    parts = []
    speeds = {
        way: [record["calls_per_second"] for record in records if record["kind"] == "speed" and record["way"] == way]
        for way in WAYS
    }
    if all(speeds.values()):
        rounds = len(speeds["bare"])
        lines = [
            f"| way | calls a second, median of {rounds} | lowest to highest | calls a round |",
            "|---|---|---|---|",
        ]
        for way in WAYS:
            calls = next(record["calls"] for record in records if record["kind"] == "speed" and record["way"] == way)
            lines.append(
                f"| {NAMES[way]} | {statistics.median(speeds[way]):,.0f} | {min(speeds[way]):,.0f} to {max(speeds[way]):,.0f} | {calls:,} |"
            )
        parts.append("\n".join(lines))
        lines = ["| target | asked | of the medians | median of the rounds' own |", "|---|---|---|---|"]
        teacher = statistics.median(speeds["teacher"])
        lines.append(f"| {NAMES['teacher']}, calls a second | ≥ {FEWEST_CALLS_PER_SECOND:,} | {teacher:,.0f} | |")
        for way, other, least in RATIOS:
            ratio = statistics.median(speeds[way]) / statistics.median(speeds[other])
            own = statistics.median(a / b for a, b in zip(speeds[way], speeds[other], strict=True))
            lines.append(f"| {NAMES[way]} ÷ {NAMES[other]} | ≥ {least:g} | {ratio:.3g} | {own:.3g} |")
        parts.append("\n".join(lines))
    memory = sorted((record for record in records if record["kind"] == "memory"), key=lambda record: record["rows"])
    if len(memory) > 1:
        small, large = memory[0], memory[-1]
        lines = [
            f"| peak, MB (PSS / RSS) | {small['rows']:,} rows | {large['rows']:,} rows | ratio of PSS | asked |",
            "|---|---|---|---|---|",
        ]
        for role in ("driver", "workers", "ledger", "limiter"):
            before, after = small["peak_megabytes"][role], large["peak_megabytes"][role]
            asked = f"≤ {MOST_GROWTH}" if role in ("driver", "workers") else ""
            sizes = " | ".join(f"{peak['pss']:,.0f} / {peak['rss']:,.0f}" for peak in (before, after))
            lines.append(f"| {role} | {sizes} | {after['pss'] / before['pss']:.2f} | {asked} |")
        parts.append("\n".join(lines))
    if records:
        last = records[-1]
        parts.append(
            f"{last['cpu']}; Python {last['python']}, aiohttp {last['aiohttp']}, mistralai {last['mistralai']}, Ray {last['ray']}; {last['at'][:10]}."
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure generation against a local server.")
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed", help="calls a second of four ways")
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--calls", type=int, default=10_000)
    speed.add_argument("--sdk-calls", type=int, default=500)
    speed.add_argument("--ray-calls", type=int, default=60_000)
    speed.add_argument("--in-flight", type=int, default=IN_FLIGHT)
    memory = commands.add_parser("memory", help="peak memory of the stage at several numbers of rows")
    memory.add_argument("--rows", type=int, nargs="+", default=[10_000, 200_000])
    for command in (speed, memory):
        command.add_argument(
            "--out", type=Path, required=True, help="file to append measurements to, one JSON object a line"
        )
        command.add_argument("--folder", type=Path, help="folder on the disk to measure on; default: a temporary one")
    table = commands.add_parser("table", help="Markdown of measurements")
    table.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(render_tables([json.loads(line) for path in arguments.files for line in path.read_text().splitlines()]))
        return
    os.environ |= {"MISTRAL_API_KEY": "benchmark", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        if arguments.command == "speed":
            records = measure_speed(
                arguments.rounds,
                arguments.calls,
                arguments.sdk_calls,
                arguments.ray_calls,
                arguments.in_flight,
                Path(place),
            )
        else:
            records = measure_memory(arguments.rows, Path(place))
        for record in records:
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record | describe_machine()) + "\n")
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
