"""All seven stages, from CSV files to a compared set of adapters.

Local:      python -m ray_jobs.pipeline --config configs/demo/pipeline.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.pipeline --config configs/demo/pipeline.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.pipeline import PipelineConfig, run

    run(parse_config(PipelineConfig, argv, prog="python -m ray_jobs.pipeline", description=__doc__))


if __name__ == "__main__":
    start_job(main)
