"""A small `vllm` for tests: the names, signatures and ways to fail that nli.engines.vllm.engine relies on, as vLLM 0.26 has them, around a model that is a function.

standin = install(monkeypatch, write)
write(ids, adapter)  ->  the ids that the model would write after these, EOS and all
standin.engine.seen  ->  the requests, in their order
"""

import asyncio
import enum
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field

MODULES = (
    "vllm",
    "vllm.inputs",
    "vllm.sampling_params",
    "vllm.lora",
    "vllm.lora.request",
    "vllm.engine",
    "vllm.engine.arg_utils",
)
MODULES += ("vllm.v1", "vllm.v1.engine", "vllm.v1.engine.async_llm", "vllm.v1.engine.exceptions")
MODULES += ("vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.registry")

ARGUMENTS = {
    *(
        "model",
        "config_format",
        "load_format",
        "tokenizer_mode",
        "skip_tokenizer_init",
        "generation_config",
        "dtype",
        "hf_overrides",
        "quantization",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "kv_cache_dtype",
    ),
    *(
        "cudagraph_capture_sizes",
        "gpu_memory_utilization",
        "enable_prefix_caching",
        "scheduling_policy",
        "distributed_executor_backend",
    ),
    *(
        "compilation_config",
        "worker_extension_cls",
        "disable_log_stats",
        "enable_log_requests",
        "use_tqdm_on_load",
        "device_ids",
    ),
    *("enable_lora", "max_loras", "max_cpu_loras", "max_lora_rank", "lora_target_modules"),
}


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logprob_token_ids: list[int] | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_clone: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not 0.0 <= self.temperature <= 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")

    @staticmethod
    def for_sampler_warmup() -> "SamplingParams":
        return SamplingParams(temperature=0.9)


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


class EngineGenerateError(Exception):
    """One request failed."""


class EngineDeadError(Exception):
    """The engine's process has ended."""

    def __init__(self) -> None:
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.")


class AsyncEngineArgs:
    """The arguments that the engine gives, and no others."""

    def __init__(self, **values) -> None:
        unknown = set(values) - ARGUMENTS
        if unknown:
            raise TypeError(f"unexpected arguments {unknown}")
        self.__dict__.update(values)


class LazyModel:
    """A class that the registry knows by its module and name."""

    def __init__(self, module_name: str, class_name: str) -> None:
        self.module_name, self.class_name = module_name, class_name

    def load_model_cls(self) -> type:
        return getattr(importlib.import_module(self.module_name), self.class_name)


class Registry:
    """Which class serves an architecture; this one takes any class for a model."""

    def __init__(self) -> None:
        self.models = {
            "MistralForCausalLM": LazyModel("collections", "OrderedDict"),
            "LostForCausalLM": LazyModel("collections", "Lost"),
        }

    def register_model(self, model_arch: str, model_cls: type) -> None:
        self.models[model_arch] = model_cls


class Standin:
    """What the model writes, what fails, and the engine once it is there."""

    def __init__(self, write: Callable[[list[int], str | None], list[int]]) -> None:
        self.write = write
        self.logprobs = (-3.0, -1.0)
        self.start_error: Exception | None = None
        self.lora_error: Exception | None = None
        self.engine: AsyncLLM | None = None
        self.registry = Registry()


class AsyncLLM:
    standin: Standin

    def __init__(self, arguments: AsyncEngineArgs) -> None:
        self.arguments = arguments
        self.seen: list = []
        self.loras: list = []
        self.errored = False
        self.hold = False
        self.closed = False
        self.loop = asyncio.get_running_loop()

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> "AsyncLLM":
        if cls.standin.start_error:
            raise cls.standin.start_error
        cls.standin.engine = cls(engine_args)
        return cls.standin.engine

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        if self.standin.lora_error:
            raise self.standin.lora_error
        self.loras.append(lora_request)
        return True

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None
    ) -> list:
        assert method == "report_figures"
        return [{"peak_memory_gb": 71.3, "compile_seconds": 18.2}]

    async def generate(self, prompt, sampling_params, request_id, *, lora_request=None, priority=0):
        assert asyncio.get_running_loop() is self.loop
        assert prompt["type"] == "token"
        assert sampling_params.output_kind is RequestOutputKind.FINAL_ONLY and not sampling_params.detokenize
        ids = prompt["prompt_token_ids"]
        if len(ids) >= self.arguments.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length.")
        self.seen.append(
            types.SimpleNamespace(
                ids=ids, parameters=sampling_params, lora=lora_request, priority=priority, request_id=request_id
            )
        )
        if self.errored:
            raise EngineDeadError
        while self.hold:
            await asyncio.sleep(0.01)
        written = self.standin.write(ids, lora_request.lora_name if lora_request else None)
        if isinstance(written, Exception):
            self.errored = self.errored or isinstance(written, EngineDeadError)
            raise written if isinstance(written, EngineDeadError | ValueError) else EngineGenerateError from written
        yield types.SimpleNamespace(outputs=[self._complete(written, sampling_params)], finished=True)

    def _complete(self, written: list[int], parameters: SamplingParams):
        stops = [index for index, token in enumerate(written) if token in parameters.stop_token_ids]
        ids, reason = (
            (written[: stops[0] + 1], "stop")
            if stops and stops[0] < parameters.max_tokens
            else (written[: parameters.max_tokens], "length")
        )
        logprobs = None
        if parameters.logprob_token_ids:
            logprobs = [
                {
                    token: types.SimpleNamespace(logprob=value)
                    for token, value in zip(parameters.logprob_token_ids, self.standin.logprobs, strict=True)
                }
            ]
        return types.SimpleNamespace(token_ids=ids, finish_reason=reason, logprobs=logprobs)

    def shutdown(self, timeout: float | None = None) -> None:
        self.closed = True


def tokens_input(prompt_token_ids: list[int]) -> dict:
    return {"type": "token", "prompt_token_ids": prompt_token_ids}


def make_modules(write: Callable[[list[int], str | None], list[int]]) -> dict[str, types.ModuleType]:
    """The modules by their names, with AsyncLLM.standin in front of them."""
    found = {name: types.ModuleType(name) for name in MODULES}
    found["vllm"].__version__ = "0.26.0"
    found["vllm.inputs"].tokens_input = tokens_input
    found["vllm.sampling_params"].SamplingParams, found["vllm.sampling_params"].RequestOutputKind = (
        SamplingParams,
        RequestOutputKind,
    )
    found["vllm.lora.request"].LoRARequest = LoRARequest
    found["vllm.engine.arg_utils"].AsyncEngineArgs = AsyncEngineArgs
    found["vllm.v1.engine.exceptions"].EngineDeadError, found["vllm.v1.engine.exceptions"].EngineGenerateError = (
        EngineDeadError,
        EngineGenerateError,
    )
    AsyncLLM.standin = Standin(write)
    found["vllm.v1.engine.async_llm"].AsyncLLM = AsyncLLM
    found["vllm.model_executor.models.registry"].ModelRegistry = AsyncLLM.standin.registry
    return found


def install(monkeypatch, write: Callable[[list[int], str | None], list[int]]) -> Standin:
    """Have `import vllm` find this module's names for the time of a test."""
    for name, module in make_modules(write).items():
        monkeypatch.setitem(sys.modules, name, module)
    return AsyncLLM.standin
