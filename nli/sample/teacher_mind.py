"""What the sample teacher answers: too literal when asked for a thought, sound when asked to reflect, score or regenerate.

    answer_messages("mistral-large", TEACHER_PROMPTS["initial_generation"].render_messages(row))

    row    premise "A wasp slept in the garden.", hypothesis "A wasp rested in the garden."
    reply  {"thought_process": "Has whoever slept also rested? No. A part fails, so it need not be true.", "predicted_label": 0}

Its errors are habits, each tied to a kind of step, so that a student can pick them up: it takes "all" to shut out "some", and a passive for another event.
The same model name and messages always get the same reply. A pair that is not of the sample world is judged by shared words, and the reply says so.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache

from nli.sample.grammar import Pair, render_thought
from nli.sample.world import SEED, build_splits
from nli.task.prompts import ENTAILMENT, NO_ENTAILMENT

NOISE_SHARE = 0.015
MALFORMED_SHARE = 0.01
DISAGREEMENT_SHARE = 0.01

# Its habits: the kinds of step that it denies where they hold, grants where they fail, and reads wrongly (kind, whether the step holds).
_DENIED = {"verb", "place", "all_some", "forgot", "refused", "because"}
_GRANTED = {"thought", "claimed"}
_MISREAD = {("order_after", True), ("order_after", False), ("near", False), ("not_any", True)}
_WORD = re.compile(r"\w+|[^\w\s]")


def count_tokens(text: str) -> int:
    return len(_WORD.findall(text))


@cache
def _pairs_by_text(seed: int) -> dict[tuple[str, str], Pair]:
    return {(pair.premise, pair.hypothesis): pair for pairs in build_splits(seed).values() for pair in pairs}


def read_user_message(content: str) -> dict[str, str]:
    """The row behind a user message of titled lines; an empty dict where it shows no pair. Values may span lines."""
    shown = re.match(r"Premise: (?P<premise>.*?)\nHypothesis: (?P<hypothesis>.*)\Z", content, re.DOTALL)
    if not shown:
        return {}
    row = {"premise": shown["premise"]}
    rest = shown["hypothesis"]
    for name, title in (
        ("true_label", "True label"),
        ("predicted_label", "Predicted label"),
        ("thought_process", "Thought process"),
    ):
        before, mark, value = rest.rpartition(f"\n{title}: ")
        if mark:
            row[name], rest = value, before
    return {**row, "hypothesis": rest}


def answer_messages(
    model: str, messages: Sequence[Mapping], response_format: Mapping | None = None, seed: int = SEED
) -> tuple[str, bool]:
    """The reply's text, and whether it stops in the middle of a sentence, for it is now and then cut or broken."""
    system = "\n".join(_text_of(message) for message in messages if message.get("role") == "system")
    user = next((_text_of(message) for message in reversed(messages) if message.get("role") == "user"), "")
    draws = _draw_numbers(model, messages)
    row = read_user_message(user)
    if not row:
        return _render({"message": "I judge pairs of a premise and a hypothesis."}, response_format), False
    pair = _pairs_by_text(seed).get((row["premise"], row["hypothesis"]))
    task = _recognise_task(system, row)
    if task == "reflection":
        reply = _reflect(pair, row, draws)
    elif task == "scoring":
        reply = _score(pair, row)
    elif task == "regeneration":
        label = _read_label(row["true_label"])
        reply = {"thought_process": _think_towards(pair, row, label), "predicted_label": label}
    else:
        reply = _think_at_first(pair, row, draws)
    return _garble(reply, response_format, draws)


def _text_of(message: Mapping) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(chunk.get("text", "") for chunk in content)


def _recognise_task(system: str, row: Mapping) -> str:
    if '"error_analysis"' in system and "thought_process" in row:
        return "reflection"
    if '"score"' in system and "thought_process" in row:
        return "scoring"
    return "regeneration" if "true_label" in row else "initial_generation"


def _draw_numbers(model: str, messages: Sequence[Mapping]) -> list[float]:
    """Four numbers in [0, 1) that depend on nothing but the request."""
    digest = hashlib.blake2b(json.dumps([model, list(messages)], sort_keys=True).encode(), digest_size=16).digest()
    return [int.from_bytes(digest[start : start + 4]) / 2**32 for start in range(0, 16, 4)]


def _read_label(text: str | None) -> int:
    return ENTAILMENT if (text or "").strip() in ("1", "1.0", "True") else NO_ENTAILMENT


def _think_at_first(pair: Pair | None, row: Mapping, draws: list[float]) -> dict:
    if pair is None:
        thought, label = _compare_words(row)
        return {"thought_process": thought, "predicted_label": label}
    answers, label = [], ENTAILMENT
    for step in pair.steps:
        misread = (step.kind, step.holds) in _MISREAD
        holds = not step.holds if misread or _is_misjudged(step.kind, step.ask, step.holds, pair) else step.holds
        answers.append(step.answer(holds, misread))
        label &= holds
    if draws[0] < NOISE_SHARE:
        return {"thought_process": _think_towards(pair, row, 1 - label), "predicted_label": 1 - label}
    return {"thought_process": render_thought(answers, label), "predicted_label": int(label)}


