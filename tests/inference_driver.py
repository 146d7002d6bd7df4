"""A driver of an inference run with the fake engine, in a process of its own that tests can kill.

python -m tests.inference_driver '{"model": …, "data": …}' '{"log": …, "seconds": 0.05}'
"""

import functools
import json
import sys

from nli import inference
from nli.inference import InferenceConfig
from tests.fake_engine import FakeSettings, build_fake_engine

if __name__ == "__main__":
    inference.build_engine = functools.partial(build_fake_engine, FakeSettings(**json.loads(sys.argv[2])))
    inference.run(InferenceConfig(**json.loads(sys.argv[1])))
