"""vLLM's engine against a stand-in for vLLM: what it asks, what it makes of the replies, and how it fails.

python -m pytest tests/test_vllm_engine.py
"""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nli.engines.interface import Decoding, EngineSettings, Request, answer_all
from nli.engines.vllm.adapters import AdapterShape, describe_adapter, prepare_adapter, read_embedding, smallest_rank
from nli.engines.vllm.engine import VLLMEngine, label_probability
from nli.engines.vllm.setup import (
    ENVIRONMENT,
    build_arguments,
    capture_sizes,
    choose_start,
    read_gpu_memory,
    register_classes,
    share_of_memory,
)
from nli.models.tokenizer import encode_prompt, load_tokenizer
from nli.runtime.errors import EngineDead, ModelError
from nli.task.prompts import render_completion, render_student_prompt
from tests import vllm_standin
from tests.conftest import REPOSITORY, TINY_BASE

PROMPT = render_student_prompt("Two dogs ran.", "Animals moved.")
ANSWER = render_completion("Dogs are animals.", 1)
SETTINGS = EngineSettings(TINY_BASE, (), "bf16", "bf16", Decoding(max_new_tokens=64), 0, "cuda:0")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_BASE)


@pytest.fixture
def standin(monkeypatch, tokenizer):
    """A vLLM whose model writes ANSWER after every prompt."""
    monkeypatch.setattr("nli.engines.vllm.setup.read_gpu_memory", lambda device: None)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    return vllm_standin.install(
        monkeypatch, lambda ids, adapter: [*after_prompt(tokenizer, ANSWER), tokenizer.eos_token_id]
    )


