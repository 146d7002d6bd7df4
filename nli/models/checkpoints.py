"""Folders of weights: which are complete, which was trained on what, and where the newest good checkpoint is.

A run's folder `models/reflected/` holds the adapter (`adapter_model.safetensors`, `adapter_config.json`, tokenizer, `nli.json`) and `checkpoint-N/` folders,
written aside by `nli.training.saving` and renamed when they are whole, each with a `complete.json`:

    {"files": {"adapter_model.safetensors": {"bytes": 1184, "sha256": "5e…"}, "optimizer.pt": {…}, …}, "sha256": "c0…"}

A checkpoint needs no other: it carries the best adapter up to its step, its own or a copy (`best_adapter.safetensors`).

`nli.json` says what an adapter belongs to: the base and its fingerprint, the quantisation, the prompt. A merged model's says what was merged too.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from nli.models.adapter_files import (
    WEIGHTS,
    check_shapes,
    fetch_adapter,
    find_hub_file,
    find_weights,
    is_adapter,
    read_adapter_config,
)
from nli.runtime.errors import DataError, ModelError
from nli.runtime.files import sha256_file, write_atomic
from nli.task.prompts import STUDENT_PROMPT_NAME, STUDENT_TEMPLATE, find_template_fault, prompt_sha256
from nli.task.records import content_hash

COMPLETE = "complete.json"
CARD = "nli.json"
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
    found = [
        path
        for path in run_folder.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()
    ]
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
    patterns = (
        "tokenizer*",
        "*.model",
        "vocab*",
        "merges.txt",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
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
        "prompt_sha256": prompt_sha256(STUDENT_TEMPLATE),
        "prompt_template": STUDENT_TEMPLATE,
    }
    write_atomic(folder / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def read_card(folder: Path) -> dict | None:
    """The `nli.json` of an adapter or merged model; a checkpoint inside a run's folder uses the run's. None where there is none. Raises ModelError."""
    places = [folder / CARD, *([folder.parent / CARD] if "checkpoint-" in folder.name else [])]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        return None
    try:
        card = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{place}: cannot be read ({error}).") from None
    needed = ("base_model", "base_fingerprint", "prompt_sha256")
    if (
        not isinstance(card, dict)
        or not all(isinstance(card.get(name), str) for name in needed)
        or not isinstance(card.get("prompt_template", ""), str)
    ):
        raise ModelError(f"{place}: not a card of this project, which names {', '.join(needed)}.")
    return card


def resolve_template(model: str, template_file: str = "") -> str:
    """The prompt's template for a model by hub name or folder, or for an adapter's folder: the file's, else the one it was trained with, else this project's.

    Raises DataError for a file that is no template, and ModelError where nobody says what an adapter was trained with, or the file says something else.
    """
    given = read_template(template_file) if template_file else None
    folder = Path(model)
    if not folder.is_dir() and (file := find_hub_file(model, CARD)):
        folder = file.parent
    card = read_card(folder) if folder.is_dir() else None
    if card is None:
        if given is None and is_adapter(model):
            cure = "Give the prompt that it was trained with by --prompt-template: a text file with {premise} and {hypothesis} in their places."
            raise ModelError(f"{model}: the adapter has no {CARD} that holds its prompt. {cure}")
        return given or STUDENT_TEMPLATE
    trained = _read_card_template(card, model)
    if given is not None and given != trained:
        raise ModelError(
            f"{template_file}: {model} was trained with another prompt, which stands in its {CARD}; leave --prompt-template out."
        )
    return trained


def read_template(path: str) -> str:
    """A prompt template from a UTF-8 file, less what editors put at its ends: a byte order mark and a newline. Raises DataError if it is none."""
    try:
        template = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError:
        raise DataError(f"{path}: no such prompt template can be read.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the prompt template is not UTF-8.") from None
    if fault := find_template_fault(template):
        raise DataError(f"{path}: {fault}")
    return template


def _read_card_template(card: dict, path: str) -> str:
    template = card.get("prompt_template", STUDENT_TEMPLATE)
    if prompt_sha256(template) != card["prompt_sha256"]:
        raise ModelError(
            f"{path}: the model was trained with another prompt than the one that stands in its {CARD}: the hashes differ."
        )
    return template


def describe_model(path: str, base_model: str) -> tuple[str, str | None]:
    """(base, adapter's folder) of what a user named: a base or an adapter, by folder or hub name. An adapter's base is `base_model` or the one it names.

    A base in a local folder comes back as an absolute path, an adapter with a hub name as its folder in the cache. Raises ModelError if a local folder holds
    neither, if an adapter's weights are missing, its checkpoint damaged, its base not here, or if its weights or what its card tells do not fit the base.
    """
    folder = Path(path)
    if not folder.is_dir():
        if _is_no_hub_name(path):
            raise ModelError(f"{path}: no such model folder, and not a hub name such as mistralai/Mistral-7B-v0.3.")
        fetched = fetch_adapter(path)
        return (path, None) if fetched is None else _describe_adapter(Path(fetched), base_model)
    if (folder / "config.json").is_file() and not (
        is_adapter(path) and find_weights(folder) and not _has_weights(folder)
    ):
        if (card := read_card(folder)) is not None:
            _read_card_template(card, path)
        return path, None
    if not is_adapter(path):
        runs = [str(path.parent) for path in folder.glob("*/adapter_config.json")][:3]
        hint = f" Did you mean {' or '.join(runs)}?" if runs else ""
        raise ModelError(f"{path}: neither a model (config.json) nor an adapter (adapter_config.json).{hint}")
    return _describe_adapter(folder, base_model)


def _describe_adapter(folder: Path, base_model: str) -> tuple[str, str]:
    if find_weights(folder) is None:
        raise ModelError(f"{folder}: the adapter has no {WEIGHTS}; its training or copying was cut short.")
    if folder in list_checkpoints(folder.parent) and (folder / COMPLETE).is_file() and (fault := find_fault(folder)):
        raise ModelError(f"{folder}: {fault}; take another checkpoint.")
    card = read_card(folder)
    named = read_adapter_config(folder).get("base_model_name_or_path")
    base = base_model or named
    if not base:
        raise ModelError(f"{folder}: the adapter does not name its base; give --base-model.")
    if Path(base).is_dir():
        base = os.path.abspath(base)
    elif _is_no_hub_name(base) or find_hub_file(base, "config.json") is None:
        if base_model:
            raise ModelError(
                f"{base}: no model there; --base-model takes a model folder, or a hub name with access to the hub."
            )
        raise ModelError(
            f"{folder}: the adapter names {base} as its base, which cannot be found from here; say where it is by --base-model."
        )
    if card is not None:
        trained_on, given = card["base_fingerprint"], fingerprint_model(base)
        comparable = trained_on.startswith("hub:") == given.startswith(
            "hub:"
        )  # a hub name and its local copy cannot be told apart by these
        if comparable and trained_on != given:
            raise ModelError(
                f"{folder}: the adapter was trained on {card['base_model']} ({trained_on}), not on {base} ({given})."
            )
        _read_card_template(card, str(folder))
    check_shapes(folder, base)
    return base, str(folder)


def _is_no_hub_name(path: str) -> bool:
    return path.startswith((".", "/")) or path.count("/") != 1


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a whole model."""
    return any(
        True for pattern in ("model*.safetensors", "pytorch_model*.bin", "consolidated*") for _ in folder.glob(pattern)
    )
