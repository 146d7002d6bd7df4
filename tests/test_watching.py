"""The accuracy that a run watches is that of greedy answers, whatever the number of ranks, and watching changes nothing in the training."""

import json

import pytest

from nli.evaluation.metrics import UNPARSED
from nli.runtime.errors import ConfigError
from nli.runtime.files import write_jsonl
from nli.training import run as sft
from nli.training.config import TrainConfig
from nli.training.watching import Watch, WatchedEvaluations, generate_greedily, read_watch
from tests.conftest import TINY_BASE
from tests.test_checkpoints import config_of
from tests.test_stages import read_rows
from tests.test_training_guards import losses_by_step, sft_row


def test_an_unread_answer_is_wrong_and_a_missing_eos_is_counted():
    watch = Watch(None, [[1]] * 4, [1, 1, 0, 0], max_length=64, max_new_tokens=8)
    scores = watch.score([(3, 0, True), (0, 1, True), (2, 1, True), (1, UNPARSED, False)])
    assert scores == {
        "accuracy": 0.5,
        "precision": 0.75,
        "recall": 0.5,
        "f1": pytest.approx(0.5833, abs=1e-4),
        "unparsed_rate": 0.25,
        "eos_rate": 0.75,
    }


def test_a_sample_of_one_label_has_an_accuracy_and_no_f1():
    watch = Watch(None, [[1]] * 2, [1, 1], max_length=64, max_new_tokens=8)
    assert watch.score([(0, 1, True), (1, 0, True)]) == {"accuracy": 0.5, "unparsed_rate": 0.0, "eos_rate": 1.0}


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory) -> str:
    """Thirty dev rows as training finds them, one without a label."""
    import pyarrow.parquet as pq

    from nli.training.preflight import read_splits, tokenise_here

    folder = tmp_path_factory.mktemp("rows")
    paths = (folder / "train.jsonl", folder / "dev.jsonl")
    write_jsonl(paths[0], [sft_row("train", 0)])
    write_jsonl(paths[1], [sft_row("dev", index) | ({"true_label": None} if index == 4 else {}) for index in range(30)])
    (folder / "tokenised").mkdir()
    pq.write_table(tokenise_here(read_splits(paths), TINY_BASE), folder / "tokenised" / "0.parquet")
    return str(folder / "tokenised")


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from nli.models.load import load_base
    from nli.models.tokenizer import load_tokenizer

    return load_base(TINY_BASE, "none", "fp32", "cpu").eval(), load_tokenizer(TINY_BASE)


