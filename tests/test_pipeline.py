"""What the pipeline checks before the first call is paid for."""

from dataclasses import replace
from pathlib import Path

import pytest

from nli.pipeline import PipelineConfig, check, check_room, plan_evaluation, plan_inference, plan_sweep, settle
from nli.runtime.config import load_config
from nli.runtime.errors import ConfigError, DataError
from nli.runtime.manifest import start_run
from tests.conftest import REPOSITORY

HEADER = "premise,hypothesis,label\n"


@pytest.fixture
def config(repository, tmp_path) -> PipelineConfig:
    """The demo's pipeline on three files of one pair each."""
    for name, pair in {"train": "a,b,1", "dev": "c,d,0", "test": "e,f,1"}.items():
        (tmp_path / f"{name}.csv").write_text(HEADER + pair + "\n")
    demo = load_config(REPOSITORY / "configs/demo/pipeline.py", PipelineConfig)
    return replace(demo, **{f"{name}_csv": str(tmp_path / f"{name}.csv") for name in ("train", "dev", "test")})


def test_sound_inputs_pass(config, tmp_path):
    check(settle(config), tmp_path)


def test_a_pair_in_two_splits_is_refused_and_a_shared_premise_reported(config, tmp_path, capsys):
    (tmp_path / "test.csv").write_text(HEADER + "a,f,1\n")
    check(settle(config), tmp_path)
    assert "1 premises stand in both the train and the test file" in capsys.readouterr().out
    (tmp_path / "test.csv").write_text(HEADER + "a,b,1\n")
    with pytest.raises(DataError, match="1 pairs stand in both the train and the test file, the first: 'a', 'b'"):
        check(settle(config), tmp_path)


def test_a_fault_in_the_last_file_is_found_first(config, tmp_path):
    (tmp_path / "test.csv").write_text("premise,label\na,1\n")
    with pytest.raises(DataError, match="test.csv:1: no column hypothesis"):
        check(settle(config), tmp_path)
    (tmp_path / "test.csv").unlink()
    with pytest.raises(DataError, match="test.csv: no such file"):
        settle(config)


def test_a_sweep_without_any_of_the_ablations_is_refused_at_once(config, tmp_path):
    chosen = replace(config, ablations=("unmodified",), sweep=replace(config.sweep, ablation=("reflected",)))
    with pytest.raises(ConfigError, match="has none of the pipeline's ablations"):
        check(settle(chosen), tmp_path)


def test_teacher_and_student_must_answer_the_same_rows(config):
    with pytest.raises(ConfigError, match=r"thoughts.max_rows 5 and inference.max_rows 0 differ"):
        replace(config, thoughts=replace(config.thoughts, max_rows=5))


def test_a_cluster_that_a_later_stage_does_not_fit_into_is_refused_before_the_first_call(
    config, tmp_path, monkeypatch, capsys
):
    import ray

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}])
    config = settle(config)
    check_room(config, tmp_path)
    for stage, values in (("train", {"use_gpu": True}), ("inference", {"num_workers": 3})):
        wide = replace(config, **{stage: replace(getattr(config, stage), **values)})
        with pytest.raises(
            ConfigError, match=r"num_workers (1 need 1 GPUs and the cluster has 0|3 need 3 CPUs and the cluster has 2)"
        ):
            check_room(wide, tmp_path)
        (tmp_path / "ray_bootstrap_config.yaml").write_text("")
        check_room(wide, tmp_path)
        (tmp_path / "ray_bootstrap_config.yaml").unlink()
    assert capsys.readouterr().out == ""
    for name in plan_inference(wide, tmp_path).run_names:  # nothing is left to do there
        start_run(tmp_path / f"results/{name}.manifest.json", "inference", {}, wide).finish({})
    check_room(wide, tmp_path)
    with pytest.raises(ConfigError, match="num_workers 2 need 2.01 CPUs"):
        check_room(replace(wide, sweep=replace(wide.sweep, train=replace(wide.sweep.train, num_workers=2))), tmp_path)


def test_files_below_the_storage_root_are_found(config, tmp_path):
    relative = replace(
        config, storage_root=str(tmp_path), train_csv="train.csv", dev_csv="dev.csv", test_csv="test.csv"
    )
    assert settle(relative).test_csv == str(tmp_path / "test.csv")


def test_every_stage_gets_absolute_files(config):
    root = Path("/out")
    settled = settle(config)
    assert Path(settled.train.base_model).is_absolute()
    answered = plan_inference(settled, root)
    assert (answered.model, answered.run_names) == (
        settled.train.base_model,
        ("base", "correct_only", "reflected", "unmodified"),
    )
    assert answered.adapters == ("/out/models/correct_only", "/out/models/reflected", "/out/models/unmodified")
    assert Path(answered.data).is_absolute()
    assert plan_sweep(settled, root).train_files == "/out/data/finetune/{ablation}_train.jsonl"
    assert plan_sweep(settled, root).train.dev_file == "/out/data/finetune/reflected_dev.jsonl"
    assert plan_evaluation(settled, root).names == ("teacher", "base", "correct_only", "reflected", "unmodified")
