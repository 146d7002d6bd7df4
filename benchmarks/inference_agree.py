"""Do the engines agree? The same model's answers by several engines, held against plain transformers.

    python -m benchmarks.inference_agree reference --model models/reflected --base data/sample/tiny-mistral --pairs pairs.json

`pairs.json` names result files of the job: {"results": {"vllm:bf16": "….jsonl", "transformers:bf16": "….jsonl"}}. The reference loads base and adapter by
transformers and PEFT alone, in fp32, batch 1, and computes by teacher forcing

- at each first divergence of two engines: the two tokens' log-probabilities and the two best there
- for each row of each engine: the probability of label 1, the softmax over the two label tokens where the engine's own text says its label; `undecided` counts
  rows where it lies between 0.01 and 0.99, which are few after a thought and many with --options=--no-cot. What bf16 alone does to it is shown by plain
  transformers in bf16, asked about the first engine's texts
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.inference_report import compare_answers, find_divergence
from benchmarks.inference_runs import Board

LABEL = re.compile(r'"predicted_label"\s*:\s*([01])')


def run_agree(
    board: Board, model: str, base: str, data: str, engines: Sequence[str], options: Sequence[str] = ()
) -> dict | None:
    """Answer the rows with each of the engines, engine:precision[:batch size[:reversed]], then compare. None where fewer than two answered."""
    files, ordered = {}, write_ordered(Path(data), board.folder)
    for spec in engines:
        engine, precision, batch, order = [*spec.split(":"), "", ""][:4]
        chosen = ["--engine", engine, "--base-model", base, *(["--batch-size", batch] if batch else []), *options]
        result = board.run_job(
            f"agree-{spec.replace(':', '-')}",
            precision=precision,
            options=chosen,
            forced=False,
            model=model,
            data=ordered[order],
        )
        found = sorted(Path(result["folder"]).glob("*.jsonl"))
        if found and "failed_with" not in result:
            files[spec] = str(found[0])
    if len(files) < 2:
        return None
    pairs = board.folder / "pairs.json"
    pairs.write_text(json.dumps({"results": files}), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "benchmarks.inference_agree",
        "reference",
        "--model",
        model,
        "--base",
        base,
        "--pairs",
        pairs,
    ]
    done = board.run_process("agree reference", command, 300)
    lines = [line.removeprefix("RESULT ") for line in done["output"].splitlines() if line.startswith("RESULT ")]
    for line in lines:
        board.record({"arm": "agree"} | json.loads(line))
    if done["exit_status"]:
        board.record({"arm": "agree", "failed_with": done["exit_status"], "end": done["output"][-1500:]})
    return {"compared": len(lines)}


def write_ordered(data: Path, folder: Path) -> dict[str, Path]:
    """The rows under ids of their own, as they are and from the last to the first."""
    with open(data, encoding="utf-8", newline="") as file:
        rows = [
            {"id": index} | {name: value for name, value in row.items() if name != "id"}
            for index, row in enumerate(csv.DictReader(file))
        ]
    paths = {"": folder / "agree.csv", "reversed": folder / "agree-reversed.csv"}
    for path, taken in zip(paths.values(), (rows, rows[::-1]), strict=True):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(taken)
    return paths


def pair_up(specs: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs to compare: each engine with the first of its precision, and with the first of itself; the first two where there is no such pair."""
    parts = {spec: spec.split(":") for spec in specs}
    pairs = {}
    for spec in specs:
        for kept in (slice(1, 2), slice(0, 2)):
            first = next(other for other in specs if parts[other][kept] == parts[spec][kept])
            if first != spec:
                pairs[first, spec] = None
    return list(pairs) or [(specs[0], specs[1])]


