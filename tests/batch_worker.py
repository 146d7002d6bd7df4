"""A batch-mode run without Ray, as a process that can kill itself.

python -m tests.batch_worker '{"folder": …, "base_url": …, "num_rows": 40, "kill_at": "job_created", "nth": 1}'
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from nli.api import batch_client
from nli.api.ledger import Ledger
from nli.api.ledger_file import LedgerReader
from nli.api.prices import NANO
from nli.runtime.worklist import Worklist
from nli.task.parsing import ParseStatus
from nli.task.prompts import TEACHER_PROMPTS
from nli.teacher.batch import ask_in_batches
from nli.teacher.requests import TeacherConfig, first_key, read_outcomes

PROMPT = TEACHER_PROMPTS["initial_generation"]
RUN = "thoughts.jsonl"


def make_rows(num_rows: int) -> list[dict]:
    """Rows whose ids say which they are; every tenth repeats the pair of the one before it."""
    numbers = [number - (number % 10 == 9) for number in range(num_rows)]
    return [
        {"id": str(index), "premise": f"Two dogs ran {number} times.", "hypothesis": "Animals moved."}
        for index, number in enumerate(numbers)
    ]


def make_config(base_url: str, **values) -> TeacherConfig:
    defaults = {"base_url": base_url, "mode": "batch", "batch_poll_seconds": 0.02, "batch_max_requests": 12}
    return TeacherConfig(**defaults | values)


def run_batches(folder: Path, config: TeacherConfig, num_rows: int, hook=lambda step: None) -> dict:
    """Ask for the rows' answers as `run_generation` does; returns id -> (status, raw text) and the run's sums."""
    rows = make_rows(num_rows)
    ledger = Ledger(folder)
    reader = LedgerReader(folder)

    def find_done(keys):
        return {
            key
            for key, (_, is_complete) in read_outcomes(PROMPT, reader, keys, config.repair_invalid).items()
            if is_complete
        }

    with tempfile.TemporaryDirectory() as place, Worklist(Path(place) / "rows.sqlite") as worklist:
        worklist.fill(((row, first_key(config, PROMPT, row)) for row in rows), Path("rows.csv"))
        if worklist.list_pending(find_done):
            ledger.begin_run(RUN, int(config.max_cost * NANO) if config.max_cost else None)
            ask_in_batches(config, PROMPT, "any", RUN, ledger, folder, worklist.path, hook)
        answers = {}
        for chunk in worklist.iterate():
            outcomes = read_outcomes(PROMPT, reader, [key for _, key in chunk], config.repair_invalid)
            answers |= {
                row["id"]: [str(outcomes[key][0].status), outcomes[key][0].raw_text, outcomes[key][0].problem]
                for row, key in chunk
            }
    totals = ledger.read_totals(RUN)
    reader.close()
    ledger.close()
    return {
        "answers": answers,
        "totals": vars(totals),
        "failed": sum(status == ParseStatus.REQUEST_FAILED for status, _, _ in answers.values()),
    }


def main(arguments: dict) -> None:
    seen: list[str] = []

    def hook(step: str) -> None:
        seen.append(step)
        if step == arguments.get("kill_at") and seen.count(step) == arguments.get("nth", 1):
            os.kill(os.getpid(), signal.SIGKILL)

    batch_client.ORPHAN_WAITS = (0.0, 0.05)
    config = make_config(arguments["base_url"], **arguments.get("config", {}))
    result = run_batches(Path(arguments["folder"]), config, arguments["num_rows"], hook)
    print(json.dumps(result | {"steps": seen}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
