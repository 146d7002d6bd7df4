"""One run of the thoughts stage through Ray Data against the benchmark's teacher: how many calls a second the server saw, and how much memory who took.

    run_stage(server, folder, num_rows=10_000, workers=2, samples_memory=True)
        -> {"calls": 10000, "calls_per_second": 1312.0, "seconds": 21.4, "peak_megabytes": {"driver": {"pss": 310.2, "rss": 402.9}, "worker": {…}, …}}

Calls a second are counted by the server, from the first call's arrival to the last's, so that Ray's start is left out. Memory is sampled from the kernel's
account of every process that the job started; the peak of a role is that of its largest process, and of `workers` that of all of them together.
"""

import csv
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from benchmarks.callers import make_row
from benchmarks.teacher_server import RunningServer

ROLES = {"MapWorker(": "worker", "LedgerService": "ledger", "LimiterService": "limiter"}
SAMPLE_SECONDS = 0.5


def write_rows(path: Path, num_rows: int) -> None:
    """A CSV file of examples."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "premise", "hypothesis", "label"])
        writer.writerows(
            [row["id"], row["premise"], row["hypothesis"], int(row["id"]) % 2] for row in map(make_row, range(num_rows))
        )


def run_stage(
    server: RunningServer, folder: Path, num_rows: int, workers: int, in_flight: int, samples_memory: bool = False
) -> dict:
    """Run the stage in a new folder. Raises RuntimeError, with the end of its output, if it fails or the server's bill is not one call a row."""
    folder.mkdir(parents=True)
    write_rows(folder / "rows.csv", num_rows)
    server.reset_bill()
    command = [
        sys.executable,
        "-m",
        "ray_jobs.generate_thoughts",
        f"--base-url={server.base_url}",
        f"--input-csv={folder}/rows.csv",
    ]
    command += [
        f"--output-jsonl={folder}/thoughts.jsonl",
        f"--ledger-dir={folder}/ledger",
        f"--workers={workers}",
        f"--max-in-flight={in_flight}",
    ]
    with open(folder / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        sampler = MemorySampler(process.pid) if samples_memory else None
        status = process.wait()
        peaks = sampler.stop() if sampler else {}
        log.seek(0)
        text = log.read()
    bill = server.bill()
    if status or bill["billed"] != num_rows or bill["repeated"]:
        raise RuntimeError(
            f"exit status {status}, {bill['billed']} calls billed, {bill['repeated']} repeated; {text[-2000:]}"
        )
    result = {"calls": num_rows, "seconds": bill["seconds"], "calls_per_second": (num_rows - 1) / bill["seconds"]}
    return result | ({"peak_megabytes": peaks} if samples_memory else {})


class MemorySampler:
    """Peaks of proportional and resident set size of a process and all that it starts, by role, from a thread."""

    def __init__(self, process_id: int, roles: Mapping[str, str] = ROLES) -> None:
        self._root, self._roles = process_id, roles
        self._peaks: dict[str, dict[str, float]] = defaultdict(lambda: {"pss": 0.0, "rss": 0.0})
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, dict[str, float]]:
        """The peaks in megabytes."""
        self._done.set()
        self._thread.join()
        return {role: {name: round(value, 1) for name, value in sizes.items()} for role, sizes in self._peaks.items()}

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            workers = {"pss": 0.0, "rss": 0.0}
            for role, sizes in self._sample():
                for name, value in sizes.items():
                    self._peaks[role][name] = max(self._peaks[role][name], value)
                    workers[name] += value if role == "worker" else 0.0
            for name, value in workers.items():
                self._peaks["workers"][name] = max(self._peaks["workers"][name], value)

    def _sample(self) -> list[tuple[str, dict[str, float]]]:
        import psutil

        found = []
        try:
            processes = psutil.Process(self._root).children(recursive=True)
        except psutil.Error:
            return found
        for process_id, role in [
            (self._root, "driver"),
            *((process.pid, _role_of(process, self._roles)) for process in processes),
        ]:
            sizes = _read_sizes(process_id) if role else None
            if sizes:
                found.append((role, sizes))
        return found


def _role_of(process, roles: Mapping[str, str]) -> str | None:
    import psutil

    try:
        title = " ".join(process.cmdline())
    except psutil.Error:
        return None
    return next((role for name, role in roles.items() if title.startswith("ray::") and name in title), None)


def _read_sizes(process_id: int) -> dict[str, float] | None:
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {
        line.split(":")[0].lower(): int(line.split()[1]) / 1024 for line in lines if line.startswith(("Pss:", "Rss:"))
    }
    return sizes or None
