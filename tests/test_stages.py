"""Each stage for real, small: the sample teacher over HTTP, the tiny Mistral on a CPU, one Ray."""

import contextlib
import csv
import json
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from nli import sweep
from nli.data import sft_rows as sft_data
from nli.data.sft_rows import PrepareSFTDataConfig
from nli.inference import run as inference
from nli.inference.run import InferenceConfig
from nli.runtime.errors import DataError, NLIError, ResumeError, TeacherError
from nli.sweep import SweepConfig
from nli.teacher import reflections, thoughts
from nli.teacher.reflections import GenerateReflectionsConfig
from nli.teacher.thoughts import GenerateThoughtsConfig
from nli.training import run as sft
from nli.training.run import TrainConfig
from tests.conftest import REPOSITORY, TINY_BASE

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

HARD_TEXT = [
    ("n/a", "NaN", "0"),
    ('She said "well", and left.', "{She} left; [it] seems.", "1"),
    ("Two\nlines\r\nand a half,", " edge spaces ", "0"),
    ("cafÃ© au lait — naïve", "犬 🐕 ran\tfast", "1"),
    ("a\u2028b", "\\n is not a newline", "0"),
]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def think(teacher_url: str, folder: Path, **values) -> GenerateThoughtsConfig:
    settings = {
        "base_url": teacher_url,
        "model": "sample-teacher",
        "workers": 2,
        "max_rows": 60,
        "ledger_dir": str(folder / "ledger"),
    }
    if "thoughts" not in values:
        settings["input_csv"] = str(REPOSITORY / "data/sample/train.csv")
    return GenerateThoughtsConfig(**(settings | {"output_jsonl": str(folder / "thoughts.jsonl")} | values))


def reflect(teacher_url: str, folder: Path, **values) -> GenerateReflectionsConfig:
    settings = {
        "base_url": teacher_url,
        "model": "strong",
        "workers": 1,
        "ledger_dir": str(folder / "ledger"),
        "output_jsonl": str(folder / "r.jsonl"),
    }
    return GenerateReflectionsConfig(**(settings | values))


@pytest.fixture(scope="module")
def sft_files(ray_cluster, teacher_url, tmp_path_factory) -> dict[str, str]:
    """Training files of two ablations, made by stages 1 to 3."""
    folder = tmp_path_factory.mktemp("sft")
    files = {}
    for split in ("train", "dev"):
        answers = thoughts.run(
            think(
                teacher_url,
                folder,
                input_csv=str(REPOSITORY / f"data/sample/{split}.csv"),
                output_jsonl=str(folder / f"{split}.jsonl"),
            )
        )
        reflected = reflections.run(
            reflect(teacher_url, folder, thoughts=str(answers), output_jsonl=str(folder / f"r_{split}.jsonl"))
        )
        for ablation in ("correct_only", "reflected"):
            source = {"reflections": str(reflected)} if ablation == "reflected" else {}
            files[f"{ablation}_{split}"] = str(folder / f"{ablation}_{split}.jsonl")
            sft_data.run(
                PrepareSFTDataConfig(
                    thoughts=str(answers), ablation=ablation, output_jsonl=files[f"{ablation}_{split}"], **source
                )
            )
    return files


def train_config(files: dict[str, str], folder: Path, **values) -> TrainConfig:
    settings = {
        "base_model": TINY_BASE,
        "train_file": files["reflected_train"],
        "dev_file": files["reflected_dev"],
        "output_dir": str(folder),
        "compute_dtype": "fp32",
        "learning_rate": 3e-4,
        "global_batch_size": 16,
        "per_device_batch_size": 8,
        "max_steps": 6,
        "eval_steps": 3,
        "activation_checkpointing": False,
        "wandb": False,
        "log_steps": 1,
    }
    return TrainConfig(**(settings | values))


@pytest.fixture(scope="module")
def adapter(sft_files, tmp_path_factory) -> Path:
    """An adapter of six steps, made by stage 4."""
    return sft.run(train_config(sft_files, tmp_path_factory.mktemp("models") / "reflected"))


