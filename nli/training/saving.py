"""Checkpoints that survive anything: written aside, hashed, flushed, renamed, and only then reported; each needs no other.

    class Trainer(SealedCheckpoints, SFTTrainer): ...

While a checkpoint is written it is `models/reflected/.saving/checkpoint-6`; a kill leaves that, and never a `checkpoint-6` that is not whole. Older ones are
deleted only when the new one is in its place.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nli.models.checkpoints import (
    BEST_WEIGHTS,
    WEIGHTS,
    best_weights,
    find_newest_complete,
    flush_to_disk,
    list_checkpoints,
    mark_complete,
    read_trainer_state,
)
from nli.models.tokenizer import first_line
from nli.runtime.errors import StorageError
from nli.runtime.files import write_atomic

SAVING = ".saving"
DELETING = ".deleting"


class SealedCheckpoints:
    """For a transformers Trainer: how it saves.

    `best_adapter` holds, on rank 0, the weights with the best metric so far; a checkpoint with worse ones carries them along. `keep_checkpoints` is the
    number of newest checkpoints that stay; that with the best metric stays beside them.
    """

    best_adapter: bytes | None = None
    keep_checkpoints: int = 2

    def _get_output_dir(self, trial) -> str:
        return str(Path(self.args.output_dir) / SAVING)

    def _save_checkpoint(self, model, trial) -> None:
        output, step, is_first = Path(self.args.output_dir), self.state.global_step, self.is_world_process_zero()
        aside = output / SAVING / f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self.state.best_model_checkpoint = None  # it may be gone tomorrow; its weights are carried along
            if is_first:
                self.state.save_to_json(str(aside / "trainer_state.json"))
                self._carry_best(aside)
            _wait_for_all()  # every rank has written its part
            if is_first:
                seal_checkpoint(aside, output / aside.name)
                delete_old(output, self.keep_checkpoints, self.state.best_global_step)
        except Exception as error:
            if not is_failed_write(error):
                raise
            if is_first:
                shutil.rmtree(output / SAVING, ignore_errors=True)
            newest = list_checkpoints(output)
            raise StorageError(
                f"{aside.name} of {output} cannot be written ({first_line(error)}; {shutil.disk_usage(output).free / 1e9:.1f} GB are free). "
                f"Free space and run the same command: it goes on from {newest[-1].name if newest else 'the start'}."
            ) from None

    def _carry_best(self, aside: Path) -> None:
        if self.state.best_global_step == self.state.global_step:
            self.best_adapter = (aside / WEIGHTS).read_bytes()
        elif self.best_adapter is not None:
            (aside / BEST_WEIGHTS).write_bytes(self.best_adapter)


def seal_checkpoint(aside: Path, place: Path) -> None:
    """Flush and hash a checkpoint's files, then give it its name."""
    mark_complete(aside)
    flush_to_disk(aside)
    shutil.rmtree(place, ignore_errors=True)
    aside.rename(place)
    flush_to_disk(place.parent)


def delete_old(run_folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the `keep` newest and that of the best step. One that is half deleted is no checkpoint any more."""
    for folder in list_checkpoints(run_folder)[:-keep]:
        if folder.name != f"checkpoint-{best_step}":
            doomed = folder.with_name(f"{DELETING}-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def is_failed_write(error: Exception) -> bool:
    """Whether a save failed because the disk would not take it: torch and safetensors hide the system's error in ones of their own."""
    from safetensors import SafetensorError

    if isinstance(error, RuntimeError):
        return "PytorchStreamWriter" in str(error) or "inline_container.cc" in str(error)
    return isinstance(error, OSError | SafetensorError | StorageError)


@contextmanager
def telling_of_a_full_disk(run_folder: Path) -> Iterator[None]:
    """Raise StorageError where the block fails because a disk is full or a quota used up, wherever it wrote."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"{error.filename or run_folder}: {error.strerror}. Free space and run the same command: it goes on from the newest checkpoint."
        ) from None


def find_start(run_folder: Path) -> Path | None:
    """The checkpoint to go on from: the newest that verifies. What a kill left half made goes, and log lines of steps that will be made again."""
    for path in [run_folder / SAVING, *run_folder.glob(f"{DELETING}-*")]:
        if path.exists():
            print(
                f"{path}: was being {'written' if path.name == SAVING else 'deleted'} when a run ended; removed",
                flush=True,
            )
            shutil.rmtree(path)
    checkpoint = find_newest_complete(run_folder)
    log = run_folder / "log.jsonl"
    if log.exists():
        last = read_trainer_state(checkpoint)["global_step"] if checkpoint else -1
        lines = [
            line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")
        ]  # a kill may cut the last one
        write_atomic(log, "".join(line for line in lines if json.loads(line)["step"] <= last))
    return checkpoint


def read_best(checkpoint: Path | None) -> bytes | None:
    """The best adapter's weights up to a checkpoint, None where there is none."""
    path = best_weights(checkpoint) if checkpoint else None
    return path.read_bytes() if path else None


def save_adapter(trainer, tokenizer, output: Path, weights: bytes | None) -> None:
    """Save the trained adapter and its tokenizer into the run's folder; `weights` replace the trainer's last ones. The weights come last, whole."""
    aside = output / SAVING
    trainer.model.save_pretrained(str(aside))
    tokenizer.save_pretrained(str(aside))
    if weights is not None:
        (aside / WEIGHTS).write_bytes(weights)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == WEIGHTS):
        flush_to_disk(path)
        os.replace(path, output / path.name)
    aside.rmdir()


def _wait_for_all() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
