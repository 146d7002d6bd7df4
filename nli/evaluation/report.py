"""An evaluation as people read it: a plain table for a terminal, and one HTML file that needs nothing else.

In:   the content of evaluation.json: {"confidence": 0.95, "runs": [{"run": "reflected", "n": 400, "unparsed": 0, "accuracy": 0.8925, …}], …}
Out:  run        n    unparsed  accuracy  95 % interval  macro F1
      reflected  400         0     0.893    0.858–0.919     0.892
      and an HTML page with the same numbers, rounded for the eye; each cell carries its exact value

The page holds its style and its pictures (SVG, drawn by matplotlib), fetches nothing and runs no script. All text from data is escaped.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nli.evaluation.figures import COLOURS, draw_intervals
from nli.runtime.errors import DataError, ResumeError
from nli.runtime.manifest import read_manifest

GLYPHS = "●■◆▲▼✚✖"
"""the marks of nli.evaluation.figures as characters"""
NONE = "–"


def render_table(evaluation: Mapping) -> str:
    """The result table as plain text, one run a line; runs without labels show the share of label 1 instead of accuracy."""
    runs = evaluation["runs"]
    level = f"{format_percent(evaluation['confidence'])} interval"
    if is_scored(evaluation):
        header = ["model", "n", "unparsed", "accuracy", level, "macro F1"]
        keys = [("accuracy", "macro_f1")] * len(runs)
    else:
        header = ["model", "n", "unparsed", "label 1", level]
        keys = [("share_1",)] * len(runs)
    lines = [header]
    for row, (key, *others) in zip(runs, keys, strict=True):
        figures = [
            format_share(row[key]),
            format_interval(row[f"{key}_low"], row[f"{key}_high"]),
            *(format_share(row[other]) for other in others),
        ]
        lines.append([row["run"], str(row["n"]), str(row["unparsed"]), *figures])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def render_report(evaluation: Mapping, extra_sections: Iterable[Mapping] = ()) -> str:
    """The HTML page. An extra section is {"title", "note" (may be missing), and "rows" (a list of objects, shown as a table) or "html" (put in as it is)}."""
    names = [row["run"] for row in evaluation["runs"]]
    return render_page(
        "report.html.j2",
        evaluation=evaluation,
        interval=format_interval,
        scored=is_scored(evaluation),
        marks={
            name: {"colour": COLOURS[number % len(COLOURS)], "glyph": GLYPHS[number % len(GLYPHS)]}
            for number, name in enumerate(names)
        },
        findings=summarise(evaluation),
        overview=draw_overview(evaluation),
        slices=group_slices(evaluation),
        sections=[read_section(section) for section in extra_sections],
    )


def render_page(template: str, **values: object) -> str:
    """A template of this folder with the report's formats; all text from data is escaped."""
    loader = FileSystemLoader(
        [Path(__file__).parent / "templates", Path(__file__).parents[1] / "data/templates"], encoding="utf-8"
    )
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "share": format_share,
        "signed": format_signed,
        "p": format_p,
        "percent": format_percent,
        "count": format_count,
        "cell": format_cell,
        "label": format_label,
    }
    return environment.get_template(template).render(**values)


def summarise(evaluation: Mapping) -> list[str]:
    """The page's first sentences, each a fact from the tables."""
    runs, comparisons = evaluation["runs"], evaluation["comparisons"]
    unparsed, answers = sum(row["unparsed"] for row in runs), sum(row["n"] for row in runs)
    findings = [
        f"{format_count(unparsed)} of {format_count(answers)} answers could not be read"
        + ("; they count as wrong." if unparsed and is_scored(evaluation) else ".")
    ]
    if not is_scored(evaluation):
        return [*findings, "The rows have no true labels, so there is no accuracy: only what the runs answered."]
    best = max(runs, key=lambda row: row["accuracy"])
    interval = format_interval(best["accuracy_low"], best["accuracy_high"])
    findings.append(
        f"{'Accuracy' if len(runs) == 1 else 'The highest accuracy'} is {format_share(best['accuracy'])} ({interval}), by {best['run']}."
    )
    if comparisons:
        level = format_percent(1 - evaluation["confidence"])
        differing = [row for row in comparisons if row["differs"]]
        findings.append(
            f"{len(differing)} of {len(comparisons)} comparisons differ beyond chance (exact McNemar test, Holm-adjusted, level {level})."
        )
        alike = [
            row["other"] if row["run"] == best["run"] else row["run"]
            for row in comparisons
            if not row["differs"] and best["run"] in (row["run"], row["other"])
        ]
        if alike:
            findings.append(f"These rows cannot tell {best['run']} from {', '.join(alike)}.")
    return findings


def is_scored(evaluation: Mapping) -> bool:
    """Whether the rows have true labels."""
    return any(row["labelled"] for row in evaluation["runs"])


def group_slices(evaluation: Mapping) -> list[dict]:
    """The flat slices as one block a way of slicing: its rows, and a chart of them."""
    blocks: dict[str, list[Mapping]] = {}
    for row in evaluation["slices"]:
        blocks.setdefault(row["by"], []).append(row)
    lows = [row["accuracy_low"] for row in evaluation["slices"] if not row["too_small"]]
    left = min(lows, default=0.0)
    blocks = {
        by: sorted(rows, key=lambda row: row["group"]) for by, rows in blocks.items()
    }  # stable: runs keep their order in a group
    return [
        {"by": by, "rows": rows, "chart": draw_slices(rows, [run["run"] for run in evaluation["runs"]], left)}
        for by, rows in blocks.items()
    ]


