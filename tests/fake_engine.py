"""An engine without a model, for tests of what lies around engines: it notes what it is asked, takes its time, and breaks on demand.

    monkeypatch.setattr("nli.inference.run.build_engine", functools.partial(build_fake_engine, FakeSettings(log="asked.txt", seconds=0.05)))

What a row's premise holds decides what becomes of it: "raise" breaks the request, "kill" ends the process, "dead" ends the engine,
"half" is answered by half of a surrogate pair, and "wait" waits for a file. A healthy engine answers them all.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nli.engines.interface import EngineSettings, Generation, Request
from nli.runtime.errors import EngineDead, ModelError
from nli.task.prompts import render_completion


@dataclass(frozen=True)
class FakeSettings:
    log: str = ""
    """file that gets a line `{process} {premise}` for each request that was answered"""
    seconds: float = 0.0
    at_once: int = 8
    dies_when_loading: bool = False
    refused: str = ""
    """file that the first process to load makes, and then has no engine; all others have one"""
    load_seconds: float = 0.0
    is_healthy: bool = False
    company: int = 0
    """engines that have to be loaded before any of them answers: none is alone for a while because the others come late"""
    gate: str = ""
    """file before which no row with "wait" in its premise is answered: the run cannot end sooner"""


class FakeEngine:
    description = "fake 1.0"

    def __init__(self, fake: FakeSettings, settings: EngineSettings) -> None:
        if fake.dies_when_loading:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(fake.load_seconds)
        if fake.refused:
            with contextlib.suppress(FileExistsError), open(fake.refused, "x", encoding="utf-8"):
                raise ModelError("the GPU has 12 of 80 MiB free")
        if fake.company:
            with open(f"{fake.log}.loaded", "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()}\n")
        self._fake, self._settings = fake, settings
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(fake.at_once)

    def submit(self, request: Request) -> Future[Generation]:
        return self._pool.submit(self._answer, request)

    def _answer(self, request: Request) -> Generation:
        if request.adapter is not None and request.adapter not in self._settings.adapters:
            raise ValueError(f"{request.adapter} is not loaded")
        premise = request.prompt.split("Premise: ")[1].split("\nHypothesis: ")[0]
        if self._fake.company:
            wait_until(
                lambda: (
                    len(Path(f"{self._fake.log}.loaded").read_text(encoding="utf-8").splitlines()) >= self._fake.company
                )
            )
        if self._fake.gate and "wait" in premise:
            wait_until(Path(self._fake.gate).exists)
        fault = "" if self._fake.is_healthy else premise
        if "kill" in fault:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._fake.seconds)
        if "dead" in fault:
            raise EngineDead("the device is gone")
        if "raise" in fault:
            raise ValueError("no such token")
        if "half" in fault:
            return Generation("\ud800", "stop", len(request.prompt), 1)
        if self._fake.log:
            with self._lock, open(self._fake.log, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {premise}\n")
        label = request.seed % 2 if self._settings.decoding.temperature else len(premise) % 2
        adapter = Path(request.adapter).name if request.adapter else "base"
        text = render_completion(f"{adapter}: {premise}", label)
        return Generation(
            text, "stop", len(request.prompt), request.num_tokens or len(text), probability=0.25 + 0.5 * label
        )

    def figures(self) -> dict:
        told = {
            "load_seconds": self._fake.load_seconds,
            "compile_seconds": None,
            "peak_memory_gb": None,
            "batch_size": self._fake.at_once,
        }
        return told | {"num_adapters": len(self._settings.adapters)}

    def close(self) -> None:
        self._pool.shutdown()


def wait_until(holds: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for something that other processes bring about."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"waited {seconds:.0f} s in vain")
        time.sleep(0.01)


def build_fake_engine(fake: FakeSettings, name: str, settings: EngineSettings) -> FakeEngine:
    """`nli.engines.interface.build_engine` for tests."""
    return FakeEngine(fake, settings)
