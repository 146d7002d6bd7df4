"""A driver of an inference run with the fake engine, in a process of its own that tests can kill.

python -m tests.inference_driver '{"model": …, "data": …}' '{"log": …, "seconds": 0.05}'
"""

import functools
import json

from nli.inference import run as inference
from nli.inference.run import InferenceConfig
from nli.runtime.config import start_job
from tests.fake_engine import FakeSettings, build_fake_engine


def main(argv: list[str]) -> None:
    inference.build_engine = functools.partial(build_fake_engine, FakeSettings(**json.loads(argv[1])))
    inference.run(InferenceConfig(**json.loads(argv[0])))


if __name__ == "__main__":
    start_job(main)
