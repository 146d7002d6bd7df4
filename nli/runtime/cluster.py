"""Where rows are computed: join the Ray cluster that is there or start one here, and spread rows over actors.

with connected(gpu=None):
    for rows in spread(pending, AskTeacher, (settings,), num_workers=4, batch_size=16, label="thoughts"):
        ...  # lists of finished rows, in the order in which they finish
"""

import inspect
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nli.runtime import errors
from nli.runtime.config import is_submitted_job
from nli.runtime.errors import ClusterError, ConfigError, NLIError
from nli.runtime.manifest import list_gpus

if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def connected(gpu: int | None = None) -> Iterator[None]:
    """A Ray connection for the length of the block.

    Already connected (a pipeline, a test, a Tune trial): nothing is done. Else it joins the cluster that `finds_cluster` speaks of; else it starts a local
    one and stops it at the end. `gpu` picks one GPU of this machine by index; raises ConfigError where a cluster places the work.
    """
    import ray

    check_gpu_choice(gpu)
    if ray.is_initialized():
        yield
        return
    existing = finds_cluster()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options = {} if existing else {"include_dashboard": True, "num_cpus": len(os.sched_getaffinity(0))}
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "the Ray that runs on this machine")
        raise ClusterError(
            f"{address} cannot be joined ({str(error).strip().splitlines()[0]}). Is it up, and RAY_AUTH_MODE set as it needs?"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Give SIGINT back to its handler after the block: Ray Train and Tune take it for themselves and keep it, and Ctrl-C would do nothing from then on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def check_gpu_choice(gpu: int | None, use_gpu: bool | None = None) -> None:
    """Raise ConfigError if a GPU is picked by index where a cluster places the work, or asked for on a machine that has none.

    Stages ask before they start anything.
    """
    if gpu is None and not use_gpu:
        return
    if finds_cluster():
        if gpu is not None:
            raise ConfigError(
                "--gpu picks a GPU of this machine and does not work on a cluster, which places the work itself. Leave it out, or leave the cluster."
            )
        return
    num_gpus = len(list_gpus())
    if not num_gpus:
        raise ConfigError(
            "A GPU is asked for and this machine has none that nvidia-smi can see. Join a cluster (RAY_ADDRESS), or use the CPU: --use-gpu False."
        )
    if gpu is not None and gpu >= num_gpus:
        raise ConfigError(
            f"--gpu {gpu}: this machine has {num_gpus} {'GPU' if num_gpus == 1 else 'GPUs'}, counted from 0."
        )


def check_workers_fit(
    num_workers: int, each: Mapping[str, float], label: str, extra_cpus: float = 0.0, is_next: bool = True
) -> None:
    """Raise ConfigError if the connected cluster has less of something than `num_workers` reserve, for Ray would wait for more without end.

    Whether a cluster grows cannot be asked of Ray. One that is this machine alone does not, unless `ray up` made it (its ~/ray_bootstrap_config.yaml is
    there) or it runs in Kubernetes. Where it may grow, a line says what is waited for, if the workers are what comes next.
    """
    import ray

    have = ray.cluster_resources()
    needed = {name: amount * num_workers + (extra_cpus if name == "CPU" else 0) for name, amount in each.items()}
    alone = sum(node["Alive"] for node in ray.nodes()) <= 1
    grows = (
        not alone
        or Path("~/ray_bootstrap_config.yaml").expanduser().exists()
        or "KUBERNETES_SERVICE_HOST" in os.environ
    )
    for name in (name for name, amount in needed.items() if have.get(name, 0) < amount):
        if not grows:
            raise ConfigError(
                f"num_workers {num_workers} need {needed[name]:g} {name}s and the cluster has {have.get(name, 0):g}. "
                "Take fewer workers (num_workers, cpus_per_worker), or join a larger cluster."
            )
        if is_next:
            print(
                f"{label}: waiting for {needed[name]:g} {name}s; the cluster has {have.get(name, 0):g} now", flush=True
            )


def finds_cluster() -> bool:
    """Whether `connected` would join a cluster: one this process is in, RAY_ADDRESS, a submitted job's, or one that `ray start` runs on this machine."""
    if is_submitted_job() or "RAY_ADDRESS" in os.environ:
        return True
    import ray
    from ray._private.services import find_bootstrap_address

    return ray.is_initialized() or find_bootstrap_address(None) is not None


def spread(
    rows: Sequence[Mapping],
    actor: type,
    arguments: tuple,
    *,
    num_workers: int,
    batch_size: int,
    label: str,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_workers: int = 0,
    calls_at_once: int = 0,
    awaits_all: bool = False,
) -> Iterator[list[dict]]:
    """Call `actor(*arguments)` on lists of rows by Ray Data, in `num_workers` actors, and yield the lists that it returns as they finish.

    With `max_workers`, Ray Data adds actors up to so many as the cluster grows. An error of ours that ends an actor's work is raised here as itself: at once
    or, with `awaits_all`, after all other work has ended; that is for actors that end by themselves when one of them fails. `calls_at_once` is for actors
    whose `__call__` is a coroutine: each works on so many batches at once, rows are handed out one batch at a time, and the caller shows what they do.
    """
    import ray

    quiet_ray_data()
    num_blocks = max(1, min(len(rows), max(2 * num_workers, len(rows) // max(1, 4 * batch_size))))
    dataset = ray.data.from_items(
        [{"row": json.dumps(row)} for row in rows], override_num_blocks=len(rows) if calls_at_once else num_blocks
    ).map_batches(
        _CallAsync if inspect.iscoroutinefunction(actor.__call__) else _Call,
        fn_constructor_args=(actor, arguments),
        compute=ray.data.ActorPoolStrategy(
            min_size=num_workers,
            max_size=max(num_workers, max_workers),
            max_concurrent_calls_per_actor=calls_at_once or None,
            max_tasks_in_flight_per_actor=calls_at_once + 2 if calls_at_once else None,
        ),
        batch_size=batch_size,
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
    )
    first_error = None
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    # Closed at once, whatever ends the loop: actors that nobody listens to would work on until the iterator happens to be collected.
    with closing(batches), progress_bar(len(rows), label, disable=bool(calls_at_once)) as progress:
        for batch in batches:
            results, error = _read_results(batch.column("row").to_pylist())
            progress.update(len(results))
            if results:
                yield results
            first_error = first_error or error
            if first_error is not None and not awaits_all:
                break
    if first_error is not None:
        raise first_error


def progress_bar(total: int, label: str, disable: bool = False) -> "tqdm":
    """A line that shows how many rows are finished."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 15  # seconds between progress lines; a log file keeps every one
    return tqdm(
        total=total,
        desc=label,
        unit="row",
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
        disable=disable,
    )


def quiet_ray_data() -> None:
    """Leave the console to our own progress lines; Ray Data's stay in its log files."""
    import warnings

    import ray

    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors", category=UserWarning)

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a slow account, or a long batch, is no fault
    context.autoscaling_config.actor_pool_util_upscaling_threshold = (
        1.0  # of an actor's calls at work; queues of `spread` never reach Ray Data's 1.75
    )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal").setLevel(logging.ERROR)


class _Call:
    """Carries rows through Ray Data as JSON text: ids, nulls and every character stay as they are, whatever a column's first block looks like to Arrow.

    An error of ours travels as a value: raised in an actor, it would reach the user inside pages of Ray's stack traces.
    """

    def __init__(self, actor: type, arguments: tuple) -> None:
        self.failure: NLIError | None = None
        try:
            self.call = actor(*arguments)
        except NLIError as error:
            self.failure = error

    def __call__(self, batch: Mapping) -> dict:
        try:
            return _pack(self._ready()(_unpack(batch)))
        except NLIError as error:
            return _pack([], error)

    def _ready(self) -> Callable:
        if self.failure is not None:
            raise self.failure
        return self.call


class _CallAsync(_Call):
    async def __call__(self, batch: Mapping) -> dict:
        try:
            return _pack(await self._ready()(_unpack(batch)))
        except NLIError as error:
            return _pack([], error)


def _unpack(batch: Mapping) -> list[dict]:
    return [json.loads(text) for text in batch["row"]]


def _pack(rows: Sequence[Mapping], error: NLIError | None = None) -> dict:
    results = [{"row": row} for row in rows] + ([{"error": [type(error).__name__, str(error)]}] if error else [])
    return {"row": [json.dumps(result) for result in results]}


def _read_results(texts: Sequence[str]) -> tuple[list[dict], NLIError | None]:
    """The rows of a block, and the error that stands among them."""
    results = [json.loads(text) for text in texts]
    failures = [result["error"] for result in results if "error" in result]
    error = getattr(errors, failures[0][0])(failures[0][1]) if failures else None
    return [result["row"] for result in results if "row" in result], error


def own_error(error: BaseException) -> NLIError | None:
    """The NLIError inside an exception that Ray raised for a remote failure, if there is one."""
    pending: list[BaseException] = [error]
    while pending:
        current = pending.pop()
        if isinstance(current, NLIError) and type(current).__module__ == NLIError.__module__:
            return current
        inner = [current.__cause__, getattr(current, "cause", None), *getattr(current, "worker_failures", {}).values()]
        pending += [error for error in inner if isinstance(error, BaseException)]
    return None
