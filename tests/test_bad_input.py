"""Bad input, as a user meets it: one clear message, a non-zero exit status, nothing started, nothing overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import REPOSITORY, TINY_BASE

GOOD_CSV = "premise,hypothesis,label\nTwo dogs ran.,Animals moved.,1\n"


def run_job(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a job as `python -m` does. Ray cannot start in it: whatever would start Ray fails in another way than the test expects."""
    command = [sys.executable, "-m", f"ray_jobs.{arguments[0]}", *arguments[1:]]
    variables = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "COLUMNS": "200"} | environment
    variables = {name: value for name, value in variables.items() if value}
    return subprocess.run(
        command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def refuse(result: subprocess.CompletedProcess) -> str:
    """The message of a refused job, after checking how it was refused."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.strip() == ""
    return result.stderr


def write_adapter(folder: Path, width: int = 192, base: str = TINY_BASE) -> None:
    """The least of a LoRA adapter from elsewhere: one layer, no card."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": base})
    )
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{layer}.lora_A.weight": np.zeros((2, width), np.float32),
        f"{layer}.lora_B.weight": np.zeros((192, 2), np.float32),
    }
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    contents = {
        "good.csv": GOOD_CSV,
        "no_columns.csv": "text_a,premise,label\nx,y,1\n",
        "bad_label.csv": "premise,hypothesis,label\na,b,1\nc,d,2\ne,f,entailment\n",
        "empty.csv": "",
        "header_only.csv": "premise,hypothesis,label\n",
        "empty.jsonl": "",
        "bad.jsonl": '{"id": "1"\n{"id": "2"}\n',
        "typo.py": "from nli.training.run import TrainConfig\n\nconfig = TrainConfig(\n    lora_rnak=8,\n)\n",
        "type.py": 'from nli.training.run import TrainConfig\n\nconfig = TrainConfig(lora_rank="8")\n',
        "other.py": "from nli.inference.run import InferenceConfig\n\nconfig = InferenceConfig()\n",
        "nothing.py": "batch_size = 8\n",
        "no_place.txt": "Premise: {premise} Does it entail that?\n",
        "with_bos.txt": "<s>[INST] {premise} {hypothesis} [/INST]\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    write_adapter(tmp_path / "adapter")
    write_adapter(tmp_path / "narrow", width=128)
    write_adapter(tmp_path / "lost", base="/home/them/mistral")
    return {name: str(tmp_path / name) for name in [*contents, "folder", "adapter", "narrow", "lost", "out"]}


THOUGHTS = ("generate_thoughts", "--base-url", "http://127.0.0.1:9", "--output-jsonl", "{out}/a.jsonl", "--input-csv")
ANSWER = ("run_inference", "--data", "{good.csv}", "--results-dir", "{out}", "--model")
CASES = {
    "misspelt flag": (("train_sft", "--lora-rnak", "8"), ["lora-rnak", "--lora-rank"]),
    "misspelt field in a file": (
        ("train_sft", "--config", "{typo.py}"),
        ["typo.py:3: unknown field 'lora_rnak'. Did you mean lora_rank?"],
    ),
    "wrong type in a file": (
        ("train_sft", "--config", "{type.py}"),
        ["type.py:3: lora_rank is '8': input should be a valid integer"],
    ),
    "wrong type on the command line": (("train_sft", "--lora-rank", "eight"), ["--lora-rank", "eight"]),
    "out of range": (("train_sft", "--learning-rate", "-1"), ["learning_rate is -1.0: input should be greater than 0"]),
    "conflict": (("train_sft", "--num-workers", "3"), ["global_batch_size 64 is no multiple of num_workers 3"]),
    "another stage's config": (
        ("train_sft", "--config", "{other.py}"),
        ["`config` is a InferenceConfig; this job needs a TrainConfig"],
    ),
    "a file without config": (("train_sft", "--config", "{nothing.py}"), ["does not define `config`"]),
    "no such config": (
        ("train_sft", "--config", "configs/train/ablation4.py"),
        ["configs/train/ablation4.py: no such config file. Did you mean configs/train/"],
    ),
    "no such CSV": ((*THOUGHTS, "{out}/none.csv"), ["none.csv: no such file"]),
    "a CSV without the columns": (
        (*THOUGHTS, "{no_columns.csv}"),
        ["no_columns.csv:1: no column hypothesis; the header is text_a,premise,label"],
    ),
    "unknown labels, all at once": (
        (*THOUGHTS, "{bad_label.csv}"),
        [
            "bad_label.csv:3: label '2' is neither 1 (entailment) nor 0",
            "bad_label.csv:4: label 'entailment' is neither",
        ],
    ),
    "an empty CSV": ((*THOUGHTS, "{empty.csv}"), ["empty.csv: the file is empty; it needs a header"]),
    "a CSV of a header": ((*THOUGHTS, "{header_only.csv}"), ["header_only.csv: the file has a header but no rows"]),
    "no labels where they are needed": (
        (*THOUGHTS, "data/sample/demo.csv", "--prompt-name", "regeneration"),
        ["demo.csv:1: no column label; the header is premise,hypothesis"],
    ),
    "scoring without thoughts": (
        ("generate_thoughts", "--prompt-name", "scoring"),
        ["prompt_name scoring reads --thoughts"],
    ),
    "an address that is none": (
        ("generate_thoughts", "--base-url", "api.mistral.ai"),
        ["'api.mistral.ai' is not an http:// or https:// address"],
    ),
    "thoughts that are not JSON": (
        ("generate_reflections", "--thoughts", "{bad.jsonl}"),
        ["bad.jsonl:1: not JSON", "bad.jsonl:2: premise: field required"],
    ),
    "an empty thoughts file": (("prepare_sft_data", "--thoughts", "{empty.jsonl}"), ["empty.jsonl: the file is empty"]),
    "reflected without reflections": (
        ("prepare_sft_data", "--ablation", "reflected"),
        ["ablation reflected needs --reflections"],
    ),
    "no training file": (("train_sft", "--train-file", "{out}/none.jsonl"), ["none.jsonl: no such file"]),
    "object storage": (
        ("prepare_sft_data", "--thoughts", "{good.csv}", "--output-jsonl", "s3://bucket/a.jsonl"),
        ["object storage is not supported"],
    ),
    "a folder that is no model": (
        ("run_inference", "--model", "{folder}"),
        ["folder: neither a model (config.json) nor an adapter"],
    ),
    "no such model": (
        ("run_inference", "--model", "{out}/model"),
        ["out/model: no such model folder, and not a hub name"],
    ),
    "no such model on the hub": (
        (*ANSWER, "nobody/nothing"),
        ["nobody/nothing: no model there", "Give a model folder, or a hub name with access to the hub"],
    ),
    "an adapter that does not fit its base": (
        (*ANSWER, "{narrow}"),
        [
            "narrow: the adapter's lora_A of model.layers.0.self_attn.q_proj takes 128 numbers, and",
            "tiny-mistral's 192",
            "by --base-model",
        ],
    ),
    "an adapter whose base is elsewhere": (
        (*ANSWER, "{lost}"),
        ["lost: the adapter names /home/them/mistral as its base", "say where it is by --base-model"],
    ),
    "a base that is not there": (
        (*ANSWER, "{adapter}", "--base-model", "{out}/base"),
        ["out/base: no model there; --base-model takes a model folder"],
    ),
    "an adapter that nobody knows the prompt of": (
        (*ANSWER, "{adapter}"),
        ["adapter: the adapter has no nli.json that holds its prompt", "--prompt-template"],
    ),
    "no such prompt template": (
        (*ANSWER, TINY_BASE, "--prompt-template", "{out}/prompt.txt"),
        ["out/prompt.txt: no such file"],
    ),
    "a prompt template without a place for the hypothesis": (
        (*ANSWER, "{adapter}", "--prompt-template", "{no_place.txt}"),
        ["no_place.txt: the prompt template needs {hypothesis} exactly once, and has it not at all"],
    ),
    "a prompt template with BOS": (
        (*ANSWER, "{adapter}", "--prompt-template", "{with_bos.txt}"),
        ["with_bos.txt: the prompt template holds <s>: leave it out"],
    ),
    "inference on a CSV without the columns": (
        ("run_inference", "--model", TINY_BASE, "--data", "{no_columns.csv}"),
        ["no_columns.csv:1: no column hypothesis"],
    ),
    "a GPU index on a cluster": (
        ("run_inference", "--model", TINY_BASE, "--data", "{good.csv}", "--results-dir", "{out}", "--gpu", "1"),
        ["--gpu picks a GPU of this machine and does not work on a cluster"],
    ),
    "predictions that do not exist": (
        ("evaluate_predictions", "--predictions", "{out}/none.jsonl", "--output-dir", "{out}"),
        ["none.jsonl: no such file"],
    ),
    "a sweep axis that is no field": (
        ("sweep_lora", "--extra-axes", "lora_dropuot=0,0.1"),
        ["sweep axis 'lora_dropuot' is not a field", "lora_dropout?"],
    ),
    "an empty axis": (("sweep_lora", "--lora-rank"), ["every axis needs at least one value"]),
}


@pytest.mark.parametrize(("arguments", "messages"), CASES.values(), ids=list(CASES))
def test_bad_input_ends_in_one_clear_message_and_starts_nothing(files, arguments, messages):
    def fill(argument: str) -> str:
        for name, path in files.items():
            argument = argument.replace("{" + name + "}", path)
        return argument

    shown = refuse(run_job(*map(fill, arguments)))
    for message in messages:
        assert message in shown
    made = [path for path in Path(files["out"]).rglob("*") if path.is_file()]
    assert made == []


def test_a_gpu_is_missed_before_a_model_is_loaded():
    message = refuse(
        run_job(
            "train_sft", "--config", "configs/train/ablation2.py", RAY_ADDRESS="", PATH=str(Path(sys.executable).parent)
        )
    )
    assert "this machine has none that nvidia-smi can see" in message and "--use-gpu False" in message


def test_no_key_is_said_before_anything_is_asked(files, tmp_path):
    arguments = ("generate_thoughts", "--input-csv", files["good.csv"], "--output-jsonl", str(tmp_path / "a.jsonl"))
    assert "No API key. Set MISTRAL_API_KEY" in refuse(run_job(*arguments, MISTRAL_API_KEY=""))
    assert not (tmp_path / "a.jsonl.manifest.json").exists()


def test_an_output_of_another_config_is_shown_and_left_alone(files, tmp_path):
    output = tmp_path / "sft.jsonl"
    answer = {
        "id": "1",
        "premise": "p",
        "hypothesis": "h",
        "true_label": 1,
        "answered_by": "m",
        "prompt_name": "initial_generation",
        "prompt_sha256": "0",
        "raw_text": "{}",
        "thought_process": "T",
        "predicted_label": 1,
        "parse_status": "ok",
    }
    thoughts = tmp_path / "thoughts.jsonl"
    thoughts.write_text(json.dumps(answer) + "\n")
    arguments = ("prepare_sft_data", "--thoughts", str(thoughts), "--output-jsonl", str(output), "--ablation")
    assert run_job(*arguments, "correct_only").returncode == 0
    before = output.read_bytes()
    assert "ablation: 'correct_only' -> 'unmodified'" in refuse(run_job(*arguments, "unmodified"))
    assert output.read_bytes() == before


def test_a_base_that_does_not_match_the_adapter_is_refused(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": TINY_BASE}))
    card = {"base_model": "elsewhere", "base_fingerprint": "sampled:0123456789abcdef", "prompt_sha256": "0"}
    (adapter / "nli.json").write_text(json.dumps(card))
    (adapter / "adapter_model.safetensors").write_bytes(b"never read")
    message = refuse(run_job("run_inference", "--model", str(adapter), "--results-dir", str(tmp_path / "results")))
    assert "the adapter was trained on elsewhere (sampled:0123456789abcdef), not on" in message
