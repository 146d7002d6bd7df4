"""The rows that a model is writing at one time: each has a slot for its keys and values, comes in whenever there is room and leaves when it has ended.

    slots = Slots(model, longest=32768)
    logits = slots.prefill([[1, 3, …, 4], [1, 3, …, 4]])     new rows in the next free slots; logits before their first token
    logits = slots.step(tokens)                              one more token for all
    slots.keep([0])                                          the row of slot 1 has ended

A row's keys lie from the slot's first column on, whatever lies in the other slots, and the mask hides what is not the row's. So nothing is padded on the left,
no column moves when a row comes or leaves, and a prompt is read with no mask at all. `prefill` and `step` can be repeated after they failed.
"""

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BLOCK = 64
"""columns are given out in blocks of so many"""


class Slots:
    """Keys and values of the rows of one model, a row to a slot."""

    def __init__(self, model: "PreTrainedModel", longest: int | None) -> None:
        import torch

        self.model, self.device = model, model.device
        self.longest = longest
        self.lengths: list[int] = []  # tokens whose keys are there, by slot
        self.num_slots, self.columns = 0, 0  # that there is memory for, or will be in the next forward pass
        self.start: int | None = None  # the first slot of the rows that are being read; None while all write
        self.on_device = torch.zeros(0, dtype=torch.long, device=self.device)  # self.lengths there
        self.rows, self.shown = self.on_device, 0  # slots and columns of the step at hand
        self.cache = _build_cache(self, model.config.get_text_config().num_hidden_layers)
        self.last: torch.Tensor | None = None
        self.head = model.get_output_embeddings()
        self.hook = self.head.register_forward_pre_hook(self._pick_last)
        self.projects = type(self.head) is torch.nn.Linear and "forward" not in vars(
            self.head
        )  # not one with an adapter or with hooks of its own
        if self.projects:
            self.head.forward = partial(_project, self.head)

    def __len__(self) -> int:
        return len(self.lengths)

    def prefill(self, prompts: list[list[int]]) -> "torch.Tensor":
        """Put prompts into the next slots; logits of what follows each, in fp32."""
        self.start = len(self.lengths)
        self.num_slots = max(self.num_slots, self.start + len(prompts))
        self.columns = max(self.columns, _round_up(max(map(len, prompts)) + 1))
        logits = self.read(prompts, self.cache)
        self.rewind([*self.lengths, *map(len, prompts)])
        return logits

    def read(self, prompts: list[list[int]], cache=None) -> "torch.Tensor":
        """Logits in fp32 of what follows each of the prompts. Without a cache nothing is kept."""
        import torch

        width = max(map(len, prompts))
        # Padded on the right: a causal model sees no padding there, so that no mask is needed.
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts], device=self.device)
        self.last = torch.tensor([len(ids) - 1 for ids in prompts], device=self.device)
        try:
            return self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits[:, 0].float()
        finally:
            self.last = None

    def step(self, tokens: "torch.Tensor") -> "torch.Tensor":
        """Go on with one token per row; logits of what follows, in fp32."""
        import torch

        self.start = None
        longest = max(self.lengths) + 1
        if longest > self.columns:
            self.columns = _round_up(longest + BLOCK)
        # Rows that have ended may run on until they are taken out; they must not run out of the model's positions.
        positions = self.on_device if self.longest is None else self.on_device.clamp(max=self.longest - 1)
        self.shown, self.rows = _round_up(longest), torch.arange(len(self.lengths), device=self.device)
        visible = torch.arange(self.shown, device=self.device)[None] <= self.on_device[:, None]
        logits = self.model(
            input_ids=tokens[:, None],
            attention_mask=visible[:, None, None],
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, 0]
        self.lengths = [length + 1 for length in self.lengths]
        self.on_device = self.on_device + 1
        return logits.float()

    def keep(self, slots: list[int]) -> list[int]:
        """Give up all slots but these. The last rows move to the slots that become free; the answer says which row now is in which slot."""
        import torch

        count, kept = len(slots), set(slots)
        order = [slot if slot in kept else None for slot in range(count)]
        holes = [slot for slot in range(count) if order[slot] is None]
        movers = [slot for slot in slots if slot >= count]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            self.cache.move(torch.tensor(movers, device=self.device), torch.tensor(holes, device=self.device))
        self.rewind([self.lengths[slot] for slot in order])
        return order

    def rewind(self, lengths: list[int]) -> None:
        """Say how many tokens of each row count as read; what is behind them, and rows behind the last, will be written over."""
        import torch

        self.lengths = lengths
        self.on_device = torch.tensor(lengths, dtype=torch.long, device=self.device)

    def fit(self) -> None:
        """Give back the memory of slots and columns that no row needs now."""
        self.num_slots, self.columns = len(self.lengths), _round_up(max(self.lengths, default=0) + 1)
        self.cache.fit()

    def drop(self) -> None:
        """Give up all rows and their memory."""
        self.num_slots = self.columns = 0
        self.rewind([])
        for layer in self.cache.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    def close(self) -> None:
        """Give up the rows, and leave the model as it was."""
        self.drop()
        self.hook.remove()
        if self.projects:
            del self.head.forward

    def _pick_last(self, module, inputs):
        """Before the output layer: only the hidden states of each prompt's last token."""
        if self.last is None:
            return None
        import torch

        hidden = inputs[0]
        return (hidden[torch.arange(len(hidden), device=hidden.device), self.last][:, None], *inputs[1:])


