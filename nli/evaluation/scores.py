"""The figures of an evaluation: each run scored, compared with the others, and in slices of its rows.

In:   the Answers of each run, in one order: {"reflected": [{"id": "7", "true_label": 1, "predicted_label": 0, "parse_status": "ok", …}, …], "unmodified": …}
Out:  score_run     {"run": "reflected", "n": 400, "unparsed": 0, "statuses": {"ok": 400}, "accuracy": 0.8925, "accuracy_low": 0.858, …}
      compare_runs  [{"run": "unmodified", "other": "reflected", "difference": -0.0825, "p_value": 2e-05, "holm_p_value": 1e-04, "differs": True, …}]
      slice_runs    [{"by": "premise length", "group": "Q1", "range": "3–9 words", "run": "reflected", "n": 103, "accuracy": 0.93, …}, …]
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from nli.evaluation.metrics import (
    UNPARSED,
    adjust_holm,
    compare_answers,
    count_words,
    name_quartiles,
    score_answers,
    score_group,
    share_words,
    wilson_interval,
)
from nli.task.parsing import ParseStatus

SMALL_SLICE = 20
"""a slice of fewer rows is marked as too small to read anything from"""


def to_labels(rows: Iterable[Mapping]) -> tuple[list[int], list[int]]:
    """True and predicted labels of the labelled rows; UNPARSED where an answer could not be read."""
    labelled = [row for row in rows if row["true_label"] is not None]
    return [row["true_label"] for row in labelled], [
        row["predicted_label"] if row["parse_status"] == ParseStatus.OK else UNPARSED for row in labelled
    ]


def score_run(name: str, rows: Sequence[Mapping], confidence: float, draws: int, seed: int) -> dict:
    """One line of the result table: unparsed answers first, then the figures of `score_answers`."""
    statuses = Counter(row["parse_status"] for row in rows)
    parsed = statuses[ParseStatus.OK]
    positive = sum(row["predicted_label"] == 1 for row in rows if row["parse_status"] == ParseStatus.OK)
    low, high = wilson_interval(positive, parsed, confidence) if parsed else (None, None)
    truth, predicted = (np.array(labels, dtype=int) for labels in to_labels(rows))
    return {
        "run": name,
        "n": len(rows),
        "unparsed": len(rows) - parsed,
        "statuses": {
            str(status): statuses[status]
            for status in [*ParseStatus, *sorted(set(statuses) - set(ParseStatus))]
            if statuses[status]
        },
        "predicted_1": positive,
        "share_1": positive / parsed if parsed else None,
        "share_1_low": low,
        "share_1_high": high,
        **score_answers(truth, predicted, confidence, draws, seed),
    }


def compare_runs(
    runs: Mapping[str, Sequence[Mapping]], baseline: str, confidence: float, draws: int, seed: int
) -> list[dict]:
    """Each run against the baseline, or each pair (the later run less the earlier), with p values adjusted over all of them."""
    pairs = (
        [(name, baseline) for name in runs if name != baseline]
        if baseline
        else [(b, a) for a, b in combinations(runs, 2)]
    )
    labels = {name: tuple(np.array(part, dtype=int) for part in to_labels(rows)) for name, rows in runs.items()}
    comparisons = []
    for name, other in pairs:
        truth, predicted = labels[name]
        if len(truth):
            figures = compare_answers(truth, predicted, labels[other][1], confidence, draws, seed)
            comparisons.append({"run": name, "other": other, **figures})
    adjusted = adjust_holm([row["p_value"] for row in comparisons])
    return [
        row | {"holm_p_value": p_value, "differs": p_value < 1 - confidence}
        for row, p_value in zip(comparisons, adjusted, strict=True)
    ]


def slice_runs(runs: Mapping[str, Sequence[Mapping]], columns: Sequence[str], confidence: float) -> list[dict]:
    """Accuracy of every run in every slice of its labelled rows, as flat rows {"by", "group", "range", "run", "n", "unparsed", "accuracy", …}."""
    slices = []
    for name, rows in runs.items():
        labelled = [row for row in rows if row["true_label"] is not None]
        truth, predicted = (np.array(labels, dtype=int) for labels in to_labels(rows))
        for by, groups in group_rows(labelled, columns).items():
            for group, span in sorted(set(groups)):
                chosen = np.array([item == (group, span) for item in groups])
                figures = score_group(truth[chosen], predicted[chosen], confidence)
                slices.append(
                    {
                        "by": by,
                        "group": group,
                        "range": span,
                        "run": name,
                        **figures,
                        "too_small": figures["n"] < SMALL_SLICE,
                    }
                )
    return slices


def group_rows(rows: Sequence[Mapping], columns: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """For each way of slicing, the group of each row: the columns' own values, then quartiles of lengths and of word overlap with their ranges."""
    if not rows:
        return {}
    groups = {
        column: [(str(row[column]) if row[column] not in (None, "") else "(none)", "") for row in rows]
        for column in columns
    }
    thoughts = [count_words(row["thought_process"]) if row["parse_status"] == ParseStatus.OK else None for row in rows]
    groups["thought length"] = name_quartiles(thoughts, "words", "no thought")
    groups["premise length"] = name_quartiles([count_words(row["premise"]) for row in rows], "words")
    groups["hypothesis length"] = name_quartiles([count_words(row["hypothesis"]) for row in rows], "words")
    groups["word overlap"] = name_quartiles(
        [round(100 * share_words(row["premise"], row["hypothesis"])) for row in rows], "%"
    )
    return groups
