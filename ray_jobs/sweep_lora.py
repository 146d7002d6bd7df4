"""Stage 5: search LoRA rank x learning rate x ablation.

Local:      python -m ray_jobs.sweep_lora --config configs/sweep_lora.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.sweep_lora --config configs/sweep_lora.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.sweep import SweepConfig, run

    run(parse_config(SweepConfig, argv, prog="python -m ray_jobs.sweep_lora", description=__doc__))


if __name__ == "__main__":
    start_job(main)