def test_thoughts_have_a_row_for_every_pair_in_order_and_a_second_run_asks_nothing(teacher_url, tmp_path, capsys):
    config = think(teacher_url, tmp_path)
    rows = read_rows(thoughts.run(config))
    assert [row["id"] for row in rows] == [str(index) for index in range(60)]
    assert {row["parse_status"] for row in rows} <= {"ok", "bad_json", "missing_field", "truncated", "no_json"}
    assert sum(row["parse_status"] == "ok" for row in rows) >= 57
    assert all(
        row["answered_by"] == "sample-teacher" and row["num_prompt_tokens"] > 0 for row in rows if row["num_replies"]
    )
    assert {row["phenomenon"] for row in rows} > {"negation"}
    capsys.readouterr()
    assert read_rows(thoughts.run(replace(config, base_url=teacher_url))) == rows
    assert "60 finished already, 0 to ask" in capsys.readouterr().out


def test_only_a_new_pair_is_asked_about_whatever_becomes_of_ids_outputs_and_order(teacher_url, tmp_path, capsys):
    source = tmp_path / "pairs.csv"
    source.write_text("premise,hypothesis,label\nTwo dogs ran.,Animals moved.,1\nA man slept.,A man ran.,0\n")
    before = read_rows(thoughts.run(think(teacher_url, tmp_path, input_csv=str(source))))
    source.write_text(
        "premise,hypothesis,label\nNobody slept.,A man slept.,0\nTwo dogs ran.,Animals moved.,1\nA man slept.,A man ran.,0\n"
    )
    capsys.readouterr()
    after = read_rows(thoughts.run(think(teacher_url, tmp_path, input_csv=str(source))))
    assert "2 finished already, 1 to ask" in capsys.readouterr().out
    assert [row["premise"] for row in after] == ["Nobody slept.", "Two dogs ran.", "A man slept."]
    assert [row["raw_text"] for row in after[1:]] == [row["raw_text"] for row in before]
    source.write_text(
        "id,premise,hypothesis,label\nb,A man slept.,A man ran.,0\na,Two dogs ran.,Animals moved.,1\nc,A man slept.,A man ran.,1\n"
    )
    other = think(teacher_url, tmp_path, input_csv=str(source), output_jsonl=str(tmp_path / "with_ids.jsonl"))
    with_ids = read_rows(thoughts.run(other))
    assert "3 rows (2 different requests), 2 finished already, 0 to ask" in capsys.readouterr().out
    assert [(row["id"], row["raw_text"]) for row in with_ids] == [
        (name, before[index]["raw_text"]) for name, index in (("b", 1), ("a", 0), ("c", 1))
    ]


def test_a_dry_run_counts_and_sends_and_writes_nothing(teacher_url, tmp_path, capsys):
    thoughts.run(
        think(
            teacher_url,
            tmp_path,
            base_url="http://127.0.0.1:9",
            dry_run=True,
            model="ministral-8b-2512",
            requests_per_minute=60.0,
        )
    )
    shown = capsys.readouterr().out
    assert "dry run: 60 rows, 60 different requests, 0 answered already; nothing was sent" in shown
    assert "60 s at the limits" in shown.replace("60.5", "60") and "$" in shown
    assert list(tmp_path.iterdir()) == []


def test_reflections_that_miss_the_true_label_or_betray_it_are_dead_letters_and_no_training_rows(teacher_url, tmp_path):
    answers = thoughts.run(think(teacher_url, tmp_path, max_rows=1000))
    output = reflections.run(reflect(teacher_url, tmp_path, thoughts=str(answers)))
    dead = read_rows(tmp_path / "r.dead_letters.jsonl")
    assert dead and {row["reason"] for row in dead} <= {
        "label_disagrees",
        "betrays_label",
        "no_json",
        "bad_json",
        "truncated",
        "missing_field",
    }
    assert all(row["reflected_label"] != row["true_label"] for row in dead if row["reason"] == "label_disagrees")
    made = sft_data.run(
        PrepareSFTDataConfig(
            thoughts=str(answers),
            reflections=str(output),
            ablation="reflected",
            output_jsonl=str(tmp_path / "train.jsonl"),
        )
    )
    assert not {row["id"] for row in dead} & {row["id"] for row in read_rows(made)}


def test_a_new_label_asks_nothing_and_reaches_the_output(teacher_url, tmp_path, capsys):
    source = tmp_path / "pairs.csv"
    source.write_text("premise,hypothesis,label\nTwo dogs ran.,Animals moved.,0\n")
    config = think(teacher_url, tmp_path, input_csv=str(source))
    thoughts.run(config)
    source.write_text("premise,hypothesis,label\nTwo dogs ran.,Animals moved.,1\n")
    capsys.readouterr()
    assert read_rows(thoughts.run(config))[0]["true_label"] == 1
    assert "0 to ask" in capsys.readouterr().out


