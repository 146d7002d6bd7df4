"""How much GPU memory training takes, and the micro-batch and recompute that fit.

shape = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=32768, tied=False)
estimate(Workload(shape, "nf4", adapter_parameters=27_262_976), tokens=12_000).total / GIB   ->  peak of torch.cuda.max_memory_allocated, in GiB
choose(workload, limit=80 * GIB, longest=512, step_tokens=24_000)   ->  Choice(micro_batch_tokens=…, recomputed_layers=0, estimate=…)

The form is counted from the code of `nli.training.kernels` and `nli.training.trainer`; its two coefficients were fitted on two measured settings (docs/TRAINING.md).
"""

import math
from dataclasses import dataclass
from typing import Literal

GIB = 2**30
# Fitted: what each kept activation byte takes in truth, and what is there at any size (loss tile, dequantised matrices, buffers of the libraries).
ACTIVATION_FACTOR = 1.007
CONSTANT_BYTES = 0.17 * GIB
MARGIN = 0.92  # of the limit is planned for: the allocator's gaps and the CUDA context take the rest
LEAST_TOKENS = 2048  # a micro-batch below this pays more for dequantising than recompute would
MOST_TOKENS = 32768  # above this a larger micro-batch gains nothing
LONGEST_STEP = 1.2  # of the mean step's tokens: a step that is longer than the mean one need not be cut in two for it


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config) -> "Shape":
        """From a transformers config."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of one decoder layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def adapter_parameters(self, rank: int, target_modules: tuple[str, ...]) -> int:
        """Weights of LoRA adapters on the named layers; names that are none of `linear_sizes` count nothing."""
        sizes = self.linear_sizes()
        return self.layers * sum(rank * sum(sizes[name]) for name in target_modules if name in sizes)


@dataclass(frozen=True)
class Workload:
    """What is trained: a base in its storage type with adapters."""

    shape: Shape
    quantization: Literal["nf4", "int8", "none"]
    adapter_parameters: int
    dropout: bool = False
    bytes_per_value: int = 2  # of activations, embeddings and unquantised weights: 2 for bf16, 4 for fp32
    optimizer_bytes: int = 8  # per adapter weight: 8 for AdamW in fp32, 2 with 8-bit state


@dataclass(frozen=True)
class Estimate:
    """Peak bytes of one training step by what they are for."""

    base: int
    adapters: int
    activations: int
    constant: int

    @property
    def total(self) -> int:
        return self.base + self.adapters + self.activations + self.constant


@dataclass(frozen=True)
class Choice:
    """Tokens of a micro-batch and decoder layers whose activations are made again, and what that takes."""

    micro_batch_tokens: int
    recomputed_layers: int
    estimate: Estimate


def estimate(workload: Workload, tokens: int, recomputed_layers: int = 0) -> Estimate:
    """Peak memory of a micro-batch of `tokens` tokens, of which the first `recomputed_layers` layers keep their input alone."""
    shape = workload.shape
    linear = shape.layers * sum(rows * columns for rows, columns in shape.linear_sizes().values())
    # NF4: half a byte, an 8-bit scale for 64 weights, an fp32 scale for 256 of these, and the scales as `FrozenWeight` unpacks them
    stored = {"nf4": 0.5 + 1 / 64 + 4 / 16384 + 4 / 64, "int8": 1 + 4 / shape.hidden, "none": workload.bytes_per_value}[
        workload.quantization
    ]
    tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return Estimate(
        base=round(linear * stored + tables * workload.bytes_per_value),
        adapters=workload.adapter_parameters * (4 + 4 + workload.optimizer_bytes),
        activations=round(ACTIVATION_FACTOR * activation_bytes(workload, tokens, recomputed_layers)),
        constant=round(CONSTANT_BYTES),
    )


def activation_bytes(workload: Workload, tokens: int, recomputed_layers: int = 0) -> int:
    """Bytes that the forward pass of a micro-batch leaves for the backward pass, as counted, and the widest step of that pass."""
    shape = workload.shape
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # a layer's input, its normed form, q, k and v, the attention's output, the sum before the MLP, gate and up
    values = shape.hidden * 3 + (q + 2 * kv) + q + shape.intermediate * 2
    kept = values * workload.bytes_per_value + (shape.hidden + q if workload.dropout else 0)  # a mask is a byte
    remembered = shape.hidden * workload.bytes_per_value
    again = kept if recomputed_layers else 0
    widest = (shape.intermediate + 2 * shape.hidden) * workload.bytes_per_value
    return tokens * ((shape.layers - recomputed_layers) * kept + recomputed_layers * remembered + again + widest)


def choose(
    workload: Workload,
    limit: float,
    longest: int,
    step_tokens: int,
    recompute: bool | Literal["auto"] = "auto",
    micro_batch_tokens: int = 0,
) -> Choice:
    """The largest micro-batch, and with "auto" the least recompute, that fit into `limit` bytes.

    `longest` is the longest row, `step_tokens` what one worker has in a mean step: a micro-batch need be little larger. What is given as a number is kept.
    Where nothing fits, the smallest micro-batch with full recompute comes back: the caller compares its estimate with the limit.
    """
    layers = workload.shape.layers
    room = limit * MARGIN
    least = max(longest, min(LEAST_TOKENS, step_tokens))
    most = max(least, min(MOST_TOKENS, math.ceil(LONGEST_STEP * step_tokens)))

    def largest(recomputed: int) -> int:
        fixed, one = estimate(workload, 0, recomputed).total, estimate(workload, 1000, recomputed).activations / 1000
        return math.floor((room - fixed) / one)

    steps = {True: [layers], False: [0], "auto": [*range(0, layers, max(1, layers // 8)), layers]}[recompute]
    for recomputed in steps:
        tokens = micro_batch_tokens or min(most, largest(recomputed))
        fits = (micro_batch_tokens or tokens >= least) and estimate(workload, tokens, recomputed).total <= room
        if fits or recomputed == steps[-1]:
            tokens = micro_batch_tokens or max(longest, tokens)
            return Choice(tokens, recomputed, estimate(workload, tokens, recomputed))
    raise AssertionError("steps is never empty")
