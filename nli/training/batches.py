"""The rows of an optimizer step, dealt into micro-batches without padding.

deal([300, 200, 200, 100], num_workers=2, max_tokens=400)  ->  [[[0, 3]], [[1, 2]]]     worker 0 takes rows 0 and 3 in one micro-batch of 400 tokens

The rows of a step depend on the seed and the epoch alone, so that any number of workers, and a resumed run, make the same steps. Every worker has the same
number of micro-batches in a step, of about the same number of tokens.
"""

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets
    import numpy


def deal(lengths: Sequence[int], num_workers: int, max_tokens: int, max_rows: int = 0) -> list[list[list[int]]]:
    """Positions of `lengths` by worker and micro-batch, at most `max_tokens` and (if not 0) `max_rows` each; a longer row stands alone.

    A micro-batch is empty where there are fewer rows than micro-batches.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows = max_rows or len(lengths)
    count = max(1, math.ceil(sum(lengths) / (num_workers * max_tokens)), math.ceil(len(lengths) / (num_workers * rows)))
    count = min(count, math.ceil(len(lengths) / num_workers))
    while True:
        bins: list[list[int]] = [[] for _ in range(num_workers * count)]
        heap = [(0, 0, number) for number in range(len(bins))]
        closed = []
        for index in order:
            load, held, number = heapq.heappop(heap)
            bins[number].append(index)
            target = closed if held + 1 == rows else heap
            heapq.heappush(target, (load + lengths[index], held + 1, number))
        if all(len(held) <= 1 or sum(lengths[index] for index in held) <= max_tokens for held in bins):
            break
        count += 1
    bins.sort(key=lambda held: (-sum(lengths[index] for index in held), held))
    dealt: list[list[list[int]]] = [[] for _ in range(num_workers)]
    for turn in range(count):  # there and back, so that no worker always takes the larger one
        workers = range(num_workers) if turn % 2 == 0 else range(num_workers - 1, -1, -1)
        for worker, held in zip(workers, bins[turn * num_workers : (turn + 1) * num_workers], strict=True):
            dealt[worker].append(sorted(held))
    return dealt


class GlobalBatches:
    """One worker's part of each step: item `step` is its list of packed micro-batches. Without a seed the rows keep their order."""

    def __init__(
        self,
        rows: "datasets.Dataset",
        global_batch_size: int,
        rank: int,
        num_workers: int,
        max_tokens: int,
        max_rows: int = 0,
        seed: int | None = None,
    ):
        self.global_batch_size, self.rank, self.num_workers = global_batch_size, rank, num_workers
        self.max_tokens, self.max_rows, self.seed = max_tokens, max_rows, seed
        columns = rows.with_format("numpy")
        self.ids, self.labels = list(columns["input_ids"]), list(columns["labels"])
        self.lengths = [len(ids) for ids in self.ids]
        self.epoch = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.global_batch_size)

    def __getitem__(self, step: int) -> list[dict]:
        chosen = self.choose(step)
        dealt = deal([self.lengths[index] for index in chosen], self.num_workers, self.max_tokens, self.max_rows)
        rows = [[chosen[position] for position in held] for held in dealt[self.rank]]
        return [
            pack([self.ids[row] for row in held], [self.labels[row] for row in held]) if held else self.stand_in()
            for held in rows
        ]

    def count_labels(self) -> int:
        """How many tokens the loss is over in all rows."""
        return sum(int((labels[1:] != -100).sum()) for labels in self.labels)

    def choose(self, step: int) -> list[int]:
        """Which rows make a step of the current epoch."""
        if step >= len(self):
            raise IndexError(step)
        if self._order[0] != self.epoch:
            import numpy

            count = len(self.lengths)
            order = (
                range(count)
                if self.seed is None
                else numpy.random.default_rng((self.seed, self.epoch)).permutation(count).tolist()
            )
            self._order = (self.epoch, order)
        return list(self._order[1][step * self.global_batch_size : (step + 1) * self.global_batch_size])

    def stand_in(self) -> dict:
        """A micro-batch for a worker that no row was left for: its loss is zero and counts no token."""
        return pack([self.ids[0][:2]], [self.labels[0][:2] * 0 - 100])


def pack(ids: Sequence["numpy.ndarray"], labels: Sequence["numpy.ndarray"]) -> dict:
    """Rows end to end as one: {"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 2, 0, 1]], "cu_seq_lens_q": [0, 3, 5], …}.

    The first token of a row is no label, for nothing stands before it.
    """
    import numpy
    import torch

    lengths = [len(row) for row in ids]
    starts = numpy.cumsum([0, *lengths])
    flat_labels = numpy.concatenate(labels).astype(numpy.int64)
    flat_labels[starts[:-1]] = -100
    bounds = torch.from_numpy(starts.astype(numpy.int32))
    return {
        "input_ids": torch.from_numpy(numpy.concatenate(ids).astype(numpy.int64))[None],
        "labels": torch.from_numpy(flat_labels)[None],
        "position_ids": torch.from_numpy(numpy.concatenate([numpy.arange(length) for length in lengths]))[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
