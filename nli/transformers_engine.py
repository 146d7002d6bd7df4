"""Engines that answer prompts with a causal LM.

    engine = TransformersEngine(base, adapter, quantization="nf4", compute_dtype="bf16", device="cuda:0", batch_size=32, max_new_tokens=512)
    engine.generate(["[INST] Premise: …[/INST]", …])
    -> [Generation(text='{"thought_process": …}', finish_reason="stop", num_prompt_tokens=61, num_completion_tokens=38, problem=""), …]

Greedy decoding; `finish_reason` is "stop" when the model ended by EOS and "length" when the limit cut it. A prompt that cannot be encoded becomes a
Generation with a problem and no text; the others are answered.
"""

from typing import TYPE_CHECKING

from nli.engines import Generation
from nli.errors import DataError
from nli.model import ComputeDtype, Quantization, load_adapter, load_base
from nli.tokenization import encode_prompt, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine:
    """transformers' `generate` on batches of prompts of similar length, so that little is padded."""

    def __init__(
        self,
        base_model: str,
        adapter: str | None,
        *,
        quantization: Quantization,
        compute_dtype: ComputeDtype,
        device: str,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.tokenizer = load_tokenizer(base_model)
        model = load_base(base_model, quantization, compute_dtype, device)
        self.model = (load_adapter(model, adapter) if adapter else model).eval()

    def generate(self, prompts: list[str]) -> list[Generation]:
        """Answer prompts, in their order."""
        encoded: dict[int, list[int]] = {}
        generations: list[Generation | None] = [None] * len(prompts)
        for index, prompt in enumerate(prompts):
            try:
                encoded[index] = encode_prompt(self.tokenizer, prompt)
            except DataError as error:
                generations[index] = Generation(None, None, None, None, str(error))
        by_length = sorted(encoded, key=lambda index: len(encoded[index]))
        for start in range(0, len(by_length), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            for index, generation in zip(indices, self._generate_batch([encoded[index] for index in indices]), strict=True):
                generations[index] = generation
        return generations

    def _generate_batch(self, batch: list[list[int]]) -> list[Generation]:
        import torch

        with torch.inference_mode():
            return generate_greedily(self.model, self.tokenizer, batch, self.max_new_tokens)


def generate_greedily(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: list[list[int]], max_new_tokens: int) -> list[Generation]:
    """Continue each list of token ids, padded on the left, until EOS or the limit."""
    import torch

    pad, width = tokenizer.pad_token_id, max(map(len, batch))
    output = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    return [_read_completion(tokenizer, ids, completion) for ids, completion in zip(batch, output[:, width:].tolist(), strict=True)]


def _read_completion(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], completion: list[int]) -> Generation:
    eos = tokenizer.eos_token_id
    stopped = eos in completion
    ids = completion[: completion.index(eos)] if stopped else completion
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    # Training joins prompt and completion by one space, which is not part of the answer.
    return Generation(text.removeprefix(" "), "stop" if stopped else "length", len(prompt_ids), len(ids) + stopped)
