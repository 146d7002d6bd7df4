"""Folders of weights: which are complete, which was trained on what, and where the newest good checkpoint is.

A run's folder `models/reflected/` holds the adapter (`adapter_model.safetensors`, `adapter_config.json`, tokenizer, `nli.json`) and `checkpoint-N/` folders,
each with a `complete.json` that is written last:

    {"files": {"adapter_model.safetensors": {"bytes": 1184, "sha256": "5e…"}, "optimizer.pt": {…}, …}}

`nli.json` says what an adapter belongs to: the base and its fingerprint, the quantisation, the prompt.
"""

import json
import os
import shutil
from pathlib import Path

from nli.errors import ModelError
from nli.prompts import STUDENT_PROMPT_NAME, render_student_prompt, student_prompt_sha256
from nli.records import content_hash
from nli.storage import sha256_file, write_atomic

COMPLETE = "complete.json"
CARD = "nli.json"
WEIGHTS = "adapter_model.safetensors"
_SAMPLED_BYTES = 1 << 16


def mark_complete(folder: Path) -> None:
    """Hash all files of a checkpoint into its `complete.json`."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE
    }
    write_atomic(folder / COMPLETE, json.dumps({"files": files}, indent=2) + "\n")


def find_fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was written."""
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {COMPLETE}: its writing was cut short"
    except (ValueError, KeyError, TypeError):
        return f"{COMPLETE} is damaged"
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {written['bytes']}"
        if sha256_file(path) != written["sha256"]:
            return f"{name} has changed since it was written"
    return None


def find_newest_complete(run_folder: Path) -> Path | None:
    """The newest checkpoint that verifies. Newer ones that do not are renamed to `damaged-checkpoint-N`, with a message."""
    checkpoints = sorted(_checkpoints(run_folder), key=_step, reverse=True)
    for folder in checkpoints:
        fault = find_fault(folder)
        if fault is None:
            return folder
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"{folder}: {fault}; set aside as {aside.name}", flush=True)
    return None


def find_best(run_folder: Path, checkpoint: Path) -> Path | None:
    """The checkpoint that had the best eval loss when `checkpoint` was written, where it lies now; None if there was no evaluation before it.

    Raises ModelError if it is missing or does not verify: the best adapter would be lost, and another one pass for it.
    """
    step = read_trainer_state(checkpoint).get("best_global_step")
    if not step:
        return None
    best = run_folder / f"checkpoint-{step}"
    check_best(best)
    return best


def check_best(best: Path) -> None:
    """Raise ModelError if the checkpoint with the best eval loss is missing or damaged."""
    fault = find_fault(best) if best.is_dir() else "no such folder"
    if fault is not None:
        raise ModelError(f"{best}: {fault}; it had the best eval loss of its run. Put it back, or move the newer checkpoints away to train again from before.")


def read_trainer_state(checkpoint: Path) -> dict:
    """A checkpoint's trainer_state.json. Raises ModelError if it cannot be read."""
    path = checkpoint / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the trainer's state cannot be read ({error}).") from None


def has_work(run_folder: Path) -> bool:
    """Whether a run's folder holds anything that training made: a log, a checkpoint or an adapter."""
    names = ("log.jsonl", WEIGHTS, "checkpoint-*", "damaged-checkpoint-*")
    return any(True for name in names for _ in run_folder.glob(name))


def _checkpoints(run_folder: Path) -> list[Path]:
    return [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def fingerprint_model(path: str) -> str:
    """A hash of a model folder's config and of the sizes, first and last 64 KiB of its weight files; a hub name stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}"
    parts = [(folder / "config.json").read_text(encoding="utf-8")] if (folder / "config.json").is_file() else []
    for weights in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = weights.stat().st_size
        with open(weights, "rb") as file:
            head = file.read(_SAMPLED_BYTES)
            file.seek(max(0, size - _SAMPLED_BYTES))
            tail = file.read(_SAMPLED_BYTES)
        parts += [weights.name, str(size), head.hex(), tail.hex()]
    return f"sampled:{content_hash(parts)}"


def fingerprint_tokenizer(path: str) -> str:
    """A hash of the tokenizer's files in a model folder; a hub name stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return f"hub:{path}"
    patterns = ("tokenizer*", "*.model", "vocab*", "merges.txt", "tekken.json", "special_tokens_map.json", "added_tokens.json")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return content_hash([part for file in files for part in (file.name, sha256_file(file))])


def write_card(folder: Path, base_model: str, quantization: str, compute_dtype: str, max_length: int) -> None:
    """Write an adapter's `nli.json`."""
    card = {
        "base_model": base_model,
        "base_fingerprint": fingerprint_model(base_model),
        "quantization": quantization,
        "compute_dtype": compute_dtype,
        "max_length": max_length,
        "prompt_name": STUDENT_PROMPT_NAME,
        "prompt_sha256": student_prompt_sha256(),
        "prompt_template": render_student_prompt("{premise}", "{hypothesis}"),
    }
    write_atomic(folder / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> dict | None:
    """An adapter's `nli.json`; a checkpoint inside a run's folder uses the run's. None where there is none."""
    for place in (folder / CARD, folder.parent / CARD):
        if place.is_file():
            return json.loads(place.read_text(encoding="utf-8"))
    return None


def is_adapter(path: str) -> bool:
    """Whether a local folder holds an adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def describe_model(path: str, base_model: str) -> tuple[str, str | None]:
    """(base, adapter) of what a user named: a base by folder or hub name, or a folder with an adapter, whose base is `base_model` or the one it names.

    A base in a local folder comes back as an absolute path. Raises ModelError if a local folder holds neither, if an adapter's weights are missing or its
    checkpoint damaged, or if the adapter was trained on another base or prompt than the one that would be used.
    """
    folder = Path(path)
    if not folder.is_dir():
        if path.startswith((".", "/")) or path.count("/") != 1:
            raise ModelError(f"{path}: no such model folder, and not a hub name such as mistralai/Mistral-7B-v0.3.")
        return path, None
    if (folder / "config.json").is_file():
        return path, None
    if not is_adapter(path):
        runs = [str(path.parent) for path in folder.glob("*/adapter_config.json")][:3]
        hint = f" Did you mean {' or '.join(runs)}?" if runs else ""
        raise ModelError(f"{path}: neither a model (config.json) nor an adapter (adapter_config.json).{hint}")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{path}: the adapter has no {WEIGHTS}; its training or copying was cut short.")
    if folder in _checkpoints(folder.parent) and (folder / COMPLETE).is_file() and (fault := find_fault(folder)):
        raise ModelError(f"{path}: {fault}; take another checkpoint.")
    card = read_card(folder)
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = base_model or named
    if not base:
        raise ModelError(f"{path}: the adapter does not name its base; give --base-model.")
    if Path(base).is_dir():
        base = os.path.abspath(base)
    if card is not None:
        trained_on, given = card["base_fingerprint"], fingerprint_model(base)
        comparable = trained_on.startswith("hub:") == given.startswith("hub:")  # a hub name and its local copy cannot be told apart by these
        if comparable and trained_on != given:
            raise ModelError(f"{path}: the adapter was trained on {card['base_model']} ({trained_on}), not on {base} ({given}).")
        if card["prompt_sha256"] != student_prompt_sha256():
            raise ModelError(f"{path}: the adapter was trained with another prompt than this version renders; its own stands in {CARD}.")
    return base, path
