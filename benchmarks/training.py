"""How fast QLoRA trains on a GPU, what each choice is worth, and that the fast path computes the same.

    python benchmarks/training.py --baselines DIR SETTING [SETTING …]     each in a fresh process; one JSON line each, also in $OUT/training.jsonl
    python benchmarks/training.py --tiny fast                             the same on a CPU with the tiny model: does it run at all?

The workload is that of `common.py` in the folder of baselines: rows of 175 + 196 tokens on average, global batch 64, random weights in Mistral-7B-v0.3's shape,
r = 32 on q, k, v and o. The baseline is `train_bench.py` there: TRL's trainer as it comes. Tokens a second are real tokens: the mean row x 64 over the median
step.
"""

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = Path("/tmp/m7b")
ROWS = Path("/tmp/nli-bench/rows")


@dataclass(frozen=True)
class Setting:
    """Fields of TrainConfig, and what of the fast path is left out."""

    config: dict = field(default_factory=dict)
    without: tuple[str, ...] = ()
    steps: int = 8
    workers: int = 0  # 0: in this process; else through Ray Train


NO_DROPOUT = {"lora_dropout": 0.0}
ALIKE = {"micro_batch_tokens": 6400, "activation_checkpointing": False}  # micro-batches of the baseline's 16 rows
SETTINGS = {
    # cumulative: each line adds one thing to the line before
    "packed": Setting({**ALIKE}, ("adapters", "mlp", "liger")),
    "liger": Setting({**ALIKE}, ("adapters", "mlp")),
    "adapters": Setting({**ALIKE}, ("mlp",)),
    "mlp": Setting({**ALIKE}),
    "fast": Setting(),
    "fast-no-dropout": Setting(NO_DROPOUT),
    # for a card of 24 GB
    "22gb": Setting({"memory_limit_gb": 22.0}),
    "22gb-no-dropout": Setting({"memory_limit_gb": 22.0, **NO_DROPOUT}),
    # the memory estimate's other points
    "recompute-all": Setting({"activation_checkpointing": True, "micro_batch_tokens": 12500}, steps=4),
    "10gb": Setting({"activation_checkpointing": "auto", "memory_limit_gb": 10.0}, steps=4),
    "rank-16-qv": Setting(
        {**NO_DROPOUT, "lora_rank": 16, "target_modules": ("q_proj", "v_proj"), "micro_batch_tokens": 8400}, steps=4
    ),
    "bf16-base": Setting({**NO_DROPOUT, "quantization": "none", "micro_batch_tokens": 8400}, steps=4),
    "int8-base": Setting({**NO_DROPOUT, "quantization": "int8", "micro_batch_tokens": 4200}, steps=4),
    # several GPUs
    "ray-1": Setting({"log_steps": 4}, workers=1, steps=16),
    "ray-2": Setting({"log_steps": 4}, workers=2, steps=16),
    "zero2": Setting({"parallel": "zero2"}, workers=2, steps=6),
}
GROUPS = {  # run one after the other in one process, where each line only adds to the kernels of the line before
    "table": ("packed", "liger", "adapters", "mlp", "fast"),
    "memory": ("recompute-all", "10gb", "rank-16-qv", "bf16-base"),
}
OTHERS = (*GROUPS, "baseline", "baseline-no-recompute", "equality", "profile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join([*OTHERS, *SETTINGS]))
    parser.add_argument("--baselines", default="", help="folder of common.py and train_bench.py")
    parser.add_argument("--tiny", action="store_true", help="the tiny model on the CPU")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path[:0] = [str(REPOSITORY), arguments.baselines]
    if arguments.run:
        prepare(arguments.tiny)
        if arguments.run in ("equality", "profile"):
            {"equality": run_equality, "profile": run_profile}[arguments.run](arguments.tiny)
        for name in GROUPS.get(arguments.run, (arguments.run,) if arguments.run in SETTINGS else ()):
            run_setting(name, arguments.tiny)
            forget(arguments.tiny)
        return
    for name in arguments.settings:
        if name not in SETTINGS and name not in OTHERS:
            parser.error(f"no setting {name}")
    for name in arguments.settings:
        command = [
            sys.executable,
            __file__,
            "--run",
            name,
            "--baselines",
            arguments.baselines,
            *(["--tiny"] if arguments.tiny else []),
        ]
        if name.startswith("baseline"):
            recompute = "0" if name == "baseline-no-recompute" else "1"
            command = [
                sys.executable,
                f"{arguments.baselines}/train_bench.py",
                "nf4",
                "16",
                "0",
                recompute,
                "sdpa",
                "0",
                "5",
            ]
        started = time.monotonic()
        finished = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False
        )
        lines = [line for line in finished.stdout.splitlines() if line.startswith(("RESULT", "PROFILE"))]
        print(
            "\n".join(lines) if lines else f"RESULT {json.dumps({'setting': name, 'failed': finished.stderr[-1500:]})}",
            flush=True,
        )
        print(f"# {name}: {time.monotonic() - started:.0f} s", flush=True)
        if finished.returncode:
            print(f"# {name} ended with {finished.returncode}: {finished.stderr[-1500:]}", flush=True)


