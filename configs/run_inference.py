"""The primary adapter on the test set."""

from nli.inference import InferenceConfig

config = InferenceConfig(
    model="models/reflected",
    data="data/original_data/test.csv",
    quantization="nf4",
    compute_dtype="bf16",
    batch_size=32,
    max_new_tokens=512,
    use_gpu=True,
)
