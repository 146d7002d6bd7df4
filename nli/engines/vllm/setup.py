"""With what arguments vLLM starts: for a fixed set of prompts that shall be done soon, not for a server's latency.

set_environment()
build_arguments(settings, adapters=(), longest=32768, memory_share=0.9)  ->  {"model": "mistralai/Mistral-7B-v0.3", "dtype": "bfloat16", "max_num_seqs": 2048}
"""

import ctypes
import logging
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nli.engines.interface import EngineSettings
from nli.engines.vllm.adapters import AdapterShape, smallest_rank
from nli.runtime.errors import ModelError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

OWNER = "NLI_ENGINE_OWNER"  # environment variable: the process that vLLM's engine process ends with
MOST_ROWS = 2048  # at once, where the KV cache has room: in fp8 the rows take 0.88 of what they take with 1,024, in bf16 about the same
MOST_TOKENS = 16384  # of one step's prompts and answers together
USUAL_LENGTH = 4096  # of prompt and answer; a model's own limit may be far above what a row can need
PROMPT_ROOM = 2048  # left for the prompt where answers may be longer than that
MOST_LORAS = 8  # in GPU memory at once; others wait in the host's memory
# Of the GPU's memory, weights, activations and KV cache together. What is left holds the CUDA context and what fragments, which vLLM does not count.
MEMORY_SHARE = 0.90
SPARE_MIB = 2048  # left free where other processes use the GPU too
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED of the CUDA driver API

QUANTIZATION = {"bf16": None, "fp8": "fp8", "nf4": "bitsandbytes"}

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it serves top-k and top-p, which are never asked for, and compiles itself at the start
}


