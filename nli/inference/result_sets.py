"""Which models an inference run asks, and where the results of each lie.

    base, models = describe_models(config)          -> "/models/base", [Model("reflected", "/models/reflected", "[INST] …"), Model("unmodified", …), …]
    sets = [open_results(config, stack, source, "vllm", base, model) for model in models]
    sets[0].files["jsonl"]                          -> results/reflected-nf4-test-20260114_090512.jsonl

Results have the name that the user gives, that of an interrupted run of the same model, settings and data, or a new one. A manifest beside them holds what
decides an answer, and work that was made another way is refused.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nli.inference.answer_store import AnswerStore
from nli.inference.worker import Target
from nli.models.adapter_files import find_weights, read_adapter_config
from nli.models.checkpoints import describe_model, fingerprint_model, read_card, resolve_template
from nli.models.load import check_base
from nli.models.tokenizer import check_prompt_ids
from nli.runtime.errors import ConfigError, DataError, ModelError, ResumeError, StorageError
from nli.runtime.files import resolve_input, resolve_model, resolve_output, sha256_file
from nli.runtime.manifest import Run, is_in_use, lock_output, read_manifest, start_run
from nli.task.prompts import STUDENT_PROMPT_NAME, prompt_sha256

if TYPE_CHECKING:
    from nli.inference.run import InferenceConfig


class Model(NamedTuple):
    """One of the models of a run: its name, its adapter's folder, its prompt, and what its results are called, if that was said."""

    name: str
    adapter: str | None
    template: str
    run_name: str = ""


@dataclass
class ResultSet:
    """One model of a run with its files."""

    name: str
    target: Target
    store: AnswerStore
    record: Run
    cure: str
    """what asks its failed rows again"""
    num_pending: int = 0
    files: dict[str, Path] = field(default_factory=dict)


def describe_models(config: "InferenceConfig") -> tuple[str, list[Model]]:
    """The base of a run and its models. Raises ModelError if one does not fit, ConfigError if two have one name, DataError if the template is none."""
    model = resolve_model(config.model, config.storage_root)
    base_model = resolve_model(config.base_model, config.storage_root)
    base, adapter = describe_model(model, base_model)
    check_base(base)
    template_file = str(resolve_input(config.prompt_template, config.storage_root)) if config.prompt_template else ""
    models = [Model(_name(model), adapter, resolve_template(adapter or model, template_file))]
    for path in config.adapters:
        folder = resolve_model(path, config.storage_root)
        _, its_adapter = describe_model(folder, base_model or base)
        if its_adapter is None and not Path(folder).is_dir():
            raise ModelError(f"{path}: no such adapter folder, and no adapter that the hub has under this name.")
        if its_adapter is None:
            raise ModelError(f"{path}: a model of its own, not an adapter; give it as --model, in a run of its own.")
        named = read_adapter_config(Path(its_adapter)).get("base_model_name_or_path") or base
        if not base_model and read_card(Path(its_adapter)) is None and base not in (named, os.path.abspath(named)):
            print(
                f"inference: warning: {path} names {named} as its base and is asked on {base}; only their shapes are known to agree",
                flush=True,
            )
        models.append(Model(_name(folder), its_adapter, resolve_template(its_adapter, template_file)))
    for each in models:
        try:
            check_prompt_ids(base, each.adapter, each.template)
        except DataError as error:
            cure = "Control tokens may stand at a prompt's two ends only, with no space after the last."
            raise DataError(f"{template_file or f'the prompt of {each.name}'}: {error}. {cure}") from None
    if config.run_names:
        return base, [each._replace(run_name=run_name) for each, run_name in zip(models, config.run_names, strict=True)]
    names = [each.name for each in models]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        cure = "give each a name by --run-names, rename a folder, or answer them in two runs"
        raise ConfigError(f"two of the models are called {repeated}, and so would their results be; {cure}.")
    if len(models) == 1 or not config.run_name:
        return base, [each._replace(run_name=config.run_name) for each in models]
    return base, [each._replace(run_name=f"{config.run_name}-{each.name}") for each in models]


