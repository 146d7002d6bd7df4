"""Stage 2: a stronger model reflects on the answers that were wrong.

In:   an Answer with {"true_label": 1, "predicted_label": 0, "parse_status": "ok", "thought_process": "Step 1: …", …}
Out:  that row, unchanged, with {"reflected_by": "mistral-large-2512", "error_analysis": "Step 2 overlooks that dogs are animals.",
      "improved_thought_process": "Dogs are animals …", "reflected_label": 1, "reflection_status": "ok", …}

Right answers are not sent, nor are unlabelled rows, nor answers that could not be read: there is no thought to reflect on (they are counted).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nli.cluster import connected, spread
from nli.config import config_class
from nli.parsing import ParseStatus
from nli.prompts import TEACHER_PROMPTS
from nli.records import Answer, is_correct, row_key
from nli.runs import manifest_beside, start_run
from nli.storage import RowFile, index_rows, read_jsonl, resolve_input, resolve_output
from nli.teacher import Outcome, Teacher, TeacherConfig, check_teacher, describe_requests, refuse_failed, settle_key_file

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
        "reflection_raw_text": outcome.raw_text,
        "error_analysis": fields.get("error_analysis"),
        "improved_thought_process": fields.get("improved_thought_process"),
        "reflected_label": fields.get("predicted_label"),
        "reflection_status": outcome.status,
        "reflection_problem": outcome.problem,
        "num_reflection_prompt_tokens": outcome.num_prompt_tokens,
        "num_reflection_completion_tokens": outcome.num_completion_tokens,
    }


class ReflectionWriter:
    """Ray Data actor: wrong Answers in, Reflections out."""

    def __init__(self, config: GenerateReflectionsConfig) -> None:
        self.config = config
        self.teacher = Teacher(config, PROMPT, check_teacher(config), share=1 / config.workers)

    async def __call__(self, answers: list[dict]) -> list[dict]:
        return await self.teacher.ask_all(answers, lambda answer, outcome: to_reflection(answer, outcome, self.config))


def run(config: GenerateReflectionsConfig) -> Path:
    """Reflect on every wrong answer that has no reflection yet; returns the output's path. Raises as `nli.thoughts.run` does."""
    config = settle_key_file(config)
    source = resolve_input(config.thoughts, config.storage_root)
    output = RowFile(resolve_output(config.output_jsonl, config.storage_root))
    answers = read_jsonl(source, Answer)[: config.max_rows or None]
    check_teacher(config)
    record = start_run(manifest_beside(output.path), "reflections", describe_requests(config, PROMPT), config, [source], has_work=output.exists())

    wrong = [answer for answer in answers if needs_reflection(answer)]
    current = index_rows(wrong, source)
    reflections = {key: row for key, row in output.read_finished().items() if key in current and is_about(row, current[key])}
    pending = [answer for key, answer in current.items() if key not in reflections]
    done = len(wrong) - len(pending)
    print(f"reflections: {len(answers)} answers, {len(wrong)} wrong, {done} reflected already, {len(pending)} to ask {config.model} for", flush=True)
    if pending:
        with connected():
            for batch in spread(pending, ReflectionWriter, (config,), num_workers=config.workers, batch_size=config.max_in_flight, label="reflections"):
                output.append(batch)
                reflections |= {row_key(row): row for row in batch}
    finished = [reflections[key] for key in current]
    output.finish(finished)
    record.finish(count_reflections(answers, finished))
    print(f"reflections: {record.manifest['counts']} -> {output.path}", flush=True)
    refuse_failed(finished, "reflection_status", "reflection_problem", output.path)
    return output.path


def is_about(reflection: Mapping, answer: Mapping) -> bool:
    """Whether a finished reflection was made of this very answer, and its request did not fail."""
    same = all(reflection[name] == answer[name] for name in ("thought_process", "predicted_label", "true_label"))
    return same and reflection["reflection_status"] != ParseStatus.REQUEST_FAILED


def count_reflections(answers: list[dict], reflections: list[dict]) -> dict:
    """How many answers there were, how many were wrong or unreadable, and how the reflections ended."""
    return {
        "answers": len(answers),
        "unreadable_answers": sum(answer["parse_status"] != ParseStatus.OK for answer in answers),
        "rows": len(reflections),
        **{f"status_{status}": count for status, count in sorted(Counter(row["reflection_status"] for row in reflections).items())},
        "label_disagrees": sum(row["reflection_status"] == ParseStatus.OK and row["reflected_label"] != row["true_label"] for row in reflections),
    }