def record(**values) -> None:
    """Print a result and add it to $OUT/training.jsonl."""
    line = json.dumps(values)
    print("RESULT", line, flush=True)
    with open(Path(os.environ.get("OUT", "/tmp")) / "training.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def prepare(tiny: bool) -> None:
    """Make the model, its tokenizer and the tokenised rows, once."""
    import numpy
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not tiny:
        import common
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        common.make_model()
        if not (MODEL / "tokenizer.json").exists():
            words = {**{f"t{index}": index for index in range(3, 32768)}, "<unk>": 0, "<s>": 1, "</s>": 2}
            tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<unk>", unk_token="<unk>"
            ).save_pretrained(MODEL)
    folder = rows_folder(tiny)
    if folder.exists():
        return
    count, top = (64 * 16, 32000) if not tiny else (64 * 5, 400)
    prompts, completions = workload(count)
    chance = numpy.random.default_rng(1)
    columns: dict[str, list] = {"split": [], "line": [], "input_ids": [], "labels": [], "num_tokens": []}
    for line, (prompt, length) in enumerate(zip(prompts, completions, strict=True)):
        prompt = [10 + token % (top - 10) for token in prompt]
        completion = [10 + token % (top - 10) for token in chance.integers(10, 32000, length).tolist()]
        if tiny:
            prompt, completion = prompt[::8], completion[::8]
        values = (
            "train" if line < count - 16 else "dev",
            line,
            prompt + completion,
            [-100] * len(prompt) + completion,
            len(prompt) + len(completion),
        )
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    ids = pa.list_(pa.int32())
    folder.mkdir(parents=True)
    table = pa.table(
        {
            **columns,
            "input_ids": pa.array(columns["input_ids"], ids),
            "labels": pa.array(columns["labels"], ids),
            "problem": [""] * len(columns["line"]),
        }
    )
    pq.write_table(table, folder / "0.parquet")


def workload(count: int):
    """`common.workload`, which stands here too so that the tiny run needs no baselines."""
    import numpy

    r = numpy.random.default_rng(0)
    prompt = numpy.clip(r.normal(175, 25, count), 110, 320).astype(int)
    out = numpy.clip(r.lognormal(numpy.log(190), 0.35, count), 60, 512).astype(int)
    return [r.integers(10, 32000, length).tolist() for length in prompt], out


def rows_folder(tiny: bool) -> Path:
    return ROWS / ("tiny" if tiny else "7b")


def read_config(setting: Setting, tiny: bool):
    from nli.training.config import TrainConfig

    values = {
        "base_model": str(REPOSITORY / "data/sample/tiny-mistral") if tiny else str(MODEL),
        "output_dir": f"/tmp/nli-bench/run-{os.getpid()}",
        "max_length": 1024,
        "max_steps": 4 if tiny else setting.steps,
        "eval_steps": 10_000,
        "early_stopping_patience": 0,
        "warmup_fraction": 0.0,
        "lr_scheduler": "constant_with_warmup",
        "log_steps": 1,
        "wandb": False,
        "watch_rows": 0,
        "num_workers": max(1, setting.workers),
        "use_gpu": not tiny,
    } | setting.config
    if tiny:
        values |= {"compute_dtype": "bf16" if values.get("parallel") == "zero2" else "fp32"}
    return TrainConfig(**values)


def build(config, tiny: bool, without: tuple[str, ...] = ()):
    """The trainer as a worker builds it, saving nothing; parts of the fast path left out as asked."""
    from nli.training import kernels
    from nli.training import worker as training

    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    training.speed_up = functools.partial(kernels.speed_up, **dict.fromkeys(without, False))
    plain_arguments = training.build_arguments

    def build_arguments(*values):
        arguments = plain_arguments(*values)
        arguments.bf16 = "adapters" in without  # PEFT's own adapters need the autocast
        arguments.save_strategy, arguments.eval_strategy, arguments.load_best_model_at_end = "no", "no", False
        return arguments

    training.build_arguments = build_arguments
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if "adapters" in without else "no"
    trainer = training.build_trainer(config, output, str(rows_folder(tiny)), "cpu" if tiny else "cuda:0")
    training.build_arguments = plain_arguments
    return trainer


