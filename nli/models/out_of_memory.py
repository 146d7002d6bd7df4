"""Forward passes that may fail: for want of memory, because of a row, or because the GPU is gone.

attempt(lambda: slots.step(tokens).tolist(), "cuda:0")
-> (None, Failure(out_of_memory=True, problem="OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."))
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from nli.models.tokenizer import first_line
from nli.runtime.errors import EngineDead

Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why a pass failed. It holds no traceback, which would keep the pass's memory."""

    out_of_memory: bool
    problem: str


def attempt(forward: Callable[[], Result], device: str) -> tuple[Result | None, Failure | None]:
    """What a pass gives, or why it failed; on a GPU the memory that it held is given back. Raises EngineDead where the GPU cannot compute any more."""
    try:
        return forward(), None
    except Exception as error:
        failure = Failure(is_out_of_memory(error), f"{type(error).__name__}: {first_line(error)}")
    if device.startswith("cuda"):
        _check_gpu(device, failure)
    return None, failure


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error tells of too little memory, of a GPU or of the machine."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and ("ALLOC_FAILED" in str(error) or "can't allocate memory" in str(error))


def _check_gpu(device: str, failure: Failure) -> None:
    import torch

    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception:
        raise EngineDead(f"The GPU failed: {failure.problem}") from None
