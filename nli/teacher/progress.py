"""One live line of a generation run: requests and tokens per minute, cost so far and at the end, time left.

thoughts:  62%|██████    | 1240/2000 rows, 1198 requests/min, 511k tokens/min, $0.081 of about $0.13, 38 s left
"""

import contextlib
import sys
import threading
import time
from collections import deque

from nli.api.ledger_file import LedgerReader, Totals
from nli.api.prices import format_dollars
from nli.runtime.errors import StorageError

WINDOW_SECONDS = 60.0
FEWEST_REPLIES = 50  # before the cost at the end is told from the replies


class LiveProgress:
    """Shows a run's sums from the ledger while the block lasts, from a thread of its own."""

    def __init__(self, label: str, reader: LedgerReader, run: str, num_rows: int, has_price: bool) -> None:
        self._label, self._reader, self._run, self._num_rows, self._has_price = label, reader, run, num_rows, has_price
        self._interval = 1.0 if sys.stderr.isatty() else 15.0  # seconds between lines; a log file keeps every one
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> "LiveProgress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._reader.close()

    def _show(self) -> None:
        with contextlib.suppress(StorageError):  # the run meets it too, and ends by it
            self._show_until_stopped()

    def _show_until_stopped(self) -> None:
        from tqdm import tqdm

        start = self._reader.read_totals(self._run)
        seen: deque[tuple[float, Totals]] = deque([(time.monotonic(), start)])
        bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} rows{postfix}"
        with tqdm(
            total=self._num_rows, desc=self._label, bar_format=bar_format, mininterval=0, dynamic_ncols=True
        ) as bar:
            is_last = False
            while not is_last:
                is_last = self._stop.wait(self._interval)
                now, totals = time.monotonic(), self._reader.read_totals(self._run)
                while len(seen) > 1 and now - seen[0][0] > WINDOW_SECONDS:
                    seen.popleft()
                seen.append((now, totals))
                bar.n = min(self._num_rows, max(0, count_rows(totals) - count_rows(start)))
                bar.set_postfix_str(describe(seen, start, bar.n, self._num_rows, self._has_price), refresh=True)


def count_rows(totals: Totals) -> int:
    """First requests that ended, repairs left out."""
    return totals.done + totals.failed - totals.repairs


def describe(seen: deque[tuple[float, Totals]], start: Totals, num_done: int, num_rows: int, has_price: bool) -> str:
    """The figures of the line, from sums at two or more moments."""
    (first_at, first), (last_at, last) = seen[0], seen[-1]
    minutes = max(1e-9, last_at - first_at) / 60
    requests = (last.done - first.done) / minutes
    tokens = (last.prompt_tokens + last.completion_tokens - first.prompt_tokens - first.completion_tokens) / minutes
    parts = [f"{requests:.0f} requests/min", f"{tokens / 1000:.0f}k tokens/min"]
    if has_price:
        spent = last.cost + last.held
        cost = format_dollars(spent)
        if num_done >= FEWEST_REPLIES:
            cost += f" of about {format_dollars(int(start.cost + start.held + (spent - start.cost - start.held) * num_rows / num_done))}"
        parts.append(cost)
    rate = (count_rows(last) - count_rows(first)) / (minutes * 60)
    if rate > 0:
        parts.append(f"{(num_rows - num_done) / rate:.0f} s left")
    if last.ambiguous_sends > start.ambiguous_sends:
        parts.append(f"{last.ambiguous_sends - start.ambiguous_sends} sent without answer")
    return ", ".join(parts)
