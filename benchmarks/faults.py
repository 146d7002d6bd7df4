"""The fault script of the benchmark's teacher: what goes wrong, decided by a seed, a request's key and how often it was asked, never by time or order.

    {"rate": 0.2, "kinds": ["429", "500", "reset_after"], "attempts": 2, "content_rate": 0.05, "content_kinds": ["wrong_schema"]}

A fifth of the first and of the second attempts at each request fail, in one of the three ways; from the third attempt on it is answered. A twentieth of the
requests are answered, each time, with a completion whose content does not fit: such an answer belongs to the request, so that a run that nothing disturbs
reads the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields

from benchmarks.replies import fraction_of

STATUS_KINDS = ("429", "429_date", "429_bare", "500", "502", "503", "529")
"""not billed; `429` says in seconds when to come again, `429_date` as a date, `429_bare` not at all"""
UNBILLED_KINDS = (*STATUS_KINDS, "reset_before")
BILLED_KINDS = ("reset_after", "late", "truncated", "not_json", "drip")
"""`late` answers after `late_seconds`, `drip` sends the body over `drip_seconds`: what a client makes of both is up to its timeout"""
KINDS = (*UNBILLED_KINDS, *BILLED_KINDS)
CONTENT_KINDS = ("invalid_json", "wrong_schema", "length")
"""billed completions; `length` is cut, and says so"""
BATCH_OUTCOMES = ("SUCCESS", "FAILED", "TIMEOUT_EXCEEDED", "CANCELLED", "EXPIRED")
"""`TIMEOUT_EXCEEDED` and `CANCELLED` come with half of the results; `EXPIRED` is a success whose results cannot be downloaded any more"""


class FaultScriptError(ValueError):
    """The script names a field or kind that there is not, or a value out of range."""


@dataclass(frozen=True)
class FaultScript:
    """Shares are from 0 to 1. The default disturbs nothing."""

    rate: float = 0.0
    """share of a request's first `attempts` attempts that fail by one of `kinds`"""
    kinds: tuple[str, ...] = KINDS
    attempts: int = 1
    content_rate: float = 0.0
    """share of requests that are always answered by one of `content_kinds`"""
    content_kinds: tuple[str, ...] = CONTENT_KINDS
    retry_after_seconds: int = 1
    late_seconds: float = 5.0
    drip_seconds: float = 1.0
    batch_rate: float = 0.0
    """share of a batch job's requests that fail the first time that they are asked"""
    batch_jobs: tuple[str, ...] = ()
    """how the first jobs end, one after another; later ones succeed"""
    batch_lost_creates: int = 0
    """so many of the first jobs are made, and the connection is reset instead of saying so"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, legal in (("kinds", KINDS), ("content_kinds", CONTENT_KINDS), ("batch_jobs", BATCH_OUTCOMES)):
            unknown = [kind for kind in getattr(self, name) if kind not in legal]
            if unknown:
                raise FaultScriptError(f"{name}: there is no {unknown[0]!r}; there are {', '.join(legal)}.")
        for name in ("rate", "content_rate", "batch_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise FaultScriptError(f"{name} is {getattr(self, name)}: a share from 0 to 1.")

    def choose(self, key: str, attempt: int) -> str | None:
        """The fault of a request's attempt, counted from 1, or None."""
        if not self.rate or attempt > self.attempts or fraction_of(self.seed, "rate", key, attempt) >= self.rate:
            return None
        return self.kinds[int(fraction_of(self.seed, "kind", key, attempt) * len(self.kinds))]

    def choose_content(self, key: str) -> str | None:
        """What is wrong with every answer to this request, or None."""
        if not self.content_rate or fraction_of(self.seed, "content_rate", key) >= self.content_rate:
            return None
        return self.content_kinds[int(fraction_of(self.seed, "content_kind", key) * len(self.content_kinds))]

    def fails_in_batch(self, custom_id: str, attempt: int) -> bool:
        """Whether a batch job's request ends in its error file."""
        return attempt == 1 and fraction_of(self.seed, "batch_rate", custom_id) < self.batch_rate

    def spoil(self, content: str, kind: str | None) -> tuple[str, str]:
        """A right answer made wrong in the way of `kind`: content and finish reason."""
        if kind == "invalid_json":
            return content.replace('"', "", 1), "stop"
        if kind == "wrong_schema":
            answer = json.loads(content)
            wrong = {"label": "yes"} if "predicted_label" in answer else {"answer": "none"}
            return json.dumps(
                {name: value for name, value in answer.items() if name not in ("predicted_label", "score")} | wrong
            ), "stop"
        if kind == "length":
            return content[: len(content) // 2], "length"
        return content, "stop"


def read_script(spec: str | Mapping, seed: int = 0) -> FaultScript:
    """A script from its JSON. Raises FaultScriptError naming what is wrong with it."""
    try:
        values = dict(json.loads(spec) if isinstance(spec, str) else spec)
    except ValueError as error:
        raise FaultScriptError(f"{spec!r} is not a JSON object ({error}).") from None
    names = [field.name for field in fields(FaultScript)]
    unknown = [name for name in values if name not in names]
    if unknown:
        raise FaultScriptError(f"there is no {unknown[0]!r}; there are {', '.join(names)}.")
    return FaultScript(
        **{"seed": seed} | {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    )