def test_another_model_is_refused_for_an_output_that_holds_answers(teacher_url, tmp_path):
    config = think(teacher_url, tmp_path, max_rows=3)
    path = thoughts.run(config)
    before = path.read_bytes()
    with pytest.raises(ResumeError, match="model: 'sample-teacher' -> 'another'"):
        thoughts.run(replace(config, model="another"))
    assert path.read_bytes() == before


def test_scoring_and_regeneration_are_stages_of_their_own(teacher_url, tmp_path):
    answers = thoughts.run(think(teacher_url, tmp_path, max_rows=20))
    scores = read_rows(
        thoughts.run(
            think(
                teacher_url,
                tmp_path,
                prompt_name="scoring",
                thoughts=str(answers),
                output_jsonl=str(tmp_path / "scores.jsonl"),
            )
        )
    )
    usable = [row for row in scores if row["parse_status"] == "ok"]
    assert len(usable) >= 18
    assert all(1 <= row["score"] <= 5 and row["analysis"] and row["scored_thought_process"] for row in usable)
    wrong = [row["score"] for row in usable if row["scored_label"] != row["true_label"]]
    right = [row["score"] for row in usable if row["scored_label"] == row["true_label"]]
    assert max(wrong) < min(right)
    again = read_rows(
        thoughts.run(
            think(
                teacher_url,
                tmp_path,
                prompt_name="regeneration",
                max_rows=20,
                output_jsonl=str(tmp_path / "again.jsonl"),
            )
        )
    )
    assert sum(row["predicted_label"] == row["true_label"] for row in again) >= 19


def test_a_refused_key_and_an_unreachable_server_stop_with_one_message(teacher_url, tmp_path):
    config = think(teacher_url, tmp_path, base_url="http://127.0.0.1:9", max_attempts=1)
    with pytest.raises(TeacherError, match="no connection to http://127.0.0.1:9"):
        thoughts.run(config)
    empty = tmp_path / "key"
    empty.write_text("")
    with pytest.raises(TeacherError, match="No API key"):
        thoughts.run(replace(config, api_key_file=str(empty)))


def test_reflections_are_of_wrong_answers_only_and_keep_the_wrong_label(teacher_url, tmp_path):
    answers = thoughts.run(think(teacher_url, tmp_path))
    config = reflect(teacher_url, tmp_path, thoughts=str(answers))
    by_id = {row["id"]: row for row in read_rows(answers)}
    reflected = read_rows(reflections.run(config))
    wrong = [
        row["id"]
        for row in by_id.values()
        if row["parse_status"] == "ok" and row["predicted_label"] != row["true_label"]
    ]
    assert [row["id"] for row in reflected] == wrong and wrong
    for row in reflected:
        assert {name: row[name] for name in by_id[row["id"]]} == by_id[row["id"]]
        assert row["reflected_by"] == "strong"
    good = [row for row in reflected if row["reflection_status"] == "ok"]
    assert sum(row["reflected_label"] == row["true_label"] for row in good) >= 0.9 * len(good)


def test_text_passes_from_csv_to_thoughts_and_results_unchanged(teacher_url, adapter, tmp_path):
    source = tmp_path / "hard.csv"
    with open(source, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("premise", "hypothesis", "label"), *HARD_TEXT])
    answers = read_rows(thoughts.run(think(teacher_url, tmp_path, input_csv=str(source))))
    results = tmp_path / "results"
    predictions = inference.run(infer(adapter, results, data=str(source), run_name="hard"))
    expected = [(premise, hypothesis, int(label)) for premise, hypothesis, label in HARD_TEXT]
    for rows in (
        answers,
        read_rows(predictions),
        json.loads((results / "hard.json").read_text(encoding="utf-8"))["rows"],
    ):
        assert [(row["premise"], row["hypothesis"], row["true_label"]) for row in rows] == expected
    with open(results / "hard.csv", encoding="utf-8", newline="") as file:
        assert [(row["premise"], row["hypothesis"], int(row["true_label"])) for row in csv.DictReader(file)] == expected


