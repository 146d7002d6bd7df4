"""Merge an adapter into its base, and say how far the merged model's answers are from the adapter's.

Local:      python -m ray_jobs.export_model --config configs/export_model.py
Submitted:  ray job submit --runtime-env runtime_env.yaml -- python -m ray_jobs.export_model --config configs/export_model.py
"""

from nli.runtime.config import parse_config, start_job


def main(argv: list[str]) -> None:
    from nli.export import ExportConfig, run

    run(parse_config(ExportConfig, argv, prog="python -m ray_jobs.export_model", description=__doc__))


if __name__ == "__main__":
    start_job(main)
