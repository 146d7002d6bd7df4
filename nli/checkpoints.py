"""Folders of weights: which are complete, which was trained on what, and where the newest good checkpoint is.

A run's folder `models/reflected/` holds the adapter (`adapter_model.safetensors`, `adapter_config.json`, tokenizer, `nli.json`) and `checkpoint-N/` folders,
written aside by `nli.saving` and renamed when they are whole, each with a `complete.json`:

    {"files": {"adapter_model.safetensors": {"bytes": 1184, "sha256": "5e…"}, "optimizer.pt": {…}, …}, "sha256": "c0…"}

A checkpoint needs no other: it carries the best adapter up to its step, its own or a copy (`best_adapter.safetensors`).

`nli.json` says what an adapter belongs to: the base and its fingerprint, the quantisation, the prompt. A merged model's says what was merged too.
"""

import hashlib
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
BEST_WEIGHTS = "best_adapter.safetensors"
_SAMPLED_BYTES = 1 << 16


def mark_complete(folder: Path) -> None:
    """Flush all files of a checkpoint to the disk and hash them into its `complete.json`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            flush_to_disk(path)
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_atomic(folder / COMPLETE, json.dumps({"files": files, "sha256": _hash_list(files)}, indent=2) + "\n")


def _hash_list(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def flush_to_disk(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names, before anything relies on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every file is as it was written."""
    try:
        seal = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        files = seal["files"]
        if seal["sha256"] != _hash_list(files):
            return f"{COMPLETE} has changed since it was written"
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
    """The newest checkpoint that verifies. All that do not are renamed to `damaged-checkpoint-N`, with a message."""
    whole = []
    for folder in list_checkpoints(run_folder):
        fault = find_fault(folder)
        if fault is None:
            whole.append(folder)
            continue
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"{folder}: {fault}; set aside as {aside.name}", flush=True)
    return whole[-1] if whole else None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoint-N folders of a run, the newest last."""
    found = [path for path in run_folder.glob("checkpoint-*") if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def best_weights(checkpoint: Path) -> Path | None:
    """The file of the best adapter up to a checkpoint, which it carries itself; None if there was no evaluation before it."""
    state = read_trainer_state(checkpoint)
    if not state.get("best_global_step"):
        return None
    return checkpoint / (WEIGHTS if state["best_global_step"] == state["global_step"] else BEST_WEIGHTS)


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
        card = json.loads((folder / CARD).read_text(encoding="utf-8")) if (folder / CARD).is_file() else None
        if card is not None and card["prompt_sha256"] != student_prompt_sha256():
            raise ModelError(f"{path}: the merged model was trained with another prompt than this version renders; its own stands in {CARD}.")
        return path, None
    if not is_adapter(path):
        runs = [str(path.parent) for path in folder.glob("*/adapter_config.json")][:3]
        hint = f" Did you mean {' or '.join(runs)}?" if runs else ""
        raise ModelError(f"{path}: neither a model (config.json) nor an adapter (adapter_config.json).{hint}")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{path}: the adapter has no {WEIGHTS}; its training or copying was cut short.")
    if folder in list_checkpoints(folder.parent) and (folder / COMPLETE).is_file() and (fault := find_fault(folder)):
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
