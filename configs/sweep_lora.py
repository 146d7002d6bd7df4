"""LoRA rank x learning rate x ablation: 27 trials of the recipe."""

from configs.train.default import config as default
from nli.sweep import SweepConfig

config = SweepConfig(
    output_dir="sweeps/lora",
    train_files="data/finetune/{ablation}_train.jsonl",
    lora_rank=(16, 32, 64),
    learning_rate=(1e-4, 2e-4, 4e-4),
    ablation=("correct_only", "reflected", "unmodified"),
    train=default,
    scheduler="asha",
)
