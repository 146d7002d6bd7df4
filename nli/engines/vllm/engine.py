"""vLLM's engine: rows join and leave the GPU's batch step by step, each as soon as there is room or its answer ends.

    settings = EngineSettings(base, adapters=("models/a",), precision="bf16", compute_dtype="bf16", decoding=Decoding(), batch_size=0, device="cuda:0")
    engine = VLLMEngine(settings)
    engine.submit(Request("[INST] Premise: …[/INST]", adapter="models/a")).result()
    -> Generation(text='{"thought_process": …}', finish_reason="stop", num_prompt_tokens=61, num_completion_tokens=38, problem="", probability=0.98)

Tokens are made and read here, once a row: vLLM sees ids only and does nothing per token for the text. A label's probability is a second request, of one
token, over the row's own ids up to the label; the prefix cache still holds them. vLLM's engine is a process of its own, which ends with this one. This one is
not the worker's either: nli.engines.vllm.process starts nli.engines.vllm.child, which holds this class.
"""

import asyncio
import contextlib
import itertools
import math
import os
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nli.engines.interface import EngineSettings, Generation, Request
from nli.engines.vllm.adapters import describe_adapter, prepare_adapter
from nli.engines.vllm.setup import (
    OWNER,
    USUAL_LENGTH,
    build_arguments,
    choose_start,
    register_classes,
    set_environment,
    share_of_memory,
    warm_up_with,
)
from nli.models.label_tokens import find_label, force_label, read_completion, thought_so_far
from nli.models.tokenizer import encode_prompt, load_tokenizer
from nli.runtime.errors import DataError, EngineDead, ModelError
from nli.task.parsing import ParseStatus, parse_answer
from nli.task.prompts import render_completion

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

_CLOSE_SECONDS = 10.0
_STOP_SECONDS = 2.0  # for vLLM's process to end by itself; what it holds goes back either way


