"""Checks of the data, before money or GPU time is spent on it: pairs, the teacher's answers, and its reflections.

In:   --csv train=data/original_data/train.csv dev=data/original_data/dev.csv --thoughts train=data/original_thoughts/train.jsonl
Out:  output_dir/check.json {"faults": 1, "warnings": 2, "findings": [{"level": "fault", "where": "train, dev", "check": "shared pairs", "count": 3, …}, …],
      "splits": [{"split": "train", "rows": 37651, "label_1": 18925, …}, …], "answers": [{"file": "train thoughts", "accuracy": 0.76, …}, …], …},
      output_dir/report.html with the same and its pictures, and the findings and tables on stdout

Files of one name belong together: `train` thoughts are compared with the `train` CSV, `train` reflections with both. Nothing is changed; a strict check ends
with an error where there is a fault, any other ends well and leaves the judgement to the reader.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from nli.data.pairs import read_examples
from nli.runtime.config import Count, CountOrZero, config_class
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.files import resolve_input, resolve_output, write_atomic
from nli.runtime.manifest import start_run

if TYPE_CHECKING:
    from nli.data.row_checks import Facts, Finding

SAMPLE_CSV = (
    "train=data/sample/train.csv",
    "dev=data/sample/dev.csv",
    "test=data/sample/test.csv",
    "demo=data/sample/demo.csv",
)
BUCKETS = ((0, 100), (101, 150), (151, 200), (201, 250), (251, 300), (301, None))
"""tokens of a thought: the ranges by which the original project measured its teacher"""
NO_THOUGHT = "no thought"
CHARACTERS_PER_TOKEN = 4
"""by which the original project counted tokens; ours too where no tokenizer is given, so that the ranges compare"""


@config_class
class CheckDataConfig:
    """Check CSV files, answers and reflections. The default reads the sample's CSV files only."""

    csv: tuple[str, ...] = ()
    """pairs, one file a split: name=file, or a file whose name is the split's; empty, with no other file given: the sample's"""
    thoughts: tuple[str, ...] = ()
    """answers of stage 1, JSON Lines: name=file, the name of their CSV"""
    reflections: tuple[str, ...] = ()
    """reflections of stage 2, JSON Lines: name=file, the name of their answers"""
    output_dir: str = "results/sample_check"
    """folder for check.json, report.html and manifest.json"""
    strict: bool = False
    """end with an error where there is a fault: broken rows, conflicting labels, a pair in two splits, answers to other texts"""
    tokenizer: str = ""
    """measure lengths in tokens: a folder or file with a tokenizer, or a Mistral model's name; empty: in words"""
    max_rows: CountOrZero = 0
    """read only so many rows of each CSV; 0: all"""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """level of all intervals, 0.5 to below 1"""
    bootstrap_draws: Count = 10_000
    """resamples behind each F1 interval"""
    random_seed: CountOrZero = 1337
    """seed of the bootstrap"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        for field in ("csv", "thoughts", "reflections"):
            names = Counter(name for name, _ in split_names(getattr(self, field)))
            repeated = [name for name, count in names.items() if count > 1]
            if repeated:
                raise ConfigError(f"{field} has two files called {repeated[0]!r}; tell them apart as name=file.")
            if "" in names:
                raise ConfigError(f"{field} has a file without a name; write name=file.")

    def csv_files(self) -> tuple[str, ...]:
        """The CSV files as given, or the sample's where no file of any kind is given."""
        return self.csv or (() if self.thoughts or self.reflections else SAMPLE_CSV)


def split_names(files: Sequence[str]) -> list[tuple[str, str]]:
    """`train=a/b.csv` as ("train", "a/b.csv"), and `a/train.csv` as ("train", "a/train.csv")."""
    named = [(re.fullmatch(r"([^/=]*)=(.*)", given), given) for given in files]
    return [(found[1], found[2]) if found else (Path(given).stem, given) for found, given in named]


