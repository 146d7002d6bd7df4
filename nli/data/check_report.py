"""A check of the data as people read it: findings and tables for a terminal, and one HTML file with pictures.

In:   the content of check.json: {"faults": 1, "warnings": 0, "findings": [{"level": "fault", "where": "train, dev", …}], "splits": […], …}
Out:  1 fault, 0 warnings

      fault    train, dev: shared pairs (3): pairs that stand in both splits: …
                 ids 4, 9: 'Two dogs ran.' / 'Animals moved.'
      split  rows   label 1  label 0  …
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nli.evaluation.figures import COLOURS, draw_intervals, draw_svg
from nli.evaluation.report import GLYPHS, format_count, format_interval, format_percent, format_share, render_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render_text(check: Mapping) -> str:
    """The findings, then one table for each kind of file that was checked."""
    parts = [count_findings(check), "\n".join(line for finding in check["findings"] for line in _describe(finding))]
    parts += [
        align(table)
        for table in (
            table_splits(check),
            table_shared(check),
            table_answers(check),
            table_buckets(check),
            table_reflections(check),
        )
        if table
    ]
    return "\n\n".join(part for part in parts if part)


def render_check(check: Mapping) -> str:
    """The HTML page."""
    files = list(dict.fromkeys(row["file"] for row in check["buckets"]))
    lows = [row["accuracy_low"] for row in check["buckets"] if row["n"]]
    return render_page(
        "check_report.html.j2",
        check=check,
        summary=count_findings(check),
        tables=[
            {"title": title, "note": note, "rows": table}
            for title, note, table in (
                (
                    "Splits",
                    "Premises counts distinct ones; repeated pairs are pairs that stand more than once.",
                    table_splits(check),
                ),
                ("Shared between splits", "Distinct premises and pairs that stand in both.", table_shared(check)),
                ("Answers", _note_answers(check), table_answers(check)),
                (
                    "Reflections",
                    "Those that reach the true label can stand in for wrong answers in a training file.",
                    table_reflections(check),
                ),
            )
            if table
        ],
        buckets=table_buckets(check),
        marks=[
            {"name": name, "colour": COLOURS[number % len(COLOURS)], "glyph": GLYPHS[number % len(GLYPHS)]}
            for number, name in enumerate(files)
        ],
        charts=[
            draw_buckets(check["buckets"], way, files, min(lows, default=0.0))
            for way in dict.fromkeys(row["by"] for row in check["buckets"])
        ],
        histograms=[draw_lengths(text, rows, check["unit"]) for text, rows in group_lengths(check).items()],
        lengths=table_lengths(check),
    )


def count_findings(check: Mapping) -> str:
    """`1 fault, 0 warnings`"""
    return ", ".join(
        f"{format_count(check[key])} {key if check[key] != 1 else key[:-1]}" for key in ("faults", "warnings")
    )


def table_splits(check: Mapping) -> list[list[str]]:
    """Rows of text, the header first; empty where there is no split."""
    keys = ("rows", "label_1", "label_0", "unlabelled", "premises", "repeated_pairs", "conflicting_pairs")
    rows = [
        [
            row["split"],
            *(format_count(row[key]) for key in keys),
            _share(row["label_1"], row["label_1"] + row["label_0"]),
        ]
        for row in check["splits"]
    ]
    return [["split", *(key.replace("_", " ") for key in keys), "share of 1"], *rows] if rows else []


def table_shared(check: Mapping) -> list[list[str]]:
    """What each two splits share."""
    keys = ("premises", "pairs", "conflicting_pairs")
    rows = [[row["splits"], *(format_count(row[key]) for key in keys)] for row in check["shared"]]
    return [["splits", *(key.replace("_", " ") for key in keys)], *rows] if rows else []


def table_answers(check: Mapping) -> list[list[str]]:
    """The teacher's figures, unread answers first."""
    interval = f"{format_percent(check['confidence'])} interval"
    header = [
        "answers",
        "rows",
        "unparsed",
        "accuracy",
        interval,
        "macro F1",
        interval,
        "precision of 1",
        "recall of 1",
        "F1 of 1",
        interval,
    ]
    rows = [
        [
            *(row["file"], format_count(row["rows"]), format_count(row["unparsed"])),
            *(format_share(row["accuracy"]), format_interval(row["accuracy_low"], row["accuracy_high"])),
            *(format_share(row["macro_f1"]), format_interval(row["macro_f1_low"], row["macro_f1_high"])),
            *(format_share(row["positive_precision"]), format_share(row["positive_recall"])),
            *(format_share(row["positive_f1"]), format_interval(row["positive_f1_low"], row["positive_f1_high"])),
        ]
        for row in check["answers"]
    ]
    return [header, *rows] if rows else []


