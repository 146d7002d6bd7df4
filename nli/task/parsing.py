"""From a model's raw text to named fields, or to the reason why not. One parser serves the teacher, the base and every adapter.

In:   'Sure! {"thought_process": "Step 1: dogs are animals.", "predicted_label": "1"} Hope this helps.'
Out:  Parsed(status=ParseStatus.OK, fields={'thought_process': 'Step 1: dogs are animals.', 'predicted_label': 1}, problem='')

Only the model's own text is parsed, never the prompt. The first JSON object that holds every expected field is the answer, whatever stands around it;
there is no search for words like "entailment" and no default label. Text comes back as the model wrote it.
"""

import json
import re
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ValidationError

from nli.task.prompts import ThoughtReply


class ParseStatus(StrEnum):
    """How the reading of one answer ended."""

    OK = "ok"
    NO_JSON = "no_json"  # no opening brace anywhere
    BAD_JSON = "bad_json"  # something like an object, but not JSON
    MISSING_FIELD = (
        "missing_field"  # an object without an expected field, or with something else than text where text belongs
    )
    BAD_LABEL = (
        "bad_label"  # the label (or score) is not one of the legal values, or is given twice with different values
    )
    TRUNCATED = "truncated"  # the text ends before the object does
    REQUEST_FAILED = "request_failed"  # there is no text: the call or the generation failed


@dataclass(frozen=True)
class Parsed:
    """`fields` holds the reply's fields when `status` is OK and is None otherwise; `problem` says in words what was wrong."""

    status: ParseStatus
    fields: dict | None = None
    problem: str = ""


def parse_answer(text: str, finish_reason: str | None = None) -> Parsed:
    """Parse an answer with `thought_process` and `predicted_label`. `finish_reason` is "length" when the token limit cut the text."""
    return parse_reply(text, ThoughtReply, finish_reason)


def parse_reply(text: str, reply: type[BaseModel], finish_reason: str | None = None) -> Parsed:
    """Parse `text` into the fields of `reply`: strings unchanged, integers as int (0, "0" and 0.0 alike), extra fields ignored."""
    wanted = reply.model_fields
    seen_object = None
    cut = finish_reason == "length"
    found_brace = "{" in text
    whole = 0  # end of the last object that was read whole: a brace in one of its strings tells nothing about the text's end
    for start in _OBJECT_START.finditer(
        text
    ):  # an answer may be wrapped in an outer object, so inner ones are tried too
        try:
            value, end = _DECODER.raw_decode(text, start.start())
        except json.JSONDecodeError as error:
            cut = cut or (start.start() >= whole and _is_at_end(error))
        except RecursionError:
            break
        else:
            if all(name in value for name in wanted):
                return _check_fields(value, reply)
            seen_object = value if seen_object is None else seen_object
            whole = max(whole, end)
    if cut and found_brace:
        return Parsed(ParseStatus.TRUNCATED, problem="the text ends before its JSON object does")
    if seen_object is not None:
        missing = [name for name in wanted if name not in seen_object]
        return Parsed(ParseStatus.MISSING_FIELD, problem=f"no field {', '.join(missing)}")
    if found_brace:
        return Parsed(ParseStatus.BAD_JSON, problem="an opening brace, but no valid JSON object")
    if cut:
        return Parsed(ParseStatus.TRUNCATED, problem="the text ends before any JSON object")
    return Parsed(ParseStatus.NO_JSON, problem="no JSON object in the text" if text.strip() else "the text is empty")


class _Conflict:
    """Stands for a key that an object gives twice with different values."""


def _merge_pairs(pairs: list[tuple[str, object]]) -> dict:
    merged: dict = {}
    for key, value in pairs:
        merged[key] = _Conflict() if key in merged and merged[key] != value else value
    return merged


def _read_integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)  # int() refuses numbers of thousands of digits


# strict=False lets raw newlines and tabs stand inside strings, as models write them.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_merge_pairs, parse_int=_read_integer)
_OBJECT_START = re.compile(r'\{(?=\s*(?:["}]|\Z))')
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_at_end(error: json.JSONDecodeError) -> bool:
    """Whether the text ended too early for the decoder: inside a string, or before or inside another value or an escape."""
    return (
        error.msg.startswith("Unterminated string")
        or re.fullmatch(r"[\w.+-]{0,5}\s*", error.doc[error.pos :]) is not None
    )


def _check_fields(value: dict, reply: type[BaseModel]) -> Parsed:
    fields = {}
    for name, info in reply.model_fields.items():
        given = value[name]
        if info.annotation is int:
            number = _as_integer(given)
            if number is None:
                return Parsed(ParseStatus.BAD_LABEL, problem=f"{name} is {_show(given)}")
            fields[name] = number
        elif not isinstance(given, str):
            return Parsed(ParseStatus.MISSING_FIELD, problem=f"{name} is {_show(given)}, not text")
        elif _LONE_SURROGATE.search(given):
            return Parsed(ParseStatus.BAD_JSON, problem=f"{name} holds half of a surrogate pair, which is no character")
        else:
            fields[name] = given
    try:
        reply.model_validate(fields)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        return Parsed(ParseStatus.BAD_LABEL, problem=f"{name} is {_show(fields[name])}")
    return Parsed(ParseStatus.OK, fields)


def _as_integer(value: object) -> int | None:
    """0, 0.0, "0" and " 0 " are 0; true, 0.5, null and words are nothing."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value in range(10) else None


def _show(value: object) -> str:
    if isinstance(value, _Conflict):
        return "given twice with different values"
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