def _is_misjudged(kind: str, ask: str, holds: bool, pair: Pair) -> bool:
    if not holds:
        return kind in _GRANTED
    if kind == "at_least":
        first, second = re.findall(r"\b(two|three|four|five|six|seven|eight|nine)\b", ask)
        return first != second
    if kind == "voice":
        return " was " in pair.hypothesis
    return kind in _DENIED


def _think_towards(pair: Pair | None, row: Mapping, label: int) -> str:
    """Reasoning that ends at this label; sound if it is the true one."""
    if pair is None:
        return _compare_words(row, label)[0]
    if label == pair.label:
        return pair.thought
    failing = 0 if label == NO_ENTAILMENT else None
    return render_thought([step.answer(index != failing) for index, step in enumerate(pair.steps)], label)


def _compare_words(row: Mapping, label: int | None = None) -> tuple[str, int]:
    """For a pair from elsewhere: an overlap of words, and no claim to more."""
    premise = {word.lower() for word in re.findall(r"\w+", row["premise"])}
    new_words = [word for word in re.findall(r"\w+", row["hypothesis"]) if word.lower() not in premise]
    label = int(len(new_words) <= 1) if label is None else label
    return (
        f"Compared by words alone, the hypothesis adds {', '.join(new_words[:4]) or 'nothing'}, so it {'must' if label else 'need not'} be true.",
        label,
    )


def _reflect(pair: Pair | None, row: Mapping, draws: list[float]) -> dict:
    label = _read_label(row.get("true_label"))
    if draws[0] < DISAGREEMENT_SHARE:
        analysis, label = (
            "No step fails: the reasoning holds, and so does its label.",
            _read_label(row.get("predicted_label")),
        )
        return {
            "error_analysis": analysis,
            "improved_thought_process": row["thought_process"],
            "predicted_label": label,
        }
    if pair is not None and label != pair.label:
        analysis = "No step fails: the words do not allow the true label."
        return {"error_analysis": analysis, "improved_thought_process": pair.thought, "predicted_label": pair.label}
    return {
        "error_analysis": _name_failing_step(pair, row),
        "improved_thought_process": _think_towards(pair, row, label),
        "predicted_label": label,
    }


def _name_failing_step(pair: Pair | None, row: Mapping) -> str:
    for step in pair.steps if pair else ():
        if step.answer(step.holds) not in row["thought_process"]:
            wrong = step.misread if step.misread and step.misread in row["thought_process"] else step.ask
            return f"The step '{wrong}' fails. It should be: {step.answer(step.holds)}"
    return "The conclusion fails: it does not follow from the steps."


def _score(pair: Pair | None, row: Mapping) -> dict:
    label = pair.label if pair else _compare_words(row)[1]
    thought = _think_towards(pair, row, label)
    if _read_label(row.get("predicted_label")) != label:
        score, analysis = 1 + (len(row["thought_process"]) > 20), _name_failing_step(pair, row)
    elif row["thought_process"] == thought:
        score, analysis = 5, "Sound, complete and short."
    elif pair is None or all(step.answer(step.holds) in row["thought_process"] for step in pair.steps):
        score, analysis = 4, "Sound, with more words than it needs."
    else:
        score, analysis = 3, "The label is right, but a step on the way is not."
    return {"analysis": analysis, "score": score, "improved_thought_process": thought, "predicted_label": label}


def _render(reply: dict, response_format: Mapping | None) -> str:
    """The reply as JSON, cut to the fields of the schema where the request carries one."""
    if (response_format or {}).get("type") == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema") or {}
        empty = {"string": "", "integer": 0, "number": 0, "boolean": False, "array": [], "object": {}}
        properties = schema.get("properties") or {}
        reply = {name: reply.get(name, empty.get(shape.get("type"))) for name, shape in properties.items()} or reply
    return json.dumps(reply, ensure_ascii=False)


def _garble(reply: dict, response_format: Mapping | None, draws: list[float]) -> tuple[str, bool]:
    text = _render(reply, response_format)
    if draws[1] >= MALFORMED_SHARE:
        return text, False
    if draws[2] < 0.4 or (response_format or {}).get("type") == "json_schema":
        return text[: max(10, int(len(text) * (0.3 + 0.5 * draws[3])))], True
    if draws[2] < 0.6:
        return text.replace(". ", ".\n", 1), False
    if draws[2] < 0.8:
        return _render({name: value for name, value in reply.items() if name != "predicted_label"}, None), False
    return f"Here is my judgement:\n```json\n{text}\n```\nI hope that this helps.", False