def table_buckets(check: Mapping) -> list[list[str]]:
    """Accuracy by the length of the thought."""
    rows = [
        [
            *(row["file"], _name_bucket(row), format_count(row["n"]), format_count(row["unparsed"])),
            *(format_share(row["accuracy"]), format_interval(row["accuracy_low"], row["accuracy_high"])),
        ]
        for row in check["buckets"]
    ]
    return (
        [
            [
                "answers",
                "length of thought",
                "rows",
                "unparsed",
                "accuracy",
                f"{format_percent(check['confidence'])} interval",
            ],
            *rows,
        ]
        if rows
        else []
    )


def table_reflections(check: Mapping) -> list[list[str]]:
    """How the reflections ended."""
    keys = ("rows", "read", "reach_true_label", "disagree", "missing")
    rows = [[row["file"], *(format_count(row.get(key)) for key in keys)] for row in check["reflections"]]
    return [["reflections", *(key.replace("_", " ") for key in keys)], *rows] if rows else []


def table_lengths(check: Mapping) -> list[list[str]]:
    """Quantiles of all lengths."""
    keys = ("n", "min", "q1", "median", "q3", "p95", "max", "mean")
    rows = [[row["where"], row["text"], *(f"{row[key]:,.5g}" for key in keys)] for row in check["lengths"]]
    return [["file", f"length of ({check['unit']})", *keys], *rows] if rows else []


def align(table: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def group_lengths(check: Mapping) -> dict[str, list[Mapping]]:
    """The lengths of each kind of text: `{"premise": [train's, dev's, …], …}`."""
    grouped: dict[str, list[Mapping]] = {}
    for row in check["lengths"]:
        grouped.setdefault(row["text"], []).append(row)
    return grouped


def draw_buckets(buckets: Sequence[Mapping], way: str, files: Sequence[str], left: float) -> dict:
    """Accuracy by quartile or by fixed range of length: a title and its picture; small groups are hollow."""
    lines: dict[str, list[tuple]] = {}
    for row in buckets:
        if row["by"] == way and row["n"] > row["unparsed"]:
            name = _name_bucket(row) if len(files) == 1 else row["group"]
            lines.setdefault(name, []).append(
                (files.index(row["file"]), row["accuracy"], row["accuracy_low"], row["accuracy_high"], row["n"] < 20)
            )
    title = "By quartile of thought length" if way == "quartile" else "By tokens of the thought"
    return {"title": title, "svg": draw_intervals(list(lines.items()), "accuracy", left, width=5.1, line=0.24)}


def draw_lengths(text: str, rows: Sequence[Mapping], unit: str) -> dict:
    """One outline for each file: the share of its rows by length."""
    width, height = 5.1, 2.1

    def paint(figure: "Figure") -> None:
        axes = figure.add_axes((0.11, 0.22, 0.87, 0.75))
        for number, row in enumerate(rows):
            step = row["edges"][1] - row["edges"][0]
            shares = [count / row["n"] / step for count in row["counts"]]
            axes.stairs(
                shares, row["edges"], color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=row["where"], alpha=0.9
            )
        axes.set_xlabel(unit, color="#52606d")
        axes.set_ylabel(f"share of rows per {unit.removesuffix('s')}", color="#52606d")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=4)
        axes.tick_params(length=0, labelcolor="#1f2933")
        axes.grid(axis="y", color="#d9dde3", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, labelcolor="#1f2933")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)

    return {"title": text, "svg": draw_svg(width, height, f"lengths of {text}", f"{text}{rows}", paint)}


def _describe(finding: Mapping) -> list[str]:
    first = f"{finding['level']:<8} {finding['where']}: {finding['check']} ({format_count(finding['count'])}): {finding['message']}"
    return [first, *(f"{'':<11}{example}" for example in finding["examples"])]


def _name_bucket(row: Mapping) -> str:
    return (
        f"{row['group']}: {row['range']}"
        if row["range"]
        else f"{row['group']} tokens"
        if row["by"] == "tokens" and "no" not in row["group"]
        else row["group"]
    )


def _note_answers(check: Mapping) -> str:
    return (
        f"Accuracy is right ÷ all labelled rows, with Wilson's interval at {format_percent(check['confidence'])}; an answer that could not be read is wrong. "
        "Precision, recall and F1 of 1 are those of the class entailment. "
        f"F1 intervals come from {format_count(check['bootstrap_draws'])} bootstrap draws (seed {check['random_seed']})."
    )


def _share(part: int, whole: int) -> str:
    return format_share(part / whole if whole else None)
