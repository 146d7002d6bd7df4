"""The training recipe as a config: what `nli.training.run` plans, `nli.training.worker` runs and `nli.sweep` varies.

config = TrainConfig(base_model="data/sample/tiny-mistral", compute_dtype="fp32", lora_rank=8)
"""

from typing import Annotated, Literal

from pydantic import Field

from nli.runtime.config import Count, CountOrZero, Fraction, NonNegative, Positive, config_class
from nli.runtime.errors import ConfigError


@config_class
class TrainConfig:
    """Train LoRA adapters on a 4-bit base. The default trains on sample rows and writes a sample model."""

    base_model: str = "mistralai/Mistral-7B-v0.3"
    """causal LM: a folder or a hub name"""
    train_file: str = "data/finetune/sample_reflected_train.jsonl"
    """training rows of stage 3, JSON Lines"""
    dev_file: str = "data/finetune/sample_reflected_dev.jsonl"
    """rows for the eval loss, JSON Lines; none of them may be in the training file"""
    output_dir: str = "models/sample-reflected"
    """folder of the adapter, its checkpoints and logs"""

    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """base weights: NF4 with double quantisation, LLM.int8, or as they are"""
    compute_dtype: Literal["bf16", "fp32"] = "bf16"
    """type that matrix products run in; adapters keep fp32 master weights"""
    lora_rank: Count = 32
    """rank of the adapters"""
    lora_alpha: Count = 64
    """scale of the adapters: their product is multiplied by lora_alpha / lora_rank"""
    lora_dropout: Fraction = 0.05
    """dropout before the adapters, 0 to below 1; q, k and v share a mask, as they share their input"""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """linear layers that get adapters"""

    learning_rate: Positive = 2e-4
    """peak learning rate"""
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """course of the learning rate after warm-up"""
    warmup_fraction: Fraction = 0.03
    """share of all steps in which the rate rises from 0, 0 to below 1"""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay"""
    max_grad_norm: NonNegative = 1.0
    """gradients are scaled down to this norm; 0: never"""
    optimizer: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """AdamW in fp32, or with 8-bit state"""
    epochs: Positive = 5.0
    """passes over the training rows; early stopping may end sooner"""
    max_steps: CountOrZero = 0
    """end after so many optimizer steps; 0: by epochs"""
    global_batch_size: Count = 64
    """rows per optimizer step over all workers"""
    per_device_batch_size: CountOrZero = 0
    """most rows per forward pass of one worker; 0: as many as micro_batch_tokens takes. The accumulation follows"""
    micro_batch_tokens: CountOrZero = 0
    """most tokens per forward pass of one worker, rows end to end without padding; 0: what the memory estimate allows"""
    max_length: Count = 512
    """most tokens of prompt, completion, BOS and EOS together"""
    drop_overlong: bool = False
    """leave out rows over max_length, with a message, instead of refusing the file"""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """recompute activations in the backward pass (less memory, slower): in all layers, in none, or in as few as the memory estimate asks for"""
    memory_limit_gb: NonNegative = 0.0
    """GPU memory to plan for, in GiB (22 for a 24 GB card); 0: what the GPU has"""

    eval_steps: CountOrZero = 0
    """optimizer steps between evaluations (and checkpoints); 0: once per epoch"""
    early_stopping_patience: CountOrZero = 3
    """evaluations without a better one before training ends; 0: never"""
    watch_rows: CountOrZero = 64
    """labelled dev rows that the model answers at each evaluation, for accuracy, unparsed and EOS rates in the log; 0: none"""
    watch_beside: bool | None = None
    """answer them in a task of its own while training goes on; None: if a GPU is spare then; False: training waits, as it must for best_by accuracy"""
    best_by: Literal["eval_loss", "accuracy"] = "eval_loss"
    """what the best checkpoint has best, and early stopping looks at; accuracy is that over watch_rows"""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """newest checkpoints kept; the best one stays beside them"""
    log_steps: Count = 10
    """optimizer steps between log lines"""
    seed: CountOrZero = 42
    """seed of adapters, order and dropout"""

    num_workers: Count = 1
    """training workers, one GPU each; they share the global batch"""
    parallel: Literal["ddp", "zero2", "zero3", "fsdp2"] = "ddp"
    """how workers share the work: DDP, or DeepSpeed ZeRO-2, which splits gradients and optimizer; zero3 and fsdp2 are refused with the reason"""
    cpus_per_worker: Count = 1
    """CPU cores of one worker"""
    use_gpu: bool | None = None
    """train on GPUs; None: if the cluster has any"""
    gpu: CountOrZero | None = None
    """index of the GPU to use on this machine, by one worker; refused on a cluster"""
    preflight: bool = False
    """only check the data and say what the run will be like: starts nothing, writes nothing"""
    max_failures: CountOrZero = 3
    """times that lost workers are started again"""
    wandb: bool = True
    """log to Weights & Biases, offline without WANDB_API_KEY"""
    wandb_project: str = "mistral-nli"
    """project of the W&B run"""
    storage_root: str = ""
    """folder that relative outputs go below; empty: NLI_STORAGE_ROOT or the current folder"""

    def __post_init__(self) -> None:
        if self.global_batch_size % self.num_workers:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is no multiple of num_workers {self.num_workers}; change one of the two."
            )
        if self.parallel in ("zero3", "fsdp2"):
            reason = {
                "fsdp2": "FSDP2 leaves 4-bit weights whole on every GPU, and splitting them in bf16 storage corrupts them (bitsandbytes issue 1945)",
                "zero3": "ZeRO-3 loads the whole quantised base on every GPU first, so nothing is saved",
            }[self.parallel]
            raise ConfigError(
                f"parallel {self.parallel} is not offered: {reason}. Use ddp: it exchanges adapters alone, and a 7B base takes 4 GB."
            )
        if self.parallel == "zero2" and self.compute_dtype != "bf16":
            raise ConfigError("parallel zero2 computes in bf16; leave compute_dtype at bf16, or use parallel ddp.")
        if self.best_by == "accuracy" and not self.watch_rows:
            raise ConfigError(
                "best_by accuracy needs watch_rows, the dev rows that accuracy is taken over; give more than 0."
            )
        if self.best_by == "accuracy" and self.watch_beside:
            raise ConfigError(
                "best_by accuracy needs each accuracy at its evaluation, and watch_beside lets training go on before it is there."
            )
        if self.gpu is not None and self.num_workers > 1:
            raise ConfigError(
                f"gpu {self.gpu} is one GPU and num_workers {self.num_workers} need one each; leave gpu out, or train with one worker."
            )
        if self.gpu is not None and self.use_gpu is False:
            raise ConfigError(
                f"gpu {self.gpu} picks a GPU and use_gpu=False trains without one; leave one of the two out."
            )


# What may differ between two attempts at the same run: places, hardware, and how much is logged or kept.
FREE_FIELDS = {
    *(
        "base_model",
        "train_file",
        "dev_file",
        "output_dir",
        "storage_root",
        "num_workers",
        "cpus_per_worker",
        "use_gpu",
        "gpu",
        "max_failures",
        "wandb",
    ),
    *("preflight", "watch_beside"),
    *(
        "wandb_project",
        "log_steps",
        "keep_checkpoints",
        "per_device_batch_size",
        "micro_batch_tokens",
        "activation_checkpointing",
        "memory_limit_gb",
    ),
}
