"""From what an engine wrote to a row's answer: one text, or a vote among several.

to_answer({"answered_by": "reflected", …}, [Generation('{"thought_process": "Dogs are animals.", "predicted_label": 1}', "stop", 61, 17, probability=0.98)])
-> {"answered_by": "reflected", …, "raw_text": …, "thought_process": "Dogs are animals.", "predicted_label": 1, "label_probability": 0.98, …}

vote([<label 1>, <unparsed>, <label 0>, <label 1>])   -> the first answer with label 1, and "votes": [1, 2]
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nli.task.parsing import ParseStatus, parse_answer

if TYPE_CHECKING:
    from nli.engines.interface import Generation


def to_answer(frame: Mapping, generations: "Sequence[Generation]") -> dict:
    """The answer that one or several samples make; `frame` holds the fields that are the same in every row of a run."""
    answers = [_read(generation) for generation in generations]
    return {**frame, **(answers[0] if len(answers) == 1 else vote(answers))}


def to_failed(frame: Mapping, problem: str) -> dict:
    """The answer of a row for which there is no text."""
    return {**frame, **_lay_out(ParseStatus.REQUEST_FAILED, {}, problem)}


def vote(answers: Sequence[Mapping]) -> dict:
    """The first answer with the label that most have; its tokens are those of all, its probability the mean of those that could be read.

    Unparsed answers do not vote. A tie goes to the label with the higher mean probability, else to the earlier answer. If none votes, the first stands.
    """
    voters = [answer for answer in answers if answer["parse_status"] == ParseStatus.OK]
    counts = [sum(answer["predicted_label"] == label for answer in voters) for label in (0, 1)]
    known = [answer["label_probability"] for answer in voters if answer["label_probability"] is not None]
    mean = sum(known) / len(known) if known else None
    if counts[0] != counts[1]:
        label = int(counts[1] > counts[0])
    elif mean is not None and mean != 0.5:
        label = int(mean > 0.5)
    else:
        label = voters[0]["predicted_label"] if voters else None
    chosen = next((answer for answer in voters if answer["predicted_label"] == label), answers[0])
    written = [answer["num_completion_tokens"] for answer in answers if answer["num_completion_tokens"] is not None]
    return {
        **chosen,
        "label_probability": mean,
        "num_completion_tokens": sum(written) if written else None,
        "votes": counts,
    }


def derive_seed(key: str, sample: int) -> int:
    """The seed of a row's sample, the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{key}:{sample}".encode()).digest()[:4]) >> 1


def _read(generation: "Generation") -> dict:
    if generation.text is None:
        return _lay_out(
            ParseStatus.REQUEST_FAILED, {}, generation.problem, num_prompt_tokens=generation.num_prompt_tokens
        )
    parsed = parse_answer(generation.text, generation.finish_reason)
    return _lay_out(
        parsed.status,
        parsed.fields or {},
        parsed.problem,
        raw_text=generation.text,
        finish_reason=generation.finish_reason,
        num_prompt_tokens=generation.num_prompt_tokens,
        num_completion_tokens=generation.num_completion_tokens,
        label_probability=generation.probability,
        label_forced=generation.label_forced,
    )


def _lay_out(status: ParseStatus, fields: Mapping, problem: str, **written: object) -> dict:
    """All fields of an answer, in their order."""
    return {
        "raw_text": written.get("raw_text", ""),
        "thought_process": fields.get("thought_process"),
        "predicted_label": fields.get("predicted_label"),
        "parse_status": str(status),
        "problem": problem,
        "finish_reason": written.get("finish_reason"),
        "num_prompt_tokens": written.get("num_prompt_tokens"),
        "num_completion_tokens": written.get("num_completion_tokens"),
        "label_probability": written.get("label_probability"),
        "label_forced": written.get("label_forced", False),
        "votes": None,
    }
