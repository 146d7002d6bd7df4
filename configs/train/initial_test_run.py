"""Twenty steps of the recipe: does everything run on this machine, and how fast?"""

from dataclasses import replace

from configs.train.default import config as default

config = replace(default, output_dir="models/initial_test_run", max_steps=20, eval_steps=10, log_steps=1, wandb=False)
