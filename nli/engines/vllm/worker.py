"""What rides along in vLLM's engine process: the end that follows its owner's, and the figures that only that process knows.

    AsyncEngineArgs(worker_extension_cls="nli.engines.vllm.worker.WorkerExtension", …)
    await engine.collective_rpc("report_figures")  ->  [{"peak_memory_gb": 71.3, "compile_seconds": 18.2}]

vLLM imports this module in its engine process before it loads the model; no other may, since a fork would take it along and not import it again. The engine
process outlives an owner that is killed, idle and with the GPU's memory in its hands; so from the import on, a thread looks whether its parent is still the
one that OWNER names, and ends the process when it is not.
"""

import os
import signal
import threading
import time

from nli.engines.vllm.setup import OWNER

_LOOK_SECONDS = 1.0


class WorkerExtension:
    """Methods that vLLM adds to its GPU worker."""

    def report_figures(self) -> dict:
        """The most GPU memory that torch held in this process, in GB (10**9 bytes), and the seconds that compiling took."""
        import torch

        return {
            "peak_memory_gb": torch.cuda.max_memory_reserved() / 1e9,
            "compile_seconds": float(self.compilation_config.compilation_time),
        }


def end_with(owner: int) -> None:
    """Kill this process as soon as its parent is not `owner`."""
    while os.getppid() == owner:
        time.sleep(_LOOK_SECONDS)
    os.kill(
        os.getpid(), signal.SIGKILL
    )  # no cleaning up: the GPU's memory goes back with the process, and a clean end may hang


if OWNER in os.environ and int(os.environ[OWNER]) != os.getpid():
    threading.Thread(target=end_with, args=(int(os.environ[OWNER]),), name="owner-watch", daemon=True).start()
