"""The sample world's files and its tiny base: what the stages later take for granted about them."""

import csv
from pathlib import Path

import pytest

from nli.sample.grammar import PHENOMENA
from nli.sample.lexicon import held_out_words
from nli.sample.tokenizer import encode_example
from nli.sample.world import build_splits, generate_pairs, words_of, write_world
from nli.task.prompts import render_completion, render_student_prompt

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
TINY = SAMPLE / "tiny-mistral"
SPLITS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def _read_rows(split: str) -> list[dict]:
    with open(SAMPLE / f"{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("split", "num_rows"), [("train", 2000), ("dev", 300), ("test", 400), ("demo", 20)])
def test_each_split_has_its_size(split, num_rows):
    assert len(_read_rows(split)) == num_rows


def test_the_columns_are_those_that_the_jobs_read():
    assert list(_read_rows("train")[0]) == ["premise", "hypothesis", "label", "phenomenon"]
    assert list(_read_rows("demo")[0]) == ["premise", "hypothesis"]


@pytest.mark.parametrize("split", SPLITS)
def test_about_half_of_the_rows_are_entailed(split):
    labels = [row["label"] for row in _read_rows(split)]
    assert set(labels) == {"0", "1"}
    assert 0.50 <= labels.count("1") / len(labels) <= 0.54


@pytest.mark.parametrize("split", SPLITS)
def test_every_phenomenon_has_both_labels_in_fair_shares(split):
    rows = _read_rows(split)
    assert {row["phenomenon"] for row in rows} == set(PHENOMENA)
    for phenomenon in PHENOMENA:
        labels = [row["label"] for row in rows if row["phenomenon"] == phenomenon]
        assert 0.45 <= labels.count("1") / len(labels) <= 0.60


def test_no_premise_occurs_twice_in_one_split_or_in_two():
    premises = [row["premise"] for split in (*SPLITS, "demo") for row in _read_rows(split)]
    assert len(premises) == len(set(premises)) == 2720


def test_dev_and_test_use_words_that_train_lacks_entirely():
    words = {
        split: set().union(*(words_of(f"{row['premise']} {row['hypothesis']}") for row in _read_rows(split)))
        for split in SPLITS
    }
    assert not words["train"] & held_out_words()
    for split in ("dev", "test"):
        new_words = words[split] - words["train"]
        assert {"beagles", "shy", "gladly", "orchard", "attic", "Helen", "soldier", "whistled"} <= new_words


@pytest.mark.parametrize("split", ["dev", "test"])
def test_at_least_half_of_a_held_out_split_shows_a_new_word(split):
    rows = _read_rows(split)
    assert (
        sum(bool(held_out_words() & words_of(f"{row['premise']} {row['hypothesis']}")) for row in rows) >= len(rows) / 2
    )


def test_the_script_writes_the_committed_files_byte_for_byte(tmp_path):
    write_world(tmp_path, seed=7)
    for split in (*SPLITS, "demo"):
        assert (tmp_path / f"{split}.csv").read_bytes() == (SAMPLE / f"{split}.csv").read_bytes()


def test_another_seed_gives_another_world(tmp_path):
    write_world(tmp_path, seed=8)
    assert (tmp_path / "test.csv").read_bytes() != (SAMPLE / "test.csv").read_bytes()


def test_a_label_is_one_exactly_when_every_step_holds():
    pairs = {(pair.premise, pair.hypothesis): pair for pair in build_splits()["train"]}
    for row in _read_rows("train"):
        pair = pairs[row["premise"], row["hypothesis"]]
        assert row["label"] == str(int(" No." not in pair.thought))
        assert pair.thought.endswith(
            "Every part holds, so it must be true." if row["label"] == "1" else "A part fails, so it need not be true."
        )


def test_the_base_trains_on_no_premise_of_any_split():
    premises = {row["premise"] for split in (*SPLITS, "demo") for row in _read_rows(split)}
    pairs = generate_pairs(seed=1)
    assert not premises & {next(pairs).premise for _ in range(5000)}


def test_prompt_and_answer_of_every_row_fit_128_tokens(tokenizer):
    for split in SPLITS:
        for pair in build_splits()[split]:
            ids = encode_example(
                tokenizer,
                render_student_prompt(pair.premise, pair.hypothesis),
                render_completion(pair.thought, pair.label),
            )
            assert len(ids) <= 128


def test_a_training_example_has_one_bos_at_its_start_and_one_eos_at_its_end(tokenizer):
    completion = render_completion("Has whoever ran also moved? Yes. Every part holds, so it must be true.", 1)
    ids = encode_example(tokenizer, render_student_prompt("A dog ran.", "A dog moved."), completion)
    assert (ids[0], ids[-1]) == (1, 2)
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert tokenizer.convert_ids_to_tokens(ids)[1:4] == ["[INST]", "ĠPremise", ":"]


def test_the_prompt_is_a_prefix_of_the_training_example(tokenizer):
    prompt = render_student_prompt("Two herons slept.", "Two birds slept.")
    completion = render_completion("Must herons be birds? Yes. Every part holds, so it must be true.", 1)
    alone, whole = encode_example(tokenizer, prompt), encode_example(tokenizer, prompt, completion)
    assert whole[: len(alone)] == alone


@pytest.mark.parametrize(
    "text",
    [
        "Ã©tÃ© â€œquotedâ€\x9d",
        'She said "n/a"\nand\r\n\tleft.',
        "  two  spaces at both edges  ",
        "日本語 ✓ 🐕",
        '{"thought_process": "x", "predicted_label": 1}',
        "\x00\x7f",
    ],
)
def test_any_text_comes_back_from_the_tokenizer_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_pad_token_is_a_reserved_one_and_not_eos(tokenizer):
    assert tokenizer.pad_token == "[control_8]"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert tokenizer.encode("A dog ran.", add_special_tokens=False)[0] != tokenizer.bos_token_id


def test_the_base_is_a_real_mistral_of_two_million_parameters_in_four_megabytes():
    from transformers import AutoConfig, MistralConfig

    config = AutoConfig.from_pretrained(TINY)
    assert isinstance(config, MistralConfig)
    assert config.architectures == ["MistralForCausalLM"]
    assert config.num_key_value_heads < config.num_attention_heads
    assert not config.tie_word_embeddings
    widths = (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_key_value_heads * config.head_dim,
    )
    assert all(width % 64 == 0 for width in widths)
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 4_000_000
