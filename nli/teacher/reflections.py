"""Stage 2: a stronger model reflects on the answers that were wrong.

In:   an Answer with {"true_label": 1, "predicted_label": 0, "parse_status": "ok", "thought_process": "Step 1: …", …}
Out:  that row, unchanged, with {"reflected_by": "mistral-large-2512", "error_analysis": "Step 2 overlooks that dogs are animals.",
      "improved_thought_process": "Dogs are animals …", "reflected_label": 1, "reflection_status": "ok", …}

Right answers are not sent, nor are unlabelled rows, nor answers that could not be read: there is no thought to reflect on (they are counted).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from nli.runtime.config import config_class
from nli.runtime.files import iterate_jsonl, resolve_input, resolve_output
from nli.task.leaks import betrays_label
from nli.task.parsing import ParseStatus
from nli.task.prompts import TEACHER_PROMPTS
from nli.task.records import Answer, is_correct, list_counts
from nli.teacher.requests import Outcome, TeacherConfig, describe_parameters
from nli.teacher.stage import Generation, run_generation

PROMPT = TEACHER_PROMPTS["reflection"]


@config_class
class GenerateReflectionsConfig(TeacherConfig):
    """Ask a stronger model to reflect on wrong answers. The default reads and writes sample files only."""

    thoughts: str = "data/original_thoughts/sample_train.jsonl"
    """answers of stage 1, JSON Lines"""
    output_jsonl: str = "data/reflected_thoughts/sample_train.jsonl"
    """reflections, JSON Lines in input order"""
    model: str = "mistral-large-2512"
    """model name as the server knows it; stronger than the one that answered"""
    prompt_name: Literal["reflection"] = "reflection"
    """what the model is asked to do"""

    def __post_init__(self) -> None:
        self.check()


def needs_reflection(answer: Mapping) -> bool:
    """Whether a labelled answer could be read and is wrong."""
    return answer["true_label"] is not None and answer["parse_status"] == ParseStatus.OK and not is_correct(answer)


def to_reflection(answer: Mapping, outcome: Outcome, config: GenerateReflectionsConfig) -> dict:
    """The Reflection that an outcome makes of a wrong Answer, whose own fields stay as they are."""
    fields = outcome.fields or {}
    return {
        **answer,
        "reflected_by": config.model,
        "reflection_prompt_sha256": PROMPT.sha256,
        "reflection_parameters": describe_parameters(config),
        "reflection_raw_text": outcome.raw_text,
        "error_analysis": fields.get("error_analysis"),
        "improved_thought_process": fields.get("improved_thought_process"),
        "reflected_label": fields.get("predicted_label"),
        "telling_phrase": betrays_label(fields.get("improved_thought_process") or ""),
        "reflection_status": outcome.status,
        "reflection_problem": outcome.problem,
        "num_reflection_prompt_tokens": outcome.num_prompt_tokens,
        "num_reflection_completion_tokens": outcome.num_completion_tokens,
    }


def run(config: GenerateReflectionsConfig) -> Path:
    """Reflect on every wrong answer that has no reflection yet; returns the output's path. Raises as `run_generation` does."""
    source = resolve_input(config.thoughts, config.storage_root)
    output = resolve_output(config.output_jsonl, config.storage_root)
    answers: Counter = Counter()
    work = Generation(
        stage="reflections",
        config=config,
        prompt=PROMPT,
        source=source,
        output=output,
        read_rows=lambda: read_wrong(source, config.max_rows, answers),
        build_row=lambda row, outcome: to_reflection(row, outcome, config),
        count_row=count_reflection,
        find_fault=find_fault,
    )
    counts = run_generation(work)
    if counts is not None:
        left = f"{answers['unreadable']} unreadable and {answers['unlabelled']} unlabelled ones left out"
        dead = {name.removeprefix("dead_"): count for name, count in counts.items() if name.startswith("dead_")}
        usable = counts["rows"] - sum(dead.values())
        reasons = f" ({list_counts(dead)})" if dead else ""
        print(
            f"reflections: {answers['answers']} answers, {left}; {usable} of {counts['rows']} reflections usable{reasons} -> {output}",
            flush=True,
        )
    return output


def read_wrong(source: Path, max_rows: int, answers: Counter) -> Iterable[dict]:
    """The wrong ones among the first `max_rows` answers (0: all); `answers` counts what was read."""
    for answer in iterate_jsonl(source, Answer):
        if max_rows and answers["answers"] == max_rows:
            return
        answers["answers"] += 1
        answers["unreadable"] += answer["parse_status"] != ParseStatus.OK
        answers["unlabelled"] += answer["parse_status"] == ParseStatus.OK and answer["true_label"] is None
        if needs_reflection(answer):
            yield answer


def find_fault(reflection: Mapping) -> tuple[str, str] | None:
    """Why a reflection is no material for training, or None: it cannot be read, misses the true label, or betrays that it was told it."""
    if reflection["reflection_status"] != ParseStatus.OK:
        return reflection["reflection_status"], reflection["reflection_problem"]
    if reflection["reflected_label"] != reflection["true_label"]:
        return (
            "label_disagrees",
            f"it reaches {reflection['reflected_label']}, and the true label is {reflection['true_label']}",
        )
    if reflection["telling_phrase"]:
        return "betrays_label", reflection["telling_phrase"]
    return None


def count_reflection(counts: Counter, reflection: Mapping) -> None:
    """Add a Reflection to the run's counts."""
    counts[f"status_{reflection['reflection_status']}"] += 1
    counts["prompt_tokens"] += reflection["num_reflection_prompt_tokens"] or 0
    counts["completion_tokens"] += reflection["num_reflection_completion_tokens"] or 0
