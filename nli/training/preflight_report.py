"""What a training run will be like, told before a GPU is used.

rows      train 2000, dev 400; over max_length 512 and left out: 3
labels    train 1,012 of 1 and 985 of 0; dev 203 of 1 and 197 of 0
tokens    train median 181, 95 % 262, longest 402, 372,405 together
             150–174 |############                 412
steps     160 of 64 rows, 32 an epoch
time      about 13 min of training at 6,187 tokens/s, as measured in models/initial_test_run
memory    21.4 GiB of 24.0 GiB: micro-batches of up to 8192 tokens, 12 of 32 layers recomputed
disk      1.2 GB, 240.0 GB free
leakage   no pair stands in both files, 12 premises do
preview   reflected_train.jsonl:1, the prompt (not learnt), then what is learnt
          <s>|[INST]| Prem|ise|…
          {"|thought|…|}|</s>
"""

import json
import math
import os
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nli.data.pairs import shared_premises
from nli.models.checkpoints import fingerprint_model
from nli.models.tokenizer import IGNORED_LABEL, load_tokenizer
from nli.runtime.errors import StorageError
from nli.runtime.manifest import list_gpus, read_manifest
from nli.task.parsing import parse_answer
from nli.training.config import TrainConfig
from nli.training.memory import GIB, Choice, Shape, choose
from nli.training.preflight import NAMES, Splits, describe_overlong
from nli.training.worker import read_workload

_BAR = 40  # characters of the histogram's longest bar
_BINS = 12  # at most
_NO_ESTIMATE = "trained on the CPU: no estimate"


@dataclass(frozen=True)
class Report:
    """The report by sections; `summary` is what a run prints, the rest is for --preflight and the run's preflight.txt."""

    sections: dict[str, list[str]]
    disk_bytes: int

    def render(self, names: Sequence[str] = ()) -> str:
        """The named sections, or all of them, one below the other."""
        lines = []
        for name, texts in self.sections.items():
            if not names or name in names:
                lines += [f"{name if index == 0 else '':<9} {text}" for index, text in enumerate(texts)]
        return "\n".join(lines)


def describe_run(
    config: TrainConfig, splits: Splits, table, output: Path, colour: bool = False, on_cpu: bool = False
) -> Report:
    """The report of a run whose rows are tokenised in `table` (split, line, input_ids, labels, num_tokens). `colour` marks the preview for a terminal."""
    kept = {name: [] for name in NAMES}
    rows = table.select(["split", "line", "num_tokens"]).to_pylist()
    for row in rows:
        if 0 < row["num_tokens"] <= config.max_length:
            kept[row["split"]].append(row["num_tokens"])
    steps, steps_per_epoch = count_steps(len(kept["train"]), config)
    mean_tokens = sum(kept["train"]) / max(1, len(kept["train"]))
    shape = read_shape(config.base_model)
    disk = estimate_disk(config, shape, steps)
    overlong = describe_overlong(splits, table, config.max_length)
    fate = "left out" if config.drop_overlong else "refused"
    sections = {
        "rows": [
            f"{', '.join(f'{name} {len(kept[name])}' for name in NAMES)}; over max_length {config.max_length} and {fate}: {len(overlong)}"
        ],
        "labels": [describe_labels(splits)],
        "tokens": describe_tokens(kept),
        "steps": [
            f"{steps} of {config.global_batch_size} rows, {steps_per_epoch} an epoch"
            + describe_evaluations(config, steps, steps_per_epoch)
        ],
        "time": [describe_time(config, output, steps * config.global_batch_size * mean_tokens)],
        "memory": [
            _NO_ESTIMATE
            if on_cpu or config.use_gpu is False
            else describe_memory(config, shape, max(kept["train"], default=0), mean_tokens)
        ],
        "disk": [
            f"{disk / 1e9:.2f} GB for checkpoints and adapter, {free_bytes(output) / 1e9:.1f} GB free at {nearest_folder(output)}"
        ],
        "leakage": [describe_leakage(splits)],
        "preview": preview_row(config.base_model, splits, table, colour),
    }
    return Report(sections | ({"long rows": overlong[:20]} if overlong else {}), disk)


