"""The recipe: QLoRA on Mistral-7B-v0.3. The other files of this folder are this one with a few fields replaced."""

from nli.training.run import TrainConfig

config = TrainConfig(
    base_model="mistralai/Mistral-7B-v0.3",
    train_file="data/finetune/reflected_train.jsonl",
    dev_file="data/finetune/reflected_dev.jsonl",
    output_dir="models/default",
    quantization="nf4",
    compute_dtype="bf16",
    lora_rank=32,
    lora_alpha=64,
    lora_dropout=0.05,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
    learning_rate=2e-4,
    lr_scheduler="linear",
    warmup_fraction=0.03,
    weight_decay=0.01,
    epochs=5,  # at most: early stopping ends it after 3 evaluations without a better eval loss
    early_stopping_patience=3,
    eval_steps=250,
    global_batch_size=64,  # in as few forward passes as the GPU's memory allows, over any number of GPUs that divides it
    max_length=512,
    use_gpu=True,
)