@pytest.fixture
def start(standin):
    """Makes engines and closes them."""
    engines = []

    def make(**changes) -> VLLMEngine:
        decoding = {name: changes.pop(name) for name in list(changes) if name in Decoding.__dataclass_fields__}
        engines.append(VLLMEngine(replace(SETTINGS, decoding=replace(SETTINGS.decoding, **decoding), **changes)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def after_prompt(tokenizer, completion: str) -> list[int]:
    """The ids of a completion as they follow the prompt."""
    return tokenizer.encode(f"{PROMPT} {completion}", add_special_tokens=False)[
        len(encode_prompt(tokenizer, PROMPT)) - 1 :
    ]


def make_adapter(folder, rank: int = 8, modules: tuple[str, ...] = ("q_proj", "v_proj"), **extra: torch.Tensor) -> str:
    folder.mkdir(parents=True)
    weights = {}
    for module in modules:
        for letter, shape in (("A", (rank, 192)), ("B", (192, rank))):
            weights[f"base_model.model.model.layers.0.self_attn.{module}.lora_{letter}.weight"] = torch.zeros(shape)
    weights |= {f"base_model.model.{name.replace('__', '.')}.weight": tensor for name, tensor in extra.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": rank, "target_modules": list(modules), "modules_to_save": ["lm_head"] if extra else None})
    )
    return str(folder)


def test_a_row_is_asked_as_ids_and_answered_as_text_without_its_end(start, standin, tokenizer):
    engine = start(label_probability=False)
    answer = engine.submit(Request(PROMPT)).result(10)
    assert (answer.text, answer.finish_reason, answer.problem, answer.probability) == (ANSWER, "stop", "", None)
    assert (answer.num_prompt_tokens, answer.num_completion_tokens) == (
        len(encode_prompt(tokenizer, PROMPT)),
        len(after_prompt(tokenizer, ANSWER)) + 1,
    )
    [seen] = standin.engine.seen
    assert seen.ids == encode_prompt(tokenizer, PROMPT)
    assert (seen.parameters.temperature, seen.parameters.max_tokens, seen.parameters.seed) == (0.0, 64, None)
    assert seen.parameters.stop_token_ids == [tokenizer.eos_token_id]
    assert engine.description == "vllm 0.26.0"


def test_a_labels_probability_is_a_second_request_that_ends_before_the_label(start, standin, tokenizer):
    answer = start().submit(Request(PROMPT)).result(10)
    assert answer.text == ANSWER and not answer.label_forced
    assert answer.probability == pytest.approx(math.exp(-1) / (math.exp(-1) + math.exp(-3)))
    first, second = standin.engine.seen
    zero, one = tokenizer.convert_tokens_to_ids(["0", "1"])
    label = len(first.ids) + after_prompt(tokenizer, ANSWER).index(one)
    assert second.ids == (first.ids + after_prompt(tokenizer, ANSWER))[:label]
    assert (second.parameters.logprob_token_ids, second.parameters.max_tokens, second.parameters.temperature) == (
        [zero, one],
        1,
        0.0,
    )
    assert second.priority < first.priority


@pytest.mark.parametrize("no_cot", [False, True])
def test_a_prompt_longer_than_the_engine_s_room_but_not_than_the_model_s_is_told_what_takes_it(
    start, monkeypatch, no_cot
):
    long = Request(render_student_prompt("Two dogs ran. " * 60, "Animals moved."))
    assert start(no_cot=no_cot).submit(long).result(10).problem == ""
    monkeypatch.setattr("nli.engines.vllm.setup.USUAL_LENGTH", 100)
    monkeypatch.setattr("nli.engines.vllm.setup.PROMPT_ROOM", 100)
    problem = start(no_cot=no_cot).submit(long).result(10).problem
    assert problem.endswith(
        "no room for an answer within the engine's 164; engine transformers goes up to the model's 512"
    )


def test_logits_that_are_no_numbers_are_no_probability(start, standin):
    standin.logprobs = (math.nan, -1.0)
    answer = start().submit(Request(PROMPT)).result(10)
    assert (answer.text, answer.problem) == (None, "the model's logits are not finite numbers")


def test_a_text_without_a_label_has_no_probability_and_no_second_request(start, standin, tokenizer):
    standin.write = lambda ids, adapter: after_prompt(tokenizer, "Dogs are animals.")
    answer = start().submit(Request(PROMPT)).result(10)
    assert (answer.text, answer.finish_reason, answer.probability) == ("Dogs are animals.", "length", None)
    assert len(standin.engine.seen) == 1


@pytest.mark.parametrize(("logprobs", "label"), [((-3.0, -1.0), 1), ((-1.0, -3.0), 0)])
def test_an_answer_that_cannot_be_parsed_is_completed_with_the_likelier_label(
    start, standin, tokenizer, logprobs, label
):
    standin.write = lambda ids, adapter: after_prompt(tokenizer, '{"thought_process": "Dogs are animals; so')
    standin.logprobs = logprobs
    answer = start(force_label=True).submit(Request(PROMPT)).result(10)
    assert json.loads(answer.text) == {"thought_process": "Dogs are animals; so", "predicted_label": label}
    assert answer.label_forced and answer.probability == pytest.approx(label_probability(*logprobs))
    first, second = standin.engine.seen
    assert second.ids[: len(first.ids)] == first.ids and tokenizer.decode(second.ids).endswith('"predicted_label": ')


def test_an_answer_that_parses_keeps_its_own_label(start):
    answer = start(force_label=True).submit(Request(PROMPT)).result(10)
    assert answer.text == ANSWER and not answer.label_forced and answer.probability is not None


def test_without_a_thought_only_the_label_is_asked(start, standin):
    answer = start(no_cot=True).submit(Request(PROMPT)).result(10)
    assert answer.text == render_completion("", 1) and answer.label_forced
    assert answer.num_completion_tokens == 1
    assert [seen.parameters.max_tokens for seen in standin.engine.seen] == [1]
    assert standin.engine.arguments.enable_prefix_caching is False


def test_samples_carry_their_seed_and_a_benchmark_its_length(start, standin):
    engine = start(temperature=0.7, label_probability=False)
    answer_all(engine, [Request(PROMPT, seed=3), Request(PROMPT, num_tokens=7)])
    by_seed = {seen.parameters.seed: seen.parameters for seen in standin.engine.seen}
    assert (by_seed[3].temperature, by_seed[3].max_tokens, by_seed[3].ignore_eos) == (0.7, 64, False)
    assert (by_seed[0].max_tokens, by_seed[0].ignore_eos, by_seed[0].stop_token_ids) == (7, True, [])


def test_each_row_gets_the_adapter_that_it_names(start, standin, tmp_path):
    first, second = make_adapter(tmp_path / "a", 8), make_adapter(tmp_path / "b", 24, ("o_proj", "q_proj"))
    engine = start(adapters=(first, second), label_probability=False)
    arguments = standin.engine.arguments
    assert (arguments.max_loras, arguments.max_lora_rank, arguments.lora_target_modules) == (
        2,
        32,
        ["o_proj", "q_proj", "v_proj"],
    )
    assert [(lora.lora_int_id, lora.lora_path) for lora in standin.engine.loras] == [(1, first), (2, second)]
    answer_all(engine, [Request(PROMPT, adapter=second), Request(PROMPT), Request(PROMPT, adapter=first)])
    assert [seen.lora.lora_int_id if seen.lora else None for seen in standin.engine.seen] == [2, None, 1]
    assert "not among those" in engine.submit(Request(PROMPT, adapter="c")).result(10).problem


def test_a_refused_row_is_a_problem_and_the_others_are_answered(start, standin):
    engine = start(label_probability=False)
    control, long, good = answer_all(
        engine,
        [
            Request("[INST] a [/INST] b [/INST]"),
            Request(render_student_prompt("dog " * 600, "Animals moved.")),
            Request(PROMPT),
        ],
    )
    assert control.text is None and "control token" in control.problem
    assert engine.submit(Request("[INST] \ud800 [/INST]")).result(10).problem.startswith("TypeError: ")
    assert long.text is None and "512" in long.problem
    assert good.text == ANSWER
    standin.write = lambda ids, adapter: ValueError("no such thing")
    assert engine.submit(Request(PROMPT)).result(10).problem == "vLLM refuses this row (ValueError: no such thing)"
    standin.write = lambda ids, adapter: KeyError("odd")
    assert engine.submit(Request(PROMPT)).result(10).problem == "vLLM failed on this row (KeyError: 'odd')"


def test_a_dead_engine_is_raised_out_of_every_answer(start, standin):
    engine = start()
    standin.engine.hold = True
    waiting = [engine.submit(Request(PROMPT)) for _ in range(3)]
    standin.write = lambda ids, adapter: vllm_standin.EngineDeadError()
    standin.engine.hold = False
    waiting.append(engine.submit(Request(PROMPT)))
    for future in waiting:
        with pytest.raises(EngineDead, match="engine has ended"):
            future.result(10)
    assert engine.figures()["peak_memory_gb"] is None


def test_figures_come_from_the_engines_own_process(start):
    figures = start(batch_size=16).figures()
    assert figures["load_seconds"] > 0
    assert (figures["compile_seconds"], figures["peak_memory_gb"], figures["batch_size"]) == (18.2, 71.3, 16)


def test_closing_ends_the_engine_and_what_still_runs(start, standin):
    engine = start()
    standin.engine.hold = True
    waiting = engine.submit(Request(PROMPT))
    while not standin.engine.seen:
        time.sleep(0.01)
    engine.close()
    assert waiting.cancelled() and standin.engine.closed
    engine.close()
    with pytest.raises(EngineDead, match="closed"):
        engine.submit(Request(PROMPT))


def test_an_engine_that_does_not_start_says_what_to_set(start, standin):
    standin.start_error = RuntimeError("Engine core initialization failed. See root cause above.")
    with pytest.raises(ModelError, match=r"does not start with bf16 .*batch_size.*precision"):
        start()
    assert "NLI_ENGINE_OWNER" not in os.environ


def test_vllm_is_given_the_models_class_so_that_it_need_not_look_for_it(start, standin):
    start()
    assert standin.registry.models["MistralForCausalLM"] is OrderedDict
    lost = standin.registry.models["LostForCausalLM"]
    register_classes(["LostForCausalLM", "MistralForCausalLM"])
    assert standin.registry.models["LostForCausalLM"] is lost


class Driver:
    """The CUDA driver, as far as a process asks it for its devices."""

    def __init__(self, status) -> None:
        self.status = status

    def cuDeviceGetCount(self, count):
        return self.status


@pytest.mark.parametrize(("status", "method"), [(None, "fork"), (3, "fork"), (0, "spawn"), (100, "spawn")])
def test_vllm_may_fork_unless_cuda_is_in_use(monkeypatch, status, method):
    def find(name):
        if status is None:
            raise OSError(f"{name}: cannot open shared object file")
        return Driver(status)

    monkeypatch.setattr("ctypes.CDLL", find)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    choose_start()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == method


def test_an_adapter_that_vllm_refuses_is_named_at_the_start(start, standin, tmp_path):
    standin.lora_error = Exception("vLLM does not yet support DoRA.")
    with pytest.raises(ModelError, match=r"a: vLLM cannot put the adapter .*DoRA.*engine transformers"):
        start(adapters=(make_adapter(tmp_path / "a"),))


def test_arguments_follow_the_settings():
    arguments = build_arguments(SETTINGS, [], 32768, 0.9)
    assert (arguments["max_num_seqs"], arguments["max_num_batched_tokens"], arguments["max_model_len"]) == (
        2048,
        16384,
        4096,
    )
    assert arguments["enable_prefix_caching"] and "enable_lora" not in arguments
    small = build_arguments(
        replace(SETTINGS, batch_size=2, precision="nf4", device="cuda:1"), [AdapterShape(64, ("q_proj",))], 512, 0.5
    )
    assert (small["max_num_seqs"], small["max_num_batched_tokens"], small["max_model_len"]) == (2, 1024, 512)
    assert (small["quantization"], small["device_ids"], small["max_lora_rank"]) == ("bitsandbytes", [1], 64)
    assert arguments["kv_cache_dtype"] == "auto"  # the model's own, which is bf16
    assert build_arguments(replace(SETTINGS, kv_cache_dtype="fp8"), [], 512, 0.9)["kv_cache_dtype"] == "fp8"
    assert arguments["hf_overrides"] == {"head_dtype": "float32"}
    assert arguments["compilation_config"] == {"mode": "none", "cudagraph_mode": "full_decode_only"}
    with pytest.raises(ModelError, match="fp32"):
        build_arguments(replace(SETTINGS, precision="fp32"), [], 512, 0.9)
    with pytest.raises(ModelError, match="computes in bf16"):
        build_arguments(replace(SETTINGS, compute_dtype="fp32"), [], 512, 0.9)


def test_every_batch_size_runs_in_a_graph_with_little_padding():
    assert capture_sizes(1) == [1] and capture_sizes(3) == [1, 2, 3]
    sizes = capture_sizes(2048)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 2048 and len(sizes) == 40
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))


