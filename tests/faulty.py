"""Training workers that a fault strikes once, for tests of what survives it."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from nli.training.worker import train_worker


def train_with_faults(faults: Mapping[str, int], struck: str, job: dict) -> None:
    """`train_worker`, struck by each fault once, at its optimizer step; the folder `struck` remembers which have been."""
    import transformers

    from nli.training import saving

    trainer = transformers.Trainer

    def strike(name: str, step: int, blow: Callable[[], object]) -> None:
        mark = Path(struck) / name
        if faults.get(name) == step and not mark.exists():
            mark.touch()
            blow()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(method: str, name: str, blow: Callable[..., object]) -> None:
        original = getattr(trainer, method)

        def struck_method(self, *args, **kwargs):
            strike(name, self.state.global_step, lambda: blow(*args))
            return original(self, *args, **kwargs)

        setattr(trainer, method, struck_method)

    def fill_disk(folder: str) -> None:
        os.symlink("/dev/full", Path(folder) / "optimizer.pt")  # every write to it finds no space left

    before("training_step", "killed_between_saves", lambda *_: die())
    before("_save_scaler", "killed_during_save", lambda *_: die())
    before("_save_optimizer_and_scheduler", "disk_full_at_save", fill_disk)
    delete_old = saving.delete_old

    def delete_and_die(run_folder: Path, keep: int, best_step: int | None) -> None:
        delete_old(run_folder, keep, best_step)
        newest = saving.list_checkpoints(run_folder)[-1]
        strike("killed_between_save_and_report", int(newest.name.removeprefix("checkpoint-")), die)

    saving.delete_old = delete_and_die
    train_worker(job)
