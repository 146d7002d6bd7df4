"""Stage 7: how right each run is on the same rows, which runs differ, on which rows, and how sure that is.

In:   results/reflected.jsonl, one Answer a row {"id": "7", "true_label": 1, "predicted_label": 0, "parse_status": "ok", "thought_process": "Step 1 …", …},
      results/unmodified.jsonl, …
Out:  output_dir/evaluation.json {"runs": [{"run": "reflected", "n": 400, "unparsed": 0, "accuracy": 0.8925, "accuracy_low": 0.858, …}, …],
      "comparisons": [{"run": "unmodified", "other": "reflected", "difference": -0.0825, "p_value": 2e-05, "holm_p_value": 1e-04, …}], "slices": […], …},
      output_dir/report.html with the same numbers, and a table on stdout

An answer that could not be read is wrong, and is counted first. Files without labels get counts, statuses and the share of label 1.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

from pydantic import Field

from nli.evaluation.shown_rows import pick_disagreements, pick_unparsed, shorten
from nli.runtime.config import Count, CountOrZero, config_class, nearest
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.files import read_jsonl, resolve_input, resolve_output, write_atomic
from nli.runtime.manifest import start_run
from nli.task.parsing import ParseStatus
from nli.task.records import Answer, row_key

MOST_GROUPS = 50
_PACKAGES = ("numpy", "scipy", "scikit-learn", "matplotlib", "jinja2")


@config_class
class EvaluatePredictionsConfig:
    """Score and compare answers. The default reads the teacher's answers on the sample."""

    predictions: tuple[str, ...] = ("data/original_thoughts/sample_train.jsonl",)
    """answers to score, one JSON Lines file a run, all on the same rows"""
    names: tuple[str, ...] = ()
    """name of each run in tables, in the files' order; empty: the file names without .jsonl"""
    output_dir: str = "results/sample_evaluation"
    """folder for evaluation.json, report.html and manifest.json"""
    baseline: str = ""
    """name of the run that all others are compared with; empty: all pairs"""
    slice_by: tuple[str, ...] = ()
    """further columns of the rows to slice by, such as phenomenon"""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """level of all intervals, 0.5 to below 1; comparisons are tested at 1 - confidence"""
    bootstrap_draws: Count = 10_000
    """resamples behind each bootstrap interval"""
    random_seed: CountOrZero = 1337
    """seed of the bootstrap"""
    sweep_json: str = ""
    """results of a sweep to show in the report, JSON with trials and best"""
    stages: tuple[str, ...] = ()
    """manifests of earlier stages to show in the report, with their times"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        if not self.predictions:
            raise ConfigError("predictions is empty: give at least one file of answers.")
        if self.names and len(self.names) != len(self.predictions):
            raise ConfigError(
                f"names has {len(self.names)} entries and predictions {len(self.predictions)}: give one name for each file, or none."
            )
        names = self.run_names()
        if len(set(self.predictions)) < len(self.predictions):
            raise ConfigError("predictions names a file twice; a run compared with itself shows nothing.")
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        if repeated or not all(name.strip() for name in names):
            raise ConfigError(
                f"two runs are called {repeated[0]!r}; tell them apart with --names."
                if repeated
                else "a run has no name; give one with --names."
            )
        default = EvaluatePredictionsConfig.__dataclass_fields__["predictions"].default
        if self.baseline and self.baseline not in names and self.predictions != default:
            raise ConfigError(
                f"baseline {self.baseline!r} is no run; the runs are {', '.join(names)}.{nearest(self.baseline, names)}"
            )
        if self.baseline and len(names) == 1:
            raise ConfigError(
                f"baseline {self.baseline!r} is the only run; give another file of predictions to compare with it."
            )

    def run_names(self) -> tuple[str, ...]:
        """The name of each run, in the order of the files."""
        return self.names or tuple(Path(path).stem for path in self.predictions)


def index_rows(path: Path) -> dict[str, dict]:
    """A file's Answers by row key. Raises DataError for a file that cannot be read, a row that stands twice, or an `ok` answer without label."""
    if path.is_dir():
        raise DataError(f"{path}: a folder; give the JSON Lines file of answers in it.")
    rows: dict[str, dict] = {}
    for row in read_jsonl(path, Answer):
        if rows.setdefault(row_key(row), row) is not row:
            raise DataError(
                f"{path}: id {row['id']!r} stands twice with the same pair; each row counts once, so remove one of them."
            )
        if row["parse_status"] == ParseStatus.OK and row["predicted_label"] is None:
            raise DataError(
                f"{path}: id {row['id']!r} has parse_status ok and no predicted_label; make the file again with run_inference."
            )
    return rows


def align_runs(files: Mapping[str, Path]) -> dict[str, list[dict]]:
    """Each run's Answers, all in the first file's order. Raises DataError if the files hold different rows or different true labels."""
    indexed = {name: index_rows(path) for name, path in files.items()}
    first_name, first = next(iter(indexed.items()))
    for name, rows in indexed.items():
        for here, there, missing in (
            (name, first_name, [key for key in first if key not in rows]),
            (first_name, name, [key for key in rows if key not in first]),
        ):
            if missing:
                example = indexed[there][missing[0]]
                raise DataError(
                    f"{files[here]}: lacks {len(missing)} of the rows of {files[there]}, such as id {example['id']!r} with the premise "
                    f"{shorten(example['premise'], 60)!r}. Runs are compared on the same rows: run inference for both on the same data, or evaluate them apart."
                )
        for key, row in rows.items():
            if row["true_label"] != first[key]["true_label"]:
                raise DataError(
                    f"{files[name]}: id {row['id']!r} has true_label {row['true_label']}, and {first[key]['true_label']} in {files[first_name]}. "
                    "Make both files from the same data."
                )
    return {name: [rows[key] for key in first] for name, rows in indexed.items()}