def load_measure(tokenizer: str) -> tuple[Callable[[str], int], Callable[[str], int], str]:
    """What measures a text's length, what counts its tokens for the fixed ranges, and what the measure is called. Raises ConfigError."""
    from nli.api.token_counts import load_token_counter
    from nli.evaluation.metrics import count_words

    if not tokenizer:
        return count_words, lambda text: -(-len(text) // CHARACTERS_PER_TOKEN), "words"
    counter = load_token_counter("", tokenizer) if Path(tokenizer).exists() else load_token_counter(tokenizer)
    if counter.name.startswith("estimate"):
        raise ConfigError(
            f"tokenizer {tokenizer!r} is no folder, file or Mistral model; give one, or none to measure in words."
        )
    return counter.count_text, counter.count_text, "tokens"


def score_teacher(where: str, facts: Sequence["Facts"], config: CheckDataConfig, unit: str) -> tuple[dict, list[dict]]:
    """The teacher's figures on its labelled rows, and its accuracy by the length of its thoughts: quartiles, and fixed ranges of tokens."""
    import numpy as np

    from nli.evaluation.metrics import UNPARSED, name_quartiles, score_answers, score_group

    labelled = [fact for fact in facts if fact.true_label is not None]
    truth = np.array([fact.true_label for fact in labelled], dtype=int)
    said = np.array([fact.answered_label for fact in labelled], dtype=int)
    summary = {
        "file": where,
        "rows": len(facts),
        "unparsed": sum(fact.answered_label == UNPARSED for fact in facts),
        "statuses": dict(Counter(fact.status for fact in facts).most_common()),
        "predicted_1": sum(fact.answered_label == 1 for fact in facts),
        **score_answers(truth, said, config.confidence, config.bootstrap_draws, config.random_seed),
    }
    ways = {
        "quartile": name_quartiles([fact.length for fact in labelled], unit, NO_THOUGHT),
        "tokens": [name_bucket(fact.tokens) for fact in labelled],
    }
    buckets = []
    for way, groups in ways.items():
        for group, span in sorted(set(groups) - ({(NO_THOUGHT, "")} if way == "tokens" else set()), key=_bucket_order):
            chosen = np.array([item == (group, span) for item in groups])
            buckets.append(
                {
                    "file": where,
                    "by": way,
                    "group": group,
                    "range": span,
                    **score_group(truth[chosen], said[chosen], config.confidence),
                }
            )
    return summary, buckets


def name_bucket(tokens: int | None) -> tuple[str, str]:
    """The fixed range that a thought's tokens fall into: `("101-150", "")`."""
    if tokens is None:
        return NO_THOUGHT, ""
    low, high = next((low, high) for low, high in BUCKETS if high is None or tokens <= high)
    return f"{low}-{high}" if high else f"{low}+", ""


def _bucket_order(bucket: tuple[str, str]) -> int:
    digits = re.search(r"\d+", bucket[0])
    return int(digits[0]) if digits else 10**9


def run(config: CheckDataConfig) -> Path:
    """Check the files, write check.json and report.html, print findings and tables; returns the report's path.

    A file that cannot be read is a fault among the findings. Raises DataError at the end of a strict check with faults, after all is written.
    """
    from nli.data.check_report import count_findings, render_check, render_text
    from nli.data.row_checks import compare_splits

    files = {
        kind: {name: resolve_input(path, config.storage_root) for name, path in split_names(given)}
        for kind, given in (
            ("csv", config.csv_files()),
            ("thoughts", config.thoughts),
            ("reflections", config.reflections),
        )
    }
    measure, count_tokens, unit = load_measure(config.tokenizer)
    folder = resolve_output(config.output_dir, config.storage_root)
    inputs = [path for named in files.values() for path in named.values()]
    manifest = folder / "manifest.json"
    record = start_run(manifest, "data_check", {"stage": "data_check"}, config, inputs, manifest.exists())

    check = {
        "unit": unit,
        "confidence": config.confidence,
        "bootstrap_draws": config.bootstrap_draws,
        "random_seed": config.random_seed,
    }
    check |= {
        "bucket_tokens": config.tokenizer or f"characters ÷ {CHARACTERS_PER_TOKEN}",
        "files": {kind: _as_text(named) for kind, named in files.items()},
    }
    splits, findings, lengths, check["splits"] = check_csvs(files["csv"], config, measure)
    check["shared"], found = compare_splits(splits)
    more = check_generated(files, splits, config, measure, count_tokens, unit)
    check |= more["tables"]
    findings = sorted([*findings, *found, *more["findings"]], key=lambda finding: finding.level != "fault")
    check["lengths"] = [item for item in [*lengths, *more["lengths"]] if item]
    check["faults"] = sum(finding.level == "fault" for finding in findings)
    check["warnings"] = len(findings) - check["faults"]
    check["findings"] = [asdict(finding) for finding in findings]
    check["provenance"] = {name: record.manifest[name] for name in ("commit", "versions", "hardware", "inputs")} | {
        "started": record.manifest["attempts"][-1]["started"]
    }
    write_atomic(folder / "check.json", json.dumps(check, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_atomic(folder / "report.html", render_check(check))
    record.finish(
        {"faults": check["faults"], "warnings": check["warnings"], "rows": sum(row["rows"] for row in check["splits"])}
    )
    print(render_text(check), flush=True)
    print(f"report: {folder / 'report.html'}", flush=True)
    if config.strict and check["faults"]:
        raise DataError(
            f"the data have {count_findings(check)}, listed above and in {folder / 'check.json'}. Mend the faults, or check without --strict."
        )
    return folder / "report.html"


def check_csvs(
    files: Mapping[str, Path], config: CheckDataConfig, measure: Callable[[str], int]
) -> tuple[dict, list["Finding"], list, list[dict]]:
    """The rows of each split that can be read, with findings, lengths and a summary of each."""
    from nli.data.row_checks import Finding, check_pairs, describe_lengths

    splits, findings, lengths, summaries = {}, [], [], []
    for name, path in files.items():
        try:
            rows = read_examples(path, config.max_rows)
        except DataError as error:
            lines = str(error).splitlines()
            findings.append(Finding("fault", name, "broken rows", 1, "the CSV cannot be used as it is", tuple(lines)))
            continue
        splits[name] = rows
        summary, found = check_pairs(name, rows)
        summaries.append(summary)
        findings += found
        lengths += [
            describe_lengths(name, text, (measure(row[text]) for row in rows)) for text in ("premise", "hypothesis")
        ]
    return splits, findings, lengths, summaries


def check_generated(
    files: Mapping[str, Mapping[str, Path]],
    splits: Mapping[str, list[dict]],
    config: CheckDataConfig,
    measure: Callable[[str], int],
    count_tokens: Callable[[str], int],
    unit: str,
) -> dict:
    """Findings, lengths and tables of the answers and the reflections."""
    from nli.data.row_checks import check_records, check_reflections, compare_with_pairs, describe_lengths, read_facts
    from nli.task.records import Answer, Reflection

    findings, lengths, answers = [], [], {}
    tables: dict[str, list] = {"answers": [], "buckets": [], "reflections": []}
    for name, path in files["thoughts"].items():
        where = f"{name} thoughts"
        facts, faults, sources = read_facts(path, Answer, measure, count_tokens)
        answers[name] = facts
        findings += check_records(where, facts, faults, "answers")
        findings += compare_with_pairs(where, facts, splits[name]) if name in splits else []
        lengths.append(describe_lengths(where, "thought", (fact.length for fact in facts)))
        summary, buckets = score_teacher(where, facts, config, unit)
        tables["answers"].append(summary | sources)
        tables["buckets"] += buckets
    for name, path in files["reflections"].items():
        where = f"{name} reflections"
        facts, faults, sources = read_facts(path, Reflection, measure, count_tokens)
        summary, found = check_reflections(where, facts, answers.get(name))
        findings += [*check_records(where, facts, faults, "reflections"), *found]
        findings += [
            finding for finding in compare_with_pairs(where, facts, splits.get(name, [])) if finding.level == "fault"
        ]
        lengths.append(describe_lengths(where, "improved thought", (fact.length for fact in facts)))
        tables["reflections"].append(
            summary | {"statuses": dict(Counter(fact.status for fact in facts).most_common())} | sources
        )
    return {"findings": findings, "lengths": lengths, "tables": tables}


def _as_text(named: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in named.items()}
