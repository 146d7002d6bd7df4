"""Merge an adapter into its base: one model folder that any engine loads, and how far its answers are from the adapter's.

In:   an adapter folder or checkpoint-N, and the dev rows of its run
Out:  models/reflected-merged/  config.json, model.safetensors, tokenizer, nli.json, and export.json:
      {"form": "merged_bf16", "check": {"rows": 100, "labels_changed": 2, "texts_changed": 31, "unparsed_before": 0, "unparsed_after": 0,
       "first_token_logits": {"max": 0.41, "mean": 0.03}, "label_token_logits": {"max": 0.62, "mean": 0.05}, …}, …}

    merged_bf16   added to the original base's weights in bf16
    merged_nf4    added to the weights that NF4 makes of them, dequantised to bf16: what the adapter was trained on

A merged model is not the trained one: the weights are rounded to bf16 after the sum, and merged_bf16 adds to weights that the adapter never saw. So both are
held against the unmerged adapter on the base precision of its training before the folder gets its name.
"""

import contextlib
import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nli.engines.interface import Decoding, EngineSettings, Generation, Request, answer_all
from nli.engines.transformers.engine import TransformersEngine
from nli.models.adapter_files import find_weights
from nli.models.checkpoints import CARD, describe_model, fingerprint_model, flush_to_disk, read_card
from nli.models.load import check_base, load_adapter, load_base
from nli.models.tokenizer import encode_example, encode_prompt, first_line, load_tokenizer
from nli.runtime.cluster import check_gpu_choice, connected, own_error
from nli.runtime.config import Count, CountOrZero, as_dict, config_class
from nli.runtime.errors import ConfigError, DataError, ModelError, ResumeError, StorageError
from nli.runtime.files import read_jsonl, resolve_input, resolve_model, resolve_output, sha256_file, write_atomic
from nli.runtime.manifest import lock_output, read_commit, read_hardware, read_manifest, read_versions
from nli.task.parsing import ParseStatus, parse_answer
from nli.task.records import SFTExample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT = "export.json"


