"""vLLM's engine in a process of its own, beside the one that asks it: what build_engine gives for "vllm".

    engine = VLLMProcess(EngineSettings(base, adapters=("models/a",), precision="bf16", …, device="cuda:0"))
    engine.submit(Request("[INST] Premise: …[/INST]", adapter="models/a")).result()
    -> Generation(text='{"thought_process": …}', finish_reason="stop", num_prompt_tokens=61, num_completion_tokens=38, problem="", probability=0.98)

Inside a Ray actor vLLM would start its engine by a fresh interpreter that imports everything once more. A plain process (nli.engines.vllm.child) may fork, so that
everything is imported once; and nothing of vLLM is imported here. That process ends with this one.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any

from nli.engines.interface import EngineSettings, Generation, Request
from nli.engines.vllm.channel import Channel
from nli.runtime.errors import EngineDead, ModelError

READY = 0  # number of the message that tells that the engine is loaded, or why not
FIGURES = "figures"  # asked in a request's place
_CLOSE_SECONDS = 15.0
_FIGURES_SECONDS = 40.0


class VLLMProcess:
    """Answers requests with vLLM on one GPU."""

    def __init__(self, settings: EngineSettings) -> None:
        started = time.monotonic()
        self._lock = threading.Lock()
        self._numbers = itertools.count(READY + 1)
        self._waiting: dict[int, Future] = {}
        self._ended = ""  # why no more requests are taken
        self._start()
        ready: Future = Future()
        self._waiting[READY] = ready
        self._reader = threading.Thread(target=self._read, name="vllm", daemon=True)
        self._reader.start()
        self._channel.send(settings)
        try:
            self.description, self._report = ready.result()
        except EngineDead as error:
            self.close()
            raise ModelError(f"{settings.base}: vLLM does not start with {settings.precision}: {error}") from None
        except BaseException:
            self.close()
            raise
        self._load_seconds = time.monotonic() - started

    def submit(self, request: Request) -> Future[Generation]:
        """The answer to come, from any thread."""
        return self._ask(request)

    def figures(self) -> dict:
        """Load, compile and memory figures, the last ones known where vLLM is gone."""
        with suppress(EngineDead, TimeoutError, CancelledError):
            self._report = self._ask(FIGURES).result(_FIGURES_SECONDS)
        return {**self._report, "load_seconds": self._load_seconds}

    def close(self) -> None:
        """End vLLM's processes, which gives the GPU's memory back, and whatever is still asked of them."""
        for future in self._end("the engine is closed"):
            future.cancel()
        self._channel.finish(_CLOSE_SECONDS)
        self._await_end()
        self._reader.join(_CLOSE_SECONDS)

    def _start(self) -> None:
        mine, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[3])  # the package may be found by this process's path alone
        environment = (
            os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whoever asks torch for a GPU does not start CUDA, after which no fork could use it
            }
        )
        environment.setdefault("TQDM_DISABLE", "1")  # vLLM's bars would fill the driver's log, line by line
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nli.engines.vllm.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt from the keyboard is for this process, which then closes
            )
        self._channel = Channel(mine)

    def _ask(self, asked: Request | str) -> Future:
        future: Future = Future()
        with self._lock:
            if self._ended:
                raise EngineDead(self._ended)
            number = next(self._numbers)
            self._waiting[number] = future
        self._channel.send((number, asked))
        return future

    def _read(self) -> None:
        """Settle what is answered, until the process is gone."""
        try:
            while True:
                for number, outcome in self._channel.receive():
                    with self._lock:
                        future = self._waiting.pop(number, None)
                    if future is not None:
                        _settle(future, outcome)
        except EOFError:
            pass
        except Exception:  # what cannot be read here will not come again
            traceback.print_exc()
            self._process.kill()
        self._channel.finish(_CLOSE_SECONDS)
        self._await_end()
        reason = f"vLLM's process has ended ({_describe_exit(self._process.returncode)}). Its own lines above say why."
        for future in self._end(reason):
            _settle(future, EngineDead(reason))
        self._channel.abandon()

    def _await_end(self) -> None:
        """The process ends by itself when the channel has ended; one that hangs would keep the GPU's memory."""
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it
                self._process.wait(_CLOSE_SECONDS)

    def _end(self, reason: str) -> list[Future]:
        """Take no more requests; returns what is still open."""
        with self._lock:
            self._ended = self._ended or reason
            waiting, self._waiting = list(self._waiting.values()), {}
        return waiting


def _settle(future: Future, outcome: Any) -> None:
    with suppress(InvalidStateError):  # who asked may have given up
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _describe_exit(status: int | None) -> str:
    if status is None:
        return "killed, but it does not go"
    return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
