"""The process that nli.engines.vllm.process starts: it holds vLLM's front end and answers what comes over the channel.

    python -m nli.engines.vllm.child 5        5: the file descriptor of its end

It never imports Ray and leaves CUDA alone, so that vLLM forks its engine process. When the channel ends, it closes the engine and leaves.
"""

import contextlib
import functools
import os
import socket
import sys
import threading
import traceback
from concurrent.futures import Future
from typing import Any

from nli.engines.interface import Request
from nli.engines.vllm.channel import Channel
from nli.engines.vllm.engine import VLLMEngine
from nli.engines.vllm.process import READY
from nli.runtime.errors import EngineDead, ModelError, NLIError

_FLUSH_SECONDS = 10.0


class Server:
    """An engine at the end of a channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: VLLMEngine | None = None
        [self._settings] = channel.receive()

    def run(self) -> None:
        """Load the engine, and answer until the channel ends."""
        reader = threading.Thread(target=self._read, name="requests", daemon=True)
        reader.start()
        try:
            self._engine = VLLMEngine(self._settings)
        except Exception as error:
            if not isinstance(error, NLIError):
                traceback.print_exc()
                error = ModelError(
                    f"{self._settings.base}: vLLM does not start with {self._settings.precision} ({type(error).__name__}: {error})."
                )
            self._channel.send((READY, error))
            self._channel.finish(_FLUSH_SECONDS)
            _leave(1)
        self._channel.send((READY, (self._engine.description, self._engine.figures())))
        reader.join()

    def _read(self) -> None:
        status = 1
        try:
            with contextlib.suppress(EOFError):
                while True:
                    for number, asked in self._channel.receive():
                        self._take(number, asked)
            if self._engine is not None:  # else it is still loading, and nothing is worth waiting for
                self._engine.close()
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            _leave(status)

    def _take(self, number: int, asked: Request | str) -> None:
        if not isinstance(asked, Request):  # figures come from the engine's process, between two of its steps
            threading.Thread(target=lambda: self._channel.send((number, self._engine.figures())), daemon=True).start()
            return
        try:
            self._engine.submit(asked).add_done_callback(functools.partial(self._reply, number))
        except EngineDead as error:
            self._channel.send((number, error))

    def _reply(self, number: int, future: Future) -> None:
        self._channel.send((number, _outcome(future)))


def _outcome(future: Future) -> Any:
    if future.cancelled():
        return EngineDead("the engine is closed")
    error = future.exception()
    if error is None or isinstance(error, NLIError):
        return error or future.result()
    return EngineDead(f"vLLM's front end failed ({type(error).__name__}: {error})")


def _leave(status: int) -> None:
    """End at once: what vLLM would tidy up at an interpreter's end is closed already, or is of no use to anyone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # who reads it may be gone
            stream.flush()
    os._exit(status)


def main() -> None:
    """Serve the channel whose file descriptor the command line names."""
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)  # a program that is started here and outlives this process would keep the channel open
    channel = Channel(end)
    os.register_at_fork(after_in_child=channel.abandon)
    try:
        server = Server(channel)
    except EOFError:
        return
    server.run()


if __name__ == "__main__":
    main()
