"""What may be wrong with pairs, answers and reflections: pure functions from rows to counts and findings.

In:   check_pairs("train", [{"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}, {"id": "9", … the same, "true_label": 0}])
Out:  {"split": "train", "rows": 2, "label_1": 1, "label_0": 1, "repeated_pairs": 1, "conflicting_pairs": 1, …} and
      [Finding("fault", "train", "conflicting labels", 1, "one pair stands with both labels", ("ids 0, 9: 'Two dogs ran.' / 'Animals moved.'",))]

A fault makes training or a score wrong and fails a strict check; a warning is something to know; neither changes a row.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from nli.evaluation.metrics import UNPARSED
from nli.task.leaks import betrays_label
from nli.task.parsing import ParseStatus
from nli.task.records import Reflection, content_hash

NUM_EXAMPLES = 3
MOST_CHARACTERS = 70
"""of one text shown in an example"""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found: how bad, in which file, what, how often, in words, and a few examples."""

    level: Literal["fault", "warning"]
    where: str
    check: str
    count: int
    message: str
    examples: tuple[str, ...] = ()


class Facts(NamedTuple):
    """What the checks keep of one answer or reflection: no text, so that 200,000 of them fit in little memory."""

    id: str
    pair: str
    """hash of premise and hypothesis"""
    true_label: int | None
    answered_label: int
    """the answer's own label, UNPARSED where it could not be read"""
    label: int
    """the label that this record is about: the answer's, or the reflection's own"""
    status: str
    thought: str
    """hash of the answer's thought; '' without one"""
    length: int | None
    """of the thought (improved, for a reflection), in the check's unit; None without one"""
    tokens: int | None
    """of the same, in tokens"""
    phrase: str | None
    """by which it betrays that its writer was told the label"""


def check_pairs(split: str, rows: Sequence[Mapping]) -> tuple[dict, list[Finding]]:
    """Counts of one split's pairs, and its pairs that stand twice."""
    by_pair: dict[tuple[str, str], list[Mapping]] = defaultdict(list)
    for row in rows:
        by_pair[row["premise"], row["hypothesis"]].append(row)
    repeated = [members for members in by_pair.values() if len(members) > 1]
    conflicting = [members for members in repeated if len({row["true_label"] for row in members} - {None}) > 1]
    alike = [members for members in repeated if len({row["true_label"] for row in members} - {None}) <= 1]
    labels = Counter(row["true_label"] for row in rows)
    summary = {
        "split": split,
        "rows": len(rows),
        "label_1": labels[1],
        "label_0": labels[0],
        "unlabelled": labels[None],
        "premises": len({row["premise"] for row in rows}),
        "repeated_pairs": len(repeated),
        "conflicting_pairs": len(conflicting),
    }
    findings = [
        *_find("fault", split, "conflicting labels", conflicting, "pairs that stand with both labels", _show_rows),
        *_find("warning", split, "duplicates", alike, "pairs that stand more than once", _show_rows),
    ]
    labelled = labels[0] + labels[1]
    if labelled and not (labels[0] and labels[1]):
        message = f"all {labelled} labelled rows have label {1 if labels[1] else 0}: nothing can be learnt or measured on one class"
        findings.append(Finding("warning", split, "label balance", labelled, message))
    return summary, findings


def compare_splits(splits: Mapping[str, Sequence[Mapping]]) -> tuple[list[dict], list[Finding]]:
    """For each two splits, the premises and the pairs that stand in both; the counts are of distinct ones."""
    pairs = {name: {(row["premise"], row["hypothesis"]): row for row in rows} for name, rows in splits.items()}
    premises = {name: {premise for premise, _ in found} for name, found in pairs.items()}
    shared, findings = [], []
    for left, right in combinations(splits, 2):
        both = [pair for pair in pairs[left] if pair in pairs[right]]
        rows = [(pairs[left][pair], pairs[right][pair]) for pair in both]
        differing = [members for members in rows if len({row["true_label"] for row in members} - {None}) > 1]
        same_premise = sorted(premises[left] & premises[right])
        shared.append(
            {
                "splits": f"{left}, {right}",
                "premises": len(same_premise),
                "pairs": len(both),
                "conflicting_pairs": len(differing),
            }
        )
        where = f"{left}, {right}"
        findings += _find(
            "fault",
            where,
            "shared pairs",
            rows,
            "pairs that stand in both splits: what is trained on cannot test",
            _show_rows,
        )
        findings += _find(
            "fault",
            where,
            "conflicting labels",
            differing,
            "pairs that stand in both splits with different labels",
            _show_rows,
        )
        findings += _find(
            "warning",
            where,
            "shared premises",
            same_premise,
            "premises that stand in both splits",
            lambda premise: repr(shorten(premise)),
        )
    return shared, findings


