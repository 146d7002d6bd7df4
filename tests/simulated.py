"""Time that passes only while everybody waits: an event loop whose clock jumps to the next timer, so that minutes of limits are tested in a moment."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

Result = TypeVar("Result")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Its `time` is the clock for what is tested. Nothing outside the loop (threads, sockets) may be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0
        poll = self._selector.select

        def select(timeout: float | None) -> list:
            ready = poll(0)
            if not ready:
                if timeout is None:
                    raise RuntimeError("everybody waits, and no timer is set")
                self._now += timeout
            return ready

        self._selector.select = select

    def time(self) -> float:
        return self._now


def simulate(main: Coroutine[None, None, Result]) -> Result:
    """Run a coroutine in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(main)