def open_results(
    config: "InferenceConfig", stack: contextlib.ExitStack, source: Path, engine: str, base: str, model: Model
) -> ResultSet:
    """The result set of one model: named, its manifest checked, its store open."""
    name, adapter, template, run_name = model
    is_of_several = bool(config.adapters)
    identity = {
        "base": fingerprint_model(base),
        "adapter": sha256_file(find_weights(Path(adapter))) if adapter else None,
        "precision": config.named_precision(),
        "compute_dtype": config.compute_dtype,
        "engine": engine,
        "prompt_sha256": prompt_sha256(template),
        **asdict(config.decoding()),
        "num_samples": config.num_samples,
        "completion_length_column": config.completion_length_column,
        "data": source.name,  # not its path or content: a file may move, and grow
    }
    folder = resolve_output(config.results_dir, config.storage_root)
    stem = (
        run_name or find_interrupted(folder, identity, source) or name_results(name, config.named_precision(), source)
    )
    files = {kind: folder / f"{stem}.{kind}" for kind in ("jsonl", "csv", "json", "answers.sqlite", "manifest.json")}
    lock = stack.enter_context(
        contextlib.closing(lock_output(files["manifest.json"]))
    )  # of several that make the store at once, SQLite fails all but one
    store = stack.enter_context(contextlib.closing(AnswerStore(files["answers.sqlite"])))
    store.check()
    is_empty = store.count() == 0
    if is_of_several:  # what would run this model alone
        config = replace(
            config,
            model=adapter or base,
            base_model=base if adapter else "",
            adapters=(),
            run_name=run_name,
            run_names=(),
        )
    record = start_run(
        files["manifest.json"], "inference", identity, config, [source], files["jsonl"].exists() or not is_empty, lock
    )
    stack.enter_context(_stopping_on_error(record, store))
    if is_empty and files["jsonl"].exists():
        store.read_in(files["jsonl"])
    frame = {
        "answered_by": name,
        "prompt_name": STUDENT_PROMPT_NAME,
        "prompt_sha256": identity["prompt_sha256"],
        "precision": config.named_precision(),
        "engine": engine,
    }
    again = (
        "the same command"
        if run_name
        else "--run-names, with the names of these files,"
        if is_of_several
        else f"--run-name {stem}"
    )
    return ResultSet(stem, Target(adapter, template, frame), store, record, f"{again} asks them again", files=files)


def find_interrupted(folder: Path, identity: Mapping, source: Path) -> str | None:
    """The name of an unfinished run of the same model, settings and data in the results folder."""
    for path in sorted(folder.glob("*.manifest.json"), reverse=True):
        with contextlib.suppress(ResumeError, StorageError, OSError):  # of another run: damaged, or another user's
            manifest = read_manifest(path)
            same = (
                manifest is not None
                and manifest["identity"] == dict(identity)
                and str(source) in manifest.get("inputs", ())
            )
            if same and manifest["status"] == "running" and not is_in_use(path):
                return path.name.removesuffix(".manifest.json")
    return None


def name_results(model: str, precision: str, source: Path) -> str:
    """{model}-{precision}-{dataset}-{timestamp}, a checkpoint with its run's name."""
    return f"{model}-{precision}-{source.stem}-{datetime.now(UTC).strftime('%Y%m%d_%H%M%S')}"


@contextlib.contextmanager
def _stopping_on_error(record: Run, store: AnswerStore) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(StorageError):  # on a full disk; what ended the run is to be told
            if (
                record.was_finished
                and record.manifest["status"] == "running"
                and not store.count_since(store.started_at)[0]
            ):
                record.withdraw()  # another model of the run failed, or was refused
            else:
                record.stop(record.manifest["counts"])
        raise


def _name(model: str) -> str:
    folder = Path(model)
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name