@config_class
class ExportConfig:
    """Merge an adapter into its base and compare their answers. The default merges the sample model."""

    model: str = "models/sample-reflected"
    """adapter folder or checkpoint-N"""
    base_model: str = ""
    """base of the adapter; empty: the one that it names"""
    form: Literal["merged_bf16", "merged_nf4"] = "merged_bf16"
    """what the adapter is added to: the original weights, or those that NF4 makes of them"""
    output_dir: str = "models/sample-reflected-merged"
    """folder of the merged model; it must be empty"""
    dev_file: str = ""
    """rows to answer before and after, JSON Lines of stage 3; empty: the dev file of the adapter's run"""
    check_rows: Count = 100
    """rows to answer before and after"""
    batch_size: Count = 32
    """prompts in one forward pass"""
    max_new_tokens: Count = 512
    """most tokens of one answer"""
    cpus_per_worker: Count = 1
    """CPU cores of the one worker"""
    use_gpu: bool | None = None
    """run on a GPU; None: if the cluster has any"""
    gpu: CountOrZero | None = None
    """index of the GPU to use on this machine; refused on a cluster"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""


def run(config: ExportConfig) -> Path:
    """Merge, compare, and give the folder its name; returns it.

    Raises ConfigError, DataError, ModelError or StorageError before a model is loaded, and ResumeError if the folder holds anything else than this very
    export or another process is at work on it.
    """
    check_gpu_choice(config.gpu, config.use_gpu)
    base, adapter = describe_model(
        str(resolve_input(config.model, config.storage_root)), resolve_model(config.base_model, config.storage_root)
    )
    if adapter is None:
        raise ModelError(f"{config.model}: a whole model, and no adapter to merge.")
    check_base(base)
    card = read_card(Path(adapter))
    if card is None:
        raise ModelError(
            f"{adapter}: no {CARD} in it or above it, so nobody knows the base precision that the adapter was trained on."
        )
    if config.form == "merged_nf4" and card["quantization"] != "nf4":
        raise ConfigError(
            f"form merged_nf4 is for adapters trained on an NF4 base; this one's was {card['quantization']}: use merged_bf16."
        )
    output = resolve_output(config.output_dir, config.storage_root)
    identity = {
        "form": config.form,
        "base_fingerprint": fingerprint_model(base),
        "adapter_sha256": sha256_file(find_weights(Path(adapter))),
    }
    if (earlier := read_export(output)) is not None and all(
        earlier.get(name) == value for name, value in identity.items()
    ):
        print(f"export: {output} holds this very model already: {describe_check(earlier['check'])}", flush=True)
        return output
    if output.exists() and any(output.iterdir()):
        raise ResumeError(
            f"{output} is not empty and holds another model or other files; choose another output_dir. Nothing was changed."
        )
    rows = read_rows(config, Path(adapter))
    job = {
        "config": as_dict(config),
        "base": base,
        "adapter": adapter,
        "card": card,
        "identity": identity,
        "rows": rows,
        "output": str(output),
    }
    with contextlib.closing(lock_output(output)), connected(config.gpu):
        run_worker(job, config)
    report = read_export(output)
    print(f"export: {config.form} -> {output}: {describe_check(report['check'])}", flush=True)
    return output


def run_worker(job: dict, config: ExportConfig) -> None:
    """Run `export_worker` where the cluster has room for it."""
    import ray

    use_gpu = ray.cluster_resources().get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu
    task = ray.remote(export_worker).options(
        num_cpus=config.cpus_per_worker, num_gpus=1 if use_gpu else 0, max_retries=0
    )
    try:
        ray.get(task.remote(job | {"device": "cuda:0" if use_gpu else "cpu"}))
    except Exception as error:
        raise own_error(error) or error from None


def export_worker(job: dict) -> None:
    """Answer with the adapter, merge, answer with the merged model, write the report, rename."""
    config, output, card = ExportConfig(**job["config"]), Path(job["output"]), job["card"]
    decoding = Decoding(max_new_tokens=config.max_new_tokens, label_probability=False)
    precision = card["compute_dtype"] if card["quantization"] == "none" else card["quantization"]
    settings = EngineSettings(
        job["base"], (job["adapter"],), precision, card["compute_dtype"], decoding, config.batch_size, job["device"]
    )
    before = answer_rows(settings, job["rows"])
    free_memory()
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_merged(
        merge(job["base"], job["adapter"], config.form, card["compute_dtype"], job["device"]), job["base"], aside
    )
    free_memory()
    provenance = {
        "merged": config.form,
        "precision": "bf16",
        "adapter": job["adapter"],
        "adapter_sha256": job["identity"]["adapter_sha256"],
    }
    write_atomic(aside / CARD, json.dumps(card | provenance, indent=2, ensure_ascii=False) + "\n")
    settings = replace(settings, base=str(aside), adapters=(), precision="bf16")
    check = compare_answers(job["rows"], before, answer_rows(settings, job["rows"]))
    report = job["identity"] | {
        "base_model": job["base"],
        "adapter": job["adapter"],
        "check": check,
        "config": job["config"],
    }
    report |= {"trained_on": {"quantization": card["quantization"], "compute_dtype": card["compute_dtype"]}}
    report |= {
        "commit": read_commit(),
        "versions": read_versions(),
        "hardware": read_hardware(),
        "device": job["device"],
    }
    write_atomic(aside / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for path in [*aside.iterdir(), aside]:
        flush_to_disk(path)
    aside.rename(output)


def merge(base: str, adapter: str, form: str, compute_dtype: str, device: str) -> "PreTrainedModel":
    """The base in bf16 with the adapter added to its weights, in fp32 and rounded once. Raises ModelError if a sum is not finite."""
    import torch

    quantised = form == "merged_nf4"
    model = load_base(base, "nf4" if quantised else "none", compute_dtype if quantised else "bf16", device)
    model = model.dequantize(torch.bfloat16) if quantised else model
    model = load_adapter(model.to(torch.bfloat16), adapter).merge_and_unload()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{adapter}: merging makes {name} infinite or not a number; the adapter's training diverged."
            )
    model.config.dtype = torch.bfloat16
    return model


def save_merged(model: "PreTrainedModel", base: str, folder: Path) -> None:
    """Save a model as safetensors, with the base's tokenizer. Raises StorageError, and leaves nothing, if there is no room for it."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StorageError(
            f"{folder}: cannot be written ({first_line(error)}). Free space or choose another output_dir."
        ) from None


