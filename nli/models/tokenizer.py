"""From prompt and completion to token ids: one function for training and inference.

    encode_prompt(tokenizer, "[INST] Premise: … [/INST]")          -> [1, 3, 5422, …, 4]             BOS, then the prompt
    encode_example(tokenizer, "[INST] …[/INST]", '{"thought…')     -> TokenisedExample(input_ids=[1, 3, …, 4, 1018, …, 2], labels=[-100, …, 1018, …, 2])

With Mistral's v3 tokenizer these are the ids of its own instruct encoding. BOS and EOS are added here as ids and nowhere else. The loss covers the
completion and its EOS.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nli.runtime.errors import DataError, ModelError
from nli.task.prompts import render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # what torch's cross-entropy passes over


@dataclass(frozen=True)
class TokenisedExample:
    """Token ids of one training row and its labels, of equal length; labels are IGNORED_LABEL over the prompt."""

    input_ids: list[int]
    labels: list[int]


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub name, with a pad token that is not EOS. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, mistral_format=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no tokenizer can be loaded from there ({first_line(error)}).") from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: the tokenizer has no BOS or no EOS token; the student's prompt needs both.")
    tokenizer.pad_token = choose_pad_token(tokenizer)
    return tokenizer


def choose_pad_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's own pad token if it is not EOS, else a reserved token of its vocabulary, so that embeddings keep their size.

    Mistral's v3 vocabulary holds reserved `[control_N]` tokens. Raises ModelError where there is no such token.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer.pad_token
    vocabulary = tokenizer.get_vocab()
    reserved = sorted(
        (index, token)
        for token, index in vocabulary.items()
        if token.startswith(("[control_", "<|reserved_special_token_", "<unused"))
    )
    if reserved:
        return reserved[-1][1]
    if tokenizer.unk_token is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        return tokenizer.unk_token
    raise ModelError(
        "The tokenizer has no token that can pad without being EOS; a model trained with such padding does not learn to stop."
    )


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """BOS and the prompt's ids. Raises DataError if the pair's text holds a control token, which would change the prompt's meaning."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    special = control_ids(tokenizer)
    framed = len(ids) > 1 and ids[0] in special and ids[-1] in special
    _refuse_special(tokenizer, ids[1:-1] if framed else ids, special)
    return [tokenizer.bos_token_id, *ids]


def check_prompt_ids(base: str, adapter: str | None, template: str) -> None:
    """Raise DataError if a prompt template cannot be encoded, ModelError if an adapter was trained with other ids for it than the base's tokenizer gives.

    At inference the base's tokenizer encodes for all adapters. One that was trained elsewhere brings a tokenizer of its own, mostly the base's with a `[PAD]`
    token, which no prompt holds; then its ids are those of its training. Any other difference shows here.
    """
    prompt = render_prompt(template, "Two dogs, a cat & 3 herons\nran home.", "An animal moved; it's true.")
    ids = encode_prompt(load_tokenizer(base), prompt)
    if adapter is None or not any((Path(adapter) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    if encode_prompt(load_tokenizer(adapter), prompt) != ids:
        cure = "Give --base-model a copy of the base with the adapter's tokenizer."
        raise ModelError(f"{adapter}: its tokenizer encodes the prompt otherwise than the one of {base}. {cure}")


def encode_example(tokenizer: "PreTrainedTokenizerBase", prompt: str, completion: str) -> TokenisedExample:
    """BOS, prompt, completion and EOS, with the prompt masked in the labels.

    Prompt and completion are encoded as one text, joined by a space, and the prompt's part must equal `encode_prompt`; raises DataError if a token spans both.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    ids = [
        tokenizer.bos_token_id,
        *tokenizer.encode(f"{prompt} {completion}", add_special_tokens=False),
        tokenizer.eos_token_id,
    ]
    if ids[: len(prompt_ids)] != prompt_ids:
        raise DataError(
            "the tokenizer joins the prompt's end and the completion's start in one token, so that no mask can part them"
        )
    _refuse_special(tokenizer, ids[len(prompt_ids) : -1], control_ids(tokenizer))
    labels = [IGNORED_LABEL] * len(prompt_ids) + ids[len(prompt_ids) :]
    return TokenisedExample(ids, labels)


@functools.lru_cache(maxsize=8)  # a vocabulary of control tokens takes longer to list than a row to encode
def control_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of the tokens that are no text: BOS, EOS, `[INST]` and the like."""
    return set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def _refuse_special(tokenizer: "PreTrainedTokenizerBase", ids: list[int], special: set[int]) -> None:
    found = next((index for index in ids if index in special), None)
    if found is not None:
        raise DataError(
            f"the text holds {tokenizer.convert_ids_to_tokens(found)!r}, a control token of the model; write it differently"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for use inside another message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