def count_steps(num_rows: int, config: TrainConfig) -> tuple[int, int]:
    """(optimizer steps of the run, of one epoch), if early stopping does not end it sooner."""
    per_epoch = max(1, math.ceil(num_rows / config.global_batch_size))
    return config.max_steps or math.ceil(config.epochs * per_epoch), per_epoch


def describe_evaluations(config: TrainConfig, steps: int, steps_per_epoch: int) -> str:
    every = config.eval_steps or steps_per_epoch
    patience = (
        f", ended after {config.early_stopping_patience} without a better one" if config.early_stopping_patience else ""
    )
    return (
        f"; evaluated and saved every {every} steps{patience}"
        if every <= steps
        else f"; eval_steps {every} is past the last one: never evaluated"
    )


def describe_labels(splits: Splits) -> str:
    """How often each label is taught in each file, and how often it is not the true one."""
    parts = []
    for name in NAMES:
        labels = [
            ((parse_answer(row["completion"]).fields or {}).get("predicted_label"), row["true_label"])
            for _, row in splits.rows[name]
        ]
        counts = Counter(taught for taught, _ in labels)
        wrong = sum(None not in (taught, true) and taught != true for taught, true in labels)
        text = f"{name} {counts[1]:,} of 1 and {counts[0]:,} of 0"
        text += f", {counts[None]:,} unreadable" if counts[None] else ""
        parts.append(text + (f" ({wrong:,} not the true one)" if wrong else ""))
    return "; ".join(parts)


def describe_tokens(kept: dict[str, list[int]]) -> list[str]:
    """Median, 95th percentile, longest and sum for both files, and the training file's histogram."""
    lines = []
    for name, lengths in kept.items():
        if lengths:
            ordered = sorted(lengths)
            high = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
            lines.append(
                f"{name} median {statistics.median_low(ordered)}, 95 % within {high}, longest {ordered[-1]}, {sum(ordered):,} together"
            )
    return [*lines, *draw_histogram(kept["train"])]


def draw_histogram(lengths: Sequence[int]) -> list[str]:
    """["  150–174 |####  3", …]: rows by token count in at most a dozen bins of equal, round width."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = next(
        width
        for scale in (10**power for power in range(9))
        for width in (scale, 2 * scale, 5 * scale)
        if (high // width - low // width) < _BINS
    )
    counts = Counter(length // width for length in lengths)
    top = max(counts.values())
    bins = range(low // width, high // width + 1)
    names = [f"{index * width}–{(index + 1) * width - 1}" for index in bins]
    pad = max(map(len, names))
    return [
        f"{name:>{pad}} |{'#' * math.ceil(_BAR * counts[index] / top):<{_BAR}} {counts[index]:,}"
        for name, index in zip(names, bins, strict=True)
    ]


def describe_time(config: TrainConfig, output: Path, tokens: float) -> str:
    """Time by a measured rate of a run beside this one, on the same base and GPUs; without one it is not guessed."""
    found = find_rate(config, output)
    if found is None:
        return (
            "unknown: no run of this base on this machine lies beside this one; a run with --max-steps 20 measures it"
        )
    rate, source = found
    minutes = tokens / (rate * config.num_workers) / 60
    shown = f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
    return f"about {shown} of training, evaluations apart, at {rate:,.0f} tokens/s a worker, as measured in {source}"


def find_rate(config: TrainConfig, output: Path) -> tuple[float, Path] | None:
    """The median real tokens a second of a worker in the newest comparable run of the same folder of runs."""
    base, gpus = fingerprint_model(config.base_model), list_gpus()
    for log in sorted(output.parent.glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True):
        manifest = read_manifest(log.parent / "manifest.json")
        settings = {
            "base": base,
            "quantization": config.quantization,
            "lora_rank": config.lora_rank,
            "max_length": config.max_length,
        }
        if (
            manifest is None
            or manifest["hardware"]["gpus"] != gpus
            or any(manifest["identity"].get(name) != value for name, value in settings.items())
        ):
            continue
        lines = [
            json.loads(line)
            for line in log.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("}\n")
        ]
        rates = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
        if rates:
            return statistics.median(rates), log.parent
    return None


def describe_memory(config: TrainConfig, shape: Shape, longest: int, mean_tokens: float) -> str:
    """The memory estimate against the GPU of this machine, or memory_limit_gb."""
    gpu = next(iter(list_gpus()), None)
    size = re.search(r"([\d.]+) MiB", gpu) if gpu else None
    limit = config.memory_limit_gb * GIB or (float(size[1]) * 2**20 if size else 0)
    step_tokens = math.ceil(mean_tokens * config.global_batch_size / config.num_workers)
    choice: Choice = choose(
        read_workload(config, shape),
        limit or 1024 * GIB,
        longest,
        step_tokens,
        config.activation_checkpointing,
        config.micro_batch_tokens,
    )
    layers = f"micro-batches of up to {choice.micro_batch_tokens:,} tokens, {choice.recomputed_layers} of {shape.layers} layers recomputed"
    needed = choice.estimate.total / GIB
    if not limit:
        return f"{needed:.1f} GiB at most (no GPU is seen from here; memory_limit_gb plans for one): {layers}"
    fits = (
        ""
        if choice.estimate.total <= limit
        else "; that does not fit: lower max_length or micro_batch_tokens, or take a larger GPU"
    )
    return f"{needed:.1f} GiB of {limit / GIB:.1f} GiB ({gpu if size and not config.memory_limit_gb else 'memory_limit_gb'}): {layers}{fits}"


def read_shape(base_model: str) -> Shape:
    """The base's sizes from its config alone."""
    from transformers import AutoConfig

    return Shape.of(AutoConfig.from_pretrained(base_model))


