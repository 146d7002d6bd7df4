"""The fast path computes what plain transformers and PEFT compute, and deals the same steps to any number of workers."""

import random

import pytest

from nli.training.batches import GlobalBatches, deal, pack
from tests.conftest import REPOSITORY, TINY_BASE

# dealing rows


def test_rows_are_dealt_by_their_tokens():
    assert deal([300, 200, 200, 100], num_workers=2, max_tokens=400) == [[[0, 3]], [[1, 2]]]
    assert deal([5, 5, 5, 5], num_workers=1, max_tokens=10) == [[[0, 2], [1, 3]]]
    assert deal([5, 5, 5, 5], num_workers=1, max_tokens=1000, max_rows=1) == [[[0], [1], [2], [3]]]
    assert deal([700], num_workers=2, max_tokens=100) == [[[0]], [[]]]


def test_every_row_is_dealt_once_in_balanced_micro_batches_of_an_equal_count():
    chance = random.Random(0)
    for num_workers in (1, 2, 3, 8):
        lengths = [chance.randint(60, 600) for _ in range(64)]
        dealt = deal(lengths, num_workers, max_tokens=4096)
        assert sorted(index for worker in dealt for held in worker for index in held) == list(range(64))
        assert len({len(worker) for worker in dealt}) == 1
        loads = [[sum(lengths[index] for index in held) for held in worker] for worker in dealt]
        assert max(load for worker in loads for load in worker) <= 4096
        if num_workers <= 3:
            assert max(map(sum, loads)) < 1.02 * min(map(sum, loads))


def rows_of(lengths: list[int], vocabulary: int = 500):
    import datasets

    chance = random.Random(1)
    ids = [[chance.randrange(10, vocabulary) for _ in range(length)] for length in lengths]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def test_the_steps_are_the_same_for_any_number_of_workers_and_differ_by_epoch():
    rows = rows_of([7 + index % 5 for index in range(22)])

    def steps(num_workers: int, epoch: int) -> list[list[tuple[int, ...]]]:
        parts = [GlobalBatches(rows, 8, rank, num_workers, max_tokens=20, seed=3) for rank in range(num_workers)]
        for part in parts:
            part.epoch = epoch
        found = []
        for step in range(3):
            micros = [micro for part in parts for micro in part[step]]
            pieces = [
                micro["input_ids"][0].tensor_split(micro["cu_seq_lens_q"][1:-1].long())
                for micro in micros
                if (micro["labels"] != -100).any()
            ]
            found.append(sorted(tuple(row.tolist()) for piece in pieces for row in piece))
        return found

    assert [len(step) for step in steps(1, 0)] == [8, 8, 6]
    assert steps(1, 0) == steps(2, 0) == steps(4, 0)
    assert steps(1, 0) != steps(1, 1)
    assert sorted(row for step in steps(1, 0) for row in step) == sorted(row for step in steps(2, 1) for row in step)


def test_packed_rows_have_their_own_positions_and_no_label_on_a_first_token():
    import numpy

    packed = pack([numpy.array([5, 6, 7]), numpy.array([8, 9])], [numpy.array([5, -100, 7]), numpy.array([8, 9])])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert packed["labels"].tolist() == [[-100, -100, 7, -100, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert packed["max_length_q"] == 3


# the same sums

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def tiny(
    quantization: str = "none", attention: str = "sdpa", targets=ATTENTION, dropout: float = 0.0, dtype: str = "fp32"
):
    """The tiny Mistral with adapters whose B is not zero, so that every gradient is alive."""
    import torch

    from nli.models.load import add_lora, keep_weights_in_evaluations, load_base

    torch.manual_seed(0)
    base = load_base(TINY_BASE, quantization, dtype, "cpu", attention)
    keep_weights_in_evaluations(base)
    model = add_lora(base, 8, 16, dropout, targets)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def adapter_gradients(model) -> dict:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


LENGTHS = [9, 23, 5, 14]
TARGETS = {
    "attention": ATTENTION,
    "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj"),
    "some": ("q_proj", "v_proj"),
}


@pytest.mark.parametrize(
    ("quantization", "targets"),
    [("none", "attention"), ("nf4", "attention"), ("nf4", "all"), ("nf4", "some"), ("int8", "attention")],
)
def test_losses_and_adapter_gradients_are_those_of_plain_transformers_and_peft(quantization, targets):
    """Each row alone through the plain model, against all rows packed through the fused one."""
    import torch

    from nli.training.attention import register_packed_attention
    from nli.training.kernels import speed_up

    rows = rows_of(LENGTHS)
    plain = tiny(quantization, targets=TARGETS[targets])
    losses = []
    for row in rows:
        out = plain(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), use_cache=False)
        count = sum(label != -100 for label in row["labels"][1:])
        (out.loss * count).backward()
        losses.append(out.loss.item())

    fast = tiny(quantization, register_packed_attention(), TARGETS[targets])
    assert speed_up(fast) == (["adapters"] if quantization == "int8" or targets == "all" else ["adapters", "mlp"])
    (micro,) = GlobalBatches(rows, 4, 0, 1, max_tokens=1000)[0]
    labels = micro.pop("labels")
    logits = fast(**micro, use_cache=False).logits[0, :-1]
    each = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")
    each.sum().backward()
    sums = [part[part != 0].mean().item() for part in each.tensor_split(micro["cu_seq_lens_q"][1:-1].long() - 1)]

    tolerance = (
        2e-2 if quantization == "int8" else 1e-4
    )  # LLM.int8 rounds each row's activations by the largest of the whole batch
    assert sums == pytest.approx(losses, rel=tolerance)
    expected, found = adapter_gradients(plain), adapter_gradients(fast)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), found[name].flatten(), dim=0)
        assert cosine > (0.99 if quantization == "int8" else 0.99999), name


