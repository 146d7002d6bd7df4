"""The demo cut to one ablation and a few steps, about two minutes: does every stage run here? Its accuracies mean nothing."""

from dataclasses import replace

from configs.demo.pipeline import config as demo

train = replace(demo.train, max_steps=6, eval_steps=3, global_batch_size=32)

config = replace(
    demo,
    output_dir="small",
    ablations=("reflected",),
    thoughts=replace(demo.thoughts, max_rows=120),
    train=train,
    sweep=replace(
        demo.sweep,
        lora_rank=(8,),
        learning_rate=(2e-3,),
        ablation=("reflected",),
        train=replace(train, max_steps=2, eval_steps=2),
    ),
    inference=replace(demo.inference, max_rows=120, max_new_tokens=48),
)
