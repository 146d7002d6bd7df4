"""vLLM's engine in a process of its own, with a stand-in for vLLM there: answers come back, and whichever process ends takes the others along.

python -m pytest tests/test_vllm_process.py
"""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from nli.engines.interface import Decoding, EngineSettings, Request, answer_all, build_engine
from nli.engines.vllm.channel import Channel
from nli.engines.vllm.process import VLLMProcess
from nli.models.tokenizer import encode_prompt, load_tokenizer
from nli.runtime.errors import EngineDead, ModelError
from nli.task.prompts import render_student_prompt
from tests.conftest import REPOSITORY, TINY_BASE
from tests.test_vllm_engine import ANSWER, PROMPT, after_prompt

SETTINGS = EngineSettings(TINY_BASE, (), "bf16", "bf16", Decoding(max_new_tokens=64), 0, "cuda:0")
HELD = render_student_prompt("A held row.", "Nothing comes.")

PACKAGE = """
import multiprocessing, signal, subprocess, sys, time
from tests import vllm_standin

ids = {ids}
modules = vllm_standin.make_modules(lambda asked, adapter: ids)


def serve():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as vLLM does, which works in a main thread only
    import nli.engines.vllm.worker

    time.sleep(60)


class AsyncLLM(vllm_standin.AsyncLLM):
    def __init__(self, arguments):
        super().__init__(arguments)
        self.core = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
        self.core.start()
        subprocess.Popen(["sleep", "90"], close_fds=False, stdout=subprocess.DEVNULL)  # a helper that outlives this process

    async def generate(self, prompt, parameters, request_id, **options):
        self.hold = len(prompt["prompt_token_ids"]) == {held}
        async for output in super().generate(prompt, parameters, request_id, **options):
            yield output

    def shutdown(self, timeout=None):
        self.core.terminate()


modules["vllm.v1.engine.async_llm"].AsyncLLM = AsyncLLM
sys.modules.update(modules)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a package `vllm`, whose model writes ANSWER after every prompt but HELD."""
    tokenizer = load_tokenizer(TINY_BASE)
    folder = tmp_path_factory.mktemp("standin")
    (folder / "vllm").mkdir()
    ids = [*after_prompt(tokenizer, ANSWER), tokenizer.eos_token_id]
    held = len(encode_prompt(tokenizer, HELD))
    assert held != len(encode_prompt(tokenizer, PROMPT))
    (folder / "vllm/__init__.py").write_text(PACKAGE.format(ids=ids, held=held))
    return folder


@pytest.fixture
def start(package, monkeypatch):
    """Makes engines, and gives each with the number of its engine process; closes them."""
    monkeypatch.setenv("PYTHONPATH", str(package))
    engines = []

    def make() -> tuple[VLLMProcess, int]:
        engines.append(build_engine("vllm", SETTINGS))
        [core] = [child.pid for child in psutil.Process(engines[-1]._process.pid).children() if child.name() != "sleep"]
        return engines[-1], core

    yield make
    for engine in engines:
        engine.close()


def is_running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for_end(process: int, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(process)


def test_progress_bars_of_vllm_stay_out_of_the_log_unless_the_user_wants_them(start, monkeypatch):
    def read_setting(engine: VLLMProcess) -> str:
        return psutil.Process(engine._process.pid).environ()["TQDM_DISABLE"]

    assert read_setting(start()[0]) == "1"
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert read_setting(start()[0]) == "0"


def test_answers_figures_and_a_quiet_end(start, capfd):
    engine, core = start()
    capfd.readouterr()
    assert engine.description == "vllm 0.26.0" and isinstance(engine, VLLMProcess)
    answer, refused = answer_all(engine, [Request(PROMPT), Request("[INST] a [/INST] b [/INST]")])
    assert (answer.text, answer.finish_reason, answer.problem) == (ANSWER, "stop", "")
    assert answer.probability == pytest.approx(math.exp(-1) / (math.exp(-1) + math.exp(-3)))
    assert refused.text is None and "control token" in refused.problem

    answers: list[Future] = []
    threads = [
        threading.Thread(target=lambda: answers.extend([engine.submit(Request(PROMPT)) for _ in range(50)]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.result(60).text for answer in answers] == [ANSWER] * 200

    figures = engine.figures()
    assert (figures["compile_seconds"], figures["peak_memory_gb"], figures["batch_size"]) == (18.2, 71.3, 2048)
    assert figures["load_seconds"] > 0

    held = engine.submit(Request(HELD))
    time.sleep(0.2)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 12  # what hangs is killed after fifteen
    assert held.cancelled() and wait_for_end(core)
    with pytest.raises(EngineDead, match="closed"):
        engine.submit(Request(PROMPT))
    assert engine.figures()["peak_memory_gb"] == 71.3
    engine.close()
    assert capfd.readouterr().err == ""


def test_a_killed_process_is_raised_out_of_every_answer_and_takes_its_engine_along(start):
    engine, core = start()
    waiting = [engine.submit(Request(HELD)) for _ in range(3)]
    os.kill(engine._process.pid, signal.SIGKILL)
    for future in waiting:
        with pytest.raises(EngineDead, match="killed by SIGKILL"):
            future.result(60)
    with pytest.raises(EngineDead, match="killed by SIGKILL"):
        engine.submit(Request(PROMPT))
    assert wait_for_end(core)
    assert engine.figures()["batch_size"] == 2048


def test_an_engine_that_does_not_start_says_why(package, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(package))
    with pytest.raises(ModelError, match="no-such-folder: no tokenizer can be loaded"):
        VLLMProcess(EngineSettings("./no-such-folder", (), "bf16", "bf16", Decoding(), 0, "cuda:0"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ModelError, match=r"does not start with bf16: .*exit status 1"):
        VLLMProcess(SETTINGS)


def test_a_process_that_neither_answers_nor_ends_is_killed(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os, sys, time\nos.close(int(sys.argv[3]))\ntime.sleep(60)\n")
    script.chmod(0o755)
    monkeypatch.setattr("nli.engines.vllm.process._CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(ModelError, match=r"does not start with bf16: .*killed by SIGKILL"):
        VLLMProcess(SETTINGS)


def test_a_message_that_cannot_be_written_ends_the_channel(capfd):
    mine, theirs = (Channel(end) for end in socket.socketpair())
    mine.send("a")
    assert theirs.receive() == ["a"]
    mine.send(lambda: None)
    with pytest.raises(EOFError):
        theirs.receive()
    assert "Can't pickle" in capfd.readouterr().err


def test_the_process_leaves_with_its_status_whoever_is_gone():
    leave = [sys.executable, "-c", "from nli.engines.vllm.child import _leave; print('x'); _leave(3)"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        assert (
            subprocess.run(leave, stdout=output, cwd=REPOSITORY, env=environment, timeout=60, check=False).returncode
            == 3
        )


def test_a_killed_owner_takes_all_along(package):
    owner = f"""
from nli.engines.interface import Decoding, EngineSettings, build_engine
import sys, time
engine = build_engine("vllm", EngineSettings({TINY_BASE!r}, (), "bf16", "bf16", Decoding(), 0, "cuda:0"))
assert not {{"vllm", "torch", "transformers"}} & set(sys.modules)
print("ready", flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{REPOSITORY}"}
    process = subprocess.Popen(
        [sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment
    )
    shown = []
    while "ready\n" not in shown:
        shown.append(process.stdout.readline())
        assert shown[-1], "the owner ended before it was ready"
    process.kill()
    killed = time.monotonic()
    process.stdout.read()  # the other processes hold the pipe too, until they end
    assert time.monotonic() - killed < 30  # they would sleep for sixty
    process.wait()
