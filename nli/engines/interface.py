"""The engines that answer prompts with a causal LM, behind one small interface.

    settings = EngineSettings(base, adapters=(), precision="nf4", compute_dtype="bf16", decoding=Decoding(), batch_size=0, device="cuda:0")
    engine = build_engine("transformers", settings)
    engine.submit(Request("[INST] Premise: …[/INST]")).result()
    -> Generation(text='{"thought_process": …}', finish_reason="stop", num_prompt_tokens=61, num_completion_tokens=38, problem="", probability=0.98)

`finish_reason` is "stop" when the model ended by EOS and "length" when the limit cut it. A prompt that cannot be answered becomes a Generation with a problem
and no text; the others are answered. Only what ends the engine itself is raised, out of every future, as EngineDead.
"""

import importlib.util
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from nli.runtime.errors import ModelError

Precision = Literal["nf4", "bf16", "fp8", "fp32"]
EngineName = Literal["auto", "vllm", "transformers"]
CacheType = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Request:
    """One prompt to answer, and how."""

    prompt: str
    """rendered text, without BOS"""
    adapter: str | None = None
    """folder of the adapter that answers; None: the base (or merged model) itself"""
    seed: int = 0
    """of this sample, where the temperature is above 0: same seed, same answer, whatever else is in the batch"""
    num_tokens: int | None = None
    """write exactly so many tokens, EOS ignored (benchmarks); None: until EOS or the limit"""


@dataclass(frozen=True)
class Decoding:
    """How answers are written, the same for every row of a run."""

    max_new_tokens: int = 512
    """most tokens of one answer"""
    temperature: float = 0.0
    """0: greedy"""
    no_cot: bool = False
    """no thought: the completion is an empty thought, and only its label is read"""
    force_label: bool = False
    """an answer that cannot be parsed is completed: its thought as far as it goes, then the likelier of the two label tokens"""
    label_probability: bool = True
    """read the probability of label 1"""


@dataclass(frozen=True)
class EngineSettings:
    """All that an engine needs to know when it starts."""

    base: str
    """folder or hub name"""
    adapters: tuple[str, ...]
    """all adapter folders that requests may name"""
    precision: Precision
    """of the base's weights; fp8 is for vLLM only, fp32 for transformers only"""
    compute_dtype: Literal["bf16", "fp32"]
    """of matrix products where precision is nf4; bf16 and fp8 compute in bf16, fp32 in fp32"""
    decoding: Decoding
    """how answers are written"""
    batch_size: int
    """most rows at once; 0: the engine's own choice"""
    device: str
    """the device's name for torch: "cuda:0" or "cpu", among others"""
    kv_cache_dtype: CacheType = "bf16"
    """of keys and values, and in fp8 of attention's products with them; fp8 is for vLLM only, whose scales for it are 1"""


@dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt, without special tokens. Text is None when nothing could be generated; `problem` says why."""

    text: str | None
    finish_reason: str | None
    num_prompt_tokens: int | None
    num_completion_tokens: int | None
    problem: str = ""
    probability: float | None = None
    """of label 1: softmax over the two label tokens at the label's place; None where the text has no such place"""
    label_forced: bool = False
    """the model did not write this label: `force_label` or `no_cot` did"""


class Engine(Protocol):
    """Answers requests from any thread; those submitted while others run join them."""

    description: str
    """the engine, its version and its attention: "transformers 5.23.0, sdpa" for one"""

    def submit(self, request: Request) -> Future[Generation]:
        """The answer to come. A request that breaks becomes a Generation with a problem; EngineDead is raised when the engine cannot go on."""
        ...

    def figures(self) -> dict:
        """{"load_seconds": 5.1, "compile_seconds": None, "peak_memory_gb": 31.2, "batch_size": 256, …}; batch_size after halvings, None: not known."""
        ...

    def close(self) -> None:
        """Give the memory back; no request may follow."""
        ...


def choose_engine(
    name: EngineName, precision: Precision, device: str, compute_dtype: str = "bf16", kv_cache_dtype: CacheType = "bf16"
) -> str:
    """Resolve "auto" to "vllm" or "transformers" and refuse, by ModelError, what cannot work.

    "auto" takes vLLM where it is installed, the device is a GPU and nothing is to be computed in fp32.
    """
    on_gpu, installed = device.startswith("cuda"), importlib.util.find_spec("vllm") is not None
    if name == "auto":
        in_fp32 = precision == "fp32" or (precision, compute_dtype) == ("nf4", "fp32")
        name = "vllm" if installed and on_gpu and not in_fp32 else "transformers"
    if name == "vllm" and not installed:
        raise ModelError('The engine vllm is not installed. Install the extra "gpu", or take engine transformers.')
    if name == "vllm" and not on_gpu:
        raise ModelError("The engine vllm needs a GPU. Take engine transformers on a CPU.")
    if name == "vllm" and precision == "fp32":
        raise ModelError("The precision fp32 is for engine transformers only.")
    if name == "vllm" and compute_dtype != "bf16":
        raise ModelError(
            f"Engine vllm computes in bf16, not in {compute_dtype}. Give compute_dtype bf16, or take engine transformers."
        )
    if name == "transformers" and precision == "fp8":
        raise ModelError("The precision fp8 needs engine vllm, on a GPU. Take nf4 or bf16 with engine transformers.")
    if name == "transformers" and kv_cache_dtype != "bf16":
        raise ModelError(
            f"A KV cache in {kv_cache_dtype} needs engine vllm, on a GPU. Leave kv_cache_dtype at bf16 with engine transformers."
        )
    return name


def build_engine(name: str, settings: EngineSettings) -> Engine:
    """Load the model. Raises ModelError if it cannot be loaded as the settings say."""
    if name == "vllm":
        from nli.engines.vllm.process import VLLMProcess

        return VLLMProcess(settings)
    from nli.engines.transformers.engine import TransformersEngine

    return TransformersEngine(settings)


def answer_all(engine: Engine, requests: Iterable[Request]) -> list[Generation]:
    """Answers to requests, in their order."""
    return [future.result() for future in [engine.submit(request) for request in requests]]
