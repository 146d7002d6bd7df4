"""The rows that flow through the pipeline: flat, the same names on disk and in code.

An Answer, as one line of `data/original_thoughts/train.jsonl` (wrapped here):

    {"id": "17", "premise": "Two dogs ran.", "hypothesis": "Animals moved.", "true_label": 1, "answered_by": "ministral-8b-2512",
     "prompt_name": "initial_generation", "prompt_sha256": "3f…",
     "parameters": "temperature=0, max_tokens=1024, …", "raw_text": "{\"thought_process\": …}", "thought_process": "Dogs are animals …",
     "predicted_label": 1, "parse_status": "ok", "problem": "", "finish_reason": "stop", "num_prompt_tokens": 212, "num_completion_tokens": 41}

What the teacher says and what the student says is this same record. Columns of the user's file beyond the four of an Example ride along as text under their
own names, so that results can be sliced by them.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nli.task.parsing import ParseStatus

Label = Literal[0, 1]
Ablation = Literal["correct_only", "reflected", "unmodified"]
ABLATIONS: tuple[Ablation, ...] = ("correct_only", "reflected", "unmodified")


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, use_enum_values=True)


class Example(_Record):
    """One premise–hypothesis pair. `true_label` is None where the file has no label."""

    id: str = Field(min_length=1)
    premise: str
    hypothesis: str
    true_label: Label | None = None


class Answer(Example):
    """An Example with what a teacher or a student said about it. A failed request is an Answer too, with `parse_status` request_failed."""

    answered_by: str
    prompt_name: str
    prompt_sha256: str
    parameters: str = ""
    raw_text: str
    thought_process: str | None
    predicted_label: Label | None
    parse_status: str
    problem: str = ""
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    num_replies: int | None = None
    """of a teacher: 2 after a repair"""
    precision: str = ""
    """of the student's base weights"""
    engine: str = ""
    """that the student ran in"""
    label_probability: float | None = None
    """of label 1, where it was read"""
    label_forced: bool = False
    votes: list[int] | None = None
    """samples with label 0 and with label 1, where several were drawn"""


class Score(Answer):
    """An Answer of the `scoring` prompt: `scored_thought_process` and `scored_label` are what was judged, `thought_process` the improvement."""

    scored_thought_process: str
    scored_label: Label
    analysis: str | None
    score: int | None


class Reflection(Answer):
    """A wrong Answer, unchanged, with the stronger model's analysis. `reflected_label` is that model's own label, `predicted_label` stays the wrong one.

    `telling_phrase` is what betrays, in the improved thought, that the model was told the label.
    """

    reflected_by: str
    reflection_prompt_sha256: str
    reflection_parameters: str = ""
    reflection_raw_text: str
    error_analysis: str | None
    improved_thought_process: str | None
    reflected_label: Label | None
    telling_phrase: str | None = None
    reflection_status: str
    reflection_problem: str = ""
    num_reflection_prompt_tokens: int | None = None
    num_reflection_completion_tokens: int | None = None


class SFTExample(_Record):
    """One training row: `prompt` as `render_student_prompt` writes it, `completion` as `render_completion` does."""

    id: str = Field(min_length=1)
    ablation: str
    source: Literal["teacher", "reflection"]
    premise: str
    hypothesis: str
    prompt: str
    completion: str
    true_label: Label | None


def row_key(row: Mapping) -> str:
    """The id plus a hash of the pair's text: an inserted or edited row never takes another's answer."""
    return f"{row['id']}:{content_hash([row['premise'], row['hypothesis']])}"


def content_hash(parts: Iterable[str]) -> str:
    """First 16 hex digits of SHA-256 over the parts, each prefixed by its length so that no two lists of parts share bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def is_correct(answer: Mapping) -> bool:
    """Whether an answer could be read and agrees with the true label."""
    return answer["parse_status"] == ParseStatus.OK and answer["predicted_label"] == answer["true_label"]


def list_counts(counts: Mapping[str, int]) -> str:
    """{"label_disagrees": 6, "truncated": 2}  ->  "label disagrees 6, truncated 2"."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
