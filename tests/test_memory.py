"""The memory estimate against what a GPU was measured to take, and the choices that follow from it.

Peaks of torch.cuda.max_memory_allocated on an NVIDIA H100 80GB, 2026-11-25, by benchmarks/training.py (docs/TRAINING.md), in GiB.
"""

import pytest

from nli.training import memory
from nli.training.memory import GIB, Shape, Workload, activation_bytes, choose, estimate

MISTRAL_7B = Shape(
    hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=32768, tied=False
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def workload(
    rank: int = 32, targets: tuple[str, ...] = ATTENTION, dropout: bool = True, quantization: str = "nf4"
) -> Workload:
    return Workload(MISTRAL_7B, quantization, MISTRAL_7B.adapter_parameters(rank, targets), dropout)


# workload, tokens of the largest micro-batch, recomputed layers, measured peak
FITTED_ON = {"fast": (workload(), 12406, 0, 46.53), "all layers recomputed": (workload(), 12292, 32, 9.65)}
OTHERS = {
    "22 GB": (workload(), 3989, 0, 18.9),
    "22 GB, no dropout": (workload(dropout=False), 4182, 0, 18.07),
    "no dropout": (workload(dropout=False), 12406, 0, 43.5),
    "rows of the baseline": (workload(), 6221, 0, 25.41),
    "10 GB, 20 layers recomputed": (workload(), 2191, 20, 8.17),
    "rank 16 on q and v, no dropout": (workload(16, ("q_proj", "v_proj"), dropout=False), 8374, 0, 30.45),
}


def test_the_two_coefficients_are_those_that_the_two_fitted_settings_give():
    (one, tokens_one, again_one, peak_one), (two, tokens_two, again_two, peak_two) = FITTED_ON.values()
    left_one, left_two = (
        peak * GIB - estimate(w, 0).base - estimate(w, 0).adapters for w, peak in ((one, peak_one), (two, peak_two))
    )
    counted_one, counted_two = (
        activation_bytes(one, tokens_one, again_one),
        activation_bytes(two, tokens_two, again_two),
    )
    factor = (left_one - left_two) / (counted_one - counted_two)
    assert pytest.approx(factor, rel=0.001) == memory.ACTIVATION_FACTOR
    assert pytest.approx((left_two - factor * counted_two) / GIB, abs=0.01) == memory.CONSTANT_BYTES / GIB


@pytest.mark.parametrize("name", OTHERS)
def test_the_estimate_is_within_a_tenth_of_settings_it_was_not_fitted_on(name):
    w, tokens, again, measured = OTHERS[name]
    assert estimate(w, tokens, again).total / GIB == pytest.approx(measured, rel=0.1)


def test_a_large_gpu_recomputes_nothing_and_a_small_one_only_what_it_must():
    large = choose(workload(), 79 * GIB, longest=512, step_tokens=24_000)
    assert (large.recomputed_layers, large.micro_batch_tokens > 18_000) == (0, True)
    small = choose(workload(), 22 * GIB, longest=512, step_tokens=24_000)
    assert (small.recomputed_layers, 4000 < small.micro_batch_tokens < 5000) == (0, True)
    tight = choose(workload(), 10 * GIB, longest=512, step_tokens=24_000)
    assert 0 < tight.recomputed_layers < 32 and tight.micro_batch_tokens >= 2048
    assert all(choice.estimate.total <= limit * GIB for choice, limit in ((large, 79), (small, 22), (tight, 10)))


def test_what_the_config_says_is_kept():
    assert choose(workload(), 79 * GIB, 512, 24_000, recompute=True).recomputed_layers == 32
    assert choose(workload(), 6 * GIB, 512, 24_000, recompute=False).recomputed_layers == 0
    assert choose(workload(), 79 * GIB, 512, 24_000, micro_batch_tokens=1000).micro_batch_tokens == 1000
    assert choose(workload(), 79 * GIB, 512, step_tokens=1000).micro_batch_tokens == 1200
    nowhere = choose(workload(), 5 * GIB, 512, 24_000)
    assert (nowhere.recomputed_layers, nowhere.micro_batch_tokens) == (32, 512) and nowhere.estimate.total > 5 * GIB


def test_sizes_are_read_from_a_model_s_config():
    from transformers import MistralConfig

    config = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=99,
    )
    shape = Shape.of(config)
    assert shape == Shape(64, 128, 2, 4, 2, 16, 99, False)
    assert shape.adapter_parameters(8, ("q_proj", "v_proj")) == 2 * 8 * (64 + 64 + 64 + 32)
