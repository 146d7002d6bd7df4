"""All stages on your own data and Mistral-7B. Stages 1 and 2 cost API money."""

from configs.generate_reflections import config as reflections
from configs.generate_thoughts import config as thoughts
from configs.run_inference import config as inference
from configs.sweep_lora import config as sweep
from configs.train.default import config as train
from nli.pipeline import PipelineConfig

config = PipelineConfig(
    output_dir="results/pipeline",
    train_csv="data/original_data/train.csv",
    dev_csv="data/original_data/dev.csv",
    test_csv="data/original_data/test.csv",
    thoughts=thoughts,
    reflections=reflections,
    train=train,
    sweep=sweep,
    inference=inference,
)
