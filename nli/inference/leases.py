"""Who works on which rows: which worker gets how many next, and what becomes of the rows of a worker that died.

    leases = Leases(num_rows=2000, most_held=1536)
    leases.begin("worker-1", "/tmp/ray/…/worker-1.err")   -> None                 it may load its engine
    leases.take("worker-1", 64)                           -> [1, 2, …, 64]        rows are numbered from 1
    leases.finish("worker-1", [3, 1])
    leases.begin("worker-1", …)                           a second start: the first one died, and 62 rows were in its hands

A row that ends its process each time must not end the run. Rows that a dead worker held are suspects: they are taken again after all others, in cohorts that
shrink with each death and with nothing else in that worker's hands, until one row that was alone at a death is given up and the others are done. A worker
that dies without having finished a row begins again with few rows, so that an engine that cannot work at all is told from a row that it cannot bear.
Rows that came back with a machine, or in a reply that never arrived, are no suspects.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

ENDED = "its process ended without a word"
MOST_STARTS = 3  # of a worker that finishes no row between them
MOST_EXCUSED = 4  # more, where each shows a row to be the cause and rows have been finished before: several such rows may come one after the other
FEWEST_SHARED = 32  # rows a worker may hold, however little is left to share
COHORTS = {1: 128, 2: 16, 3: 2}  # rows taken together that have seen so many deaths; 1 beyond
FIRST_ROWS = {0: 1 << 30, 1: 16}  # rows for a worker after so many deaths in a row without a finished row; 1 beyond


@dataclass
class _Worker:
    start: str
    log: str
    held: set[int] = field(default_factory=set)
    holds_suspects: bool = False
    num_finished: int = 0
    num_fruitless: int = 0
    """starts in a row that ended without a finished row"""
    num_excused: int = 0
    """further ones, which showed a row to be the cause"""
    is_alive: bool = True
    reason: str = ""
    """why it ended, if it could say so"""


class Leases:
    """The rows of one run. Row numbers are 1 to `num_rows`; `most_held` bounds what one worker holds."""

    def __init__(self, num_rows: int, most_held: int) -> None:
        self.num_rows = num_rows
        self.num_finished = 0
        self.num_deaths = 0
        self._most_held = most_held
        self._next = 1
        self._deaths: dict[int, int] = {}  # of rows that are suspects, held or not
        self._waiting: set[int] = set()  # suspects that nobody holds
        self._returned: set[int] = set()  # rows that nobody holds any more and that are no suspects
        self._given_up: dict[int, str] = {}
        self._has_worked = False  # whether an engine has finished a row
        self._workers: dict[str, _Worker] = {}

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to take or to finish."""
        return self._num_left() == 0

    @property
    def num_alive(self) -> int:
        """How many workers have begun and are not known to be dead."""
        return sum(worker.is_alive for worker in self._workers.values())

    @property
    def num_workers(self) -> int:
        """How many workers ever began: one that is dead may come back."""
        return len(self._workers)

    def list_logs(self) -> list[str]:
        """Where the workers that are alive write what they say."""
        return [worker.log for worker in self._workers.values() if worker.is_alive]

    def list_holders(self) -> dict[str, str]:
        """The workers with rows in their hands, with the start that has them."""
        return {name: worker.start for name, worker in self._workers.items() if worker.held}

    def begin(self, worker: str, log: str, start: str = "") -> str | None:
        """A worker starts, perhaps again; `start` tells its starts apart. Returns why it must not, if its earlier starts led to nothing."""
        before = self._workers.get(worker)
        if before is not None and before.is_alive:
            self.bury(worker, ENDED)
            before = self._workers[worker]
        num_fruitless = before.num_fruitless if before else 0
        if num_fruitless >= MOST_STARTS:
            return f"{num_fruitless} starts in a row ended before a row was finished, the last one so: {before.reason}. Its log: {before.log}"
        self._workers[worker] = _Worker(
            start, log, num_fruitless=num_fruitless, num_excused=before.num_excused if before else 0
        )
        return None

    def bury(self, worker: str, reason: str, machine_lost: bool = False) -> None:
        """A worker is dead: what it held is for others, or given up if it is shown to be the cause, which it is not where the machine was lost."""
        dead = self._workers.get(worker)
        if dead is None or not dead.is_alive:
            return
        self.num_deaths += 1
        dead.is_alive, dead.reason = False, reason
        if machine_lost:
            self._take_back(dead)
            return
        num_given_up = 0
        for row in dead.held:
            self._deaths[row] = self._deaths.get(row, 0) + 1
            if len(dead.held) == 1 and self._deaths[row] > 1:
                num_given_up += 1
                self._given_up[row] = (
                    f"the worker's process died {self._deaths[row]} times with this row in it, the last time with no other: {reason}"
                )
            else:
                self._waiting.add(row)
        dead.held = set()
        if dead.num_finished:
            dead.num_fruitless = dead.num_excused = 0
        elif num_given_up and self._has_worked and dead.num_excused < MOST_EXCUSED:
            dead.num_excused += 1
        else:
            dead.num_fruitless += 1

    def take(self, worker: str, most: int, start: str = "", has_none: bool = False) -> list[int] | None:
        """Rows for a worker to begin with, at most so many; an empty list: ask again when some have ended; None: nothing is left for it.

        A start that has ended, or is about to, gets nothing: nobody would work on it. `has_none`: the worker has no row in its hands, whatever it was given.
        """
        mine = self._workers.setdefault(worker, _Worker(start, log=""))
        if not mine.is_alive or mine.start != start:
            return []
        if has_none:
            self._take_back(mine)
        if self._next > self.num_rows and not self._waiting and not self._returned:
            return None
        if mine.holds_suspects and mine.held:
            return []
        mine.holds_suspects = False
        limit = self._limit(mine)
        num = max(0, min(most, limit - len(mine.held)))
        if self._next <= self.num_rows:
            rows = list(range(self._next, min(self._next + num, self.num_rows + 1)))
            self._next += len(rows)
        elif self._returned:
            rows = sorted(self._returned)[:num]
            self._returned.difference_update(rows)
        elif mine.held:
            return []
        else:
            rows = self._pick_suspects(min(most, limit))
            self._waiting.difference_update(rows)
            mine.holds_suspects = True
        mine.held.update(rows)
        return rows

    def finish(self, worker: str, rows: Iterable[int]) -> None:
        """Rows of a worker are stored. Those of a worker that was taken for dead count as well."""
        mine = self._workers.get(worker) or _Worker(start="", log="")  # a stranger was here before this process
        for row in rows:
            if row in mine.held or row in self._waiting or row in self._returned:
                self.num_finished += 1
                mine.num_finished += 1
                self._has_worked = True
            for place in (mine.held, self._waiting, self._returned):
                place.discard(row)
            self._deaths.pop(row, None)

    def pop_given_up(self) -> dict[int, str]:
        """Rows that are given up since the last call, each with the reason; they count as finished."""
        given_up, self._given_up = self._given_up, {}
        self.num_finished += len(given_up)
        return given_up

    def _take_back(self, mine: _Worker) -> None:
        for row in mine.held:
            (self._waiting if row in self._deaths else self._returned).add(row)
        mine.held = set()

    def _limit(self, mine: _Worker) -> int:
        """How many rows a worker may hold: a fair share of what is left, and few after deaths that led to nothing."""
        share = max(FEWEST_SHARED, -(-self._num_left() // max(1, self.num_alive)))
        first = FIRST_ROWS.get(mine.num_fruitless, 1) if not mine.num_finished else self._most_held
        return min(self._most_held, share, first)

    def _num_left(self) -> int:
        return (
            self.num_rows
            + 1
            - self._next
            + len(self._waiting)
            + len(self._returned)
            + sum(len(worker.held) for worker in self._workers.values())
        )

    def _pick_suspects(self, most: int) -> list[int]:
        """The next cohort: of the suspects with the fewest deaths, and never all of several, so that a second cohort can clear the engine."""
        fewest = min(self._deaths[row] for row in self._waiting)
        alike = sorted(row for row in self._waiting if self._deaths[row] == fewest)
        half = max(1, -(-len(self._waiting) // 2))
        return alike[: max(1, min(most, COHORTS.get(fewest, 1), half))]
