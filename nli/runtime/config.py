"""Configs: plain Python files, typed fields, command-line overrides; nothing unknown is ever ignored.

A config file ends in `config = TrainConfig(lora_rank=16)`; `python -m ray_jobs.train_sft --config that_file.py --learning-rate 1e-4` uses the dataclass's
defaults, then the file's values, then the flags. What comes out is what runs, and goes into the run's manifest.
"""

import difflib
import functools
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, TypeVar

import pydantic
import tyro
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from nli.runtime.errors import ConfigError, NLIError

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

Config = TypeVar("Config")


def config_class(cls: type[Config]) -> type[Config]:
    """Make a frozen dataclass whose fields are checked for name, type and range whenever an instance is made."""
    checked = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))(cls)
    construct = checked.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **values) -> None:
        try:
            construct(self, *args, **values)
        except pydantic.ValidationError as error:
            raise ConfigError(_explain(error, checked)) from None

    checked.__init__ = __init__
    return checked


def as_dict(config: object) -> dict:
    """The resolved config as plain values, for a manifest."""
    return asdict(config)


def parse_config(cls: type[Config], argv: Sequence[str], prog: str, description: str = "") -> Config:
    """Read `--config FILE` (if given) and the flags that override it. Raises ConfigError; unknown flags and `--help` exit as tyro does."""
    path, rest = _take_config_flag(list(argv))
    default = load_config(path, cls) if path else cls()
    description = f"{description.strip()}\n\n--config FILE: a Python file that ends in `config = {cls.__name__}(...)`; flags override its values."
    return tyro.cli(cls, default=default, args=rest, prog=prog, description=description)


def load_config(path: str | Path, cls: type[Config]) -> Config:
    """Run a config file and return its `config`. Raises ConfigError naming the file, the line and the nearest right name."""
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("configs").rglob("*.py")], n=1)
        raise ConfigError(f"{path}: no such config file." + (f" Did you mean {near[0]}?" if near else ""))
    try:
        found = runpy.run_path(str(path)).get("config")
    except ConfigError as error:
        raise ConfigError(f"{path}:{_line_in(path, error)}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{path}:{_line_in(path, error)}: {type(error).__name__}: {error}") from None
    if found is None:
        raise ConfigError(f"{path}: does not define `config`; end it with `config = {cls.__name__}(...)`.")
    if not isinstance(found, cls):
        raise ConfigError(f"{path}: `config` is a {type(found).__name__}; this job needs a {cls.__name__}.")
    return found


def start_job(main: Callable[[list[str]], object]) -> None:
    """Run a job's `main` on the command line's arguments; an NLIError becomes one message and exit status 2."""
    try:
        main(sys.argv[1:])
    except NLIError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it stopped.", file=sys.stderr)
        sys.exit(130)


def is_submitted_job() -> bool:
    """Whether this process is the driver of a `ray job submit`, whose working folder is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def nearest(name: str, names: Sequence[str]) -> str:
    """' Did you mean x?' for the closest of `names`, or ''."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def field_names(cls: type) -> list[str]:
    """The names of a config's fields, in order."""
    return [field.name for field in fields(cls)]


def _take_config_flag(argv: list[str]) -> tuple[str | None, list[str]]:
    path, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            value = next(arguments, None)
        elif argument.startswith("--config="):
            value = argument.removeprefix("--config=")
        else:
            rest.append(argument)
            continue
        if not value:
            raise ConfigError("--config needs a file, such as configs/train/default.py.")
        if path is not None:
            raise ConfigError(
                "--config is given twice; a variant is a file of its own with dataclasses.replace(base, ...)."
            )
        path = value
    return path, rest


def _explain(error: pydantic.ValidationError, cls: type) -> str:
    """All faults of a config in one message, each with its field, value and what is allowed."""
    faults = []
    for fault in error.errors():
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            faults.append(f"unknown field {name!r}.{nearest(name, field_names(cls))}")
        elif not name or fault["type"] == "value_error":
            faults.append(
                re.sub("^Value error, ", "", fault["msg"]) + (f" ({name} is {fault['input']!r})" if name else "")
            )
        else:
            faults.append(f"{name} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}.")
    return " ".join(faults)


def _line_in(path: Path, error: Exception) -> int:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()
    ]
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    return frames[-1].lineno if frames else 1
