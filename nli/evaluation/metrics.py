"""How right a set of answers is, how sure that is, and whether two sets differ: arrays in, plain numbers out.

In:   truth [1, 1, 0, 0], predicted [1, UNPARSED, 0, 1]
Out:  {"labelled": 4, "unparsed_labelled": 1, "correct": 2, "accuracy": 0.5, "accuracy_low": 0.15, …, "confusion": [[1, 0, 1], [1, 1, 0]]}

One rule for an answer that could not be read: it is an error, and no prediction. It is wrong in the accuracy; it stands in the recall denominator of its
true class; it stands in no precision denominator, because no class was predicted. So macro F1 falls with every unread answer.

A bootstrap of n rows draws how often each cell of a table of counts comes up. That is one multinomial draw, so 10,000 resamples take milliseconds.
"""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from nli.task.prompts import ENTAILMENT, NO_ENTAILMENT

UNPARSED = -1
CLASSES = (ENTAILMENT, NO_ENTAILMENT)
POWER = 0.8
"""chance of finding a difference, in the smallest detectable one"""


def score_answers(truth: np.ndarray, predicted: np.ndarray, confidence: float, draws: int, seed: int) -> dict:
    """All figures of one run on its labelled rows; `predicted` holds 0, 1 or UNPARSED.

    `accuracy` is right ÷ all rows, `parsed_accuracy` right ÷ rows that could be read; None without such rows.
    """
    n, parsed = len(truth), int(np.sum(predicted != UNPARSED))
    correct = int(np.sum(truth == predicted))
    confusion = count_confusion(truth, predicted)
    return {
        "labelled": n,
        "unparsed_labelled": n - parsed,
        "correct": correct,
        **_with_interval("accuracy", correct, n, confidence),
        **_with_interval("parsed_accuracy", correct, parsed, confidence),
        **score_classes(truth, predicted, confidence, draws, seed),
        "confusion": confusion.tolist(),
    }


def score_classes(truth: np.ndarray, predicted: np.ndarray, confidence: float, draws: int, seed: int) -> dict:
    """Precision, recall and F1: `macro_…` is the plain mean over both classes, `positive_…` the class entailment alone; F1 with bootstrap intervals.

    An unparsed row counts in the recall denominator of its true class and as a prediction of no class. A class that is never predicted has precision 0.
    All are None where a class has no true row: a mean over one class would look like a mean over both.
    """
    confusion = count_confusion(truth, predicted)
    if not confusion.sum(axis=1).all():
        return dict.fromkeys(
            f"{kind}_{figure}"
            for kind in ("macro", "positive")
            for figure in ("precision", "recall", "f1", "f1_low", "f1_high")
        )
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, labels=CLASSES, zero_division=0)
    macro, positive = bootstrap_f1(confusion, confidence, draws, seed)
    return {
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "macro_f1_low": macro[0],
        "macro_f1_high": macro[1],
        "positive_precision": float(precision[0]),
        "positive_recall": float(recall[0]),
        "positive_f1": float(f1[0]),
        "positive_f1_low": positive[0],
        "positive_f1_high": positive[1],
    }


