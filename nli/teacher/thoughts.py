"""Stage 1: the teacher writes a thought and a label for every pair, or judges or rewrites thoughts that exist.

In:   {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}
Out:  the same row with {"answered_by": "ministral-8b-2512", "prompt_name": "initial_generation", "raw_text": "{…}", "thought_process": "Dogs are …",
      "predicted_label": 1, "parse_status": "ok", …}

Prompts: `initial_generation` (from pairs), `regeneration` (from labelled pairs: a new thought for the true label), `scoring` (from thoughts: a judgement).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from nli.data.pairs import iterate_examples
from nli.runtime.config import config_class
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.files import iterate_jsonl, resolve_input, resolve_output
from nli.task.leaks import betrays_label
from nli.task.parsing import ParseStatus
from nli.task.prompts import TEACHER_PROMPTS
from nli.task.records import Answer, is_correct, list_counts
from nli.teacher.requests import Outcome, TeacherConfig, describe_parameters
from nli.teacher.stage import Generation, run_generation


@config_class
class GenerateThoughtsConfig(TeacherConfig):
    """Ask the teacher for thoughts. The default reads and writes sample files only."""

    input_csv: str = "data/sample/train.csv"
    """pairs: CSV with premise,hypothesis[,label]"""
    thoughts: str = ""
    """for prompt scoring, instead of --input-csv: the answers to judge, JSON Lines"""
    output_jsonl: str = "data/original_thoughts/sample_train.jsonl"
    """answers, JSON Lines in input order"""
    prompt_name: Literal["initial_generation", "scoring", "regeneration"] = "initial_generation"
    """what the teacher is asked to do"""

    def __post_init__(self) -> None:
        self.check()
        if (self.prompt_name == "scoring") != bool(self.thoughts):
            raise ConfigError(
                "prompt_name scoring reads --thoughts, and no other prompt does: it judges answers that exist."
            )


def to_answer(row: Mapping, outcome: Outcome, config: GenerateThoughtsConfig) -> dict:
    """The Answer (or, for `scoring`, the Score) that an outcome makes of a row."""
    prompt = TEACHER_PROMPTS[config.prompt_name]
    fields = outcome.fields or {}
    judged = {}
    if prompt.name == "regeneration":
        judged = {"telling_phrase": betrays_label(fields.get("thought_process") or "")}
    if prompt.name == "scoring":
        judged = {
            "scored_thought_process": row["thought_process"],
            "scored_label": row["predicted_label"],
            "analysis": fields.get("analysis"),
            "score": fields.get("score"),
        }
    return {
        **row,
        "answered_by": config.model,
        "prompt_name": prompt.name,
        "prompt_sha256": prompt.sha256,
        "parameters": describe_parameters(config),
        "raw_text": outcome.raw_text,
        "thought_process": fields.get("improved_thought_process" if prompt.name == "scoring" else "thought_process"),
        "predicted_label": fields.get("predicted_label"),
        "parse_status": outcome.status,
        "problem": outcome.problem,
        "finish_reason": outcome.finish_reason,
        "num_prompt_tokens": outcome.num_prompt_tokens,
        "num_completion_tokens": outcome.num_completion_tokens,
        "num_replies": outcome.num_replies,
        **judged,
    }


def run(config: GenerateThoughtsConfig) -> Path:
    """Answer every row of the input that has no answer yet; returns the output's path. Raises as `run_generation` does."""
    source = resolve_input(config.thoughts or config.input_csv, config.storage_root)
    output = resolve_output(config.output_jsonl, config.storage_root)
    work = Generation(
        stage="thoughts",
        config=config,
        prompt=TEACHER_PROMPTS[config.prompt_name],
        source=source,
        output=output,
        read_rows=lambda: read_rows(source, config),
        build_row=lambda row, outcome: to_answer(row, outcome, config),
        count_row=count_answer,
        find_fault=find_fault,
    )
    counts = run_generation(work)
    if counts is not None:
        print(f"thoughts: {describe_counts(counts)} -> {output}", flush=True)
    return output


def read_rows(source: Path, config: GenerateThoughtsConfig) -> Iterable[dict]:
    """The rows to ask about: Examples, or for `scoring` the Answers that have a thought to judge."""
    if not config.thoughts:
        yield from iterate_examples(source, config.max_rows, need_labels=config.prompt_name == "regeneration")
        return
    num_rows = 0
    for row in iterate_jsonl(source, Answer):
        if row["parse_status"] == ParseStatus.OK and (not config.max_rows or num_rows < config.max_rows):
            num_rows += 1
            yield row
    if not num_rows:
        raise DataError(f"{source}: no row has a thought to score.")


def find_fault(answer: Mapping) -> tuple[str, str] | None:
    """Why an answer is no material for training, or None: it cannot be read or, where the teacher was told the label, it says so or misses it."""
    if answer["parse_status"] != ParseStatus.OK:
        return answer["parse_status"], answer["problem"]
    if answer["prompt_name"] == "regeneration":
        if answer["predicted_label"] != answer["true_label"]:
            return (
                "label_disagrees",
                f"it reaches {answer['predicted_label']}, and the true label is {answer['true_label']}",
            )
        if answer["telling_phrase"]:
            return "betrays_label", answer["telling_phrase"]
    return None


def count_answer(counts: Counter, answer: Mapping) -> None:
    """Add an Answer to the run's counts."""
    counts[f"status_{answer['parse_status']}"] += 1
    if answer["true_label"] is not None:
        counts["labelled"] += 1
        counts["correct"] += is_correct(answer)
    counts["first_reply_ok"] += answer["num_replies"] == 1 and answer["parse_status"] == ParseStatus.OK
    counts["prompt_tokens"] += answer["num_prompt_tokens"] or 0
    counts["completion_tokens"] += answer["num_completion_tokens"] or 0


def describe_counts(counts: Mapping) -> str:
    """The counts in one line, failures first."""
    failed = {
        name.removeprefix("status_"): count
        for name, count in counts.items()
        if name.startswith("status_") and name != "status_ok"
    }
    parts = [
        f"{sum(failed.values())} of {counts['rows']} without a usable answer"
        + (f" ({list_counts(failed)})" if failed else "")
    ]
    parts.append(f"{counts['first_reply_ok']} usable at the first reply")
    if counts["labelled"]:
        parts.append(
            f"{counts['correct']} of {counts['labelled']} labelled rows right ({counts['correct'] / counts['labelled']:.3f})"
        )
    parts.append(f"{counts['prompt_tokens']} + {counts['completion_tokens']} tokens of prompts and replies")
    return ", ".join(parts)
