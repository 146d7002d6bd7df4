"""Keep within an account's requests and tokens per minute.

    limiter = MinuteLimiter(requests_per_minute=300, tokens_per_minute=100_000)
    grant = await limiter.acquire(estimated_tokens=400)   # waits until the last 60 s have room
    limiter.settle(grant, used_tokens=371)                # what the reply really used

The window slides: no 60 seconds hold more than the limit, not only no clock minute.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

WINDOW_SECONDS = 60.0


@dataclass
class Grant:
    """One request's place in the window: when it was let go and how many tokens it holds."""

    at: float
    tokens: int


class MinuteLimiter:
    """A sliding window over requests and tokens for the callers of one event loop. A limit of 0 is no limit.

    A request that alone exceeds `tokens_per_minute` is let go when the window is empty, rather than never.
    """

    def __init__(self, requests_per_minute: float = 0, tokens_per_minute: float = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        # Less than one request a minute, as a worker's share may be, is one request in more than a minute.
        self._window = WINDOW_SECONDS / min(1.0, requests_per_minute or 1.0)
        self._clock = clock
        self._granted: deque[Grant] = deque()
        self._turn = asyncio.Lock()

    async def acquire(self, estimated_tokens: int) -> Grant:
        """Wait for room for one request of so many tokens (prompt and reply together) and take it."""
        async with self._turn:
            while (wait := self.seconds_to_wait(estimated_tokens)) > 0:
                await asyncio.sleep(wait)
            grant = Grant(self._clock(), estimated_tokens)
            self._granted.append(grant)
            return grant

    def settle(self, grant: Grant, used_tokens: int) -> None:
        """Replace a grant's estimate by what was used."""
        grant.tokens = used_tokens

    def seconds_to_wait(self, estimated_tokens: int) -> float:
        """Seconds until a request of so many tokens fits; 0 when it fits now."""
        if not self.requests_per_minute and not self.tokens_per_minute:
            self._granted.clear()
            return 0.0
        now = self._clock()
        while self._granted and self._granted[0].at <= now - self._window:
            self._granted.popleft()
        if not self._granted:
            return 0.0
        wait = self._granted[0].at + self._window - now
        if self.requests_per_minute and len(self._granted) + 1 > self.requests_per_minute:
            return wait
        if self.tokens_per_minute and sum(grant.tokens for grant in self._granted) + estimated_tokens > self.tokens_per_minute:
            return wait
        return 0.0