def check_request(
    runs: Mapping[str, Sequence[Mapping]], files: Mapping[str, Path], config: EvaluatePredictionsConfig
) -> None:
    """Raise DataError if the rows cannot give what the config asks: a slice column that is missing or too fine, a comparison without labels."""
    for name, rows in runs.items():
        for column in config.slice_by:
            lacking = [row for row in rows if column not in row]
            if lacking:
                raise DataError(
                    f"{files[name]}: {len(lacking)} rows have no column {column!r} to slice by.{nearest(column, list(lacking[0]))}"
                )
            values = {str(row[column]) for row in rows}
            if len(values) > MOST_GROUPS:
                raise DataError(
                    f"{files[name]}: column {column!r} has {len(values)} different values; slice by a column of at most {MOST_GROUPS}."
                )
        if config.baseline and all(row["true_label"] is None for row in rows):
            raise DataError(
                f"{files[name]}: no row has a true label, so no run can be compared with {config.baseline!r}; use labelled data or no baseline."
            )


def describe_inputs(runs: Mapping[str, Sequence[Mapping]], files: Mapping[str, Path], hashes: Mapping) -> list[dict]:
    """Where each run comes from: its file, the models and prompts that its rows name, and how long its answers are."""
    return [
        {
            "run": name,
            "file": str(files[name]),
            "sha256": hashes[str(files[name])]["sha256"],
            "answered_by": sorted({row["answered_by"] for row in rows}),
            "prompt_name": sorted({row["prompt_name"] for row in rows}),
            "prompt_sha256": sorted({row["prompt_sha256"] for row in rows}),
            "mean_completion_tokens": average([row.get("num_completion_tokens") for row in rows]),
        }
        for name, rows in runs.items()
    ]


def average(values: Iterable[int | None]) -> float | None:
    """The mean of the values that are known, or None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def evaluate(runs: Mapping[str, Sequence[Mapping]], config: EvaluatePredictionsConfig) -> dict:
    """All numbers and examples of a set of runs; each run's Answers stand in the same order."""
    from nli.evaluation.metrics import POWER
    from nli.evaluation.scores import SMALL_SLICE, compare_runs, score_run, slice_runs

    sure = (config.confidence, config.bootstrap_draws, config.random_seed)
    return {
        "confidence": config.confidence,
        "bootstrap_draws": config.bootstrap_draws,
        "random_seed": config.random_seed,
        "power": POWER,
        "small_slice": SMALL_SLICE,
        "baseline": config.baseline,
        "runs": [score_run(name, rows, *sure) for name, rows in runs.items()],
        "comparisons": compare_runs(runs, config.baseline, *sure),
        "unparsed": pick_unparsed(runs),
        "slices": slice_runs(runs, config.slice_by, config.confidence),
        "disagreements": pick_disagreements(runs),
    }


def run(config: EvaluatePredictionsConfig) -> Path:
    """Score the files, write evaluation.json and report.html, print the table; returns the report's path.

    Nothing of an earlier evaluation is used again and all files are replaced whole, so its identity is only that it is one: a rerun with other files or
    settings is never refused, a folder that holds another stage's work is.
    """
    from nli.evaluation.report import (
        describe_stage,
        describe_stages,
        describe_sweep,
        read_sweep,
        render_report,
        render_table,
    )

    files = dict(
        zip(config.run_names(), (resolve_input(path, config.storage_root) for path in config.predictions), strict=True)
    )
    folder = resolve_output(config.output_dir, config.storage_root)
    runs = align_runs(files)
    check_request(runs, files, config)
    sweep_path = [resolve_input(config.sweep_json, config.storage_root)] if config.sweep_json else []
    sweep = read_sweep(sweep_path[0]) if sweep_path else None
    stage_paths = [resolve_input(path, config.storage_root) for path in config.stages]
    stages = [describe_stage(path) for path in stage_paths]
    record = start_run(
        folder / "manifest.json",
        "evaluation",
        {"stage": "evaluation"},
        config,
        [*files.values(), *sweep_path, *stage_paths],
        (folder / "manifest.json").exists(),
    )

    evaluation = evaluate(runs, config)
    facts = record.manifest
    evaluation["provenance"] = {
        "started": facts["attempts"][-1]["started"],
        "commit": facts["commit"],
        "versions": facts["versions"] | {name: metadata.version(name) for name in _PACKAGES},
        "hardware": facts["hardware"],
        "inputs": facts["inputs"],
        "runs": describe_inputs(runs, files, facts["inputs"]),
    }
    evaluation |= {"sweep": sweep, "stages": stages}
    sections = ([describe_sweep(sweep)] if sweep else []) + ([describe_stages(stages)] if stages else [])
    write_atomic(
        folder / "evaluation.json", json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_atomic(folder / "report.html", render_report(evaluation, sections))
    record.finish(
        {
            "runs": len(runs),
            "rows": len(next(iter(runs.values()))),
            "unparsed": sum(row["unparsed"] for row in evaluation["runs"]),
        }
    )
    print(render_table(evaluation), flush=True)
    print(f"report: {folder / 'report.html'}", flush=True)
    return folder / "report.html"
