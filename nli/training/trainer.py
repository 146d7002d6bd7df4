"""TRL's SFTTrainer over packed micro-batches: one item of the data is a whole optimizer step.

What the trainer does of its own, and what is changed:
    the model's fused head and loss, the optimizer, the schedule, clipping, checkpoints, logs and callbacks are TRL's and transformers'
    a step's rows come from `nli.training.batches`, as many micro-batches as their tokens ask for; gradients are exchanged once, after the last
    the loss of a step is the mean over the step's labelled tokens on all workers; the eval loss is the mean over the dev file's
"""

import contextlib
import time
from typing import TYPE_CHECKING

from nli.training.batches import GlobalBatches

if TYPE_CHECKING:
    from trl import SFTTrainer


def build_trainer_class() -> type["SFTTrainer"]:
    """The class; a function because TRL is heavy to import."""
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_utils import EvalLoopOutput
    from trl import SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class PackedTrainer(SFTTrainer):
        def __init__(self, model, batches: GlobalBatches, eval_batches: GlobalBatches, **values):
            self.batches, self.eval_batches = batches, eval_batches
            self.parameters_used, self.tokens_trained, self.train_seconds, self.logged = (
                count_matmul_parameters(model),
                0,
                0.0,
                (0, 0.0),
            )
            self.step_started, self.label_sums = 0.0, {}
            collator = DataCollatorForLanguageModeling(
                pad_token_id=0, padding_free=True
            )  # stands in for TRL's: no batch of ours passes through it
            super().__init__(model=model, data_collator=collator, **values)
            self.add_callback(Meter(self))

        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.batches, batch_size=1, collate_fn=_only, pin_memory=False)

        def get_eval_dataloader(self, eval_dataset=None):
            return torch.utils.data.DataLoader(self.eval_batches, batch_size=1, collate_fn=_only, pin_memory=False)

        def num_examples(self, dataloader) -> int:
            return len(dataloader.dataset.lengths)

        def floating_point_ops(self, inputs) -> int:
            return 4 * self.parameters_used * sum(micro["input_ids"].numel() for micro in inputs)

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            self.step_started = time.perf_counter()
            step = next(epoch_iterator)
            return [step], self._get_num_items_in_batch(step, device)

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = torch.zeros((), device=self.args.device)
            for number, micro in enumerate(inputs, start=1):
                last = number == len(inputs)
                self.accelerator.gradient_state._set_sync_gradients(
                    last
                )  # DeepSpeed reads from it whether to take its step
                deferred = not last and not self.is_deepspeed_enabled
                with self.accelerator.no_sync(model) if deferred else contextlib.nullcontext():
                    loss += super().training_step(model, micro, num_items_in_batch)
            return loss

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            """TRL's loss without its per-micro-batch metrics across workers, each of which would wait for the GPU; `log` gathers their sums."""
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            sums = torch.stack(
                [outputs.is_top1.sum(), outputs.entropy.detach().sum(), outputs.label_mask.sum()]
            ).float()
            mode = "train" if self.model.training else "eval"
            self.label_sums[mode] = self.label_sums.get(mode, 0) + sums
            return (
                -outputs.log_probs.sum()
                / torch.as_tensor(num_items_in_batch).clamp(min=1)
                * self.accelerator.num_processes
            )

        def evaluation_loop(
            self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
        ):
            model, batches = self.model, dataloader.dataset
            model.eval()
            num_labels = torch.tensor(batches.count_labels(), device=self.args.device)
            loss = torch.zeros((), device=self.args.device)
            for step in dataloader:
                for micro in step:
                    with torch.no_grad(), self.compute_loss_context_manager():
                        loss += self.compute_loss(model, self._prepare_inputs(micro), num_items_in_batch=num_labels)
            mean = self.accelerator.gather(loss[None]).mean().item()
            return EvalLoopOutput(
                predictions=None,
                label_ids=None,
                metrics={f"{metric_key_prefix}_loss": mean},
                num_samples=len(batches.lengths),
            )

        def log(self, logs, start_time=None):
            if "grad_norm" in logs:
                logs.update(self.measure())
            mode = "train" if self.model.training else "eval"
            if (sums := self.label_sums.pop(mode, None)) is not None:
                correct, entropy, count = self.accelerator.reduce(sums, "sum").tolist()
                prefix = "" if mode == "train" else "eval_"
                logs |= {
                    f"{prefix}mean_token_accuracy": correct / max(count, 1),
                    f"{prefix}entropy": entropy / max(count, 1),
                }
            super().log(logs, start_time)

        def measure(self) -> dict:
            """Real tokens a second and useful TFLOP/s of this worker's GPU since the last log line, and the peak memory so far."""
            tokens, seconds = self.tokens_trained - self.logged[0], self.train_seconds - self.logged[1]
            self.logged = (self.tokens_trained, self.train_seconds)
            if seconds == 0:
                return {}
            found = {
                "tokens_per_second": round(tokens / seconds, 1),
                "useful_tflops": round(4 * self.parameters_used * tokens / seconds / 1e12, 2),
            }
            if self.args.device.type == "cuda":
                found["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            return found

    class Meter(TrainerCallback):
        """Sets the epoch whose order the rows take, and times the steps without evaluations and saves."""

        def __init__(self, trainer: PackedTrainer):
            self.trainer = trainer

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.trainer.batches.epoch = state.global_step // len(self.trainer.batches)

        def on_step_end(self, args, state, control, **kwargs):
            if args.device.type == "cuda" and control.should_log:
                torch.cuda.synchronize()
            trainer, batches = self.trainer, self.trainer.batches
            trainer.train_seconds += time.perf_counter() - trainer.step_started
            rows = batches.choose((state.global_step - 1) % len(batches))
            trainer.tokens_trained += sum(batches.lengths[row] for row in rows) / batches.num_workers

    return PackedTrainer


def count_matmul_parameters(model) -> int:
    """Weights that each token is multiplied by: those of all linear layers, the adapters' and the head's among them."""
    import torch

    return sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, torch.nn.Linear)
    )


def _only(items: list):
    return items[0]