def read_facts(
    path: Path, record: type[BaseModel], measure: Callable[[str], int], count_tokens: Callable[[str], int]
) -> tuple[list[Facts], list[str], dict]:
    """The facts of a file of Answers or Reflections, its faulty lines, and who answered with which prompt. One row is in memory at a time."""
    facts, faults = [], []
    sources: dict[str, Counter] = {"answered_by": Counter(), "prompt_name": Counter()}
    by = "reflected_by" if record is Reflection else "answered_by"
    for number, line, fault in _read_lines(path):
        try:
            if fault:
                raise ValueError(fault)
            row = json.loads(line)
            record.model_validate(row)
            facts.append(to_facts(row, measure, count_tokens))
            sources["answered_by"][row[by]] += 1
            sources["prompt_name"]["reflection" if record is Reflection else row["prompt_name"]] += 1
        except ValidationError as error:
            first = error.errors()[0]
            faults.append(
                f"line {number}: {'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg'][0].lower()}{first['msg'][1:]}"
            )
        except RecursionError:
            faults.append(f"line {number}: nested too deeply")
        except ValueError as error:
            faults.append(f"line {number}: {'not JSON' if isinstance(error, json.JSONDecodeError) else error}")
    return facts, faults, {name: dict(counts) for name, counts in sources.items()}


def to_facts(row: Mapping, measure: Callable[[str], int], count_tokens: Callable[[str], int]) -> Facts:
    """The facts of one Answer, or of a Reflection, which carries the wrong Answer. Raises ValueError for a readable one without label or thought."""
    answered = row["predicted_label"] if row["parse_status"] == ParseStatus.OK else UNPARSED
    if "reflected_by" in row:
        status, label, thought = row["reflection_status"], row["reflected_label"], row["improved_thought_process"]
    else:
        status, label, thought = row["parse_status"], row["predicted_label"], row["thought_process"]
    read = status == ParseStatus.OK
    if read and (label is None or thought is None):
        raise ValueError(f"status ok and no {'label' if label is None else 'thought'}")
    return Facts(
        id=row["id"],
        pair=content_hash([row["premise"], row["hypothesis"]]),
        true_label=row["true_label"],
        answered_label=UNPARSED if answered is None else answered,
        label=label if read else UNPARSED,
        status=str(status),
        thought=content_hash([row["thought_process"]]) if row["thought_process"] else "",
        length=measure(thought) if read else None,
        tokens=count_tokens(thought) if read else None,
        phrase=betrays_label(thought) if read else None,
    )


def check_records(where: str, facts: Sequence[Facts], faults: Sequence[str], noun: str) -> list[Finding]:
    """What is wrong with answers or reflections by themselves; `noun` is one of those words."""
    seen, repeated = set(), []
    for fact in facts:
        if (fact.id, fact.pair) in seen:
            repeated.append(fact)
        seen.add((fact.id, fact.pair))
    unread = Counter(fact.status for fact in facts if fact.label == UNPARSED)
    telling = [fact for fact in facts if fact.phrase]
    empty = [fact for fact in facts if fact.length == 0]
    nothing = (
        [where] if noun == "answers" and not facts and not faults else []
    )  # that nothing was wrong, and needs reflection, is no fault
    return [
        *_find("fault", where, "no rows", nothing, "the file is empty; the stage before it has made nothing", str),
        *_find("fault", where, "broken rows", faults, "lines that are no row of this project", str),
        *_find(
            "fault", where, "repeated rows", repeated, f"{noun} that stand more than once for the same row", _show_fact
        ),
        *(
            Finding("warning", where, "unread", count, f"{noun} that could not be read: {status}")
            for status, count in unread.most_common()
        ),
        *_find("warning", where, "empty thoughts", empty, f"{noun} that could be read and hold no words", _show_fact),
        *_find(
            "warning",
            where,
            "told the label",
            telling,
            "thoughts that betray what their writer was told",
            lambda fact: f"id {fact.id}: {fact.phrase!r}",
        ),
    ]


