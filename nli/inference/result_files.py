"""The files of one inference run, written from its rows and its store without holding either in memory.

tally = write_answers(worklist, store, Path("results/reflected.jsonl"))       every row with its answer, in input order
write_table(Path("results/reflected.jsonl"))                                  results/reflected.csv
write_report(Path("results/reflected.jsonl"), head)                           results/reflected.json: the head, then one row a line
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from nli.inference.answer_store import AnswerStore
from nli.runtime.errors import StorageError
from nli.runtime.files import dump_line, write_atomic, write_csv
from nli.runtime.worklist import Worklist
from nli.task.parsing import ParseStatus

COLUMNS = (
    *(
        "id",
        "premise",
        "hypothesis",
        "true_label",
        "predicted_label",
        "label_probability",
        "thought_process",
        "raw_text",
    ),
    *("parse_status", "num_prompt_tokens", "num_completion_tokens"),
)


class Tally:
    """What is counted while the rows pass by: statuses and tokens, and the labels of labelled rows for the metrics."""

    def __init__(self) -> None:
        self.statuses: Counter = Counter()
        self.num_rows = 0
        self.num_forced = 0
        self.completion_tokens = 0
        self._truth = array("b")
        self._predicted = array("b")  # -1 where an answer could not be read

    def add(self, row: Mapping) -> None:
        """Count one row."""
        is_parsed = row["parse_status"] == ParseStatus.OK
        self.num_rows += 1
        self.statuses[row["parse_status"]] += 1
        self.num_forced += row.get("label_forced", False)
        self.completion_tokens += row.get("num_completion_tokens") or 0
        if row["true_label"] is not None:
            self._truth.append(row["true_label"])
            self._predicted.append(row["predicted_label"] if is_parsed else -1)

    @cached_property
    def metrics(self) -> dict | None:
        """`nli.evaluation.metrics.score_answers` with its defaults of evaluation; None without labelled rows."""
        import numpy as np

        from nli.evaluation.metrics import score_answers

        if not self._truth:
            return None
        truth, predicted = (np.array(labels, dtype=int) for labels in (self._truth, self._predicted))
        return score_answers(truth, predicted, confidence=0.95, draws=10_000, seed=1337)

    def counts(self) -> dict:
        """Rows, unparsed rows first, accuracy over all labelled rows, tokens."""
        metrics = self.metrics
        return {
            "rows": self.num_rows,
            "unparsed": self.num_rows - self.statuses[ParseStatus.OK],
            "failed": self.statuses[ParseStatus.REQUEST_FAILED],
            "forced": self.num_forced,
            "labelled": len(self._truth),
            "correct": metrics["correct"] if metrics else 0,
            "accuracy": metrics["accuracy"] if metrics else None,
            "completion_tokens": self.completion_tokens,
        }


def write_answers(worklist: Worklist, store: AnswerStore, output: Path) -> Tally:
    """Write every row with its answer as JSON Lines. Raises StorageError if the store lacks one."""
    tally = Tally()

    def write(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            for chunk in worklist.iterate():
                answers = store.read([key.decode() for _, key in chunk])
                for row, key in chunk:
                    if key.decode() not in answers:
                        raise StorageError(
                            f"{store.path}: lacks the answer of row {row['id']!r}; run the command again."
                        )
                    made = {**row, **answers[key.decode()]}
                    tally.add(made)
                    file.write(dump_line(made))

    write_atomic(output, write)
    return tally


def write_table(answers: Path) -> None:
    """Write the CSV beside a file of answers; None becomes an empty cell."""
    write_csv(
        answers.with_name(f"{answers.name.removesuffix('.jsonl')}.csv"), map(json.loads, _lines(answers)), COLUMNS
    )


def write_report(answers: Path, head: Mapping) -> None:
    """Write the JSON file beside a file of answers: what is known of the run, and its rows, each on a line of its own."""

    def write(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}") + ',\n "rows": [')
            for number, line in enumerate(_lines(answers)):
                file.write((",\n  " if number else "\n  ") + line.rstrip("\n"))
            file.write("\n ]\n}\n")

    write_atomic(answers.with_name(f"{answers.name.removesuffix('.jsonl')}.json"), write)


def describe_figures(figures: Mapping, target: int, seconds: float) -> dict:
    """Timing and speed of this attempt, from what the desk tells; of all its models together, where the engine answered for several in one pass."""
    engines = figures.get("engines", [])
    rows, row_seconds = sum(figures.get("rows", [])), figures.get("seconds", 0.0)

    def most(name: str) -> float | None:
        return max((engine[name] for engine in engines if engine.get(name) is not None), default=None)

    return {
        "rows_computed": figures["rows"][target] if figures else 0,
        "rows_in_pass": rows,
        "worker_deaths": figures.get("deaths", 0),
        "seconds": round(seconds, 2),
        "load_seconds": most("load_seconds"),
        "compile_seconds": most("compile_seconds"),
        "row_seconds": round(row_seconds, 2),
        "rows_per_second": round(rows / row_seconds, 2) if row_seconds else 0.0,
        "tokens_per_second": round(figures.get("tokens", 0) / row_seconds, 1) if row_seconds else 0.0,
        "peak_memory_gb": most("peak_memory_gb"),
        "engines": engines,
    }


def summarise(name: str, counts: Mapping, timing: Mapping, cure: str) -> str:
    """The console's last words on a model: unparsed rows first, accuracy, speed, memory, and where the seconds went. `cure` is what helps failed rows."""
    lines = [f"inference: {name}: {counts['unparsed']} of {counts['rows']} unparsed"]
    if counts["failed"]:
        lines[0] += f" ({counts['failed']} failed; {cure})"
    if counts["forced"]:
        lines[0] += f", {counts['forced']} with a label that was forced"
    if counts["labelled"]:
        lines[0] += f", {counts['correct']} of {counts['labelled']} right ({counts['accuracy']:.3f})"
    if timing["rows_computed"]:
        memory = f", peak memory {timing['peak_memory_gb']:.1f} GB" if timing["peak_memory_gb"] else ""
        shared = (
            f" for all models of this pass, {timing['rows_in_pass']} rows"
            if timing["rows_in_pass"] > timing["rows_computed"]
            else ""
        )
        lines.append(
            f"  {timing['rows_per_second']:.1f} rows/s, {timing['tokens_per_second']:.0f} tokens/s{shared}{memory}"
        )
        parts = {"load": timing["load_seconds"], "compile": timing["compile_seconds"], "rows": timing["row_seconds"]}
        lines.append(
            "  "
            + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items() if seconds is not None)
            + f", in all {timing['seconds']:.1f} s"
        )
    return "\n".join(lines)


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from file
