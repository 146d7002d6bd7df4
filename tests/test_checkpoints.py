"""Checkpoints survive kills, torn files and full disks: each run ends with the loss curve and the adapter of one that nothing disturbed, bit for bit."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nli.models.checkpoints import BEST_WEIGHTS, COMPLETE, WEIGHTS, best_weights, find_fault, mark_complete
from nli.runtime.errors import StorageError
from nli.runtime.files import write_jsonl
from nli.training import run as sft
from nli.training import saving
from nli.training.run import TrainConfig
from tests.conftest import REPOSITORY
from tests.faulty import train_with_faults
from tests.test_stages import read_rows, train_config
from tests.test_training_guards import interrupt, losses_by_step, sft_row


def write_checkpoint(run_folder: Path, step: int, best_step: int) -> Path:
    """A checkpoint as training leaves it, as far as finding one needs it."""
    folder = run_folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best_step}))
    (folder / WEIGHTS).write_bytes(f"weights of step {step}".encode())
    if best_step != step:
        (folder / BEST_WEIGHTS).write_bytes(f"weights of step {best_step}".encode())
    mark_complete(folder)
    return folder


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {"truncated": truncate, "bit-flipped": flip_a_bit, "missing": Path.unlink}


# without Ray


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, "trainer_state.json", BEST_WEIGHTS, COMPLETE])
def test_any_damaged_file_of_the_newest_checkpoint_sends_the_run_back_to_the_one_before(tmp_path, capsys, damage, name):
    for step in (3, 6, 9):
        write_checkpoint(tmp_path, step, best_step=3)
    damage(tmp_path / "checkpoint-9" / name)
    assert saving.find_start(tmp_path) == tmp_path / "checkpoint-6"
    assert (tmp_path / "damaged-checkpoint-9").is_dir()
    assert "checkpoint-9: " in (shown := capsys.readouterr().out) and "set aside as damaged-checkpoint-9" in shown


def test_a_damaged_older_checkpoint_is_set_aside_too_and_the_newest_is_taken(tmp_path):
    for step in (3, 6):
        write_checkpoint(tmp_path, step, best_step=3)
    truncate(tmp_path / "checkpoint-3" / WEIGHTS)
    assert saving.find_start(tmp_path) == tmp_path / "checkpoint-6"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "damaged-checkpoint-3"]


def test_a_checkpoint_carries_the_best_adapter_whatever_becomes_of_the_older_ones(tmp_path):
    for step in (3, 6):
        write_checkpoint(tmp_path, step, best_step=3)
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert saving.read_best(saving.find_start(tmp_path)) == b"weights of step 3"
    assert best_weights(write_checkpoint(tmp_path, 9, best_step=9)) == tmp_path / "checkpoint-9" / WEIGHTS


def test_what_a_kill_left_half_written_or_half_deleted_goes_with_a_message(tmp_path, capsys):
    write_checkpoint(tmp_path, 3, best_step=3)
    write_checkpoint(tmp_path / saving.SAVING, 6, best_step=6)
    (tmp_path / f"{saving.DELETING}-checkpoint-1").mkdir()
    assert saving.find_start(tmp_path) == tmp_path / "checkpoint-3"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    shown = capsys.readouterr().out
    assert (
        ".saving: was being written when a run ended; removed" in shown and "checkpoint-1: was being deleted" in shown
    )


def test_a_checkpoint_gets_its_name_only_with_all_its_hashes_and_replaces_an_orphan(tmp_path):
    write_checkpoint(tmp_path / saving.SAVING, 6, best_step=3)
    (tmp_path / saving.SAVING / "checkpoint-6" / COMPLETE).unlink()
    orphan = tmp_path / "checkpoint-6"
    orphan.mkdir()
    (orphan / "stray").touch()
    saving.seal_checkpoint(tmp_path / saving.SAVING / "checkpoint-6", orphan)
    assert find_fault(orphan) is None
    assert sorted(path.name for path in orphan.iterdir()) == sorted(
        [COMPLETE, WEIGHTS, BEST_WEIGHTS, "trainer_state.json"]
    )


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, 3, [3, 9, 12]), (2, 12, [9, 12]), (3, 9, [6, 9, 12]), (2, None, [9, 12])]
)
def test_the_newest_checkpoints_stay_and_the_best_beside_them(tmp_path, keep, best, left):
    for step in (3, 6, 9, 12):
        write_checkpoint(tmp_path, step, best_step=3)
    saving.delete_old(tmp_path, keep, best)
    assert [path.name for path in saving.list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert len(list(tmp_path.iterdir())) == len(left)


def test_the_log_loses_the_steps_that_are_made_again_and_a_torn_line(tmp_path):
    lines = [{"step": step, "loss": step / 10} for step in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    write_checkpoint(tmp_path, 3, best_step=3)
    assert saving.find_start(tmp_path) == tmp_path / "checkpoint-3"
    assert read_rows(tmp_path / "log.jsonl") == lines[:3]
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert saving.find_start(tmp_path) is None
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_disk_that_fills_up_under_a_log_is_told_and_other_errors_stay_what_they_are(tmp_path):
    with (
        pytest.raises(StorageError, match=rf"{tmp_path}: No space left on device. Free space and run the same command"),
        saving.telling_of_a_full_disk(tmp_path),
    ):
        Path("/dev/full").write_text("a line")
    with pytest.raises(FileNotFoundError), saving.telling_of_a_full_disk(tmp_path):
        (tmp_path / "none").read_text()


# with Ray


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    paths = {f"reflected_{split}": str(folder / f"reflected_{split}.jsonl") for split in ("train", "dev")}
    for split, count in (("train", 40), ("dev", 8)):
        write_jsonl(Path(paths[f"reflected_{split}"]), [sft_row(split, index) for index in range(count)])
    return paths


def config_of(files: dict[str, str], folder: Path, **values) -> TrainConfig:
    return train_config(files, folder, **({"max_steps": 9, "eval_steps": 2, "lora_rank": 4} | values))


@pytest.fixture(scope="session")
def undisturbed(ray_cluster, files, tmp_path_factory) -> Path:
    """A run of nine steps with checkpoints after every two and at the end, all kept. Tests of other modules come between those that need it."""
    run_folder = sft.run(config_of(files, tmp_path_factory.mktemp("models") / "run", keep_checkpoints=9))
    assert [path.name for path in saving.list_checkpoints(run_folder)] == [
        f"checkpoint-{step}" for step in (2, 4, 6, 8, 9)
    ]
    return run_folder


def assert_same(run_folder: Path, undisturbed: Path, resumed_from: list[int]) -> None:
    """Both runs made the same steps, and this one went on from these checkpoints."""
    for name in ("loss", "grad_norm", "eval_loss"):
        assert losses_by_step(run_folder, name) == losses_by_step(undisturbed, name)
    assert (run_folder / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    assert [row["step"] for row in read_rows(run_folder / "log.jsonl") if "resumed_from" in row] == resumed_from
    assert [path for path in run_folder.iterdir() if path.name.startswith((saving.SAVING, saving.DELETING))] == []
    assert [path.name for path in saving.list_checkpoints(run_folder)] == ["checkpoint-8", "checkpoint-9"]
    assert [find_fault(path) for path in saving.list_checkpoints(run_folder)] == [None, None]


def strike(monkeypatch, tmp_path: Path, **faults: int) -> None:
    struck = tmp_path / "struck"
    struck.mkdir()
    monkeypatch.setattr(sft, "train_worker", functools.partial(train_with_faults, faults, str(struck)))


@pytest.mark.ray
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_whose_newest_checkpoint_is_damaged_loses_one_interval_and_nothing_else(
    files, undisturbed, tmp_path, damage
):
    run_folder = interrupt(undisturbed, tmp_path / "run", "checkpoint-6", "checkpoint-8")
    damage(run_folder / "checkpoint-8" / "optimizer.pt")
    sft.run(config_of(files, run_folder))
    assert (run_folder / "damaged-checkpoint-8").is_dir()
    assert_same(run_folder, undisturbed, [6])


@pytest.mark.ray
@pytest.mark.fault
def test_a_run_killed_between_saves_during_a_save_and_before_its_report_ends_as_if_nothing_had_been(
    files, undisturbed, tmp_path, monkeypatch
):
    strike(monkeypatch, tmp_path, killed_between_saves=3, killed_during_save=6, killed_between_save_and_report=8)
    run_folder = sft.run(config_of(files, tmp_path / "run", max_failures=3))
    assert len(list((tmp_path / "struck").iterdir())) == 3
    assert_same(run_folder, undisturbed, [2, 4, 8])


@pytest.mark.ray
@pytest.mark.fault
def test_a_full_disk_at_a_save_is_named_and_the_same_command_goes_on(files, undisturbed, tmp_path, monkeypatch):
    strike(monkeypatch, tmp_path, disk_full_at_save=6)
    config = config_of(files, tmp_path / "run", max_failures=0)
    with pytest.raises(StorageError, match=r"checkpoint-6 of .*run cannot be written .*it goes on from checkpoint-4"):
        sft.run(config)
    assert [path.name for path in saving.list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "run" / saving.SAVING).exists()
    sft.run(config)
    assert_same(tmp_path / "run", undisturbed, [4])


@pytest.mark.ray
@pytest.mark.fault
def test_a_run_goes_on_from_the_newest_checkpoint_though_the_oldest_kept_one_is_gone(files, undisturbed, tmp_path):
    run_folder = interrupt(undisturbed, tmp_path / "run", "checkpoint-6", "checkpoint-8")
    shutil.rmtree(run_folder / "checkpoint-6")
    sft.run(config_of(files, run_folder))
    assert_same(run_folder, undisturbed, [8])


@pytest.mark.fault
@pytest.mark.own_cluster
def test_the_same_command_goes_on_after_its_driver_was_killed_and_adds_to_the_same_wandb_run(
    files, undisturbed, no_ray, tmp_path
):
    run_folder = tmp_path / "run"
    config = config_of(files, run_folder, wandb=True)
    path = tmp_path / "config.py"
    path.write_text(f"from nli.training.run import TrainConfig\n\nconfig = TrainConfig(**{config.__dict__!r})\n")
    command = [sys.executable, "-m", "ray_jobs.train_sft", "--config", str(path)]
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")} | {
        "HOME": str(tmp_path)
    }
    slow_saves = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "5"
    }  # so that the kill comes in a save's wait for Ray, not after the last step
    with open(tmp_path / "first.log", "w") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, env=environment | slow_saves, stdout=log, stderr=log)
        deadline = time.monotonic() + 600
        while not (run_folder / "checkpoint-4").exists():
            assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            time.sleep(0.02)
        family = psutil.Process(driver.pid).children(recursive=True)
        working = []
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                working += [] if process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent") else [process]
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # Ray's agents notice a minute later; they hold no GPU and write no checkpoint
    assert psutil.wait_procs(working, timeout=60)[1] == []
    assert json.loads((run_folder / "manifest.json").read_text())["status"] == "running"
    newest = int(saving.list_checkpoints(run_folder)[-1].name.removeprefix("checkpoint-"))
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(run_folder, undisturbed, [newest])
    wandb_runs = {folder.name.split("-")[-1] for folder in (run_folder / "wandb").glob("offline-run-*")}
    assert len(wandb_runs) == 1 and len(list((run_folder / "wandb").glob("offline-run-*"))) == 2