def compare_with_pairs(where: str, facts: Sequence[Facts], rows: Sequence[Mapping]) -> list[Finding]:
    """What an answers file and its CSV disagree on: rows of one alone, other texts or labels under the same id."""
    pairs = {row["id"]: (content_hash([row["premise"], row["hypothesis"]]), row["true_label"]) for row in rows}
    ids = {fact.id for fact in facts}
    known = [fact for fact in facts if fact.id in pairs]
    same_text = [fact for fact in known if fact.pair == pairs[fact.id][0]]
    other_text = [fact for fact in known if fact.pair != pairs[fact.id][0]]
    other_label = [fact for fact in same_text if fact.true_label != pairs[fact.id][1]]
    return [
        *_find(
            "fault",
            where,
            "other texts",
            other_text,
            "rows whose premise or hypothesis is not that of the CSV",
            _show_fact,
        ),
        *_find("fault", where, "other labels", other_label, "rows whose true label is not that of the CSV", _show_fact),
        *_find(
            "warning",
            where,
            "missing rows",
            [name for name in pairs if name not in ids],
            "pairs of the CSV without an answer",
            lambda name: f"id {name}",
        ),
        *_find(
            "warning",
            where,
            "unknown rows",
            [fact for fact in facts if fact.id not in pairs],
            "rows whose id the CSV lacks",
            _show_fact,
        ),
    ]


def check_reflections(
    where: str, reflections: Sequence[Facts], answers: Sequence[Facts] | None
) -> tuple[dict, list[Finding]]:
    """Whether reflections reach the true label, and, where there are answers, whether they are about those that are wrong."""
    read = [fact for fact in reflections if fact.label != UNPARSED]
    disagree = [fact for fact in read if fact.label != fact.true_label]
    summary = {
        "file": where,
        "rows": len(reflections),
        "read": len(read),
        "reach_true_label": len(read) - len(disagree),
        "disagree": len(disagree),
    }
    findings = _find(
        "warning",
        where,
        "disagreement",
        disagree,
        "reflections whose own label is not the true one; no training file takes them",
        _show_fact,
    )
    if answers is None:
        return summary, findings
    by_key = {(fact.id, fact.pair): fact for fact in answers}
    reflected = {(fact.id, fact.pair) for fact in reflections}
    wrong = [
        fact
        for fact in answers
        if fact.true_label is not None and fact.answered_label not in (UNPARSED, fact.true_label)
    ]
    missing = [fact for fact in wrong if (fact.id, fact.pair) not in reflected]
    astray = [fact for fact in reflections if (fact.id, fact.pair) not in by_key]
    other = [
        fact
        for fact in reflections
        if (fact.id, fact.pair) in by_key and by_key[fact.id, fact.pair].thought != fact.thought
    ]
    right = [
        fact
        for fact in reflections
        if (fact.id, fact.pair) in by_key and by_key[fact.id, fact.pair].label == fact.true_label
    ]
    findings += [
        *_find("warning", where, "missing reflections", missing, "wrong answers without a reflection", _show_fact),
        *_find("warning", where, "unknown rows", astray, "reflections on rows that the answers lack", _show_fact),
        *_find(
            "warning",
            where,
            "another answer",
            other,
            "reflections on another thought than the answers hold now",
            _show_fact,
        ),
        *_find("warning", where, "right answers", right, "reflections on answers that are right", _show_fact),
    ]
    return summary | {"wrong_answers": len(wrong), "missing": len(missing)}, findings


def describe_lengths(where: str, text: str, values: Iterable[int | None]) -> dict | None:
    """Quantiles and a histogram of lengths; the last bin holds all that are longer than nearly all. None where there is no value."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    top = max(int(np.quantile(known, 0.995, method="higher")), 1)
    step = max(1, -(-top // 30))
    edges = np.arange(0, top + step + 1, step)
    counts, _ = np.histogram(np.minimum(known, edges[-1] - 1), bins=edges)
    quantiles = dict(
        zip(("q1", "median", "q3", "p95"), np.quantile(known, [0.25, 0.5, 0.75, 0.95]).tolist(), strict=True)
    )
    range_ = {"n": len(known), "mean": float(known.mean()), "min": int(known.min()), "max": int(known.max())}
    return {"where": where, "text": text, **range_, **quantiles, "edges": edges.tolist(), "counts": counts.tolist()}


def shorten(text: str) -> str:
    """The beginning of a text, for an example."""
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _find(level: str, where: str, check: str, found: Sequence, message: str, show: Callable) -> list[Finding]:
    return (
        [Finding(level, where, check, len(found), message, tuple(show(item) for item in found[:NUM_EXAMPLES]))]
        if found
        else []
    )


def _show_rows(rows: Sequence[Mapping]) -> str:
    ids = ", ".join(row["id"] for row in rows[:4]) + (", …" if len(rows) > 4 else "")
    return f"ids {ids}: {shorten(rows[0]['premise'])!r} / {shorten(rows[0]['hypothesis'])!r}"


def _show_fact(fact: Facts) -> str:
    return f"id {fact.id}"


def _read_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number, text and fault of each line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8"), ""
            except UnicodeDecodeError as error:
                yield number, "", f"not UTF-8 at byte {error.start} of the line"
