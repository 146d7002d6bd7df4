"""One row's way through an engine that decodes by itself: from a request to its ids, from logits to tokens, from tokens to a Generation.

row = admit(tokenizer, Request("[INST] …[/INST]"), Future(), Decoding(), longest=32768)     row.ids = [1, 3, …, 4]
tokens, margins = choose_tokens(logits, partners, temperature=0.0, draws=None)
finish(tokenizer, row, decoding)                                                            Generation(text='{"thought_process": …}', …)
-> None where the row lacks only its label now: row.label_tokens are the two to choose from, after row.ids
"""

import math
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from nli.engines.interface import Decoding, Generation, Request
from nli.models.label_tokens import find_label, force_label, label_pairs, read_completion, thought_so_far
from nli.models.tokenizer import encode_prompt
from nli.runtime.errors import DataError
from nli.task.parsing import ParseStatus, parse_answer
from nli.task.prompts import render_completion

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

FRAME_TOKENS = 64
"""more than a completion without its thought has"""

NOT_FINITE = "the model's logits are not finite numbers"


@dataclass(eq=False)
class Row:
    """A request on its way: its prompt's ids, and what was written so far."""

    request: Request
    future: Future
    ids: list[int]
    """what is read: the prompt, or where only the label is lacking all that stands before it"""
    most: int
    """tokens that it may write"""
    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """by how much each token's logit is above its partner's, where it can tell a label; NaN where logits are not finite"""
    label_tokens: tuple[int, int] | None = None
    thought: str = ""
    written: Generation | None = None
    """what was written before the label was forced"""
    series: "object | None" = None
    """the row's own numbers between 0 and 1, one for each token"""

    def add(self, token: int, margin: float, eos: int) -> bool:
        """Add a token; whether the row has ended by it."""
        self.tokens.append(token)
        self.margins.append(margin)
        return len(self.tokens) >= self.most or math.isnan(margin) or (token == eos and self.request.num_tokens is None)

    def restart(self) -> "Row":
        """Forget what was written; the same will be written again."""
        self.tokens, self.margins = [], []
        return self


def admit(
    tokenizer: "PreTrainedTokenizerBase", request: Request, future: Future, decoding: Decoding, longest: int | None
) -> Row:
    """The row of a request. Raises DataError if its prompt cannot be encoded, or is too long for a model of `longest` positions."""
    import numpy as np

    ids = encode_prompt(tokenizer, request.prompt)
    most = request.num_tokens or decoding.max_new_tokens
    row = Row(request, future, ids, most if longest is None else min(most, longest - len(ids)))
    if decoding.no_cot:
        ask_label(tokenizer, row, "", Generation(None, "stop", len(ids), 1), longest)
        needed = len(row.ids)
    elif decoding.force_label and longest is not None and longest - len(ids) < FRAME_TOKENS:
        needed = len(force_label(tokenizer, request.prompt, "")[0])
    else:
        needed = len(ids) + 1
    if longest is not None and needed > longest:
        raise DataError(
            f"the prompt has {len(ids)} tokens, which leaves no room for an answer within the model's {longest} positions"
        )
    if decoding.temperature:
        row.series = np.random.Generator(np.random.Philox(key=request.seed % 2**64)).random(row.most)
    return row


def take_longest(rows: list[Row], most_rows: int, most_tokens: int) -> list[Row]:
    """Take the last of rows that are sorted by length, as many as fit."""
    count = max(1, min(most_rows, most_tokens // len(rows[-1].ids), len(rows)))
    popped = rows[-count:]
    del rows[-count:]
    return popped


def draw(rows: list[Row], steps: int, device) -> "list[torch.Tensor | None]":
    """For each of the next steps a number for each row; None where nothing is left to chance."""
    if rows[0].series is None:
        return [None] * steps
    import numpy as np
    import torch

    numbers = [row.series.take(range(len(row.tokens), len(row.tokens) + steps), mode="wrap") for row in rows]
    return list(torch.from_numpy(np.stack(numbers, axis=1)).to(device))


def choose_tokens(
    logits: "torch.Tensor", partners: "torch.Tensor", temperature: float, draws: "torch.Tensor | None"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The next token of each row, the likeliest or the one that its drawn number falls on, and its margin."""
    best, tokens = logits.max(dim=-1)
    if draws is not None:
        # The same number falls on the same token whatever stands beside the row.
        shares = (logits / temperature).softmax(dim=-1).double().cumsum(dim=-1)
        tokens = (shares <= draws[:, None] * shares[:, -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    margins = logits.gather(1, tokens[:, None]) - logits.gather(1, partners[tokens][:, None])
    return tokens, margins[:, 0].masked_fill(~best.isfinite(), float("nan"))


def list_partners(tokenizer: "PreTrainedTokenizerBase", num_logits: int, device) -> "torch.Tensor":
    """For each token that can tell a label the one that tells the other, for all others themselves."""
    import torch

    partners = list(range(num_logits))
    for index, (zero, one) in label_pairs(tokenizer).items():
        if max(zero, one) < num_logits:
            partners[index] = zero + one - index
    return torch.tensor(partners, device=device)


def finish(
    tokenizer: "PreTrainedTokenizerBase", row: Row, decoding: Decoding, longest: int | None
) -> Generation | None:
    """What a row that has ended comes to; None where its label has to be forced."""
    if math.isnan(row.margins[-1]):
        return fail(row, NOT_FINITE)
    stopped = row.request.num_tokens is None and row.tokens[-1] == tokenizer.eos_token_id
    ids = row.tokens[:-1] if stopped else row.tokens
    text = read_completion(tokenizer, ids)
    generation = Generation(text, "stop" if stopped else "length", len(row.ids), len(row.tokens))
    if decoding.force_label and parse_answer(text, generation.finish_reason).status != ParseStatus.OK:
        return ask_label(tokenizer, row, thought_so_far(text), generation, longest)
    if decoding.label_probability and (place := find_label(tokenizer, ids, text)):
        margin = row.margins[place.index]
        generation = replace(
            generation, probability=_sigmoid(margin if ids[place.index] == place.tokens[1] else -margin)
        )
    return generation


def ask_label(
    tokenizer: "PreTrainedTokenizerBase", row: Row, thought: str, written: Generation, longest: int | None
) -> None:
    """Turn a row into one that lacks only its label."""
    row.ids, row.label_tokens, thought = force_label(tokenizer, row.request.prompt, thought, longest)
    row.thought, row.written = thought, written


def finish_label(row: Row, margin: float, decoding: Decoding) -> Generation:
    """What a row that lacked only its label comes to; `margin` is by how much label 1's logit is above label 0's."""
    if math.isnan(margin):
        return fail(row, NOT_FINITE)
    probability = _sigmoid(margin) if decoding.label_probability else None
    return replace(
        row.written, text=render_completion(row.thought, int(margin > 0)), probability=probability, label_forced=True
    )


def fail(row: Row, problem: str) -> Generation:
    """A row that cannot be answered."""
    return Generation(None, None, row.written.num_prompt_tokens if row.written else len(row.ids), None, problem)


def _sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin)) if margin >= 0 else 1 - 1 / (1 + math.exp(margin))
