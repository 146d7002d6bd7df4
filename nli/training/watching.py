"""Watching accuracy while training: at each evaluation the model in training answers a sample of the dev rows.

    class Trainer(WatchedEvaluations, SFTTrainer): ...
    trainer.watch = read_watch("models/.tokenised/5e…", tokenizer, num_rows=64, max_length=512, seed=42)

adds to an evaluation's metrics {"eval_accuracy": 0.906, "eval_precision": 0.91, "eval_recall": 0.9, "eval_f1": 0.905, "eval_unparsed_rate": 0.0,
"eval_eos_rate": 1.0, "eval_watch_seconds": 21.4}. Decoding is greedy, an unread answer is wrong, precision, recall and F1 are means over both labels.
Training waits meanwhile, unless `beside` finds a spare GPU (`nli.training.watch_beside`): then the figures come in later, with the step that they belong to.
"""

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nli.models.label_tokens import read_completion
from nli.models.tokenizer import IGNORED_LABEL
from nli.task.parsing import ParseStatus, parse_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nli.training.watch_beside import WatchBeside

BATCH_ROWS = 32
UNPARSED = -1  # as in nli.evaluation.metrics


@dataclass(frozen=True)
class Watch:
    """The rows to answer: prompts as token ids, their true labels, and how long an answer may be."""

    tokenizer: "PreTrainedTokenizerBase"
    prompts: list[list[int]]
    truths: list[int]
    max_length: int
    max_new_tokens: int

    def answer(self, model, rank: int, num_ranks: int) -> list[tuple[int, int, bool]]:
        """(row, predicted label or UNPARSED, whether it ended by EOS) for this rank's share of the rows."""
        share = sorted(range(len(self.prompts)), key=lambda row: len(self.prompts[row]))[rank::num_ranks]
        answers = []
        for start in range(0, len(share), BATCH_ROWS):
            rows = share[start : start + BATCH_ROWS]
            prompts = [self.prompts[row] for row in rows]
            room = max(1, min(self.max_new_tokens, self.max_length - max(map(len, prompts))))
            for row, (text, stopped) in zip(rows, generate_greedily(model, self.tokenizer, prompts, room), strict=True):
                parsed = parse_answer(text, "stop" if stopped else "length")
                label = parsed.fields["predicted_label"] if parsed.status == ParseStatus.OK else UNPARSED
                answers.append((row, label, stopped))
        return answers

    def score(self, answers: list[tuple[int, int, bool]]) -> dict[str, float]:
        """The figures of all ranks' answers. Precision, recall and F1 are absent where the sample has one label only."""
        import numpy as np

        from nli.evaluation.metrics import score_classes  # its libraries take a second to load

        predicted = np.array([label for _, label, _ in sorted(answers)])
        truth = np.array(self.truths)
        scores = score_classes(truth, predicted, confidence=0.95, draws=1, seed=0)
        figures = {
            "accuracy": float(np.mean(predicted == truth)),
            "precision": scores["macro_precision"],
            "recall": scores["macro_recall"],
            "f1": scores["macro_f1"],
            "unparsed_rate": float(np.mean(predicted == UNPARSED)),
            "eos_rate": float(np.mean([stopped for _, _, stopped in answers])),
        }
        return {name: value for name, value in figures.items() if value is not None}


def generate_greedily(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: list[list[int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Continue each list of token ids, padded on the left, until EOS or the limit: the texts, and whether they ended by EOS.

    This is transformers' own `generate`, which takes a model in training as it is.
    """
    import torch

    pad, eos, width = tokenizer.pad_token_id, tokenizer.eos_token_id, max(map(len, batch))
    output = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=eos,
    )
    completions = output[:, width:].tolist()
    return [
        (read_completion(tokenizer, ids[: ids.index(eos)] if eos in ids else ids), eos in ids) for ids in completions
    ]


def read_watch(
    tokenised: str, tokenizer: "PreTrainedTokenizerBase", num_rows: int, max_length: int, seed: int
) -> Watch | None:
    """A sample of the labelled dev rows that fit into max_length, the same for a seed; None if there are none or none are wanted."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = (
        (pc.field("split") == "dev")
        & (pc.field("num_tokens") <= max_length)
        & pc.field("true_label").is_valid()
        & (pc.field("problem") == "")
    )
    rows = (
        pq.read_table(tokenised, filters=wanted)
        .sort_by("line")
        .select(["input_ids", "labels", "true_label"])
        .to_pylist()
    )
    chosen = [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), min(num_rows, len(rows))))]
    if not chosen:
        return None
    prompts = [row["input_ids"][: row["labels"].count(IGNORED_LABEL)] for row in chosen]
    longest = max(len(row["input_ids"]) - len(prompt) for row, prompt in zip(chosen, prompts, strict=True))
    return Watch(tokenizer, prompts, [row["true_label"] for row in chosen], max_length, max_new_tokens=2 * longest)


class WatchedEvaluations:
    """For a transformers Trainer: how it evaluates. `watched` holds the figures that came in from beside, by step."""

    watch: Watch | None = None
    beside: "WatchBeside | None" = None
    watched: dict[int, dict[str, float]] | None = None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.watch is None:
            return output
        if self.beside is not None and _from_first_rank(self.is_world_process_zero() and self.beside.has_room()):
            if self.is_world_process_zero():
                self.beside.submit(self.state.global_step, self.model)
        else:
            import torch

            started = time.perf_counter()
            device = self.args.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), self.compute_loss_context_manager():
                answers = self.watch.answer(self.model, self.args.process_index, self.args.world_size)
            figures = self.watch.score(_gather(answers)) | {"watch_seconds": round(time.perf_counter() - started, 2)}
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def log_watched(self, wait: bool = False) -> None:
        """Rank 0: log what has come in from beside, to all places that this process logs to."""
        if self.beside is None or not self.is_world_process_zero():
            return
        for step, figures in self.beside.collect(wait):
            self.watched = (self.watched or {}) | {step: figures}
            should_log = (
                self.control.should_log
            )  # `log` would gather from ranks that know nothing of it, and so would a forgotten flag
            self.callback_handler.on_log(
                self.args,
                self.state,
                self.control,
                {"watch_step": step} | {f"eval_{name}": value for name, value in figures.items()},
            )
            self.control.should_log = should_log

    def training_step(self, *args, **kwargs):
        self.log_watched()
        return super().training_step(*args, **kwargs)


def _from_first_rank(value: bool) -> bool:
    """Rank 0's value on every rank."""
    import torch

    box = [value]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _gather(answers: list) -> list:
    """All ranks' answers on every rank."""
    import torch

    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return answers
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, answers)
    return [answer for part in parts for answer in part]
