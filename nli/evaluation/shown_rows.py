"""Answers that a report shows: of each kind that could not be read one, and rows on which the runs disagree. They are picked by rule, not by eye.

In:   the Answers of each run, in one order: {"reflected": [{"id": "7", "true_label": 1, "predicted_label": 0, "parse_status": "ok", …}, …], "unmodified": …}
Out:  pick_unparsed       [{"run": "reflected", "status": "truncated", "rows": 4, "id": "7", "problem": "…", "raw_text": "{\\"thought_process\\": …"}, …]
      pick_disagreements  {"rows": 31, "patterns": [{"rows": 20, "runs": {"reflected": True, "unmodified": False}}, …], "examples": [{"id": "12", …}, …]}
"""

from collections.abc import Iterable, Mapping, Sequence

from nli.task.parsing import ParseStatus
from nli.task.records import content_hash, is_correct, row_key

NUM_EXAMPLES = 8
MOST_CHARACTERS = 600
"""of one raw text shown as an example"""


def pick_unparsed(runs: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """Each run's statuses other than ok: how many rows, and the first of them as an example."""
    found = []
    for name, rows in runs.items():
        by_status: dict[str, list[Mapping]] = {}
        for row in rows:
            if row["parse_status"] != ParseStatus.OK:
                by_status.setdefault(row["parse_status"], []).append(row)
        for status, members in sorted(by_status.items(), key=lambda item: -len(item[1])):
            first = members[0]
            example = {
                "id": first["id"],
                "problem": first.get("problem", ""),
                "raw_text": shorten(first["raw_text"], MOST_CHARACTERS),
            }
            found.append({"run": name, "status": str(status), "rows": len(members), **example})
    return found


def pick_disagreements(runs: Mapping[str, Sequence[Mapping]]) -> dict:
    """Labelled rows that some runs have right and others wrong; where no row has a label, rows that the runs label differently.

    `patterns` counts who is right on how many rows; the examples take one row of each pattern in turn, the most frequent first, by hash and not by eye.
    """
    patterns: dict[tuple, list[tuple[Mapping, ...]]] = {}
    rows = list(zip(*runs.values(), strict=True))
    scored = [answers for answers in rows if answers[0]["true_label"] is not None]
    for answers in scored or rows:
        labels = tuple(row["predicted_label"] if row["parse_status"] == ParseStatus.OK else None for row in answers)
        pattern = tuple(is_correct(row) for row in answers) if scored else labels
        if len(set(pattern)) > 1:
            patterns.setdefault(pattern, []).append(answers)
    ordered = sorted(patterns.items(), key=lambda item: -len(item[1]))
    shuffled = [sorted(members, key=lambda answers: content_hash([row_key(answers[0])])) for _, members in ordered]
    in_turn = [members[turn] for turn in range(NUM_EXAMPLES) for members in shuffled if turn < len(members)]
    return {
        "rows": sum(len(members) for members in shuffled),
        "patterns": [
            {"rows": len(members), "runs": dict(zip(runs, pattern, strict=True))} for pattern, members in ordered
        ],
        "examples": [show_answers(answers, runs) for answers in in_turn[:NUM_EXAMPLES]],
    }


def show_answers(answers: Sequence[Mapping], names: Iterable[str]) -> dict:
    """One row with what each run thought and said about it."""
    first = answers[0]
    said = [
        {
            "run": name,
            "status": row["parse_status"],
            "label": row["predicted_label"] if row["parse_status"] == ParseStatus.OK else None,
            "right": is_correct(row) if row["true_label"] is not None else None,
            "thought": shorten(row["thought_process"] or row["raw_text"], MOST_CHARACTERS),
        }
        for name, row in zip(names, answers, strict=True)
    ]
    return {
        "id": first["id"],
        "premise": first["premise"],
        "hypothesis": first["hypothesis"],
        "true_label": first["true_label"],
        "answers": said,
    }


def shorten(text: str, limit: int) -> str:
    """A text, cut after `limit` characters with a note of how many follow."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} more characters)"