def test_memory_that_others_use_is_left_to_them(monkeypatch):
    used = {"cuda:0": (80000, 500), "cuda:1": (80000, 40000), "cuda:2": (80000, 79000), "cuda:3": None}
    monkeypatch.setattr("nli.engines.vllm.setup.read_gpu_memory", used.get)
    assert [share_of_memory(device) for device in ("cuda:0", "cuda:1", "cuda:3")] == [0.9, 0.47, 0.9]
    with pytest.raises(ModelError, match="1,000 of 80,000 MiB free"):
        share_of_memory("cuda:2")


def test_a_driver_that_does_not_answer_tells_nothing_of_the_memory(monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("nli.engines.vllm.setup.shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("nli.engines.vllm.setup.subprocess.run", hang)
    assert read_gpu_memory("cuda:0") is None


def test_an_adapters_embeddings_are_left_out_where_they_are_the_bases(tmp_path):
    own = read_embedding(TINY_BASE, "lm_head")
    resized = torch.cat([own, torch.ones(3, own.shape[1], dtype=own.dtype)])
    folder = make_adapter(
        tmp_path / "a", lm_head=resized, model__embed_tokens=read_embedding(TINY_BASE, "embed_tokens").float()
    )
    copy = prepare_adapter(folder, TINY_BASE, str(tmp_path / "copies"))
    assert copy == str(tmp_path / "copies/a") and len(load_file(tmp_path / "copies/a/adapter_model.safetensors")) == 4
    assert json.loads((tmp_path / "copies/a/adapter_config.json").read_text())["modules_to_save"] is None
    assert describe_adapter(copy) == AdapterShape(8, ("q_proj", "v_proj"))
    plain = make_adapter(tmp_path / "b")
    assert prepare_adapter(plain, TINY_BASE, str(tmp_path / "copies")) == plain


def test_trained_embeddings_and_other_full_weights_are_refused(tmp_path):
    trained = make_adapter(tmp_path / "a", lm_head=read_embedding(TINY_BASE, "lm_head") + 1)
    with pytest.raises(ModelError, match=r"lm_head differs from the base's.*engine transformers"):
        prepare_adapter(trained, TINY_BASE, str(tmp_path / "copies"))
    other = make_adapter(tmp_path / "b", model__norm=torch.ones(192))
    with pytest.raises(ModelError, match=r"model\.norm\.weight, a full weight"):
        prepare_adapter(other, TINY_BASE, str(tmp_path / "copies"))
    assert [smallest_rank([rank]) for rank in (1, 4, 32, 100)] == [1, 8, 32, 128]
    with pytest.raises(ModelError, match="rank 1000"):
        smallest_rank([8, 1000])


def test_the_engines_process_ends_with_its_killed_owner():
    """The owner starts a process that imports what vLLM's engine imports, and is killed."""
    engine = "import nli.engines.vllm.worker, time; print('ready', flush=True); time.sleep(60)"
    owner = (
        "import os, subprocess, sys, time; os.environ['NLI_ENGINE_OWNER'] = str(os.getpid())\n"
        f"subprocess.Popen([sys.executable, '-c', {engine!r}]); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    killed = time.monotonic()
    assert process.stdout.read() == ""  # the child holds the pipe too, until it ends
    assert time.monotonic() - killed < 20
    process.wait()
