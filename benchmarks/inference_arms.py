"""What the job is measured against, each in a process of its own. The last line of output is the result:

    python -m benchmarks.inference_arms bare-vllm --model /tmp/b/base --data /tmp/b/pairs.csv --precision bf16
    RESULT {"rows": 1977, "load_seconds": 69.2, "rows_seconds": 26.6, "output_tokens": 394192, …}

bare-vllm   vLLM's own offline class as a careful user writes it: one `generate` call over the whole file, tokenising and detokenising included
original    transformers' `generate` on an NF4 base, static batches of 32 in file order, greedy, each batch until its longest row is done; one batch is measured
"""

import argparse
import json
import time
from pathlib import Path

STARTED = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=("bare-vllm", "original"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--max-rows", type=int, default=0)
    parser.add_argument("--batches", type=int, default=1)
    arguments = parser.parse_args()
    result = run_bare_vllm(arguments) if arguments.arm == "bare-vllm" else run_original(arguments)
    print("RESULT", json.dumps(result), flush=True)


def run_bare_vllm(arguments: argparse.Namespace) -> dict:
    from vllm import LLM, SamplingParams

    from benchmarks.inference_workload import read_workload

    imported = time.monotonic()
    weights, _, cache = arguments.precision.partition("-kv_")
    quantization = {"bf16": None, "fp8": "fp8", "nf4": "bitsandbytes"}[weights]
    llm = LLM(
        model=arguments.model,
        tokenizer_mode="hf",
        dtype="bfloat16",
        quantization=quantization,
        kv_cache_dtype=cache or "auto",
        max_model_len=1024,
        max_num_seqs=1024,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        seed=0,
    )
    loaded = time.monotonic()
    prompts, lengths = read_workload(arguments.data, arguments.max_rows)
    tokenizer = llm.get_tokenizer()
    # The converted tokenizer adds no BOS by itself; here it is put in front once.
    encoded = tokenizer(prompts, add_special_tokens=False).input_ids
    inputs = [{"prompt_token_ids": [tokenizer.bos_token_id, *ids]} for ids in encoded]
    settings = [
        SamplingParams(temperature=0.0, max_tokens=length, min_tokens=length, ignore_eos=True) for length in lengths
    ]
    outputs = llm.generate(inputs, settings, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    done = time.monotonic()
    return {
        "rows": len(texts),
        "import_seconds": round(imported - STARTED, 2),
        "load_seconds": round(loaded - imported, 2),
        "rows_seconds": round(done - loaded, 2),
        "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "prompt_tokens": sum(len(item["prompt_token_ids"]) for item in inputs),
        "characters": sum(map(len, texts)),
    }


def run_original(arguments: argparse.Namespace) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from benchmarks.inference_model import choose_device
    from benchmarks.inference_workload import BATCH, count_steps, read_workload

    device = choose_device()
    imported = time.monotonic()
    compute = torch.bfloat16 if device == "cuda" else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=nf4, dtype=compute, device_map={"": device}, attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loaded = time.monotonic()
    prompts, lengths = read_workload(arguments.data, arguments.max_rows)

    def answer(start: int, length: int) -> list[str]:
        rows = [
            [tokenizer.bos_token_id, *ids]
            for ids in tokenizer(prompts[start : start + BATCH], add_special_tokens=False).input_ids
        ]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
            )
        return tokenizer.batch_decode(written[:, width:].tolist(), skip_special_tokens=True)  # waits for the GPU

    answer(0, 8)
    measured = 0.0
    for batch in range(arguments.batches):
        began = time.monotonic()
        answer(batch * BATCH, max(lengths[batch * BATCH : (batch + 1) * BATCH]))
        measured += time.monotonic() - began
    taken = lengths[: arguments.batches * BATCH]
    seconds_per_step = measured / count_steps(taken)
    total = seconds_per_step * count_steps(lengths)
    return {
        "rows": len(lengths),
        "import_seconds": round(imported - STARTED, 2),
        "load_seconds": round(loaded - imported, 2),
        "rows_seconds": round(total, 1),
        "extrapolated_from_batches": arguments.batches,
        "measured_seconds": round(measured, 2),
        "seconds_per_step": round(seconds_per_step, 5),
        "output_tokens": sum(lengths),
    }


if __name__ == "__main__":
    main()
