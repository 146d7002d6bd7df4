"""The primary adapter on the test set."""

from nli.inference.run import InferenceConfig

config = InferenceConfig(
    model="models/reflected",
    data="data/original_data/test.csv",
    precision="nf4",
    compute_dtype="bf16",
    max_new_tokens=512,
    use_gpu=True,
)