def draw_overview(evaluation: Mapping) -> Markup:
    """One line a run: accuracy (or share of label 1) with its interval."""
    key = "accuracy" if is_scored(evaluation) else "share_1"
    rows = [row for row in evaluation["runs"] if row[key] is not None]
    lines = [
        (row["run"], [(number, row[key], row[f"{key}_low"], row[f"{key}_high"], False)])
        for number, row in enumerate(rows)
    ]
    title = "accuracy" if is_scored(evaluation) else "share of label 1"
    return draw_intervals(lines, title, min((row[f"{key}_low"] for row in rows), default=0.0), width=8.6, line=0.34)


def draw_slices(rows: Sequence[Mapping], names: Sequence[str], left: float) -> Markup:
    """One line a slice, and in it one mark a run, in the runs' colours; slices that are too small are hollow.

    Rows that are all unparsed are wrong by rule, so they stand in the table only.
    """
    groups: dict[str, list[tuple]] = {}
    spans: dict[str, set[str]] = {}
    for row in rows:
        if row["unparsed"] == row["n"]:
            continue
        spans.setdefault(row["group"], set()).add(row["range"])
        mark = (names.index(row["run"]), row["accuracy"], row["accuracy_low"], row["accuracy_high"], row["too_small"])
        groups.setdefault(row["group"], []).append(mark)
    # A range that differs from run to run, as that of their own thoughts does, belongs to no line.
    lines = [
        (f"{group}: {min(spans[group])}" if len(spans[group]) == 1 and min(spans[group]) else group, marks)
        for group, marks in groups.items()
    ]
    return draw_intervals(lines, "accuracy", left, width=5.1, line=0.15 if len(names) > 1 else 0.24)


def read_section(section: Mapping) -> dict:
    """An extra section in the template's form: its columns are all keys of all rows, in the order of their first use."""
    rows = section.get("rows", ())
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "title": section["title"],
        "note": section.get("note", ""),
        "html": Markup(section.get("html", "")),
        "rows": rows,
        "columns": columns,
    }


def read_sweep(path: Path) -> dict:
    """A sweep's results: {"trials": [{"lora_rank": 8, "eval_loss": 0.41, "status": "finished", …}], "best": {…}}. Raises DataError for anything else."""
    try:
        sweep = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=lambda _: None
        )  # NaN, the loss of a diverged trial, is no JSON
        trials, best = [dict(trial) for trial in sweep["trials"]], dict(sweep.get("best") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f'{path}: not the results of a sweep ({reason}); it must be JSON with "trials", a list of objects, and "best", an object.'
        ) from None
    return {"trials": trials, "best": best}


def describe_sweep(sweep: Mapping) -> dict:
    """The report's section of a sweep: trials by eval loss, failed ones last."""

    def loss(trial: Mapping) -> float:
        value = trial.get("eval_loss")
        return value if isinstance(value, int | float) else float("inf")

    trials = sorted(sweep["trials"], key=loss)
    known = [key for key in ("lora_rank", "learning_rate", "ablation") if key in sweep["best"]]
    rows = [
        {"": "best" if known and all(trial.get(key) == sweep["best"][key] for key in known) else ""} | trial
        for trial in trials
    ]
    return {
        "title": "Sweep",
        "note": "Trials by eval loss, lowest first; a trial without one failed or was stopped.",
        "rows": rows,
    }


def describe_stage(path: Path) -> dict:
    """One earlier stage for the report, from its manifest. Raises DataError if the file is none."""
    try:
        manifest = read_manifest(path)
    except ResumeError:
        manifest = None
    if manifest is None:
        raise DataError(
            f"{path}: not the manifest of a stage; those are called manifest.json or end in .manifest.json."
        )
    attempts = manifest.get("attempts") or [{}]
    seconds = [attempt["seconds"] for attempt in attempts if attempt.get("seconds") is not None]
    return {
        "stage": manifest.get("stage"),
        "output": path.parent.name if path.name == "manifest.json" else path.name.removesuffix(".manifest.json"),
        "status": manifest["status"],
        "rows": (manifest.get("counts") or {}).get("rows"),
        "started": attempts[0].get("started"),
        "attempts": len(attempts),
        "seconds": round(sum(seconds), 2) if seconds else None,
        "commit": (manifest.get("commit") or "")[:10],
        "manifest": str(path),
    }


def describe_stages(stages: Sequence[Mapping]) -> dict:
    """The report's section of the earlier stages."""
    note = "Seconds over all attempts of a stage; an attempt that was killed has none, and models that were answered in one pass have the whole pass's each."
    return {
        "title": "Stages",
        "note": note,
        "rows": [{key: value for key, value in stage.items() if key != "manifest"} for stage in stages],
    }


def format_share(value: float | None) -> str:
    """0.8958 as 0.896."""
    return NONE if value is None else f"{value:.3f}"


def format_signed(value: float) -> str:
    """-0.08 as −0.080, 0.08 as +0.080."""
    return f"{value:+.3f}".replace("-", "−")


def format_interval(low: float | None, high: float | None, signed: bool = False) -> str:
    """0.858–0.919; with signs `−0.120 to −0.045`."""
    if low is None or high is None:
        return NONE
    return f"{format_signed(low)} to {format_signed(high)}" if signed else f"{low:.3f}–{high:.3f}"


def format_p(value: float) -> str:
    """A p value to three decimals, or as <0.001."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def format_percent(value: float) -> str:
    """0.95 as 95 %."""
    return f"{100 * value:.3g} %"


def format_count(value: int | None) -> str:
    """12345 as 12,345."""
    return NONE if value is None else f"{value:,}"


def format_label(value: int | None) -> str:
    """A label with its name."""
    return {1: "1 entailment", 0: "0 no entailment"}.get(value, "unparsed")


def format_cell(value: object) -> str:
    """Any value of an extra section's row."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