def test_sft_saves_adapters_only_with_their_provenance_and_verified_checkpoints(adapter):
    from safetensors import safe_open

    from nli.models.checkpoints import find_fault

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and all("lora_" in name for name in names)
    assert {name.split(".self_attn.")[1].split(".")[0] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    card = json.loads((adapter / "nli.json").read_text())
    assert card["base_fingerprint"].startswith("sampled:") and "[INST]" in card["prompt_template"]
    checkpoints = sorted(path.name for path in adapter.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-6"]
    assert [find_fault(adapter / name) for name in checkpoints] == [None, None]
    log = read_rows(adapter / "log.jsonl")
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 6
    eval_losses = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert len(eval_losses) == 2 and eval_losses[1] < eval_losses[0]
    assert all(0 < row["grad_norm"] < 100 for row in log if "grad_norm" in row)
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["counts"]["steps"] == 6
    assert manifest["identity"]["lora_rank"] == 32


def test_a_finished_training_is_not_repeated_and_another_one_is_refused(adapter, sft_files, capsys):
    before = (adapter / "adapter_model.safetensors").stat().st_mtime_ns
    assert sft.run(train_config(sft_files, adapter)) == adapter
    assert "finished already" in capsys.readouterr().out
    assert (adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ResumeError, match="lora_rank: 32 -> 8"):
        sft.run(train_config(sft_files, adapter, lora_rank=8))


def test_two_workers_take_the_same_steps_on_the_same_global_batch(sft_files, adapter, tmp_path):
    """One step each way is compared by its loss: the same 16 rows, whether one worker or two see them."""
    one = read_rows(adapter / "log.jsonl")
    two = read_rows(
        sft.run(train_config(sft_files, tmp_path / "two", num_workers=2, lora_dropout=0.0, max_steps=3)) / "log.jsonl"
    )
    solo = read_rows(sft.run(train_config(sft_files, tmp_path / "one", lora_dropout=0.0, max_steps=3)) / "log.jsonl")
    losses = [[row["loss"] for row in log if "loss" in row] for log in (solo, two)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert len([row for row in one if "loss" in row]) == 6


def test_training_resumes_from_the_newest_checkpoint_that_verifies(sft_files, adapter, tmp_path, capfd):
    import shutil

    interrupted = tmp_path / "models" / "reflected"
    shutil.copytree(adapter, interrupted)
    for name in ("adapter_model.safetensors", "result.json"):
        (interrupted / name).unlink()
    manifest = json.loads((interrupted / "manifest.json").read_text())
    (interrupted / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    torn = interrupted / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:-100])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sft.run(train_config(sft_files, interrupted))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ray Train would keep Ctrl-C for itself
    result = json.loads((interrupted / "result.json").read_text())
    assert result["resumed_from"].endswith("checkpoint-3")
    assert (interrupted / "damaged-checkpoint-6").is_dir()
    undisturbed = json.loads((adapter / "result.json").read_text())
    assert (result["steps"], result["best_checkpoint"]) == (6, undisturbed["best_checkpoint"])
    assert result["eval_loss"] == pytest.approx(undisturbed["eval_loss"], rel=1e-3)


def test_a_dev_row_that_is_trained_on_and_a_row_too_long_are_named_before_training(sft_files, tmp_path):
    with pytest.raises(DataError, match=r"reflected_train.jsonl:1: the pair stands in .*reflected_train.jsonl:1 too"):
        sft.run(train_config(sft_files, tmp_path / "a", dev_file=sft_files["reflected_train"]))
    with pytest.raises(DataError, match=r"\.jsonl:\d+: \d+ tokens, over max_length 40"):
        sft.run(train_config(sft_files, tmp_path / "b", max_length=40))
    assert not list(tmp_path.glob("*/checkpoint-*"))


def infer(model: Path | str, folder: Path, **values) -> InferenceConfig:
    settings = {
        "data": str(REPOSITORY / "data/sample/test.csv"),
        "max_rows": 24,
        "run_name": "run",
        "batch_size": 8,
        "max_new_tokens": 64,
    }
    return InferenceConfig(model=str(model), results_dir=str(folder), compute_dtype="fp32", **(settings | values))


def test_inference_answers_every_row_in_order_and_resumes(adapter, tmp_path, capsys):
    path = inference.run(infer(adapter, tmp_path))
    rows = read_rows(path)
    assert [row["id"] for row in rows] == [str(index) for index in range(24)]
    assert {row["answered_by"] for row in rows} == {"reflected"}
    assert all(row["finish_reason"] in ("stop", "length") and row["raw_text"] for row in rows)
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["counts"]["labelled"] == 24 and 0 <= written["counts"]["accuracy"] <= 1
    with contextlib.closing(sqlite3.connect(tmp_path / "run.answers.sqlite")) as store, store:
        store.execute("DELETE FROM answers WHERE CAST(key AS INTEGER) >= 10")
    path.unlink()
    capsys.readouterr()
    again = read_rows(inference.run(infer(adapter, tmp_path)))
    assert [row["label_probability"] for row in again] == pytest.approx(
        [row["label_probability"] for row in rows], abs=1e-3
    )  # batches differ
    assert [row | {"label_probability": None} for row in again] == [row | {"label_probability": None} for row in rows]
    assert "10 answered already, 14 to do" in capsys.readouterr().out


def test_inference_takes_a_checkpoint_and_the_base_and_tells_unlabelled_data(adapter, tmp_path, capsys):
    inference.run(infer(adapter / "checkpoint-3", tmp_path, run_name="", max_rows=2))
    stem = next(tmp_path.glob("*.csv")).stem
    assert stem.startswith("reflected-checkpoint-3-nf4-test-")
    path = inference.run(
        infer(TINY_BASE, tmp_path, data=str(REPOSITORY / "data/sample/demo.csv"), run_name="demo", max_rows=2)
    )
    assert [row["true_label"] for row in read_rows(path)] == [None, None]
    assert "2 unlabelled rows" in capsys.readouterr().out
    assert json.loads((tmp_path / "demo.json").read_text())["counts"]["accuracy"] is None


def test_a_row_that_cannot_be_encoded_becomes_a_failed_row_and_the_others_are_answered(adapter, tmp_path):
    source = tmp_path / "bad.csv"
    source.write_text("premise,hypothesis\nTwo dogs ran.,Animals moved.\nHe wrote </s> here.,He wrote.\n")
    rows = read_rows(inference.run(infer(adapter, tmp_path, data=str(source))))
    assert rows[0]["raw_text"] and rows[0]["parse_status"] != "request_failed"
    assert rows[1]["parse_status"] == "request_failed" and "control token" in rows[1]["problem"]


def test_batch_size_and_order_change_no_answer(adapter, tmp_path):
    wide = read_rows(inference.run(infer(adapter, tmp_path, run_name="wide", batch_size=24)))
    narrow = read_rows(inference.run(infer(adapter, tmp_path, run_name="narrow", batch_size=5)))
    assert [row["raw_text"] for row in wide] == [row["raw_text"] for row in narrow]


def test_a_sweep_runs_every_combination_names_the_best_and_repeats_nothing(sft_files, tmp_path, capsys):
    base = train_config(sft_files, tmp_path / "unused", max_steps=3, early_stopping_patience=0)
    config = SweepConfig(
        output_dir=str(tmp_path / "sweep"),
        train_files=sft_files["reflected_train"].replace("reflected", "{ablation}"),
        lora_rank=(4,),
        learning_rate=(1e-5, 3e-3),
        ablation=("reflected",),
        train=base,
    )
    found = json.loads(sweep.run(config).read_text())
    names = ["ablation=reflected,lora_rank=4,learning_rate=1e-05", "ablation=reflected,lora_rank=4,learning_rate=0.003"]
    assert [trial["name"] for trial in found["trials"]] == names
    assert [trial["status"] for trial in found["trials"]] == ["finished", "finished"]
    assert found["best"]["name"] == names[1]
    assert found["best"]["eval_loss"] < found["trials"][0]["eval_loss"]
    card = json.loads((Path(found["best"]["adapter"]) / "adapter_config.json").read_text())
    assert (card["r"], card["lora_alpha"]) == (4, 8)
    capsys.readouterr()
    assert json.loads(sweep.run(config).read_text()) == found
    assert "2 trials, 2 finished already" in capsys.readouterr().out


def test_a_sweep_checks_all_trials_before_the_first(sft_files, tmp_path):
    base = train_config(sft_files, tmp_path / "unused")
    config = SweepConfig(output_dir=str(tmp_path / "sweep"), train_files=str(tmp_path / "{ablation}.jsonl"), train=base)
    with pytest.raises(DataError, match="correct_only.jsonl: no such file"):
        sweep.run(config)
    with pytest.raises(
        NLIError, match="sweep axis 'lora_dropuot' is not a field of the training config. Did you mean lora_dropout?"
    ):
        replace(config, extra_axes=("lora_dropuot=0,0.1",))
    assert not (tmp_path / "sweep").exists()
