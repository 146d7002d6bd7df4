"""Configs: defaults, then the file, then flags; nothing unknown, mistyped or out of range gets through.

python -m pytest tests/test_config.py
"""

import importlib
import inspect
import pkgutil
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

import nli
from nli.data.sft_rows import PrepareSFTDataConfig
from nli.runtime.config import (
    Count,
    Fraction,
    NonNegative,
    as_dict,
    config_class,
    field_names,
    load_config,
    nearest,
    parse_config,
    start_job,
)
from nli.runtime.errors import ConfigError, DataError
from nli.teacher.thoughts import GenerateThoughtsConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py"
)


@config_class
class ToyConfig:
    """A config with a field of each kind."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """step size"""
    lora_rank: Count = 32
    """rank of the adapter"""
    weight_decay: NonNegative = 0.01
    lora_dropout: Fraction = 0.05
    schedule: Literal["linear", "cosine"] = "linear"
    wandb: bool = True
    output_dir: str = "models/toy"
    gpu: int | None = None

    def __post_init__(self) -> None:
        if self.schedule == "cosine" and not self.wandb:
            raise ConfigError("schedule cosine needs wandb.")


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file's lines after the import that it needs, on line 1, and returns its path."""

    def write(*lines, name="toy.py"):
        path = tmp_path / name
        path.write_text("\n".join(["from test_config import ToyConfig", *lines]) + "\n", encoding="utf-8")
        return str(path)

    return write


def parse(*argv):
    return parse_config(ToyConfig, argv, prog="toy", description="A toy.")


def every_config_class() -> dict[str, type]:
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(nli.__path__, "nli.")
        if not module.ispkg
    ]
    classes = [
        value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and name.endswith("Config") and value.__module__.startswith("nli.")
    ]
    return {cls.__name__: cls for cls in classes}


def test_defaults_then_the_file_then_flags(config_file):
    path = config_file("config = ToyConfig(learning_rate=1e-3, lora_rank=8)")
    config = parse_config(ToyConfig, ["--config", path, "--lora-rank", "16"], prog="toy")
    assert (config.learning_rate, config.lora_rank, config.weight_decay) == (1e-3, 16, 0.01)
    assert parse_config(ToyConfig, [f"--config={path}", "--lora-rank=4"], prog="toy").lora_rank == 4
    assert parse_config(ToyConfig, ["--lora-rank", "4", "--config", path], prog="toy").learning_rate == 1e-3


def test_without_a_file_the_defaults_hold():
    assert parse() == ToyConfig()
    assert as_dict(parse("--lora-rank", "4")) == as_dict(ToyConfig()) | {"lora_rank": 4}


def test_a_variant_is_a_replacement_of_another_file_s_config(config_file):
    config_file("config = ToyConfig(lora_rank=8)", name="base.py")
    path = config_file(
        "import runpy",
        "from dataclasses import replace",
        "from pathlib import Path",
        "base = runpy.run_path(str(Path(__file__).parent / 'base.py'))['config']",
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write("config = replace(base, schedule='cosine')\n")
    assert (load_config(path, ToyConfig).lora_rank, load_config(path, ToyConfig).schedule) == (8, "cosine")


def test_flags_turn_booleans_on_and_off(config_file):
    assert parse("--no-wandb").wandb is False
    assert parse("--wandb").wandb is True
    path = config_file("config = ToyConfig(wandb=False)")
    assert parse_config(ToyConfig, ["--config", path], prog="toy").wandb is False
    assert parse_config(ToyConfig, ["--config", path, "--wandb"], prog="toy").wandb is True


def test_a_field_that_may_be_none_takes_a_number_or_none():
    assert parse("--gpu", "1").gpu == 1
    assert parse("--gpu", "None").gpu is None


def test_an_unknown_field_in_a_file_is_named_with_file_line_and_nearest_name(config_file):
    path = config_file("", "config = ToyConfig(", "    lora_rnk=8,", ")")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ToyConfig)
    assert str(caught.value) in {f"{path}:{line}: unknown field 'lora_rnk'. Did you mean lora_rank?" for line in (3, 4)}


def test_an_unknown_field_that_resembles_none_gets_no_suggestion():
    with pytest.raises(ConfigError, match=r"^unknown field 'xyzzy'\.$"):
        ToyConfig(xyzzy=1)