class VLLMEngine:
    """Answers requests with vLLM on one GPU."""

    def __init__(self, settings: EngineSettings) -> None:
        started = time.monotonic()
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.base)
        set_environment()
        import vllm

        self.description = f"vllm {vllm.__version__}"
        self._adapters_folder = tempfile.TemporaryDirectory(prefix="nli-adapters-")
        self._numbers = itertools.count()
        self._answers: set[asyncio.Task] = set()
        self._engine = None
        self._report: dict = {"peak_memory_gb": None, "compile_seconds": None}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        self._load_seconds = time.monotonic() - started
        print(
            f"model: {settings.base}, {settings.precision}, {self.description}, on {settings.device}, ready in {self._load_seconds:.1f} s",
            flush=True,
        )

    def submit(self, request: Request) -> Future[Generation]:
        """The answer to come, from any thread."""
        if self._engine is None:
            raise EngineDead("the engine is closed")
        try:
            prompt = encode_prompt(self.tokenizer, request.prompt)
        except Exception as error:  # whatever is wrong with one prompt concerns no other
            refused: Future[Generation] = Future()
            refused.set_result(_failed(str(error) if isinstance(error, DataError) else _reason(error)))
            return refused
        return asyncio.run_coroutine_threadsafe(self._answer(request, prompt), self._loop)

    def figures(self) -> dict:
        """Load, compile and memory figures; those that only vLLM's own process knows are None once it is gone."""
        if self._engine is not None and not self._engine.errored:
            with contextlib.suppress(Exception):  # a figure is not worth a failure
                self._report = self._wait(self._engine.collective_rpc("report_figures", timeout=30.0))[0]
        return {"load_seconds": self._load_seconds, **self._report, "batch_size": self._batch_size}

    def close(self) -> None:
        """End vLLM's process, which gives the GPU's memory back, and whatever is still asked of it."""
        if self._loop.is_closed():
            return
        try:
            with contextlib.suppress(TimeoutError):
                self._wait(self._stop(), timeout=3 * _CLOSE_SECONDS)
        finally:
            self._engine = None
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_SECONDS)
            if not self._thread.is_alive():
                self._loop.close()
            self._adapters_folder.cleanup()

    def _start(self) -> None:
        from transformers import AutoConfig

        settings = self.settings
        shapes, folders = [], []
        for number, folder in enumerate(settings.adapters):
            folders.append(
                prepare_adapter(folder, settings.base, os.path.join(self._adapters_folder.name, str(number)))
            )
            shapes.append(describe_adapter(folders[-1]))
        try:
            config = AutoConfig.from_pretrained(settings.base)
        except (OSError, ValueError) as error:
            raise ModelError(f"{settings.base}: the model cannot be loaded ({_reason(error)}).") from None
        longest = getattr(config, "max_position_embeddings", USUAL_LENGTH)
        arguments = build_arguments(settings, shapes, longest, share_of_memory(settings.device))
        self._longest, self._longest_of_model = arguments["max_model_len"], longest
        self._batch_size = arguments["max_num_seqs"]
        register_classes(config.architectures or ())
        choose_start()
        decoding = settings.decoding
        reads_labels = decoding.label_probability or decoding.force_label or decoding.no_cot
        warm_up_with(
            self._parameters(
                temperature=decoding.temperature, max_tokens=2, logprob_token_ids=[0, 1] if reads_labels else None
            )
        )
        from vllm.lora.request import LoRARequest

        self._loras = {
            folder: LoRARequest(lora_name=folder, lora_int_id=number, lora_path=os.path.abspath(prepared))
            for number, (folder, prepared) in enumerate(zip(settings.adapters, folders, strict=True), 1)
        }
        os.environ[OWNER] = str(os.getpid())
        try:
            self._engine = self._wait(self._launch(arguments))
        except Exception as error:
            cure = (
                "vLLM's own lines above say why. If it is the GPU's memory: set a smaller batch_size, take precision fp8 or nf4, "
                "or end the process that uses the GPU too."
            )
            raise ModelError(
                f"{settings.base}: vLLM does not start with {settings.precision} ({_reason(error)}). {cure}"
            ) from error
        finally:
            del os.environ[OWNER]
        for folder, lora in self._loras.items():
            try:
                self._wait(self._engine.add_lora(lora))
            except Exception as error:
                cure = "Take engine transformers, or merge the adapter with export and run what comes out."
                raise ModelError(
                    f"{folder}: vLLM cannot put the adapter on {settings.base} ({_reason(error)}). {cure}"
                ) from error

    async def _launch(self, arguments: dict) -> Any:
        """vLLM's engine, made on the loop that it will run on."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    def _wait(self, work: Coroutine, timeout: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    async def _stop(self) -> None:
        await _cancel(self._answers)  # while vLLM can still be told so
        if self._engine is not None:
            self._engine.shutdown(timeout=_STOP_SECONDS)
        await _cancel(asyncio.all_tasks() - {asyncio.current_task()})

    async def _answer(self, request: Request, prompt: list[int]) -> Generation:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        task = asyncio.current_task()
        self._answers.add(task)
        try:
            return await (
                self._label_only(request, prompt) if self.settings.decoding.no_cot else self._write(request, prompt)
            )
        except EngineDeadError as error:
            raise EngineDead(f"vLLM's engine has ended ({_reason(error)}). Its own lines above say why.") from None
        except DataError as error:
            return _failed(str(error), len(prompt))
        except ValueError as error:
            return _failed(f"vLLM refuses this row ({_reason(error)})", len(prompt))
        except Exception as error:  # whatever it is, the other rows go on, unless the engine does not
            reason = _reason(error.__cause__ if isinstance(error, EngineGenerateError) and error.__cause__ else error)
            if self._engine is None or self._engine.errored:
                raise EngineDead(f"vLLM's engine has ended ({reason}). Its own lines above say why.") from None
            return _failed(f"vLLM failed on this row ({reason})", len(prompt))
        finally:
            self._answers.discard(task)

    async def _write(self, request: Request, prompt: list[int]) -> Generation:
        """An answer, its label's probability and, where the config asks for it, the label that it lacks."""
        decoding = self.settings.decoding
        if len(prompt) >= self._longest:
            return self._too_long(prompt)
        output = await self._ask(request, prompt, self._sampling(request, self._longest - len(prompt)))
        completion = output.outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            return _failed(f"vLLM ended this row with {completion.finish_reason}", len(prompt))
        ids = list(completion.token_ids)
        written = ids[:-1] if completion.finish_reason == "stop" else ids  # the token that stopped it is the last one
        text = read_completion(self.tokenizer, written)
        answer = Generation(text, completion.finish_reason, len(prompt), len(ids))
        if decoding.force_label and parse_answer(text, completion.finish_reason).status is not ParseStatus.OK:
            return await self._force(request, thought_so_far(text), answer) or answer
        if decoding.label_probability and (place := find_label(self.tokenizer, written, text)) is not None:
            return replace(
                answer, probability=await self._read_label(request, prompt + written[: place.index], place.tokens)
            )
        return answer

    async def _label_only(self, request: Request, prompt: list[int]) -> Generation:
        return await self._force(request, "", Generation(None, "stop", len(prompt), 1)) or self._too_long(prompt)

    async def _force(self, request: Request, thought: str, written: Generation) -> Generation | None:
        """What was written, completed with the likelier label; None where the prompt leaves no room for one."""
        ids, tokens, thought = force_label(self.tokenizer, request.prompt, thought, self._longest - 1)
        if len(ids) >= self._longest:
            return None
        probability = await self._read_label(request, ids, tokens)
        shown = probability if self.settings.decoding.label_probability else None
        return replace(
            written, text=render_completion(thought, int(probability > 0.5)), probability=shown, label_forced=True
        )

    def _too_long(self, prompt: list[int]) -> Generation:
        problem = f"the prompt has {len(prompt)} tokens, which leaves no room for an answer within the engine's {self._longest}"
        if self._longest_of_model > self._longest:
            problem += f"; engine transformers goes up to the model's {self._longest_of_model}"
        return _failed(problem, len(prompt))

    async def _read_label(self, request: Request, ids: list[int], tokens: tuple[int, int]) -> float:
        """P(label 1) where the label's token follows `ids`, by the model's own log-probabilities of the two."""
        output = await self._ask(
            request, ids, self._parameters(temperature=0.0, max_tokens=1, logprob_token_ids=list(tokens)), priority=-1
        )
        no, yes = (output.outputs[0].logprobs[0][token].logprob for token in tokens)
        if not math.isfinite(yes - no):
            raise DataError("the model's logits are not finite numbers")
        return label_probability(no, yes)

    def _sampling(self, request: Request, room: int) -> "SamplingParams":
        temperature, fixed = self.settings.decoding.temperature, request.num_tokens
        return self._parameters(
            temperature=temperature,
            seed=request.seed % 2**63 if temperature > 0 else None,  # vLLM keeps it in 64 bits, and takes -1 for none
            max_tokens=min(room, fixed if fixed is not None else self.settings.decoding.max_new_tokens),
            ignore_eos=fixed is not None,
            stop_token_ids=[]
            if fixed is not None
            else [self.tokenizer.eos_token_id],  # nothing else stops: vLLM was given no tokenizer
        )

    def _parameters(self, **values) -> "SamplingParams":
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True, **values)

    async def _ask(
        self, request: Request, ids: list[int], parameters: "SamplingParams", priority: int = 0
    ) -> "RequestOutput":
        from vllm.inputs import tokens_input

        if request.adapter is not None and request.adapter not in self._loras:
            raise DataError(f"the adapter {request.adapter} is not among those that the engine was started with")
        lora = self._loras[request.adapter] if request.adapter is not None else None
        outputs = self._engine.generate(
            tokens_input(ids), parameters, f"row-{next(self._numbers)}", lora_request=lora, priority=priority
        )
        return [output async for output in outputs][-1]  # FINAL_ONLY: there is one


def label_probability(no: float, yes: float) -> float:
    """P(label 1) of the log-probabilities of the tokens of label 0 and label 1: the softmax over the two.

    label_probability(-2.0, -2.0)  ->  0.5
    """
    ratio = math.exp(-abs(yes - no))
    return 1 / (1 + ratio) if yes >= no else ratio / (1 + ratio)


async def _cancel(tasks: Iterable[asyncio.Task]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)


def _failed(problem: str, num_prompt: int | None = None) -> Generation:
    return Generation(None, None, num_prompt, None, problem)


def _reason(error: BaseException) -> str:
    """What an error says, on one line: vLLM's say what matters on their second or third."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
