"""The teacher's bill: what was asked, what is owed, and how much fell into any 60 seconds.

    bill = Bill()
    number = bill.arrive()                                     # a request is here; whether it will be billed is not known yet
    bill.charge(number, "3f…", "ministral-8b-2512", prompt_tokens=210, completion_tokens=60)
    bill.complete(number)
    bill.summarise() -> {"requests": 1, "billed": 1, "distinct": 1, "repeated": 0, "prompt_tokens": 210, …, "windows": {…}}

Windows slide: a window is any half-open stretch of so many seconds, so their maxima are exact, not those of clock minutes.
"""

import time
from array import array
from collections import Counter

from nli.api.prices import find_price

WINDOW_SECONDS = 60.0


class Bill:
    """Counts of one server. Not thread-safe: one event loop writes it."""

    def __init__(self) -> None:
        self.arrivals = array("d")
        self.completions = array("d")
        """by request number; 0 until it is complete"""
        self.tokens = array("q")
        """by request number; 0 for what is not billed"""
        self.calls: Counter[str] = Counter()
        """billed calls by request key"""
        self.asked: Counter[str] = Counter()
        """all requests by request key"""
        self.faults: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.num_tokens: dict[tuple[str, bool], tuple[int, int]] = {}
        """prompt and completion tokens by model and whether at half price"""
        self.in_flight = self.most_in_flight = 0

    def arrive(self) -> int:
        """Note a request; returns its number."""
        self.arrivals.append(time.monotonic())
        self.completions.append(0.0)
        self.tokens.append(0)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return len(self.arrivals) - 1

    def charge(
        self,
        number: int | None,
        key: str,
        model: str,
        prompt_tokens: int,
        completion_tokens: int,
        half_price: bool = False,
    ) -> None:
        """Bill a call. `number` is None for a request of a batch job, which no window holds."""
        self.calls[key] += 1
        so_far = self.num_tokens.get((model, half_price), (0, 0))
        self.num_tokens[model, half_price] = (so_far[0] + prompt_tokens, so_far[1] + completion_tokens)
        if number is not None:
            self.tokens[number] = prompt_tokens + completion_tokens

    def complete(self, number: int) -> None:
        """Note that a request is answered, or given up."""
        self.completions[number] = time.monotonic()
        self.in_flight -= 1

    def summarise(self, window_seconds: float = WINDOW_SECONDS) -> dict:
        """All counts. `windows` holds the most that any stretch of `window_seconds` saw."""
        billed = [number for number, tokens in enumerate(self.tokens) if tokens]
        num_prompt, num_completion = (sum(counts[side] for counts in self.num_tokens.values()) for side in (0, 1))
        finished = [number for number in billed if self.completions[number]]
        return {
            "requests": len(self.arrivals),
            "billed": sum(self.calls.values()),
            "distinct": len(self.calls),
            "repeated": sum(self.calls.values()) - len(self.calls),
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "half_price_tokens": sum(sum(counts) for (_, half_price), counts in self.num_tokens.items() if half_price),
            "nanodollars": self._cost(),
            "in_flight": self.in_flight,
            "most_in_flight": self.most_in_flight,
            "refused": dict(self.refused),
            "faults": dict(self.faults),
            "seconds": self.arrivals[-1] - self.arrivals[0] if self.arrivals else 0.0,
            "windows": {
                "seconds": window_seconds,
                "requests": find_fullest_window([(at, 1) for at in self.arrivals], window_seconds),
                "tokens_by_arrival": find_fullest_window(
                    [(self.arrivals[number], self.tokens[number]) for number in billed], window_seconds
                ),
                "tokens_by_completion": find_fullest_window(
                    [(self.completions[number], self.tokens[number]) for number in finished], window_seconds
                ),
            },
        }

    def _cost(self) -> int | None:
        """What is owed by the price table, or None if a model has no price there."""
        prices = {model: find_price(model) for model, _ in self.num_tokens}
        if None in prices.values():
            return None
        owed = 0
        for (model, half_price), counts in self.num_tokens.items():
            owed += (prices[model].half() if half_price else prices[model]).cost_nanodollars(*counts)
        return owed


def find_fullest_window(events: list[tuple[float, int]], seconds: float) -> int:
    """The largest sum of weights in any half-open stretch of so many seconds, for events of (time, weight)."""
    events = sorted(events)
    most = total = first = 0
    for at, weight in events:
        total += weight
        while events[first][0] <= at - seconds:
            total -= events[first][1]
            first += 1
        most = max(most, total)
    return most