def estimate_disk(config: TrainConfig, shape: Shape, steps: int) -> int:
    """Bytes that a run takes at most: the kept checkpoints, the best one beside them, one being written, and the adapter."""
    adapter = 4 * shape.adapter_parameters(config.lora_rank, config.target_modules)
    optimizer = adapter * (2 if "8bit" not in config.optimizer else 1)
    checkpoint = 2 * adapter + optimizer + 8_000_000  # its weights, the best ones, the optimizer, the tokenizer
    return (config.keep_checkpoints + 2) * checkpoint + adapter + 8_000_000 + 1_000 * steps


def check_disk(report: Report, output: Path) -> None:
    """Raise StorageError if the run's checkpoints will not fit on the disk."""
    free = free_bytes(output)
    if free < report.disk_bytes:
        raise StorageError(
            f"{output}: a run needs {report.disk_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free at {nearest_folder(output)}. "
            "Free space, keep fewer checkpoints (keep_checkpoints), or choose another output_dir."
        )


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(nearest_folder(path)).free


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there already."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def describe_leakage(splits: Splits) -> str:
    """How much dev shares with train. Pairs in both are refused."""
    train, dev = ([row for _, row in splits.rows[name]] for name in NAMES)
    premises = len(shared_premises(train, dev))
    if not premises:
        return "no pair and no premise stands in both files"
    return f"no pair stands in both files, {premises:,} premises do: the eval loss is a little too good"


def preview_row(base_model: str, splits: Splits, table, colour: bool) -> list[str]:
    """The first training row token by token: what is masked, then what is learnt, in colours on a terminal."""
    rows = enumerate(table.select(["split", "line", "num_tokens"]).to_pylist())
    good = [(NAMES.index(row["split"]), row["line"], index) for index, row in rows if row["num_tokens"]]
    if not good:
        return ["no row can be encoded"]
    first = table.slice(min(good)[2], 1).to_pylist()[0]
    tokens = [show_token(token) for token in load_tokenizer(base_model).convert_ids_to_tokens(first["input_ids"])]
    is_learnt = [label != IGNORED_LABEL for label in first["labels"]]
    masked, learnt = (
        "|".join(token for token, flag in zip(tokens, is_learnt, strict=True) if flag == wanted)
        for wanted in (False, True)
    )
    place = f"{splits.paths[first['split']].name}:{first['line']}, {is_learnt.count(False)} masked and {is_learnt.count(True)} learnt tokens"
    if colour:
        return [place, f"\033[2m{masked}\033[0m", f"\033[1;32m{learnt}\033[0m"]
    return [place, f"masked: {masked}", f"learnt: {learnt}"]


def show_token(token: str) -> str:
    """A vocabulary entry as text: its marks for spaces and newlines as what they stand for."""
    return token.replace("▁", " ").replace("Ġ", " ").replace("<0x0A>", "\\n").replace("Ċ", "\\n").replace("\n", "\\n")


def wants_colour(stream) -> bool:
    """Whether to mark text for a stream: a terminal, and no NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR")