def test_a_packed_row_sees_no_other_row():
    """Its logits stay the same to the last bit when the row before it changes."""
    import torch

    from nli.training.attention import register_packed_attention
    from nli.training.kernels import speed_up

    model = tiny("nf4", register_packed_attention())
    speed_up(model)
    rows = rows_of(LENGTHS)
    (micro,) = GlobalBatches(rows, 4, 0, 1, max_tokens=1000)[0]
    del micro["labels"]
    with torch.no_grad():
        before = model(**micro, use_cache=False).logits
        micro["input_ids"][0, :9] = 11
        after = model(**micro, use_cache=False).logits
    assert not torch.equal(before[0, :9], after[0, :9])
    assert torch.equal(before[0, 9:], after[0, 9:])


def test_packed_rows_without_their_bounds_are_refused():
    import torch

    from nli.training.attention import register_packed_attention

    model = tiny("none", register_packed_attention())
    with pytest.raises(ValueError, match="they would see each other"):
        model(input_ids=torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


def test_padded_prompts_are_answered_as_with_torch_s_own_attention():
    import torch

    from nli.training.attention import register_packed_attention

    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    values = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
    }
    plain, packed = tiny("none").eval(), tiny("none", register_packed_attention()).eval()
    assert torch.equal(plain.generate(**values), packed.generate(**values))


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_recomputed_layers_change_no_gradient_also_with_dropout(recomputed):
    import torch

    from nli.training.attention import register_packed_attention
    from nli.training.kernels import speed_up
    from nli.training.worker import recompute_layers

    found = []
    for count in (0, recomputed):
        model = tiny("nf4", register_packed_attention(), dropout=0.3)
        speed_up(model)
        recompute_layers(model, count)
        (micro,) = GlobalBatches(rows_of(LENGTHS), 4, 0, 1, max_tokens=1000)[0]
        torch.manual_seed(5)
        model(**micro, use_cache=False).loss.backward()
        found.append(adapter_gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_dropout_falls_on_the_adapters_input_alone():
    """With B = 0 the adapters add nothing, whatever is dropped; with p > 0 the part that they add has the mean it has without dropout."""
    import torch

    from nli.training.kernels import speed_up

    model = tiny("none", dropout=0.5)
    speed_up(model)
    attention = model.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 6, attention.q_proj.in_features)
    base = attention.q_proj.get_base_layer()(x)
    with torch.no_grad():
        whole = attention.q_proj.eval()(x) - base
        attention.q_proj.train()
        parts = torch.stack([attention.q_proj(x.clone()) - base for _ in range(4000)])
        assert (parts.mean(0) - whole).abs().max() < 0.1 * whole.abs().max()
        assert parts.std(0).max() > 0.1 * whole.abs().max()
        attention.q_proj.lora_B["default"].weight.zero_()
        assert torch.equal(attention.q_proj(x.clone()), base)


