"""Whatever a user names as a model is found, checked and answered with the prompt it was trained with: also adapters that other training code made."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from nli.models.checkpoints import describe_model, read_card, resolve_template, write_card
from nli.models.tokenizer import check_prompt_ids, encode_prompt, load_tokenizer
from nli.runtime.errors import DataError, ModelError
from nli.task.prompts import (
    STUDENT_TEMPLATE,
    find_template_fault,
    prompt_sha256,
    render_prompt,
    render_student_prompt,
    student_prompt_sha256,
)
from tests.conftest import TINY_BASE

OTHER_TEMPLATE = 'Premise: {premise} Hypothesis: {hypothesis} Answer with {"label": 0 or 1}:'
PAIRS = [("Two dogs ran.", "Animals moved."), ("A woman sings.", "Nobody sings.")]
EMBEDDINGS = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}


def make_published(folder: Path, seed: int = 3, **saving) -> Path:
    """An adapter as plain transformers and peft make it after adding a [PAD] token: embeddings of one more row, no card."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)
    return folder


def change_embeddings(source: Path, folder: Path) -> Path:
    """The same adapter with embeddings that were trained too."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    torch.manual_seed(5)
    weights = load_file(folder / "adapter_model.safetensors")
    for name in EMBEDDINGS:
        weights[name] += 0.02 * torch.randn_like(weights[name])
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def to_bin(source: Path, folder: Path) -> Path:
    """The same adapter in a pickled weight file."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def to_modules_to_save(source: Path, folder: Path) -> Path:
    """The same adapter, whose config names its embeddings as trained modules."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["embed_tokens", "lm_head"]}))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    made = {
        "with embeddings": make_published(folder / "with"),
        "without embeddings": make_published(folder / "without", save_embedding_layers=False),
    }
    made["trained embeddings"] = change_embeddings(made["with embeddings"], folder / "trained")
    made["pickled"] = to_bin(made["trained embeddings"], folder / "pickled")
    made["modules to save"] = to_modules_to_save(made["trained embeddings"], folder / "modules")
    return made


FORMS = ("with embeddings", "without embeddings", "trained embeddings", "pickled", "modules to save")


def generate(model, tokenizer, num_tokens: int = 16) -> tuple[list, list]:
    """Greedy completions and the logits that follow each prompt, over the base's vocabulary."""
    import torch

    completions, logits = [], []
    for pair in PAIRS:
        ids = torch.tensor([encode_prompt(tokenizer, render_student_prompt(*pair))])
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits[0, :, :960])
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=5,
            )
        completions.append(written[0, ids.shape[1] :].tolist())
    return completions, logits