def set_environment() -> None:
    """Set what vLLM reads when it is imported, where the user has not."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def choose_start() -> None:
    """Have vLLM start its engine's process by a fork, unless CUDA is in use here, which no fork can take along. vLLM asks torch alone whether it is."""
    if is_cuda_started():
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def is_cuda_started() -> bool:
    """Whether anything in this process has started CUDA: until then its driver refuses to count devices."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED


def register_classes(architectures: Iterable[str]) -> None:
    """Give vLLM the classes of these architectures; else it starts a process that imports all of vLLM once more, only to look at them.

    The engine's process needs them in any case, and gets them by the fork.
    """
    try:
        from vllm.model_executor.models.registry import ModelRegistry

        for name in architectures:
            known = ModelRegistry.models.get(name)
            if hasattr(known, "module_name"):  # known by name only
                ModelRegistry.register_model(name, known.load_model_cls())
    except Exception as error:  # then vLLM looks in its own way, and says what is wrong if anything is
        logging.getLogger(__name__).debug("%s: %s", type(error).__name__, error)


def warm_up_with(parameters: "SamplingParams") -> None:
    """Have vLLM warm up with these parameters, not with every feature of its sampler: each has kernels of its own, compiled at the start.

    The engine's process knows it by the fork.
    """
    from vllm.sampling_params import SamplingParams

    SamplingParams.for_sampler_warmup = staticmethod(lambda: parameters)


def build_arguments(
    settings: EngineSettings, adapters: Sequence[AdapterShape], longest: int, memory_share: float
) -> dict:
    """Arguments of vLLM's AsyncEngineArgs. `longest` is the model's own limit of tokens. Raises ModelError for what vLLM cannot do."""
    if settings.precision not in QUANTIZATION:
        raise ModelError(f"The precision {settings.precision} is not for engine vllm. Take engine transformers.")
    if settings.compute_dtype != "bf16":
        raise ModelError(
            f"Engine vllm computes in bf16, not in {settings.compute_dtype}. Give compute_dtype bf16, or take engine transformers."
        )
    decoding = settings.decoding
    length = min(longest, max(USUAL_LENGTH, PROMPT_ROOM + decoding.max_new_tokens))
    rows = settings.batch_size or MOST_ROWS
    reads_labels = decoding.label_probability or decoding.force_label
    arguments = {
        "model": settings.base,
        # Mistral's folders on the hub hold the model twice; this takes the files that training takes.
        "config_format": "hf",
        "load_format": "bitsandbytes" if settings.precision == "nf4" else "hf",
        "tokenizer_mode": "hf",
        "skip_tokenizer_init": True,  # rows come and go as ids
        "generation_config": "vllm",  # no sampling parameters or stop tokens from the model's folder: a request has all of them
        "dtype": "bfloat16",
        "hf_overrides": {
            "head_dtype": "float32"
        },  # logits in fp32: in bf16 they are coarse enough to move a probability by 0.03
        "quantization": QUANTIZATION[settings.precision],
        "kv_cache_dtype": "auto" if settings.kv_cache_dtype == "bf16" else settings.kv_cache_dtype,
        "max_model_len": length,
        "max_num_seqs": rows,
        "max_num_batched_tokens": max(rows, min(MOST_TOKENS, rows * length)),
        # Not compiled: that takes 40 s, and at these batch sizes saves 3 % of the rows' time in fp8 and nothing in bf16. Graphs where every row writes one
        # token: one for mixed steps too ("full") is captured as if prompts had one token, and answers came out wrong.
        "compilation_config": {"mode": "none", "cudagraph_mode": "full_decode_only"},
        "cudagraph_capture_sizes": capture_sizes(rows),
        "gpu_memory_utilization": memory_share,
        "enable_prefix_caching": (reads_labels and not decoding.no_cot)
        or decoding.temperature > 0,  # second passes over a row, samples of one prompt
        "scheduling_policy": "priority",  # a row whose text is done reads its label before new rows start, while its blocks are in the cache
        "distributed_executor_backend": "uni",  # one GPU: the engine's process is the worker; inside a Ray actor too
        "worker_extension_cls": "nli.engines.vllm.worker.WorkerExtension",
        "disable_log_stats": True,
        "enable_log_requests": False,
        "use_tqdm_on_load": False,
    }
    index = settings.device.partition(":")[2]
    if index not in ("", "0"):
        arguments["device_ids"] = [int(index)]
    if adapters:
        arguments |= {
            "enable_lora": True,
            "max_loras": min(len(adapters), MOST_LORAS),
            "max_cpu_loras": len(adapters),
            "max_lora_rank": smallest_rank(adapter.rank for adapter in adapters),
            # Without this every linear layer gets LoRA's kernels, those that no adapter changes too.
            "lora_target_modules": sorted({module for adapter in adapters for module in adapter.modules}),
        }
    return arguments


def capture_sizes(rows: int) -> list[int]:
    """Batch sizes that get a CUDA graph of their own: all steps up to `rows` run in one, and the padding to the next stays below a fifth from 64 on.

    40 sizes for 2,048 rows: fewer than the 51 that vLLM would capture up to 512, so that the start is no slower.
    """
    steps = [1, 2, 4, 8, *range(16, 128, 16), *range(128, 512, 32), *range(512, 1024, 64), *range(1024, rows, 128)]
    return [size for size in steps if size < rows] + [rows]


def share_of_memory(device: str) -> float:
    """The share of the GPU's memory to take: MEMORY_SHARE, or what other processes leave. Raises ModelError if that is next to nothing."""
    found = read_gpu_memory(device)
    if found is None:
        return MEMORY_SHARE
    total, used = found
    free = (total - used - SPARE_MIB) / total
    if free < 0.05:
        cure = "End the process that uses it, or take another GPU."
        raise ModelError(
            f"The GPU has {total - used:,} of {total:,} MiB free, too little to start an engine on. {cure}"
        )
    return min(MEMORY_SHARE, int(free * 100) / 100)


def read_gpu_memory(device: str) -> tuple[int, int] | None:
    """MiB that a GPU has and that are used, by the driver's own tool, which needs no CUDA context here; None where it cannot tell."""
    if not shutil.which("nvidia-smi"):
        return None
    index = int(device.partition(":")[2] or 0)
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry]
    name = visible[index] if index < len(visible) else str(index)
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.used", "--format=csv,noheader,nounits", "-i", name]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        total, used = found.stdout.strip().splitlines()[0].split(",")
        return int(total), int(used)
    except (IndexError, ValueError, OSError, subprocess.TimeoutExpired):
        return None