def test_an_unknown_flag_ends_the_job_with_the_nearest_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--lora-rnk", "8")
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "--lora-rnk" in message
    assert "--lora-rank" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": "8"}, "lora_rank is '8': input should be a valid integer."),
        ({"lora_rank": 8.0}, "lora_rank is 8.0: input should be a valid integer."),
        ({"lora_rank": True}, "lora_rank is True: input should be a valid integer."),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4': input should be a valid number."),
        ({"wandb": 1}, "wandb is 1: input should be a valid boolean."),
        ({"output_dir": Path("x")}, "output_dir is PosixPath('x'): input should be a valid string."),
        ({"output_dir": None}, "output_dir is None: input should be a valid string."),
        ({"schedule": "linaer"}, "schedule is 'linaer': input should be 'linear' or 'cosine'."),
        ({"lora_rank": 0}, "lora_rank is 0: input should be greater than or equal to 1."),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: input should be greater than 0."),
        ({"learning_rate": float("nan")}, "learning_rate is nan: input should be greater than 0."),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: input should be greater than or equal to 0."),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0: input should be less than 1."),
        ({"schedule": "cosine", "wandb": False}, "schedule cosine needs wandb."),
    ],
)
def test_a_wrong_type_a_value_out_of_range_and_a_conflict_are_refused_in_words(values, message):
    with pytest.raises(ConfigError) as caught:
        ToyConfig(**values)
    assert str(caught.value) == message


def test_all_faults_of_a_config_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        ToyConfig(lora_rank=0, learning_rate="fast", lora_rnk=8)
    for part in ("lora_rank is 0", "learning_rate is 'fast'", "unknown field 'lora_rnk'. Did you mean lora_rank?"):
        assert part in str(caught.value)


def test_a_replacement_is_checked_like_a_new_config():
    with pytest.raises(ConfigError, match="lora_rank is 0"):
        replace(ToyConfig(), lora_rank=0)
    with pytest.raises(ConfigError, match=r"^schedule cosine needs wandb\.$"):
        replace(ToyConfig(), schedule="cosine", wandb=False)


def test_an_integer_serves_where_a_float_is_meant():
    assert ToyConfig(learning_rate=1).learning_rate == 1


def test_a_config_cannot_be_changed_and_takes_no_positions():
    with pytest.raises(FrozenInstanceError):
        ToyConfig().lora_rank = 8
    with pytest.raises(ConfigError):
        ToyConfig(1e-3)


def test_a_wrong_type_in_a_file_is_named_with_file_and_line(config_file):
    path = config_file("", "config = ToyConfig(lora_rank='8')")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ToyConfig)
    assert str(caught.value) == f"{path}:3: lora_rank is '8': input should be a valid integer."


@pytest.mark.parametrize(
    "argv",
    [
        ["--lora-rank", "eight"],
        ["--lora-rank", "8.5"],
        ["--lora-rank"],
        ["--schedule", "linaer"],
        ["--wandb", "yes"],
        ["stray"],
    ],
)
def test_a_wrong_type_on_the_command_line_ends_the_job(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert argv[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora-rank", "0"], "lora_rank is 0: input should be greater than or equal to 1."),
        (["--learning-rate", "-1"], "learning_rate is -1.0: input should be greater than 0."),
        (["--schedule", "cosine", "--no-wandb"], "schedule cosine needs wandb."),
    ],
)
def test_a_value_out_of_range_or_a_conflict_on_the_command_line_ends_the_job(argv, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["toy", *argv])
    with pytest.raises(SystemExit) as caught:
        start_job(lambda arguments: parse(*arguments))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_ours_is_one_message_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["toy"])

    def main(arguments):
        raise DataError("pairs.csv: no such file.")

    with pytest.raises(SystemExit) as caught:
        start_job(main)
    assert (caught.value.code, capsys.readouterr().err) == (2, "error: pairs.csv: no such file.\n")


