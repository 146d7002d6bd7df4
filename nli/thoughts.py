"""Stage 1: the teacher writes a thought and a label for every pair, or judges or rewrites thoughts that exist.

In:   {"id": "0", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1}
Out:  the same row with {"answered_by": "ministral-8b-2512", "prompt_name": "initial_generation", "raw_text": "{…}", "thought_process": "Dogs are …",
      "predicted_label": 1, "parse_status": "ok", …}

Prompts: `initial_generation` (from pairs), `regeneration` (from labelled pairs: a new thought for the true label), `scoring` (from thoughts: a judgement).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nli.cluster import connected, spread
from nli.config import config_class
from nli.errors import ConfigError, DataError
from nli.examples import read_examples
from nli.parsing import ParseStatus
from nli.prompts import TEACHER_PROMPTS
from nli.records import Answer, is_correct, row_key
from nli.runs import manifest_beside, start_run
from nli.storage import RowFile, index_rows, read_jsonl, resolve_input, resolve_output
from nli.teacher import Outcome, Teacher, TeacherConfig, check_teacher, describe_requests, refuse_failed, settle_key_file


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
        if (self.prompt_name == "scoring") != bool(self.thoughts):
            raise ConfigError("prompt_name scoring reads --thoughts, and no other prompt does: it judges answers that exist.")


def to_answer(row: Mapping, outcome: Outcome, config: GenerateThoughtsConfig) -> dict:
    """The Answer (or, for `scoring`, the Score) that an outcome makes of a row."""
    prompt = TEACHER_PROMPTS[config.prompt_name]
    fields = outcome.fields or {}
    judged = {}
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
        "raw_text": outcome.raw_text,
        "thought_process": fields.get("improved_thought_process" if judged else "thought_process"),
        "predicted_label": fields.get("predicted_label"),
        "parse_status": outcome.status,
        "problem": outcome.problem,
        "finish_reason": outcome.finish_reason,
        "num_prompt_tokens": outcome.num_prompt_tokens,
        "num_completion_tokens": outcome.num_completion_tokens,
        "num_replies": outcome.num_replies,
        **judged,
    }


class ThoughtWriter:
    """Ray Data actor: rows in, Answers out."""

    def __init__(self, config: GenerateThoughtsConfig) -> None:
        self.config = config
        prompt = TEACHER_PROMPTS[config.prompt_name]
        self.teacher = Teacher(config, prompt, check_teacher(config), share=1 / config.workers)

    async def __call__(self, rows: list[dict]) -> list[dict]:
        return await self.teacher.ask_all(rows, lambda row, outcome: to_answer(row, outcome, self.config))


def run(config: GenerateThoughtsConfig) -> Path:
    """Answer every row of the input that has no answer yet; returns the output's path.

    Raises DataError, TeacherError, StorageError or ResumeError before the first call; TeacherError also later, when no call can succeed. Finished rows stay.
    """
    config = settle_key_file(config)
    source = resolve_input(config.thoughts or config.input_csv, config.storage_root)
    output = RowFile(resolve_output(config.output_jsonl, config.storage_root))
    rows = read_rows(source, config)
    check_teacher(config)
    identity = describe_requests(config, TEACHER_PROMPTS[config.prompt_name])
    record = start_run(manifest_beside(output.path), "thoughts", identity, config, [source], has_work=output.exists())

    current = index_rows(rows, source)
    answers = {key: row for key, row in output.read_finished().items() if key in current and is_about(row, current[key])}
    pending = [row for key, row in current.items() if key not in answers]
    print(f"thoughts: {len(rows)} rows, {len(rows) - len(pending)} finished already, {len(pending)} to ask {config.model} for", flush=True)
    if pending:
        with connected():
            for batch in spread(pending, ThoughtWriter, (config,), num_workers=config.workers, batch_size=config.max_in_flight, label="thoughts"):
                output.append(batch)
                answers |= {row_key(row): row for row in batch}
    finished = [answers[key] if config.thoughts else answers[key] | row for key, row in current.items()]
    output.finish(finished)
    record.finish(count_answers(finished))
    print(f"thoughts: {describe_counts(record.manifest['counts'])} -> {output.path}", flush=True)
    refuse_failed(finished, "parse_status", "problem", output.path)
    return output.path


def is_about(answer: Mapping, row: Mapping) -> bool:
    """Whether a finished answer was asked with what the row says now, and its request did not fail. A new label alone asks nothing again."""
    if answer["parse_status"] == ParseStatus.REQUEST_FAILED:
        return False
    if answer["prompt_name"] == "scoring":
        return answer["scored_thought_process"] == row["thought_process"] and answer["scored_label"] == row["predicted_label"]
    return answer["prompt_name"] != "regeneration" or answer["true_label"] == row["true_label"]


def read_rows(source: Path, config: GenerateThoughtsConfig) -> list[dict]:
    """The rows to ask about: Examples, or for `scoring` the Answers that have a thought to judge."""
    if not config.thoughts:
        return read_examples(source, config.max_rows, need_labels=config.prompt_name == "regeneration")
    answers = [row for row in read_jsonl(source, Answer) if row["parse_status"] == ParseStatus.OK]
    if not answers:
        raise DataError(f"{source}: no row has a thought to score.")
    return answers[: config.max_rows or None]


def count_answers(answers: list[dict]) -> dict:
    """Rows, statuses and tokens of a set of Answers; `correct` and `labelled` where there are labels."""
    labelled = [row for row in answers if row["true_label"] is not None]
    return {
        "rows": len(answers),
        **{f"status_{status}": count for status, count in sorted(Counter(row["parse_status"] for row in answers).items())},
        "labelled": len(labelled),
        "correct": sum(is_correct(row) for row in labelled),
        "first_reply_ok": sum(row["num_replies"] == 1 and row["parse_status"] == ParseStatus.OK for row in answers),
        "prompt_tokens": sum(row["num_prompt_tokens"] or 0 for row in answers),
        "completion_tokens": sum(row["num_completion_tokens"] or 0 for row in answers),
    }


def describe_counts(counts: Mapping) -> str:
    """The counts in one line, failures first."""
    failed = {name.removeprefix("status_"): count for name, count in counts.items() if name.startswith("status_") and name != "status_ok"}
    parts = [f"{sum(failed.values())} of {counts['rows']} without a usable answer" + (f" ({failed})" if failed else "")]
    if counts["labelled"]:
        parts.append(f"{counts['correct']} of {counts['labelled']} labelled rows right ({counts['correct'] / counts['labelled']:.3f})")
    parts.append(f"{counts['prompt_tokens']} + {counts['completion_tokens']} tokens")
    return ", ".join(parts)