class Reference:
    """Base and adapter in plain transformers."""

    def __init__(self, model: str, base: str, device: str, dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.device = device
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), device_map={"": device})
        if Path(model, "adapter_config.json").is_file():
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, model)
        self.model = loaded.eval()

    def encode(self, prompt: str, completion: str = "") -> list[int]:
        text = f"{prompt} {completion}" if completion else prompt
        return [self.tokenizer.bos_token_id, *self.tokenizer.encode(text, add_special_tokens=False)]

    def read_log_probabilities(self, ids: list[int]):
        """Log-probabilities of what follows the ids."""
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0, -1]
        return torch.log_softmax(logits.float(), -1)

    def read_label_probability(self, prompt: str, text: str) -> float | None:
        """Softmax over the two label tokens where the text's last label stands."""
        import torch

        found = list(LABEL.finditer(text))
        if not found:
            return None
        start = found[-1].start(1)
        texts = [self.encode(prompt, text[:start] + label + text[start + 1 :]) for label in "01"]
        place = find_divergence(*texts)
        if place is None or None in place.tokens:
            return None
        values = self.read_log_probabilities(texts[0][: place.index])[list(place.tokens)]
        return float(torch.softmax(values, -1)[1])

    def describe_divergence(self, row: Mapping, texts: Sequence[str]) -> dict | None:
        """The tokens at the first divergence of two texts with their log-probabilities, and those of the two best."""
        prompt = render(row)
        eos = self.tokenizer.eos_token_id
        completions = [[*self.encode(prompt, text)[len(self.encode(prompt)) :], eos] for text in texts]
        place = find_divergence(*completions)
        if place is None:
            return None
        values = self.read_log_probabilities([*self.encode(prompt), *completions[0][: place.index]])
        best = values.topk(2)
        return {
            "id": row["id"],
            "index": place.index,
            "tokens": [
                None if token is None else self.tokenizer.convert_ids_to_tokens(token) for token in place.tokens
            ],
            "log_probabilities": [None if token is None else round(float(values[token]), 4) for token in place.tokens],
            "best": self.tokenizer.convert_ids_to_tokens(best.indices.tolist()),
            "best_gap": round(float(best.values[0] - best.values[1]), 4),
        }


def render(row: Mapping) -> str:
    from nli.task.prompts import render_student_prompt

    return render_student_prompt(row["premise"], row["hypothesis"])


def run_reference(model: str, base: str, file: Path) -> None:
    """Print what each engine's probabilities and each pair's divergences come to, a line each."""
    from benchmarks.inference_model import choose_device

    files = json.loads(file.read_text(encoding="utf-8"))["results"]
    answers = {
        spec: [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
        for spec, path in files.items()
    }
    answers = {spec: sorted(rows, key=lambda row: int(row["id"])) for spec, rows in answers.items()}
    reference = Reference(model, base, choose_device())
    for left, right in pair_up(list(answers)):
        compared = compare_answers(answers[left], answers[right])
        texts = {
            index: [answers[spec][index]["raw_text"] for spec in (left, right)] for index in compared.pop("differing")
        }
        places = [reference.describe_divergence(answers[left][index], both) for index, both in texts.items()]
        listed = [place for place in places if place is not None]
        widest = max((place["best_gap"] for place in listed), default=0.0)
        result = {
            "pair": [left, right],
            **compared,
            "divergences": len(listed),
            "widest_best_gap": widest,
            "listed": listed,
        }
        print("RESULT", json.dumps(result, ensure_ascii=False), flush=True)
    expected = {
        spec: [reference.read_label_probability(render(row), row["raw_text"]) for row in rows]
        for spec, rows in answers.items()
    }
    told = {spec: [row.get("label_probability") for row in rows] for spec, rows in answers.items()}
    unparsed = {spec: sum(row["parse_status"] != "ok" for row in rows) for spec, rows in answers.items()}
    first = next(iter(answers))
    rounded = Reference(model, base, reference.device, "bfloat16")
    told["plain transformers:bf16"] = [
        rounded.read_label_probability(render(row), row["raw_text"]) for row in answers[first]
    ]
    expected["plain transformers:bf16"] = expected[first]
    for spec, values in told.items():
        pairs = [
            (value, exact)
            for value, exact in zip(values, expected[spec], strict=True)
            if value is not None and exact is not None
        ]
        differences = [abs(value - exact) for value, exact in pairs]
        result = {"engine": spec, "rows": len(values), "without_probability": len(values) - len(pairs)}
        result |= {"undecided": sum(0.01 < exact < 0.99 for _, exact in pairs)}
        result |= {"max_difference": round(max(differences), 6) if differences else None}
        result |= {"mean_difference": round(sum(differences) / len(differences), 6) if differences else None}
        result |= {"largest": [round(difference, 4) for difference in sorted(differences)[-4:]]}
        result |= {"unparsed": unparsed[spec]} if spec in unparsed else {}
        print("RESULT", json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("reference",))
    parser.add_argument("--model", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    arguments = parser.parse_args()
    run_reference(arguments.model, arguments.base, arguments.pairs)


if __name__ == "__main__":
    main()