def checksum(model, trained: bool) -> dict[str, int]:
    """A sum over the bits of each parameter that is trained, or of each that is not."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad == trained]
    return {name: int(p.detach().contiguous().view(integers[p.element_size()]).long().sum()) for name, p in named}


def run_setting(name: str, tiny: bool) -> None:
    setting = SETTINGS[name]
    if setting.workers:
        run_ray(name, setting, tiny)
        return
    import numpy
    import torch
    from transformers import TrainerCallback

    config = read_config(setting, tiny)
    trainer = build(config, tiny, setting.without)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not tiny:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    frozen, trained = checksum(trainer.model, False), checksum(trainer.model, True)
    if not tiny:
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    gc.freeze()  # as a worker does
    trainer.train()
    frozen_changed = [key for key, value in checksum(trainer.model, False).items() if frozen[key] != value]
    trained_same = [key for key, value in checksum(trainer.model, True).items() if trained[key] == value]
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    record(
        setting=name,
        **speed(numpy.diff(times)[1:], trainer.batches.lengths, trainer.parameters_used),
        **describe(trainer, config, tiny),
        losses=[round(entry["loss"], 4) for entry in logs],
        grad_norms=[round(float(entry["grad_norm"]), 4) for entry in logs],
        frozen_changed=len(frozen_changed),
        adapters_unchanged=len(trained_same),
    )


def forget(tiny: bool) -> None:
    """Free the model of the setting before."""
    import torch

    gc.unfreeze()
    gc.collect()
    if not tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def speed(seconds, lengths, parameters: int, workers: int = 1) -> dict:
    """Real tokens a second as the baseline counts them, and what the matrix products alone would need (4 N a token)."""
    import numpy

    median, tokens = float(numpy.median(seconds)), float(numpy.mean(lengths)) * 64
    rate = tokens / median
    return {
        "seconds_a_step": round(median, 3),
        "tokens_per_second": round(rate),
        "useful_tflops": round(4 * parameters * rate / 1e12 / workers, 1),
    }


def describe(trainer, config, tiny: bool) -> dict:
    import torch

    micros = trainer.batches[0]
    found = {
        "micro_batches": len(micros),
        "largest_micro_batch": max(micro["input_ids"].numel() for micro in micros),
        "recomputed_layers": sum(
            bool(getattr(module, "gradient_checkpointing", False))
            for module in trainer.model.get_base_model().model.layers
        ),
        "dropout": config.lora_dropout,
        "quantization": config.quantization,
        "rank": config.lora_rank,
    }
    if not tiny:
        found |= {
            "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "device": torch.cuda.get_device_name(),
        }
        found |= {
            "estimated_gb": round(
                estimated(trainer, config, found["largest_micro_batch"], found["recomputed_layers"]) / 2**30, 2
            )
        }
    return found


def estimated(trainer, config, tokens: int, recomputed: int) -> float:
    from nli.training.memory import Shape, estimate
    from nli.training.worker import read_workload

    return estimate(read_workload(config, Shape.of(trainer.model.config)), tokens, recomputed).total


def run_ray(name: str, setting: Setting, tiny: bool) -> None:
    """The whole worker through Ray Train, one or two GPUs."""
    import shutil

    import numpy
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from nli.training.worker import read_split, train_worker

    config = read_config(setting, tiny)
    shutil.rmtree(config.output_dir, ignore_errors=True)
    Path(config.output_dir).mkdir(parents=True)
    ray.init(include_dashboard=False, num_cpus=4, num_gpus=0 if tiny else setting.workers, log_to_driver=True)
    from dataclasses import asdict

    job = {
        "config": asdict(config),
        "output": config.output_dir,
        "tokenised": str(rows_folder(tiny)),
        "use_gpu": not tiny,
        "run_id": "bench",
    }
    started = time.monotonic()
    TorchTrainer(
        train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=setting.workers, use_gpu=not tiny),
        run_config=RunConfig(name=f"bench-{time.time_ns()}", storage_path="/tmp/nli-bench/ray"),
    ).fit()
    wall = time.monotonic() - started
    logs = [json.loads(line) for line in Path(config.output_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in logs if "grad_norm" in row]
    lengths = [len(ids) for ids in read_split(str(rows_folder(tiny)), "train", 1024)["input_ids"]]
    rates = [row["tokens_per_second"] * setting.workers for row in steps]
    rates = rates[min(2, 8 // config.log_steps) :] or rates  # the first steps compile kernels
    record(
        setting=name,
        workers=setting.workers,
        tokens_per_second=round(float(numpy.median(rates))),
        rates=rates,
        mean_row=round(float(numpy.mean(lengths)), 1),
        seconds=round(wall, 1),
        losses=[round(row["loss"], 4) for row in steps],
        grad_norms=[round(row["grad_norm"], 4) for row in steps],
        eval_losses=[round(row["eval_loss"], 4) for row in logs if "eval_loss" in row],
        peak_gb=max((row.get("peak_memory_gb", 0) for row in steps), default=0),
        parallel=config.parallel,
        device="cpu" if tiny else _device(),
    )
    ray.shutdown()


def _device() -> str:
    import torch

    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def run_equality(tiny: bool) -> None:
    """Per-row losses and adapter gradients: each row alone through plain transformers and PEFT, against all rows packed through the fast path.

    The plain form runs in bf16 under autocast, as TRL runs it, and in fp32, which tells what bf16 explains.
    """
    import torch

    from nli.models.load import add_lora, load_base
    from nli.training.attention import register_packed_attention
    from nli.training.batches import GlobalBatches
    from nli.training.kernels import speed_up
    from nli.training.worker import read_split

    device, base = ("cpu", str(REPOSITORY / "data/sample/tiny-mistral")) if tiny else ("cuda:0", str(MODEL))
    rows = read_split(str(rows_folder(tiny)), "train", 1024).select(range(8))
    total = sum(sum(label != -100 for label in labels) for labels in rows["labels"])

    def load(dtype: str, attention: str):
        model = add_lora(
            load_base(base, "nf4", dtype, device, attention), 32, 64, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj")
        ).train()
        chance = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                spread = 0.01 if "lora_B" in name else 0.02
                parameter.data = (torch.randn(parameter.shape, generator=chance) * spread).to(device)
        return model

    def finish(model, losses):
        gradients = {name: p.grad.flatten().double().cpu() for name, p in model.named_parameters() if p.requires_grad}
        return torch.tensor(losses), gradients

    def plain(dtype: str):
        model, losses = load(dtype, "sdpa"), []
        for row in rows:
            ids, labels = (torch.tensor([row[name]], device=device) for name in ("input_ids", "labels"))
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == "bf16"):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss * (labels[:, 1:] != -100).sum() / total).backward()
            losses.append(loss.item())
        return finish(model, losses)

    def fast(dtype: str):
        model = load(dtype, register_packed_attention())
        speed_up(model)
        (micro,) = GlobalBatches(rows, 8, 0, 1, max_tokens=100_000)[0]
        micro = {name: value.to(device) if hasattr(value, "to") else value for name, value in micro.items()}
        labels = micro.pop("labels")[0, 1:]
        each = torch.nn.functional.cross_entropy(
            model(**micro, use_cache=False).logits[0, :-1].float(), labels, reduction="none"
        )
        (each.sum() / total).backward()
        bounds = micro["cu_seq_lens_q"][1:-1].long().cpu() - 1
        pieces = zip(each.tensor_split(bounds), labels.tensor_split(bounds), strict=True)
        return finish(model, [(loss.sum() / (label != -100).sum()).item() for loss, label in pieces])

    def compare(one, other):
        whole = [torch.cat(list(found[1].values())) for found in (one, other)]
        each = [torch.nn.functional.cosine_similarity(one[1][name], other[1][name], dim=0).item() for name in one[1]]
        return {
            "cosine": round(torch.nn.functional.cosine_similarity(*whole, dim=0).item(), 6),
            "smallest_cosine_of_a_matrix": round(min(each), 6),
            "norm_ratio": round((whole[1].norm() / whole[0].norm()).item(), 5),
            "largest_loss_difference": round((one[0] - other[0]).abs().max().item(), 6),
        }

    exact, plain_low = plain("fp32"), plain("bf16")
    fast_exact, fast_low = fast("fp32"), fast("bf16")
    record(
        setting="equality",
        fp32_plain_and_fast=compare(exact, fast_exact),
        bf16_plain_and_fast=compare(plain_low, fast_low),
        fp32_plain_and_bf16_plain=compare(exact, plain_low),
        fp32_plain_and_bf16_fast=compare(exact, fast_low),
        losses={
            "fp32": exact[0].tolist(),
            "fast fp32": fast_exact[0].tolist(),
            "bf16": plain_low[0].tolist(),
            "fast bf16": fast_low[0].tolist(),
        },
    )


def run_profile(tiny: bool) -> None:
    """Where a step of "fast" spends the GPU's time."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    trainer = build(read_config(Setting(steps=4), tiny), tiny)
    activity = [ProfilerActivity.CPU] if tiny else [ProfilerActivity.CUDA]
    watched = profile(activities=activity)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps - 1:
                watched.start()

    trainer.add_callback(Watch())
    trainer.train()
    watched.stop()
    by = "self_cpu_time_total" if tiny else "self_cuda_time_total"
    for line in watched.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90).splitlines():
        print("PROFILE", line, flush=True)


if __name__ == "__main__":
    main()
