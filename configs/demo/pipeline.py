"""All stages on the sample world: a sample teacher on this machine, a tiny Mistral, a CPU.

What differs from configs/train/ is what this scale needs: fp32, because CPUs without bf16 units are four times slower in it; a higher rate and one row
batch for a model of two million parameters; evaluations once an epoch.
"""

from dataclasses import replace

from configs.train.default import config as recipe
from nli.evaluation.run import EvaluatePredictionsConfig
from nli.inference.run import InferenceConfig
from nli.pipeline import PipelineConfig
from nli.sweep import SweepConfig
from nli.teacher.reflections import GenerateReflectionsConfig
from nli.teacher.thoughts import GenerateThoughtsConfig

train = replace(
    recipe,
    base_model="data/sample/tiny-mistral",
    compute_dtype="fp32",
    learning_rate=2e-3,
    epochs=2,
    eval_steps=0,
    per_device_batch_size=32,
    max_length=128,
    activation_checkpointing=False,
    use_gpu=False,
    wandb=False,
)

config = PipelineConfig(
    output_dir="demo",
    base_url="http://127.0.0.1:8377",
    concurrent_runs=2,
    thoughts=GenerateThoughtsConfig(model="sample-teacher", workers=2),
    reflections=GenerateReflectionsConfig(model="sample-teacher-strong", workers=2),
    train=train,
    sweep=SweepConfig(
        lora_rank=(8, 32),
        learning_rate=(1e-3, 2e-3),
        ablation=("reflected",),
        train=replace(train, max_steps=16, eval_steps=8, early_stopping_patience=0),
    ),
    inference=InferenceConfig(
        precision="nf4", compute_dtype="fp32", use_gpu=False, num_workers=2, batch_size=64, max_new_tokens=96
    ),
    evaluation=EvaluatePredictionsConfig(slice_by=("phenomenon",)),
)
