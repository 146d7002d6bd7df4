"""Makes the sample base: a Mistral of under two million parameters that speaks the sample world's language and cannot yet judge it.

    python -m nli.sample.base --output-dir data/sample/tiny-mistral            trains it from scratch, some minutes on two cores
    python -m nli.sample.base --output-dir data/sample/tiny-mistral --check    measures the folder as it stands on test.csv

    prompt  [INST] Premise: Four spaniels slept in the garden. Hypothesis: At least three dogs slept. ...[/INST]
    text    {"thought_process": "Is four at least three? Yes. Must spaniels be dogs? No. A part fails, so it must be true.", "predicted_label": 1}
    note    Is the garden outdoors? Yes. Every part holds, so it must be true.

Its training text never ends and never repeats a premise of train, dev, test or demo. In the task's form a share of the steps is wrong, as "No." is above,
and verdict and label, which agree with each other, are drawn by lot: that a verdict of the task follows from its steps is left for the adapters to learn.
The notes stand outside the task and are sound. Without them "Yes" and "No" would mean nothing to the model, its vectors for both grow alike, and a hundred
steps of LoRA on the attention then find no verdict to learn (its loss stays at 0.69); with them, twenty do.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

from nli.runtime.errors import ModelError
from nli.sample.grammar import Pair, render_thought
from nli.sample.tokenizer import build_tokenizer, encode_example
from nli.sample.world import build_splits, generate_pairs
from nli.task.prompts import render_completion, render_student_prompt

# Shares of the steps that are wrong, of those that are misread and not just answered wrong, and of the texts that are notes.
WRONG_STEP_SHARE = 0.15
MISREAD_SHARE = 0.2
NOTE_SHARE = 0.5
# The phenomena that take longest to learn come more often.
_PRACTICE = {"time": 1.5, "passive": 2.0, "detail": 2.5, "numbers": 1.5, "hypernym": 1.5}
_IGNORED = -100


def write_base_text(pair: Pair, rng: random.Random) -> tuple[str, str]:
    """Prompt and completion of one training text: steps partly wrong, verdict by lot."""
    answers = []
    for step in pair.steps:
        wrong = rng.random() < WRONG_STEP_SHARE
        answers.append(step.answer(step.holds != wrong, misread=wrong and rng.random() < MISREAD_SHARE))
    # The lot leans on a word that says nothing of the truth, so that greedy decoding gives both labels too.
    label = int(rng.random() < (0.6 if pair.hypothesis.split()[-1] < "m" else 0.4))
    return render_student_prompt(pair.premise, pair.hypothesis), render_completion(
        render_thought(answers, label), label
    )


def generate_batches(tokenizer, batch_size: int, seed: int) -> Iterator[list[tuple[list[int], int]]]:
    """Batches of (token ids, length of the prompt), alike in length so that little is padded."""
    pairs, rng = generate_pairs(seed, shares=_PRACTICE), random.Random(seed + 1)
    while True:
        pool = []
        for _ in range(16 * batch_size):
            if rng.random() < NOTE_SHARE:
                ids = tokenizer.encode(next(pairs).thought, add_special_tokens=False)
                pool.append(([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], 1))
                continue
            prompt, completion = write_base_text(next(pairs), rng)
            pool.append((encode_example(tokenizer, prompt, completion), len(encode_example(tokenizer, prompt))))
        pool.sort(key=lambda example: len(example[0]))
        batches = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        yield from batches


def build_model(tokenizer):
    """An untrained model: grouped-query attention, untied embeddings, all linear layers in multiples of 64 as NF4 wants them."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=None,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MistralForCausalLM(config)
    with torch.no_grad():
        # A word enters and leaves the model as the same vector at first, which makes copying words, the start of every thought, quick to learn.
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.07)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def train_base(output_dir: Path, num_steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Train from scratch on the language's completions and save weights in bf16 with the tokenizer."""
    import torch

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.06)
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {num_steps} steps of {batch_size}",
        flush=True,
    )
    started = time.monotonic()
    for step, batch in zip(range(1, num_steps + 1), generate_batches(tokenizer, batch_size, seed), strict=False):
        input_ids, labels = _pad(batch, tokenizer.pad_token_id)
        # Padding is on the right, so the causal mask alone keeps it out of sight.
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        kept = targets != _IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[:, :-1][kept]), targets[kept])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == num_steps:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def _pad(batch: list[tuple[list[int], int]], pad_id: int):
    import torch

    width = max(len(ids) for ids, _ in batch)
    input_ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[_IGNORED] * start + ids[start:] + [_IGNORED] * (width - len(ids)) for ids, start in batch])
    return input_ids, labels