def test_the_sample_is_labelled_the_same_for_a_seed_and_no_larger_than_the_file(tokenised, model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    watch = read_watch(tokenised, tokenizer, 8, 512, seed=42)
    assert len(watch.prompts) == len(watch.truths) == 8
    assert (
        watch == read_watch(tokenised, tokenizer, 8, 512, seed=42) != read_watch(tokenised, tokenizer, 8, 512, seed=43)
    )
    assert tokenizer.decode(watch.prompts[0]).endswith("[/INST]")
    assert len(read_watch(tokenised, tokenizer, 99, 512, seed=42).prompts) == 29
    assert read_watch(tokenised, tokenizer, 0, 512, seed=42) is None
    assert read_watch(tokenised, tokenizer, 8, 10, seed=42) is None


def test_two_ranks_give_the_answers_of_one_and_leave_the_random_numbers_alone(tokenised, model_and_tokenizer):
    import torch

    model, tokenizer = model_and_tokenizer
    watch = read_watch(tokenised, tokenizer, 9, 512, seed=42)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one = watch.answer(model, 0, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sorted(watch.answer(model, 0, 2) + watch.answer(model, 1, 2)) == sorted(one)
    assert sorted(row for row, _, _ in one) == list(range(9))


def test_the_answers_are_those_of_inference(tokenised, model_and_tokenizer):
    """The training model in evaluation, fused and with its own attention, answers as the engine of stage 6 does."""
    from nli.engines.interface import Decoding, EngineSettings, Request, answer_all
    from nli.engines.transformers.engine import TransformersEngine
    from nli.models.load import add_lora, load_base
    from nli.training.attention import register_packed_attention
    from nli.training.kernels import speed_up

    tokenizer = model_and_tokenizer[1]
    prompts = read_watch(tokenised, tokenizer, 12, 512, seed=1).prompts
    engine = TransformersEngine(EngineSettings(TINY_BASE, (), "fp32", "fp32", Decoding(max_new_tokens=40), 12, "cpu"))
    training = add_lora(
        load_base(TINY_BASE, "none", "fp32", "cpu", register_packed_attention()), 4, 8, 0.1, ("q_proj", "v_proj")
    )
    speed_up(training)
    texts = [text for text, _ in generate_greedily(training.eval(), tokenizer, prompts, 40)]
    assert texts == [
        generation.text for generation in answer_all(engine, [Request(tokenizer.decode(ids[1:])) for ids in prompts])
    ]


def test_an_evaluation_without_a_watch_stays_as_it_is():
    class Plain:
        def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
            return args, metric_key_prefix

    class Watched(WatchedEvaluations, Plain):
        pass

    assert Watched().evaluation_loop("rows") == (("rows",), "eval")


def test_best_by_accuracy_needs_rows_to_take_it_over():
    with pytest.raises(ConfigError, match="best_by accuracy needs watch_rows"):
        TrainConfig(best_by="accuracy", watch_rows=0)
    with pytest.raises(ConfigError, match="best_by accuracy needs each accuracy at its evaluation"):
        TrainConfig(best_by="accuracy", watch_beside=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    paths = {f"reflected_{split}": folder / f"reflected_{split}.jsonl" for split in ("train", "dev")}
    for split, count in (("train", 40), ("dev", 8)):
        write_jsonl(paths[f"reflected_{split}"], [sft_row(split, index) for index in range(count)])
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.ray
def test_watching_changes_no_step_and_accuracy_can_choose_the_best_checkpoint(files, ray_cluster, tmp_path):
    unwatched = sft.run(config_of(files, tmp_path / "unwatched", max_steps=6, watch_rows=0))
    watched = sft.run(config_of(files, tmp_path / "watched", max_steps=6, watch_rows=6, best_by="accuracy"))
    beside = sft.run(config_of(files, tmp_path / "beside", max_steps=6, watch_rows=6, watch_beside=True))
    for name in ("loss", "grad_norm", "eval_loss"):
        assert losses_by_step(watched, name) == losses_by_step(beside, name) == losses_by_step(unwatched, name)
    evaluations = [row for row in read_rows(watched / "log.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4, 6]
    for row in evaluations:
        assert 0 <= row["eval_accuracy"] <= 1 and 0 <= row["eval_unparsed_rate"] <= 1 and 0 <= row["eval_eos_rate"] <= 1
    best = max(evaluations, key=lambda row: row["eval_accuracy"])  # the first of equals
    result = json.loads((watched / "result.json").read_text())
    assert (result["best_checkpoint"], result["accuracy"], result["eval_loss"]) == (
        f"checkpoint-{best['step']}",
        best["eval_accuracy"],
        best["eval_loss"],
    )
    answered = {row["watch_step"]: row for row in read_rows(beside / "log.jsonl") if "watch_step" in row}
    figures = ("eval_accuracy", "eval_unparsed_rate", "eval_eos_rate")
    assert {step: [row[name] for name in figures] for step, row in answered.items()} == {
        row["step"]: [row[name] for name in figures] for row in evaluations
    }
    result = json.loads((beside / "result.json").read_text())
    assert result["accuracy"] == answered[int(result["best_checkpoint"].removeprefix("checkpoint-"))]["eval_accuracy"]
    assert "accuracy" not in json.loads((unwatched / "result.json").read_text())