def read_rows(config: ExportConfig, adapter: Path) -> list[dict]:
    """The rows to answer, evenly over the file. Raises DataError where no file is given and the adapter's run names none that is there."""
    path = None
    if config.dev_file:
        path = resolve_input(config.dev_file, config.storage_root)
    else:
        manifests = [read_manifest(folder / "manifest.json") for folder in (adapter, adapter.parent)]
        inputs = next(
            (list(manifest["inputs"]) for manifest in manifests if manifest and manifest.get("stage") == "sft"), []
        )
        path = next((Path(name) for name in inputs[1:] if Path(name).is_file()), None)
        if path is None:
            raise DataError(
                f"{adapter}: its run's dev file is not known or not there any more; give rows of stage 3 by --dev-file."
            )
    rows = read_jsonl(path, SFTExample)
    count = min(config.check_rows, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def answer_rows(
    settings: EngineSettings, rows: Sequence[dict]
) -> tuple[list[Generation], list["torch.Tensor"], list["torch.Tensor"]]:
    """Greedy answers, and the logits before the first token and before the label of each row's own completion."""
    engine = TransformersEngine(settings)
    generations = answer_all(engine, [Request(row["prompt"], next(iter(settings.adapters), None)) for row in rows])
    first, label = [], []
    for row in rows:
        at_first, at_label = read_logits(engine.model, engine.tokenizer, row)
        first.append(at_first)
        label += [at_label] if at_label is not None else []
    engine.close()
    return generations, first, label


def read_logits(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", row: dict
) -> tuple["torch.Tensor", "torch.Tensor | None"]:
    """Logits in fp32 where the completion's first token and its label are told; the second is None where there is no label to be found."""
    import torch

    ids = encode_example(tokenizer, row["prompt"], row["completion"]).input_ids
    start = len(encode_prompt(tokenizer, row["prompt"]))
    place = next(
        (index for index in range(len(ids) - 2, start, -1) if tokenizer.decode([ids[index]]).strip() in ("0", "1")),
        None,
    )
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    return logits[start - 1].float().cpu(), None if place is None else logits[place - 1].float().cpu()


def compare_answers(rows: Sequence[dict], before: tuple, after: tuple) -> dict:
    """What merging changed: labels and texts of the answers, how many could not be read, and the logits of told tokens."""
    labels = [[read_label(generation) for generation in generations] for generations, *_ in (before, after)]
    changed = [(row["id"], *pair) for row, *pair in zip(rows, *labels, strict=True) if pair[0] != pair[1]]
    truths = [row["true_label"] for row in rows]
    labelled = sum(truth is not None for truth in truths)
    counts = {
        "rows": len(rows),
        "labels_changed": len(changed),
        "texts_changed": sum(one.text != other.text for one, other in zip(before[0], after[0], strict=True)),
        "first_token_logits": measure_difference(before[1], after[1]),
        "label_token_logits": measure_difference(before[2], after[2]),
        "changed": [{"id": row_id, "before": one, "after": other} for row_id, one, other in changed],
    }
    for name, found in zip(("before", "after"), labels, strict=True):
        counts[f"unparsed_{name}"] = found.count(None)
        correct = sum(label is not None and label == truth for label, truth in zip(found, truths, strict=True))
        counts[f"accuracy_{name}"] = correct / labelled if labelled else None
    return counts


def measure_difference(before: Sequence["torch.Tensor"], after: Sequence["torch.Tensor"]) -> dict | None:
    """Largest and mean absolute difference of logits; None where there are none."""
    import torch

    if not before:
        return None
    difference = (torch.stack(list(before)) - torch.stack(list(after))).abs()
    return {
        "positions": len(before),
        "max": round(difference.max().item(), 5),
        "mean": round(difference.mean().item(), 6),
    }


def read_label(generation: Generation) -> int | None:
    """The label of an answer, None if it cannot be read."""
    parsed = parse_answer(generation.text or "", generation.finish_reason)
    return parsed.fields["predicted_label"] if parsed.status == ParseStatus.OK else None


def read_export(folder: Path) -> dict | None:
    """The export.json of a merged model's folder, None where there is none."""
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def describe_check(check: dict) -> str:
    """The comparison in one line."""
    unparsed = f"unparsed {check['unparsed_before']} -> {check['unparsed_after']}"
    logits = ", ".join(
        f"{name} logits differ by {found['mean']:.4f} on average and {found['max']:.3f} at most"
        for name, found in (("first-token", check["first_token_logits"]), ("label", check["label_token_logits"]))
        if found
    )
    return f"{check['labels_changed']} of {check['rows']} labels and {check['texts_changed']} texts change, {unparsed}; {logits}"


def free_memory() -> None:
    """Give a dropped model's memory back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
