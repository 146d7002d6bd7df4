"""The engine that needs nothing but transformers: rows share a batch, come in when there is room and leave it when they have ended.

    engine = TransformersEngine(EngineSettings(base, (adapter,), "nf4", "bf16", Decoding(max_new_tokens=512), batch_size=0, device="cuda:0"))
    futures = [engine.submit(Request(prompt, adapter)) for prompt in prompts]

One thread drains what was submitted, sorts it by adapter and length, and writes; a future is resolved when its own row ends. A batch has one adapter. Weights
in NF4 are multiplied out once after loading where there is room: bitsandbytes would do it in every step.
"""

import queue
import threading
import time
from bisect import insort
from concurrent.futures import Future

from nli.engines.interface import EngineSettings, Generation, Request
from nli.engines.transformers.kv_slots import Slots
from nli.engines.transformers.rows import (
    Row,
    admit,
    choose_tokens,
    draw,
    fail,
    finish,
    finish_label,
    list_partners,
    take_longest,
)
from nli.models.load import load_with_adapters, read_longest
from nli.models.out_of_memory import Failure, attempt
from nli.models.tokenizer import first_line, load_tokenizer
from nli.runtime.errors import DataError, EngineDead

GPU_ROWS, CPU_ROWS = 256, 32
"""rows at once where the settings leave it open"""
GPU_TOKENS, CPU_TOKENS = 32768, 4096
"""tokens of prompts, padding included, in one forward pass"""
GPU_STEPS, CPU_STEPS = 8, 1
"""steps between two looks at which rows have ended: each look waits for the GPU"""