def test_adapters_that_are_switched_off_or_merged_take_peft_s_own_way():
    import torch

    from nli.training.kernels import speed_up

    model = tiny("none")
    speed_up(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        on = model(input_ids=ids).logits
        assert not torch.equal(off, on)
        model.merge_adapter()
        assert torch.allclose(model(input_ids=ids).logits, on, atol=1e-4)


# the same training


def real_rows(count: int):
    """Rows of the sample world as the student is trained on them."""
    import csv
    import json

    import datasets

    from nli.models.tokenizer import encode_example, load_tokenizer
    from nli.task.prompts import render_student_prompt

    tokenizer, rows = load_tokenizer(TINY_BASE), []
    with open(REPOSITORY / "data/sample/train.csv", encoding="utf-8") as file:
        for number, row in zip(range(count), csv.DictReader(file), strict=False):
            thought = "The premise says so. " * (1 + number % 4)
            completion = json.dumps({"thought_process": thought, "predicted_label": int(row["label"])})
            example = encode_example(tokenizer, render_student_prompt(row["premise"], row["hypothesis"]), completion)
            rows.append({"input_ids": example.input_ids, "labels": example.labels})
    return datasets.Dataset.from_list(rows)


def test_a_packed_run_has_the_loss_curve_of_trl_s_padded_one(tmp_path):
    """Real text, NF4, fp32: six steps of eight rows, once as one padded batch each, once in packed micro-batches of at most 300 tokens."""
    from trl import SFTConfig, SFTTrainer

    from nli.models.tokenizer import load_tokenizer
    from nli.training.attention import register_packed_attention
    from nli.training.kernels import speed_up
    from nli.training.trainer import build_trainer_class

    values = {
        "max_steps": 6,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": "none",
    }
    values |= {
        "save_strategy": "no",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "per_device_train_batch_size": 8,
        "disable_tqdm": True,
    }
    arguments = SFTConfig(
        output_dir=str(tmp_path), gradient_checkpointing=False, train_sampling_strategy="sequential", **values
    )
    rows, tokenizer = real_rows(48), load_tokenizer(TINY_BASE)
    batches = GlobalBatches(rows, 8, 0, 1, max_tokens=300, seed=5)
    assert min(len(batches[step]) for step in range(6)) >= 2
    ordered = rows.select([row for step in range(6) for row in batches.choose(step)])

    plain = SFTTrainer(model=tiny("nf4"), args=arguments, train_dataset=ordered, processing_class=tokenizer)
    packed_model = tiny("nf4", register_packed_attention())
    speed_up(packed_model)
    packed = build_trainer_class()(
        model=packed_model,
        batches=batches,
        eval_batches=batches,
        args=arguments,
        train_dataset=ordered,
        processing_class=tokenizer,
    )
    curves = []
    for trainer in (plain, packed):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer.train()
        curves.append(
            [
                (entry["loss"], entry["grad_norm"], entry["mean_token_accuracy"])
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        )
    assert len(curves[0]) == 6 and curves[0][-1][0] < 0.9 * curves[0][0][0]
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_in_bf16_the_fused_gradients_are_as_near_as_bf16_allows():
    """Real text: the fused path in bf16 against plain PEFT under autocast, as TRL runs it."""
    import torch

    from nli.training.attention import register_packed_attention
    from nli.training.kernels import speed_up

    rows = real_rows(8)
    plain = tiny("nf4", dtype="bf16")
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain(
                input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]), use_cache=False
            ).loss
        (loss * sum(label != -100 for label in row["labels"][1:])).backward()
    fast = tiny("nf4", register_packed_attention(), dtype="bf16")
    speed_up(fast)
    (micro,) = GlobalBatches(rows, 8, 0, 1, max_tokens=10_000)[0]
    labels = micro.pop("labels")[0, 1:]
    torch.nn.functional.cross_entropy(
        fast(**micro, use_cache=False).logits[0, :-1].float(), labels, reduction="sum"
    ).backward()
    one, other = (
        torch.cat([gradient.flatten() for gradient in adapter_gradients(model).values()]) for model in (plain, fast)
    )
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.999


def test_the_kernel_for_gpus_takes_what_it_is_given(monkeypatch):
    """No kernel runs here; the call is bound to the signature of the one that would."""
    import inspect

    from nli.training import attention

    name, kernel, values = attention._find_kernel()
    monkeypatch.setattr(attention, "_find_kernel", lambda: (name, inspect.signature(kernel).bind, values))
    bound = attention._varlen("q", "k", "v", "bounds", 9, 0.1, -1)
    assert bound.arguments["window_size"] == (-1, 0) and 0.1 in bound.arguments.values()