def load_plainly(folder: Path):
    """What transformers and peft give by themselves: the base resized to the adapter's tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)), mean_resizing=False)
    return PeftModel.from_pretrained(model, folder).eval()


def load_ours(*folders: Path):
    from nli.models.load import load_adapter, load_base

    model = load_base(TINY_BASE, "none", "fp32", "cpu")
    for index, folder in enumerate(folders):
        model = load_adapter(model, str(folder), f"adapter_{index}")
    return model.eval()


# prompts


def test_text_with_braces_passes_a_template_unchanged():
    rendered = render_prompt(OTHER_TEMPLATE, "The set {a} {hypothesis} {{b}} \\1 %s", "{premise}")
    assert (
        rendered
        == 'Premise: The set {a} {hypothesis} {{b}} \\1 %s Hypothesis: {premise} Answer with {"label": 0 or 1}:'
    )


def test_the_projects_own_template_is_what_it_was():
    assert (
        student_prompt_sha256()
        == prompt_sha256(STUDENT_TEMPLATE)
        == "f5e39d419d6f24dcc32a5ada97aae0bd43b36e6b2a2c73d8ce79ba2da1ba449c"
    )
    assert prompt_sha256(OTHER_TEMPLATE) == sha256(OTHER_TEMPLATE.encode()).hexdigest()
    assert find_template_fault(STUDENT_TEMPLATE) is None and find_template_fault(OTHER_TEMPLATE) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{premise} entails?", r"needs \{hypothesis\} exactly once, and has it not at all"),
        ("{premise} {premise} {hypothesis}", r"needs \{premise\} exactly once, and has it 2 times"),
        ("<s>[INST] {premise} {hypothesis} [/INST]", "holds <s>: leave it out"),
        ("\n", "the prompt template is empty"),
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path, text, fault):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(DataError, match=f"prompt.txt: .*{fault}"):
        resolve_template(TINY_BASE, str(tmp_path / "prompt.txt"))


def test_a_template_comes_from_the_file_else_the_card_else_the_project(tmp_path, published):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(OTHER_TEMPLATE + "\n")
    assert resolve_template(TINY_BASE) == resolve_template("mistralai/Mistral-7B-v0.3") == STUDENT_TEMPLATE
    assert resolve_template(TINY_BASE, str(prompt)) == OTHER_TEMPLATE
    bare = str(published["with embeddings"])
    assert resolve_template(bare, str(prompt)) == OTHER_TEMPLATE
    with pytest.raises(
        ModelError,
        match="no nli.json that holds its prompt. Give the prompt that it was trained with by --prompt-template",
    ):
        resolve_template(bare)
    with pytest.raises(DataError, match="none.txt: no such prompt template"):
        resolve_template(bare, str(tmp_path / "none.txt"))


def test_a_model_of_another_prompt_answers_with_its_own(tmp_path, published):
    run = tmp_path / "run"
    shutil.copytree(published["without embeddings"], run / "checkpoint-4")
    shutil.copytree(published["without embeddings"], run, dirs_exist_ok=True)
    write_card(run, TINY_BASE, "none", "fp32", 512)
    card = read_card(run) | {"prompt_template": OTHER_TEMPLATE, "prompt_sha256": prompt_sha256(OTHER_TEMPLATE)}
    (run / "nli.json").write_text(json.dumps(card))
    for folder in (run, run / "checkpoint-4"):
        assert describe_model(str(folder), "") == (TINY_BASE, str(folder))
        assert resolve_template(str(folder)) == OTHER_TEMPLATE
    (tmp_path / "same.txt").write_text(OTHER_TEMPLATE)
    assert resolve_template(str(run), str(tmp_path / "same.txt")) == OTHER_TEMPLATE
    (tmp_path / "other.txt").write_text(STUDENT_TEMPLATE)
    with pytest.raises(
        ModelError, match="was trained with another prompt, which stands in its nli.json; leave --prompt-template out"
    ):
        resolve_template(str(run), str(tmp_path / "other.txt"))
    (run / "nli.json").write_text(json.dumps(card | {"prompt_sha256": student_prompt_sha256()}))
    for refused in (lambda: resolve_template(str(run)), lambda: describe_model(str(run), "")):
        with pytest.raises(ModelError, match="trained with another prompt than the one that stands in its nli.json"):
            refused()


# adapters from elsewhere


def test_an_adapter_saves_its_embeddings_only_where_they_were_resized(published):
    from safetensors.torch import load_file

    names = {form: set(load_file(published[form] / "adapter_model.safetensors")) for form in FORMS[:2]}
    assert names["with embeddings"] - names["without embeddings"] == EMBEDDINGS


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_from_elsewhere_answers_as_plain_peft_on_a_resized_base_does(published, form):
    import torch

    folder = published[form]
    assert describe_model(str(folder), "") == (TINY_BASE, str(folder))
    tokenizer = load_tokenizer(TINY_BASE)
    ours = load_ours(folder)
    assert (
        ours(input_ids=torch.tensor([[1, 3]])).logits.shape[-1] == 960
    )  # nothing can be written that the base's tokenizer cannot read
    expected, found = generate(load_plainly(folder), tokenizer), generate(ours, tokenizer)
    assert found[0] == expected[0] and max(max(ids) for ids in expected[0]) < 960
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert generate(load_ours(), tokenizer)[0] != found[0]


def test_several_adapters_on_one_base_answer_as_each_does_alone_and_the_base_too(published, tmp_path):
    import torch

    tokenizer = load_tokenizer(TINY_BASE)
    folders = [
        published["with embeddings"],
        published["trained embeddings"],
        make_published(tmp_path / "other", seed=7),
    ]
    together = load_ours(*folders)
    for index, folder in enumerate(folders):
        together.set_adapter(f"adapter_{index}")
        for one, other in zip(generate(together, tokenizer)[1], generate(load_ours(folder), tokenizer)[1], strict=True):
            assert torch.equal(one, other)
    with together.disable_adapter():
        for one, other in zip(generate(together, tokenizer)[1], generate(load_ours(), tokenizer)[1], strict=True):
            assert torch.equal(one, other)


def test_prompts_are_the_same_tokens_with_the_bases_tokenizer_and_the_adapters(published, tmp_path):
    folder = published["with embeddings"]
    own = load_tokenizer(str(folder))
    assert own.pad_token == "[PAD]" and len(own) == 961
    for pair in PAIRS:
        assert encode_prompt(load_tokenizer(TINY_BASE), render_student_prompt(*pair)) == encode_prompt(
            own, render_student_prompt(*pair)
        )
    check_prompt_ids(TINY_BASE, str(folder), STUDENT_TEMPLATE)
    own.add_tokens(["Premise:"])
    shutil.copytree(folder, tmp_path / "other")
    own.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="its tokenizer encodes the prompt otherwise than the one of"):
        check_prompt_ids(TINY_BASE, str(tmp_path / "other"), STUDENT_TEMPLATE)


def test_a_template_with_control_tokens_between_its_ends_is_refused_before_any_row():
    with pytest.raises(DataError, match="control token"):
        check_prompt_ids(TINY_BASE, None, "[INST] Premise: {premise} [/INST] [INST] {hypothesis} [/INST]")
    check_prompt_ids(TINY_BASE, None, "Premise: {premise} Hypothesis: {hypothesis}")


# hub names


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache without a connection, and a function that puts a folder into it under a name."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(name: str, source: Path | str) -> Path:
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("c" * 40)
        shutil.copytree(source, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("c" * 40)
        return snapshot

    return add


def test_an_adapter_with_a_hub_name_is_found_in_the_cache_and_a_base_is_none(hub, published):
    snapshot = hub("someone/adapter", published["with embeddings"])
    assert describe_model("someone/adapter", "") == (TINY_BASE, str(snapshot))
    hub("someone/base", TINY_BASE)
    assert describe_model("someone/base", "") == ("someone/base", None)
    assert describe_model("someone/adapter", "someone/base") == ("someone/base", str(snapshot))
    assert describe_model("someone/unknown", "") == ("someone/unknown", None)  # whether it is there, check_base asks


def test_a_merged_model_with_a_hub_name_answers_with_the_prompt_of_its_card(hub, tmp_path):
    shutil.copytree(TINY_BASE, tmp_path / "merged")
    write_card(tmp_path / "merged", TINY_BASE, "none", "fp32", 512)
    card = read_card(tmp_path / "merged") | {
        "prompt_template": OTHER_TEMPLATE,
        "prompt_sha256": prompt_sha256(OTHER_TEMPLATE),
    }
    (tmp_path / "merged/nli.json").write_text(json.dumps(card))
    hub("someone/merged", tmp_path / "merged")
    assert describe_model("someone/merged", "") == ("someone/merged", None)
    assert resolve_template("someone/merged") == OTHER_TEMPLATE
    hub("someone/base", TINY_BASE)
    assert resolve_template("someone/base") == STUDENT_TEMPLATE


def test_a_base_that_is_not_here_is_asked_for(hub, published, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(published["without embeddings"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for base in ("/home/them/mistral", "someone/gone"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(
            ModelError,
            match=f"the adapter names {base} as its base, which cannot be found from here; say where it is by --base-model",
        ):
            describe_model(str(folder), "")
    assert describe_model(str(folder), TINY_BASE) == (TINY_BASE, str(folder))
    with pytest.raises(ModelError, match="someone/other: no model there; --base-model takes"):
        describe_model(str(folder), "someone/other")


# weights that do not fit


def rewrite(source: Path, folder: Path, change) -> Path:
    """A copy of an adapter whose weights went through `change`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    save_file(
        change(load_file(folder / "adapter_model.safetensors")),
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


CHANGES = {
    "rank": (
        lambda name, tensor: (name, tensor[:4].contiguous() if "lora_A" in name else tensor),
        "has the rank 4, and adapter_config.json says 8",
    ),
    "size": (
        lambda name, tensor: (name, tensor[:, :128].contiguous() if "lora_A" in name else tensor),
        "lora_A of model.layers.0.self_attn.q_proj takes 128 numbers, and .*192. Give the base that it was trained on by --base-model",
    ),
    "layers": (
        lambda name, tensor: (name.replace("layers.3", "layers.31"), tensor),
        "has weights for model.layers.31.self_attn.q_proj, which .* does not have",
    ),
    "vocabulary": (
        lambda name, tensor: (name, tensor[:900].contiguous() if name in EMBEDDINGS else tensor),
        r"the adapter's lm_head has the shape \[900, 192\], and .* has \[960, 192\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_weights_that_do_not_fit_the_base_are_refused_by_their_header(published, tmp_path, change, message):
    folder = rewrite(
        published["with embeddings"],
        tmp_path / "adapter",
        lambda weights: dict(change(*item) for item in weights.items()),
    )
    with pytest.raises(ModelError, match=message):
        describe_model(str(folder), "")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_torn_weights_are_refused_before_a_model_is_loaded(published, tmp_path, name):
    folder = tmp_path / "adapter"
    shutil.copytree(published["with embeddings" if name.endswith("safetensors") else "pickled"], folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"{name}: the weights cannot be read"):
        describe_model(str(folder), "")


def test_an_adapter_that_lacks_layers_of_its_own_config_is_refused(published, tmp_path):
    folder = rewrite(
        published["without embeddings"],
        tmp_path / "adapter",
        lambda weights: {name: weight for name, weight in weights.items() if "v_proj" not in name},
    )
    with pytest.raises(ModelError, match="the adapter cannot be put on this base .*missing adapter keys"):
        load_ours(folder)