class TransformersEngine:
    """Engine over transformers; `nli.engines.interface.Engine` says what its methods do."""

    def __init__(self, settings: EngineSettings) -> None:
        import transformers

        started = time.monotonic()
        self.decoding, self.device = settings.decoding, settings.device
        on_gpu = self.device.startswith("cuda")
        self.tokenizer = load_tokenizer(settings.base)
        self.whole, self.adapters = load_with_adapters(
            settings.base, settings.adapters, settings.precision, settings.compute_dtype, settings.device
        )
        self.model = self.whole.get_base_model() if settings.adapters else self.whole
        self.adapter: str | None = ""  # in use: none chosen yet
        self.batch_size = settings.batch_size or (GPU_ROWS if on_gpu else CPU_ROWS)
        self.most_tokens, self.steps = (GPU_TOKENS, GPU_STEPS) if on_gpu else (CPU_TOKENS, CPU_STEPS)
        self.longest = read_longest(self.model)
        self.slots = Slots(self.model, self.longest)
        self.partners = list_partners(self.tokenizer, 0, self.device)
        self.description = f"transformers {transformers.__version__}, {self.model.config._attn_implementation}"
        self.counts = {"rows": 0, "completion_tokens": 0, "steps": 0, "step_rows": 0, "labels_forced": 0}
        self.load_seconds = round(time.monotonic() - started, 2)

        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.dead: EngineDead | None = None
        self.waiting: dict[str | None, list[Row]] = {name: [] for name in self.adapters}  # sorted by length
        self.labels: dict[str | None, list[Row]] = {name: [] for name in self.adapters}
        self.apart: list[list[Row]] = []  # groups with a row that breaks, each to be tried without others
        self.active: list[Row] = []  # by slot
        self.thread = threading.Thread(target=self._work, name="transformers engine", daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> Future[Generation]:
        future: Future[Generation] = Future()
        with self.lock:
            if self.dead:
                future.set_exception(self.dead)
            else:
                self.inbox.put((request, future))
        return future

    def figures(self) -> dict:
        import torch

        peak = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2) if self.device.startswith("cuda") else None
        return {
            "load_seconds": self.load_seconds,
            "compile_seconds": None,
            "peak_memory_gb": peak,
            "batch_size": self.batch_size,
            **self.counts,
        }

    def close(self) -> None:
        self._end(EngineDead("The engine was closed."))
        self.inbox.put(None)
        self.thread.join()
        if self.slots is not None:
            self.slots.close()
        self.model = self.whole = self.slots = None
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def _work(self) -> None:
        """What the thread does."""
        import torch

        try:
            if self.device.startswith("cuda"):
                torch.cuda.set_device(self.device)
            with torch.inference_mode():
                while self._take():
                    self._turn()
        except EngineDead as error:
            self._end(error)
        except BaseException as error:  # nobody else would ever resolve the futures
            self._end(EngineDead(f"The transformers engine failed: {type(error).__name__}: {first_line(error)}"))
        groups = (self.active, *self.waiting.values(), *self.labels.values(), *self.apart)
        futures = [row.future for rows in groups for row in rows]
        while not self.inbox.empty():
            futures += [item[1] for item in [self.inbox.get()] if item is not None]
        for future in futures:
            if not future.done():
                future.set_exception(self.dead)

    def _end(self, error: EngineDead) -> None:
        with self.lock:
            self.dead = self.dead or error

    def _take(self) -> bool:
        """Take in what was submitted, and wait for it where there is nothing else to do; False when the engine is to end."""
        taken = False
        while not self.inbox.empty() or not (
            taken or self.active or self.apart or any(self.waiting.values()) or any(self.labels.values())
        ):
            item = self.inbox.get()
            if item is None:
                return False
            taken = True
            if item[1].set_running_or_notify_cancel():
                self._admit(*item)
        return self.dead is None

    def _admit(self, request: Request, future: Future) -> None:
        try:
            if request.adapter not in self.adapters:
                raise DataError(f"the adapter {request.adapter} is none of those that the engine was started with")
            self._queue([admit(self.tokenizer, request, future, self.decoding, self.longest)])
        except Exception as error:  # whatever is wrong with one prompt concerns no other
            future.set_result(Generation(None, None, None, None, first_line(error)))

    def _queue(self, rows: list[Row]) -> None:
        for row in rows:
            insort(
                (self.labels if row.label_tokens else self.waiting)[row.request.adapter],
                row.restart(),
                key=lambda row: len(row.ids),
            )

    def _turn(self) -> None:
        """Read prompts where there is room for enough of them, else write some tokens of every row."""
        if not self.active:
            if self.apart:
                self._try_apart(self.apart.pop())
                return
            self._use_adapter(
                max(
                    self.adapters,
                    key=lambda name: (len(self.waiting[name]) + len(self.labels[name]), name == self.adapter),
                )
            )
        waiting, labels = self.waiting[self.adapter], self.labels[self.adapter]
        free = self.batch_size - len(self.active)
        few = max(1, self.batch_size // 8)  # to read fewer prompts takes a GPU as long
        if waiting and free >= min(few, len(waiting)) and not self.apart:
            self._read(take_longest(waiting, free, self.most_tokens))
        elif labels and (len(labels) >= few or not self.active):
            self._read_labels(take_longest(labels, self.batch_size, self.most_tokens))
        elif self.active:
            self._write()

    def _try_apart(self, rows: list[Row]) -> None:
        """Bring a group with a row that breaks to its end, with no others beside it."""
        self._use_adapter(rows[0].request.adapter)
        (self._read_labels if rows[0].label_tokens else self._read)(rows)
        while self.active:
            self._write()

    def _use_adapter(self, name: str | None) -> None:
        if self.whole is not self.model and name != self.adapter:
            if name is None:
                self.whole.base_model.disable_adapter_layers()
            else:
                self.whole.base_model.enable_adapter_layers()
                self.whole.set_adapter(self.adapters[name])
        self.adapter = name

    def _choose(self, logits, draws) -> list:
        if len(self.partners) != logits.shape[-1]:
            self.partners = list_partners(self.tokenizer, logits.shape[-1], self.device)
        return list(choose_tokens(logits, self.partners, self.decoding.temperature, draws))

    def _read(self, rows: list[Row]) -> None:
        """Read prompts into free slots, and write their first tokens."""

        def forward() -> list:
            return [
                tensor.tolist()
                for tensor in self._choose(self.slots.prefill([row.ids for row in rows]), draw(rows, 1, self.device)[0])
            ]

        first, failure = attempt(forward, self.device)
        if failure:
            self._mend(failure, rows)
            return
        self.active += rows
        self._collect([first], rows)

    def _write(self) -> None:
        """Write as many tokens of all rows as may be written between two looks at them."""
        import torch

        steps = min(self.steps, max(row.most - len(row.tokens) for row in self.active))

        def forward() -> list:
            chosen = [torch.tensor([row.tokens[-1] for row in self.active], device=self.device)]
            written = []
            for draws in draw(self.active, steps, self.device):
                chosen = self._choose(self.slots.step(chosen[0]), draws)
                written.append(chosen)
            return [[tensor.tolist() for tensor in chosen] for chosen in written]

        written, failure = attempt(forward, self.device)
        if failure:
            self._mend(failure, self.active)
            return
        self.counts["steps"] += steps
        self.counts["step_rows"] += steps * len(self.active)
        self._collect(written, self.active)

    def _read_labels(self, rows: list[Row]) -> None:
        """Read texts that lack only their label."""
        import torch

        def forward() -> list[float]:
            logits = self.slots.read([row.ids for row in rows])
            return (
                logits.gather(1, torch.tensor([row.label_tokens for row in rows], device=self.device))
                .diff(dim=-1)[:, 0]
                .tolist()
            )

        margins, failure = attempt(forward, self.device)
        if failure:
            self._mend(failure, rows)
            return
        for row, margin in zip(rows, margins, strict=True):
            self._resolve(row, finish_label(row, margin, self.decoding))

    def _collect(self, written: list, rows: list[Row]) -> None:
        """Add to the rows what was written, give up the slots of those that have ended, and resolve these."""
        eos = self.tokenizer.eos_token_id
        ended = []
        for row, *series in zip(rows, *(zip(*step, strict=True) for step in written), strict=True):
            if any(
                row.add(token, margin, eos) for token, margin in series
            ):  # what a row writes after its end is passed over
                ended.append(row)
        if ended:
            self._leave(set(ended))
        for row in ended:
            try:
                generation = finish(self.tokenizer, row, self.decoding, self.longest)
            except Exception as error:  # whatever is wrong with one text concerns no other
                generation = fail(row, f"{type(error).__name__}: {first_line(error)}")
            if generation is None:
                self._queue([row])
            else:
                self._resolve(row, generation)

    def _leave(self, rows: set[Row]) -> None:
        """Take rows out of their slots. Where there is no memory left even for that, the others begin anew."""
        staying = [slot for slot, row in enumerate(self.active) if row not in rows]
        order, failure = attempt(lambda: self.slots.keep(staying), self.device)
        if failure:
            self._start_over([self.active[slot] for slot in staying])
        else:
            self.active = [self.active[slot] for slot in order]

    def _start_over(self, rows: list[Row]) -> None:
        self.active = []
        self.slots.drop()
        self._queue(rows)

    def _resolve(self, row: Row, generation: Generation) -> None:
        self.counts["rows"] += 1
        self.counts["completion_tokens"] += generation.num_completion_tokens or 0
        self.counts["labels_forced"] += generation.label_forced
        row.future.set_result(generation)

    def _mend(self, failure: Failure, rows: list[Row]) -> None:
        """After a forward pass over these rows failed: go on with fewer rows, or look for the one that breaks."""
        self.slots.rewind([len(row.ids) + len(row.tokens) - 1 for row in self.active])
        concerned = {*rows, *self.active} if failure.out_of_memory else set(rows)
        if len(concerned) == 1:
            self._leave(concerned)
            self._resolve(
                rows[0],
                fail(
                    rows[0],
                    f"does not fit into memory: {failure.problem}" if failure.out_of_memory else failure.problem,
                ),
            )
        elif failure.out_of_memory:
            self._shrink(rows, len(concerned))
        else:
            rows = [row.restart() for row in rows]
            self._leave(concerned)
            self.apart += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]

    def _shrink(self, rows: list[Row], num_rows: int) -> None:
        """Half as many rows at once; those that have to leave begin anew later."""
        before, self.batch_size = self.batch_size, max(1, min(self.batch_size, num_rows) // 2)
        self.most_tokens = max(1, min(self.most_tokens, max(len(row.ids) for row in rows) * len(rows)) // 2)
        print(f"inference: out of memory with {num_rows} rows at once; going on with {self.batch_size}", flush=True)
        joining = [row for row in rows if row not in set(self.active)]
        leaving = self.active[self.batch_size :]
        if before == 1:  # there are no fewer at once: each waits until nothing is beside it
            self.apart += [[row] for row in joining]
            joining = []
        self._leave(set(leaving))
        self._queue([*leaving, *joining])
        if attempt(self.slots.fit, self.device)[1]:
            self._start_over(self.active)