def test_an_interrupt_says_how_to_go_on_and_ends_with_130(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["toy"])

    def main(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        start_job(main)
    assert caught.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_another_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("sys.argv", ["toy"])
    with pytest.raises(ZeroDivisionError):
        start_job(lambda arguments: 1 // 0)


def test_a_missing_config_file_is_refused_with_the_nearest_one(tmp_path, monkeypatch):
    (tmp_path / "configs" / "train").mkdir(parents=True)
    (tmp_path / "configs" / "train" / "ablation2.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"^configs/train/ablaton2\.py: no such config file\. Did you mean configs/train/ablation2\.py\?$",
    ):
        parse("--config", "configs/train/ablaton2.py")
    with pytest.raises(ConfigError, match=r"^xyzzy: no such config file\.$"):
        parse("--config", "xyzzy")
    with pytest.raises(ConfigError, match=r"no such config file"):
        parse("--config", "configs")


def test_a_file_without_a_config_is_refused(config_file):
    path = config_file("Config = ToyConfig()")
    with pytest.raises(ConfigError) as caught:
        parse("--config", path)
    assert str(caught.value) == f"{path}: does not define `config`; end it with `config = ToyConfig(...)`."


def test_a_config_of_another_job_is_refused(config_file):
    path = config_file("from nli.data.sft_rows import PrepareSFTDataConfig", "config = PrepareSFTDataConfig()")
    with pytest.raises(ConfigError) as caught:
        parse("--config", path)
    assert str(caught.value) == f"{path}: `config` is a PrepareSFTDataConfig; this job needs a ToyConfig."
    with pytest.raises(ConfigError, match="`config` is a dict"):
        parse("--config", config_file("config = {'lora_rank': 8}"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config = ToyConfig(lora_rank=8", ":2: SyntaxError: "),
        ("config = ToyConfig(lora_rank=rank)", ":2: NameError: name 'rank' is not defined"),
        ("import no_such_module", ":2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", ":2: ZeroDivisionError: division by zero"),
    ],
)
def test_a_fault_in_the_file_s_own_python_is_named_with_its_line(config_file, line, message):
    path = config_file(line)
    with pytest.raises(ConfigError) as caught:
        parse("--config", path)
    assert str(caught.value).startswith(path + message)


def test_the_config_flag_needs_one_file(config_file):
    path = config_file("config = ToyConfig()")
    with pytest.raises(ConfigError, match="--config is given twice"):
        parse("--config", path, "--config", path)
    for argv in (["--config"], ["--config="], ["--config", ""]):
        with pytest.raises(ConfigError, match=r"^--config needs a file, such as configs/train/default\.py\.$"):
            parse(*argv)


def test_help_names_every_field_with_its_default_and_the_config_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ("--config FILE", "--lora-rank", "(default: 32)", "rank of the adapter", "--no-wandb"):
        assert part in shown


def test_the_nearest_name_is_suggested_only_when_one_is_near():
    assert nearest("lora_rnk", field_names(ToyConfig)) == " Did you mean lora_rank?"
    assert nearest("xyzzy", field_names(ToyConfig)) == ""


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_every_config_file_loads(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    classes = tuple(every_config_class().values())
    assert isinstance(load_config(name, classes), classes)


@pytest.mark.parametrize(("name", "cls"), every_config_class().items())
def test_every_field_of_every_config_says_what_it_is(name, cls):
    """A field's description, with unit and range, is the string below it; `--help` shows the same text."""
    stages = {config.__name__ for config in every_config_class().values()}
    described = "\n".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("nli."))
    for field in field_names(cls):
        declared, below = described.split(f"\n    {field}: ", 1)[1].split("\n", 2)[:2]
        if declared.split(" = ")[0] not in stages:  # a pipeline's fields are whole configs, which describe themselves
            assert below.strip().startswith('"""'), f"{name}.{field} has no description below it"


def test_conflicts_of_real_stages_are_refused():
    with pytest.raises(ConfigError, match="^prompt_name scoring reads --thoughts"):
        GenerateThoughtsConfig(prompt_name="scoring")
    with pytest.raises(ConfigError, match="^ablation reflected needs --reflections"):
        PrepareSFTDataConfig(ablation="reflected")
    with pytest.raises(ConfigError, match="^ablation custom needs both"):
        PrepareSFTDataConfig(ablation="custom", filter_correct=True)
    with pytest.raises(ConfigError, match="^ablation unmodified fixes"):
        PrepareSFTDataConfig(ablation="unmodified", filter_correct=False)