def count_confusion(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Counts of shape (2, 3): rows are the true classes 1 and 0, columns predicted 1, predicted 0 and unparsed."""
    if not len(truth):
        return np.zeros((2, 3), dtype=int)
    return confusion_matrix(truth, predicted, labels=[*CLASSES, UNPARSED])[:2]


def wilson_interval(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of a share: honest near 0 and 1 and for small n."""
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_f1(
    confusion: np.ndarray, confidence: float, draws: int, seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Percentile intervals of macro F1 and of the positive class's F1, by resampling the rows behind a confusion table."""
    n = int(confusion.sum())
    tables = np.random.default_rng(seed).multinomial(n, confusion.ravel() / n, size=draws).reshape(draws, 2, 3)
    hits = np.stack([tables[:, 0, 0], tables[:, 1, 1]], axis=1)
    weight = tables.sum(axis=2) + tables[:, :, :2].sum(axis=1)  # true rows + predicted rows of each class
    f1 = np.divide(2 * hits, weight, out=np.zeros(hits.shape), where=weight > 0)
    return _percentiles(f1.mean(axis=1), confidence), _percentiles(f1[:, 0], confidence)


def compare_answers(
    truth: np.ndarray, run: np.ndarray, other: np.ndarray, confidence: float, draws: int, seed: int
) -> dict:
    """A paired comparison of two runs on the same rows: `difference` is the accuracy of `run` less that of `other`.

    `low` and `high` are the paired bootstrap's percentiles, `p_value` is McNemar's exact test: of the rows that only one run has right, a fair coin would give
    each run half.
    """
    n = len(truth)
    run_right, other_right = truth == run, truth == other
    only_run, only_other = int(np.sum(run_right & ~other_right)), int(np.sum(~run_right & other_right))
    discordant = only_run + only_other
    resampled = np.random.default_rng(seed).multinomial(
        n, np.array([only_run, only_other, n - discordant]) / n, size=draws
    )
    low, high = _percentiles((resampled[:, 0] - resampled[:, 1]) / n, confidence)
    return {
        "n": n,
        "unparsed_run": int(np.sum(run == UNPARSED)),
        "unparsed_other": int(np.sum(other == UNPARSED)),
        "difference": (only_run - only_other) / n,
        "low": low,
        "high": high,
        "both_right": int(np.sum(run_right & other_right)),
        "only_run_right": only_run,
        "only_other_right": only_other,
        "neither_right": int(np.sum(~run_right & ~other_right)),
        "p_value": float(binomtest(only_run, discordant).pvalue) if discordant else 1.0,
        "smallest_detectable": smallest_detectable_difference(n, discordant / n, 1 - confidence),
    }


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: keeps the chance of any false alarm over all the tests below the level, without assuming independence."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    stepped = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return adjusted.tolist()


def smallest_detectable_difference(n: int, discordance: float, alpha: float, power: float = POWER) -> float | None:
    """The accuracy difference that McNemar's test at level `alpha` finds with probability `power`, given n rows of which the share `discordance` is discordant.

    Connor (1987), Biometrics 43:207-211: n = (z_alpha/2 √d + z_power √(d - δ²))² / δ², here solved for δ. No difference can exceed the discordance, so where
    the observed one is too small, δ is the one at which all discordant rows fall on one side (d = δ). None where no difference can be found at that n.
    The formula is asymptotic; the exact test needs slightly more.
    """
    z_alpha, z_power = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))
    if n <= z_alpha**2:
        return None
    difference = (
        sqrt(discordance) * (z_alpha * sqrt(n) + z_power * sqrt(n - z_alpha**2 + z_power**2)) / (n + z_power**2)
    )
    if 0 < difference <= discordance:
        return difference
    return float(brentq(lambda delta: n * delta - (z_alpha + z_power * sqrt(1 - delta)) ** 2, 0, 1))


def score_group(truth: np.ndarray, predicted: np.ndarray, confidence: float) -> dict:
    """Counts and accuracy of one slice of the rows."""
    n, correct = len(truth), int(np.sum(truth == predicted))
    return {"n": n, "unparsed": int(np.sum(predicted == UNPARSED)), "correct": correct} | _with_interval(
        "accuracy", correct, n, confidence
    )


def find_quartiles(values: np.ndarray) -> np.ndarray:
    """The quartile, 0 to 3, of each value. Equal values share one, so with many ties a quartile may be empty."""
    return np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values, side="left")


def name_quartiles(values: Sequence[int | None], unit: str, without: str = "") -> list[tuple[str, str]]:
    """`("Q1", "4–7 words")` and so on: the quartile of each value with the range that it really spans; `without` for a row that has no value."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return [(without, "")] * len(values)
    quartiles = find_quartiles(known)
    spans = {}
    for quartile in sorted(set(quartiles.tolist())):
        low, high = known[quartiles == quartile].min(), known[quartiles == quartile].max()
        spans[quartile] = (f"Q{quartile + 1}", f"{low if low == high else f'{low}–{high}'} {unit}")
    found = iter(quartiles.tolist())
    return [(without, "") if value is None else spans[next(found)] for value in values]


def count_words(text: str | None) -> int:
    """Words of a text, split at white space."""
    return len((text or "").split())


def share_words(premise: str, hypothesis: str) -> float:
    """The share of the hypothesis's distinct words that the premise has too, whatever the case and the punctuation around them."""
    wanted, given = (
        {word.strip(".,;:!?\"'()").lower() for word in text.split()} - {""} for text in (hypothesis, premise)
    )
    return len(wanted & given) / len(wanted) if wanted else 0.0


def _with_interval(name: str, successes: int, n: int, confidence: float) -> dict:
    low, high = wilson_interval(successes, n, confidence) if n else (None, None)
    return {name: successes / n if n else None, f"{name}_low": low, f"{name}_high": high}


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
