"""A run's manifest: what was made, from what, by which code on which machine; and the guard that no two configs mix in one output.

`<output>.manifest.json`, abridged:

    {"stage": "thoughts", "status": "finished", "identity": {"model": "ministral-8b-2512", "prompt_sha256": "3f…", …}, "config": {…},
     "inputs": {"/data/train.csv": {"sha256": "9c…", "bytes": 241133}}, "commit": "1f0c9…", "versions": {"ray": "2.60.0", …},
     "hardware": {"cpus": 2, "memory_gb": 23.5, "gpus": []}, "attempts": [{"started": "2026-11-22T17:02:11+00:00", "seconds": 12.8}], "counts": {"rows": 2000}}

`identity` holds the values that decide what an output contains; a rerun with another identity is refused, whatever else changed is only noted.
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TextIO

from nli.runtime.config import as_dict
from nli.runtime.errors import DataError, ResumeError, StorageError
from nli.runtime.files import sha256_file, write_atomic

_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "vllm",
    "mistralai",
    "aiohttp",
    "pyarrow",
)


@dataclass
class Run:
    """One attempt at a stage. `earlier` is the manifest of the one before."""

    path: Path
    manifest: dict
    earlier: dict | None
    has_same_inputs: bool
    """as the attempt before it"""
    _lock: TextIO
    _clock: float = field(default_factory=time.monotonic)

    @property
    def was_finished(self) -> bool:
        """Whether an earlier attempt ended well."""
        return self.earlier is not None and self.earlier["status"] == "finished"

    def finish(self, counts: Mapping) -> None:
        """Record that the stage is complete, with its counts and the seconds of this attempt, and let others at the output."""
        self.manifest["status"] = "finished"
        self._save(counts)
        self._lock.close()

    def stop(self, counts: Mapping) -> None:
        """Record an attempt that ends before the work does, and let others at the output."""
        try:
            self._save(counts)
        finally:
            self._lock.close()

    def withdraw(self) -> None:
        """Put back the manifest of before an attempt that made nothing, and let others at the output."""
        try:
            _write(self.path, self.earlier)
        finally:
            self._lock.close()

    def _save(self, counts: Mapping) -> None:
        self.manifest["attempts"][-1]["seconds"] = round(time.monotonic() - self._clock, 2)
        self.manifest["counts"] = dict(counts)
        _write(self.path, self.manifest)


def start_run(
    path: Path,
    stage: str,
    identity: Mapping,
    config: object,
    inputs: Iterable[Path] = (),
    has_work: bool | None = None,
    lock: TextIO | None = None,
) -> Run:
    """Open the manifest at `path` for a new attempt, after checking it against an earlier one's identity.

    `has_work` tells whether outputs are there that this attempt could mix with; None: a manifest tells. The output is this process's until the attempt
    finishes or the process ends; `lock` is that of a caller who took it before.
    Raises ResumeError that shows each differing value; also for outputs without a manifest, and while another process works on them. Raises DataError for
    an input that is no file, StorageError where nothing can be written.
    """
    identity = json.loads(json.dumps(identity))
    lock = lock or lock_output(path)
    earlier = None if has_work is False else read_manifest(path)
    if has_work and earlier is None:
        raise ResumeError(
            f"{path}: missing, and the output that it belongs to is there: nobody knows how it was made. Choose another output, or move it away."
        )
    if earlier is not None:
        differences = describe_differences(earlier["identity"], identity)
        if differences:
            raise ResumeError(
                f"{path.parent} holds {stage} made another way ({path.name}):\n  "
                + "\n  ".join(differences)
                + "\nChoose another output, or move the earlier one away; nothing was changed."
            )
    manifest = {
        "stage": stage,
        "status": "running",
        "identity": identity,
        "config": as_dict(config),
        "inputs": {str(item): _describe_input(item) for item in inputs},
        "commit": read_commit(),
        "versions": read_versions(),
        "hardware": read_hardware(),
        "attempts": [
            *(earlier or {}).get("attempts", []),
            {"started": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": None},
        ],
        "counts": (earlier or {}).get("counts", {}),
    }
    _write(path, manifest)
    has_same_inputs = earlier is not None and earlier.get("inputs") == manifest["inputs"]
    return Run(path, manifest, earlier, has_same_inputs, lock)


def _write(path: Path, manifest: Mapping) -> None:
    write_atomic(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _describe_input(path: Path) -> dict:
    try:
        return {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a file ({error.strerror}).") from None


def is_in_use(path: Path) -> bool:
    """Whether a process is at work on the output that the manifest at `path` describes."""
    try:
        lock_output(path).close()
    except ResumeError:
        return True
    return False


def lock_output(path: Path) -> TextIO:
    """An advisory lock beside the manifest, which ends with the process; as good across nodes as the file system's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(f".{path.name}.lock"), "a+", encoding="utf-8")  # noqa: SIM115  (held while the run lasts)
    except OSError as error:
        raise StorageError(
            f"{path.parent}: nothing can be written there ({error.strerror}). Free space or choose another output."
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ResumeError(
            f"{path.parent}: {holder} is at work on {path.name.removesuffix('.manifest.json')}; wait for it, or choose another output."
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def read_manifest(path: Path) -> dict | None:
    """A manifest, or None where there is none. Raises ResumeError if the file cannot be read as one."""
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return manifest if manifest["identity"] is not None and manifest["status"] else None
    except (ValueError, KeyError, TypeError):
        raise ResumeError(f"{path}: not a manifest of this project; move it and the output beside it away.") from None


def describe_differences(earlier: Mapping, now: Mapping) -> list[str]:
    """`name: earlier value -> value now` for each value that differs."""
    names = dict.fromkeys([*earlier, *now])
    return [
        f"{name}: {earlier.get(name)!r} -> {now.get(name)!r}" for name in names if earlier.get(name) != now.get(name)
    ]


def manifest_beside(output: Path) -> Path:
    """Where the manifest of an output file lies. A folder's manifest is its `manifest.json`."""
    return output.with_name(output.name + ".manifest.json")


def read_commit() -> str | None:
    """The commit of the code, with `+changes` if files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def read_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, those that are installed."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_hardware() -> dict:
    """Processor, usable cores, memory in GB (10**9 bytes) and GPU names of the driver's machine."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "processor": processor,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory, 1),
        "gpus": list_gpus(),
    }


def list_gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU of this machine, by its driver's own tool; empty without driver or GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return found.stdout.strip().splitlines() if found.returncode == 0 else []
