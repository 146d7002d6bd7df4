"""Stage 3: training rows from answers and reflections, for one ablation.

In:   an Answer {"thought_process": "Dogs are animals …", "predicted_label": 1, "true_label": 1, …}, or a Reflection of a wrong one
Out:  {"id": "0", "ablation": "reflected", "source": "teacher", "premise": "Two dogs ran.", "hypothesis": "Animals moved.",
      "prompt": "[INST] Premise: …[/INST]", "completion": "{\"thought_process\": …, \"predicted_label\": 1}", "true_label": 1}

    correct_only   answers whose label is right
    reflected      those, and for each wrong answer its reflection, if that reached the true label
    unmodified     all answers as they are, wrong labels included
    custom         what `filter_correct` and `label_field` say

Every row that does not become a training row is counted with its reason.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from nli.runtime.config import CountOrZero, config_class
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.files import index_rows, read_jsonl, resolve_input, resolve_output, sha256_file, write_jsonl
from nli.runtime.manifest import manifest_beside, start_run
from nli.task.parsing import ParseStatus
from nli.task.prompts import render_completion, render_student_prompt, student_prompt_sha256
from nli.task.records import Answer, Reflection, is_correct, list_counts, row_key


@config_class
class PrepareSFTDataConfig:
    """Make a training file for one ablation. The default reads and writes sample files only."""

    thoughts: str = "data/original_thoughts/sample_train.jsonl"
    """answers of stage 1, JSON Lines"""
    reflections: str = ""
    """reflections of stage 2, JSON Lines; needed by ablation reflected, refused by the others"""
    ablation: Literal["correct_only", "reflected", "unmodified", "custom"] = "correct_only"
    """which answers become training rows"""
    filter_correct: bool | None = None
    """ablation custom: keep right answers only"""
    label_field: Literal["predicted_label", "true_label"] | None = None
    """ablation custom: the label that the student is to learn"""
    output_jsonl: str = "data/finetune/sample_correct_only_train.jsonl"
    """training rows, JSON Lines in input order; the trainer shuffles"""
    max_rows: CountOrZero = 0
    """read only so many answers; 0: all"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        if (self.ablation == "reflected") != bool(self.reflections):
            raise ConfigError("ablation reflected needs --reflections, and no other ablation reads them.")
        if (self.ablation == "custom") != (self.filter_correct is not None and self.label_field is not None):
            raise ConfigError(
                "ablation custom needs both filter_correct and label_field; the named ablations fix them and accept neither."
            )
        if self.ablation != "custom" and (self.filter_correct is not None or self.label_field is not None):
            raise ConfigError(
                f"ablation {self.ablation} fixes filter_correct and label_field; use ablation custom to choose them."
            )


def build_sft_row(row: Mapping, ablation: str, source: str, thought_process: str, label: int) -> dict:
    """One training row."""
    return {
        "id": row["id"],
        "ablation": ablation,
        "source": source,
        "premise": row["premise"],
        "hypothesis": row["hypothesis"],
        "prompt": render_student_prompt(row["premise"], row["hypothesis"]),
        "completion": render_completion(thought_process, label),
        "true_label": row["true_label"],
    }


def select_rows(
    answers: Iterable[Mapping], reflections: Mapping[str, Mapping], config: PrepareSFTDataConfig
) -> tuple[list[dict], Counter]:
    """Training rows in the answers' order, and how many answers went where or were left out for which reason."""
    rows, counts = [], Counter()
    keep_wrong = config.ablation == "unmodified" or config.filter_correct is False
    label_field = config.label_field or "predicted_label"
    for answer in answers:
        thought, label, source = answer["thought_process"], answer.get(label_field), "teacher"
        reason = None
        if answer["parse_status"] != ParseStatus.OK:
            reason = "unreadable_answer"
        elif answer["true_label"] is None and not (keep_wrong and label_field == "predicted_label"):
            reason = "unlabelled"
        elif not keep_wrong and not is_correct(answer):
            if config.ablation == "reflected":
                reflection = reflections.get(row_key(answer))
                reason = why_not_usable(reflection, answer)
                if reason is None:
                    thought, label, source = (
                        reflection["improved_thought_process"],
                        reflection["true_label"],
                        "reflection",
                    )
            else:
                reason = "wrong_answer"
        if reason is None and source == "teacher" and answer.get("telling_phrase"):
            reason = "thought_betrays_the_label"
        if reason is None and not thought.strip():
            reason = "empty_thought"
        counts[f"left_out_{reason}" if reason else f"from_{source}"] += 1
        if reason is None:
            rows.append(build_sft_row(answer, config.ablation, source, thought, label))
    return rows, counts


def why_not_usable(reflection: Mapping | None, answer: Mapping) -> str | None:
    """Why a reflection cannot stand in for a wrong answer, or None if it can."""
    if reflection is None:
        return "no_reflection"
    if reflection["thought_process"] != answer["thought_process"]:
        return "reflection_of_another_answer"
    if reflection["reflection_status"] != ParseStatus.OK:
        return "unreadable_reflection"
    if reflection["reflected_label"] != answer["true_label"]:
        return "reflection_disagrees_with_true_label"
    if reflection.get("telling_phrase"):
        return "reflection_betrays_the_label"
    return None


def run(config: PrepareSFTDataConfig) -> Path:
    """Write the training file; returns its path. Quick and without calls, so it is made anew whenever an input changed."""
    thoughts = resolve_input(config.thoughts, config.storage_root)
    inputs = [thoughts]
    output = resolve_output(config.output_jsonl, config.storage_root)
    answers = read_jsonl(thoughts, Answer)[: config.max_rows or None]
    reflections = {}
    if config.reflections:
        inputs.append(resolve_input(config.reflections, config.storage_root))
        # Nothing to reflect on makes an empty file, which is no fault here.
        reflections = index_rows(read_jsonl(inputs[1], Reflection), inputs[1]) if inputs[1].stat().st_size else {}
    rows, counts = select_rows(index_rows(answers, thoughts).values(), reflections, config)
    if not rows:
        raise DataError(f"{thoughts}: no answer can be used for ablation {config.ablation} ({list_counts(counts)}).")
    identity = {
        "ablation": config.ablation,
        "filter_correct": config.filter_correct,
        "label_field": config.label_field,
        "student_prompt_sha256": student_prompt_sha256(),
    }
    record = start_run(manifest_beside(output), "sft_data", identity, config, inputs, has_work=output.exists())
    write_jsonl(output, rows)
    record.finish(
        {
            "rows": len(rows),
            "label_1": sum(row["completion"].endswith(": 1}") for row in rows),
            **counts,
            "sha256": sha256_file(output),
        }
    )
    print(f"sft_data: {config.ablation}: {len(rows)} rows ({list_counts(counts)}) -> {output}", flush=True)
    return output
