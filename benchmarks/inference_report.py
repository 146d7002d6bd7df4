"""What the measured arms come to: ratios, a table, and where two engines part. Pure functions of results.

find_ratios(results)      -> {"job rows ÷ bare rows, bf16": 1.04, "job whole − bare load and rows, bf16": 12.1, …}
render_table(results)     -> a table in Markdown
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLUMNS = {
    "arm": "arm",
    "precision": "precision",
    "rows": "rows",
    "wall_seconds": "whole, s",
    "load_seconds": "load, s",
    "rows_seconds": "rows, s",
    "rows_per_second": "rows/s",
    "tokens_per_second": "output tokens/s",
    "peak_gpu_gb": "peak GPU, GiB",
}
PRECISIONS = ("bf16", "fp8", "nf4", "bf16-kv_fp8", "fp8-kv_fp8", "nf4-kv_fp8")


def render_table(results: Sequence[Mapping]) -> str:
    """One line an arm; what failed says so."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for result in results:
        cells = [_cell(result.get(name)) for name in COLUMNS]
        if "failed_with" in result:
            cells[2] = f"failed ({result['failed_with']})"
        if result.get("extrapolated_from_batches"):
            cells[5] += f" (extrapolated from {result['extrapolated_from_batches']} batch)"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def find_newest(results: Sequence[Mapping], arm: str, precision: str) -> Mapping | None:
    """The newest good result of an arm."""
    found = [
        result
        for result in results
        if result.get("arm") == arm and result.get("precision") == precision and result.get("rows_seconds")
    ]
    return found[-1] if found else None


def find_ratios(results: Sequence[Mapping]) -> dict[str, float]:
    """What the newest results of each arm show, as far as both sides are there."""
    ratios = {}
    for precision in PRECISIONS:
        job, bare = find_newest(results, "job", precision), find_newest(results, "bare-vllm", precision)
        if job and bare:
            ratios[f"job rows ÷ bare rows, {precision}"] = round(job["rows_seconds"] / bare["rows_seconds"], 3)
            ratios[f"job whole − bare load and rows, {precision}, s"] = round(
                job["wall_seconds"] - bare["load_seconds"] - bare["rows_seconds"], 1
            )
    original = find_newest(results, "original", "nf4")
    for arm in ("job", "transformers"):
        for precision in PRECISIONS:
            found = find_newest(results, arm, precision)
            if original and found:
                ratios[f"{arm} rows/s ÷ original rows/s, {precision}"] = round(
                    found["rows_per_second"] / original["rows_per_second"], 1
                )
    return ratios


@dataclass(frozen=True)
class Divergence:
    """The first place where two answers to a row differ."""

    index: int
    """position within the completion's tokens"""
    tokens: tuple[int | None, int | None]
    """what each wrote there; None: it had ended"""


def find_divergence(left: Sequence[int], right: Sequence[int]) -> Divergence | None:
    """Where two token sequences part, or None if they are equal."""
    for index in range(max(len(left), len(right))):
        pair = (left[index] if index < len(left) else None, right[index] if index < len(right) else None)
        if pair[0] != pair[1]:
            return Divergence(index, pair)
    return None


def compare_answers(left: Sequence[Mapping], right: Sequence[Mapping]) -> dict:
    """Shares of equal labels and equal texts of two engines' answers in the same order, and the rows whose texts differ."""
    if [row["id"] for row in left] != [row["id"] for row in right]:
        raise ValueError("the two results hold other rows or another order")
    pairs = list(zip(left, right, strict=True))
    return {
        "rows": len(pairs),
        "labels_agree": round(sum(a["predicted_label"] == b["predicted_label"] for a, b in pairs) / len(pairs), 5),
        "texts_agree": round(sum(a["raw_text"] == b["raw_text"] for a, b in pairs) / len(pairs), 5),
        "differing": [index for index, (a, b) in enumerate(pairs) if a["raw_text"] != b["raw_text"]],
    }