def _project(head: "torch.nn.Linear", hidden: "torch.Tensor") -> "torch.Tensor":
    """The layer's output in fp32 whatever its weights are in: in bf16, logits between 16 and 32 are steps of 0.125, which moves a probability by 0.03."""
    import torch
    import torch.nn.functional as F

    if head.weight.is_cuda and head.weight.dtype != torch.float32 and head.bias is None:
        return torch.mm(hidden.flatten(0, -2), head.weight.t(), out_dtype=torch.float32).unflatten(
            0, hidden.shape[:-1]
        )  # copies no weights
    return F.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())


def _round_up(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def _build_cache(slots: Slots, num_layers: int):
    from transformers.cache_utils import Cache, CacheLayerMixin

    class SlotLayer(CacheLayerMixin):
        """One layer's keys and values, (slots, heads, columns, dimension), in zeros where nothing was written: a hidden NaN would still spoil a sum."""

        is_sliding = False

        def lazy_initialization(self, key_states, value_states) -> None:
            self.keys = key_states.new_zeros(0, *key_states.shape[1:2], 0, key_states.shape[3])
            self.values = value_states.new_zeros(0, *value_states.shape[1:2], 0, value_states.shape[3])
            self.is_initialized = True

        def fit(self, rows: int) -> None:
            """Hold as many slots and columns as are wanted now."""
            self.keys, self.values = (
                _fit(self.keys, rows, slots.num_slots, slots.columns),
                _fit(self.values, rows, slots.num_slots, slots.columns),
            )

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            rows, _, width, _ = key_states.shape
            self.fit(len(slots))
            if slots.start is not None:
                for held, new in ((self.keys, key_states), (self.values, value_states)):
                    held[slots.start : slots.start + rows, :, :width] = new
                    held[slots.start : slots.start + rows, :, width:] = 0
                return key_states, value_states

            for held, new in ((self.keys, key_states), (self.values, value_states)):
                held[slots.rows, :, slots.on_device] = new[:, :, 0]
            return self.keys[:rows, :, : slots.shown], self.values[:rows, :, : slots.shown]

        def get_seq_length(self) -> int:
            return 0

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return query_length, 0

        def get_max_length(self) -> int:
            return -1

    class SlotCache(Cache):
        def fit(self) -> None:
            for layer in self.layers:
                if layer.is_initialized:
                    layer.fit(len(slots))

        def move(self, source, target) -> None:
            for layer in self.layers:
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]

    return SlotCache(layers=[SlotLayer() for _ in range(num_layers)])


def _fit(held: "torch.Tensor", rows: int, num_slots: int, columns: int) -> "torch.Tensor":
    """`held` with so many slots and columns; what the first rows hold stays."""
    if held.shape[0] == num_slots and held.shape[2] == columns:
        return held
    kept = min(held.shape[2], columns)
    wanted = held.new_zeros(num_slots, held.shape[1], columns, held.shape[3])
    wanted[:rows, :, :kept] = held[:rows, :, :kept]
    return wanted
