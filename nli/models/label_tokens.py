"""Where the label stands in a completion, and which two tokens it is written with.

    find_label(tokenizer, ids, '{"thought_process": "Dogs run.", "predicted_label": 1}')   -> LabelPlace(index=8, tokens=(24, 25))
    force_label(tokenizer, "[INST] …[/INST]", "Dogs run.")                                 -> ([1, 3, …, 31], (24, 25), "Dogs run.")
    thought_so_far('{"thought_process": "Dogs are animals; so')                            -> "Dogs are animals; so"

The probability of label 1 is the softmax over the logits of these two tokens, before the token at `index`.
"""

import bisect
import functools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nli.models.tokenizer import control_ids, encode_prompt
from nli.task.parsing import ParseStatus, parse_answer
from nli.task.prompts import render_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LABEL = re.compile(r'"predicted_label"\s*:\s*"?\s*([01])')
_TAIL = 24  # tokens; an answer that ends with its label has two or three after it
_THOUGHT = re.compile(r'"thought_process"\s*:\s*"')
_STRING = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class LabelPlace:
    """A label's place among the ids of a completion."""

    index: int
    """position of the label's token within the completion's ids"""
    tokens: tuple[int, int]
    """ids of label 0 and label 1 there"""


def find_label(tokenizer: "PreTrainedTokenizerBase", completion_ids: list[int], text: str) -> LabelPlace | None:
    """Where the label that `parse_answer` reads in `text` stands among the ids that were decoded to it; None where there is none or no two tokens tell it."""
    position = _find_digit(text)
    if position is None:
        return None
    pairs = label_pairs(tokenizer)
    after = len(text) - position - 1  # characters
    for index in reversed(range(max(0, len(completion_ids) - _TAIL), len(completion_ids))):
        if (
            completion_ids[index] in pairs
        ):  # mostly the label itself: from its token to the end, little has to be decoded
            tail, rest = (read_completion(tokenizer, completion_ids[start:]) for start in (index, index + 1))
            if len(rest) <= after < len(tail) and text.endswith(tail):
                return LabelPlace(index, pairs[completion_ids[index]])

    def length(count: int) -> int:
        return len(read_completion(tokenizer, completion_ids[:count]))

    index = bisect.bisect_right(range(len(completion_ids)), position, key=length) - 1
    if not length(index) <= position < length(index + 1):
        # Bytes of an unfinished character may decode to more characters than the finished one, and lead the halving astray.
        index = next(count for count in reversed(range(len(completion_ids))) if length(count) <= position)
    tokens = pairs.get(completion_ids[index])
    return None if tokens is None else LabelPlace(index, tokens)


def read_completion(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """The text of a completion's ids. Training joins prompt and completion by one space, which is not part of the answer."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).removeprefix(" ")


@functools.lru_cache(maxsize=8)
def label_pairs(tokenizer: "PreTrainedTokenizerBase") -> dict[int, tuple[int, int]]:
    """For each token that can tell a label, the ids of label 0 and label 1: {24: (24, 25), 25: (24, 25)}, and the like for tokens such as " 1" or "1}"."""
    vocabulary = tokenizer.get_vocab()
    special = control_ids(tokenizer)
    pairs = {}
    for token, index in vocabulary.items():
        if sum(character.isdigit() for character in token) == 1 and "0" in token and index not in special:
            partner = vocabulary.get(token.replace("0", "1"))
            if partner is not None and partner not in special:
                pairs[index] = pairs[partner] = (index, partner)
    return pairs


def force_label(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, thought: str, most_tokens: int | None = None
) -> tuple[list[int], tuple[int, int], str]:
    """Ids of BOS, prompt and the completion of this thought up to its label, the two label ids there, and the thought.

    The thought's end is cut off where the ids would be more than `most_tokens`. A text that looks like a control token is encoded as the text that it is.
    Raises DataError if the prompt holds a control token.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids, tokens = _encode_to_label(tokenizer, prompt, prompt_ids, thought)
    if most_tokens is not None and len(ids) > most_tokens:
        keep, drop = 0, len(thought)  # the longest beginning that fits, by halving
        while drop - keep > 1:
            middle = (keep + drop) // 2
            fits = len(_encode_to_label(tokenizer, prompt, prompt_ids, thought[:middle])[0]) <= most_tokens
            keep, drop = (middle, drop) if fits else (keep, middle)
        thought = thought[:keep]
        ids, tokens = _encode_to_label(tokenizer, prompt, prompt_ids, thought)
    return ids, tokens, thought


def thought_so_far(text: str) -> str:
    """The thought in a text that did not parse: what stands in its thought_process string as far as it goes, else the whole text."""
    start = _THOUGHT.search(text)
    if start is None:
        return _LONE_SURROGATE.sub("\ufffd", text)
    body = _ESCAPE.sub(_mend_escape, _STRING.match(text, start.end()).group())
    thought = json.loads(f'"{body}"', strict=False)
    return _LONE_SURROGATE.sub("\ufffd", thought)


def _mend_escape(found: re.Match) -> str:
    """A backslash before a character that JSON knows no escape for stands for itself."""
    return found[0] if found[1][0] in '"\\/bfnrt' or len(found[1]) == 5 else "\\" + found[0]


def _find_digit(text: str) -> int | None:
    """The label's position in the text: the digit that, turned into the other, turns the label that is read."""
    read = parse_answer(text)
    if read.status != ParseStatus.OK:
        return None
    label = read.fields["predicted_label"]
    for found in _LABEL.finditer(text):
        position = found.start(1)
        if text[position] == str(label):
            other = parse_answer(f"{text[:position]}{1 - label}{text[position + 1 :]}")
            if other.status == ParseStatus.OK and other.fields["predicted_label"] == 1 - label:
                return position
    return None


def _encode_to_label(tokenizer, prompt: str, prompt_ids: list[int], thought: str) -> tuple[list[int], tuple[int, int]]:
    zero, one = (
        _encode_completion(tokenizer, prompt, prompt_ids, render_completion(thought, label)) for label in (0, 1)
    )
    place = next(index for index, pair in enumerate(zip(zero, one, strict=False)) if pair[0] != pair[1])
    return prompt_ids + zero[:place], (zero[place], one[place])


def _encode_completion(tokenizer, prompt: str, prompt_ids: list[int], completion: str) -> list[int]:
    """The completion's ids as training encodes them, or, where a control token would stand among them or the prompt's end would change, on its own."""
    ids = [tokenizer.bos_token_id, *tokenizer.encode(f"{prompt} {completion}", add_special_tokens=False)]
    rest = ids[len(prompt_ids) :]
    if ids[: len(prompt_ids)] == prompt_ids and not control_ids(tokenizer).intersection(rest):
        return rest
    return tokenizer.encode(f" {completion}", add_special_tokens=False, split_special_tokens=True)