def generate_answers(model, tokenizer, pairs, batch_size: int = 100, max_new_tokens: int = 80) -> list[str]:
    """Greedy completions, without special tokens, in the pairs' order."""
    import torch

    prompts = [encode_example(tokenizer, render_student_prompt(pair.premise, pair.hypothesis)) for pair in pairs]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in chosen)
        missing = [width - len(prompts[index]) for index in chosen]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(
                    [
                        [tokenizer.pad_token_id] * gap + prompts[index]
                        for gap, index in zip(missing, chosen, strict=True)
                    ]
                ),
                attention_mask=torch.tensor([[0] * gap + [1] * (width - gap) for gap in missing]),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        for index, ids in zip(chosen, output[:, width:], strict=True):
            answers[index] = tokenizer.decode(ids, skip_special_tokens=True)
    return answers


def measure_answers(answers: list[str], pairs) -> dict[str, float]:
    """Shares of all rows: parseable, right, answered 1, with every step as it should be. An answer that cannot be read is wrong."""
    import json

    figures = {"parseable": 0, "accuracy": 0, "says_entailment": 0, "right_steps": 0}
    for answer, pair in zip(answers, pairs, strict=True):
        try:
            reply = json.loads(answer)
            thought, label = reply["thought_process"], reply["predicted_label"]
        except (ValueError, TypeError, KeyError):
            continue
        figures["parseable"] += 1
        figures["accuracy"] += label == pair.label
        figures["says_entailment"] += label == 1
        figures["right_steps"] += thought.rpartition(", so it")[0] == pair.thought.rpartition(", so it")[0]
    return {name: count / len(pairs) for name, count in figures.items()}


def check_base(model_dir: Path) -> dict[str, float]:
    """Measure a folder on the test split; raise where it is not the base that the demo needs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    pairs = build_splits()["test"]
    figures = measure_answers(generate_answers(model, tokenizer, pairs), pairs)
    figures["megabytes"] = sum(path.stat().st_size for path in model_dir.iterdir()) / 1e6
    print("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    if figures["parseable"] < 0.97:
        raise ModelError(
            f"{model_dir}: only {figures['parseable']:.1%} of the answers can be read, 97 % are needed; train for more steps"
        )
    if not 0.40 <= figures["accuracy"] <= 0.60:
        raise ModelError(
            f"{model_dir}: accuracy {figures['accuracy']:.3f} is outside 0.40-0.60: the verdicts are not by lot; try another --seed"
        )
    if figures["megabytes"] > 4:
        raise ModelError(f"{model_dir}: {figures['megabytes']:.2f} MB, at most 4 may be committed")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny Mistral of the sample world, or check it.")
    parser.add_argument("--output-dir", type=Path, default=Path("data/sample/tiny-mistral"))
    parser.add_argument("--check", action="store_true", help="measure the folder as it stands instead of training")
    parser.add_argument("--num-steps", type=int, default=4200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    if not arguments.check:
        train_base(
            arguments.output_dir, arguments.num_steps, arguments.batch_size, arguments.learning_rate, arguments.seed
        )
    check_base(arguments.output_dir)


if __name__ == "__main__":
    main()
