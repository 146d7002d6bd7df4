"""The house's own rules: which module may import which, and that nothing heavy is loaded before it is needed.

python -m pytest tests/test_house.py
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import run_timed

ROOT = Path(__file__).resolve().parent.parent

HEAVY = {"ray", "torch", "transformers", "vllm", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "deepspeed"}
MODULES = sorted(path for folder in ("nli", "ray_jobs") for path in (ROOT / folder).rglob("*.py"))
JOBS = sorted(path.stem for path in (ROOT / "ray_jobs").glob("*.py") if path.stem != "__init__")


def name_of(path: Path) -> str:
    """`nli.runtime.files` for nli/runtime/files.py, `nli.sample` for nli/sample/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, at_load: bool = False) -> set[str]:
    """Full names of what a module imports: anywhere, or only when it is loaded (not inside functions, nor for the type checker alone)."""

    def visit(node: ast.AST) -> Iterator[str]:
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            package = name_of(path).rsplit(".", node.level)[0] + "." if node.level else ""
            base = (package + (node.module or "")).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return set(visit(ast.parse(path.read_text(encoding="utf-8"))))


def top_names(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_nothing_outside_the_sample_knows_of_it():
    outside = [path for path in MODULES if "sample" not in path.relative_to(ROOT).parts] + sorted(
        (ROOT / "configs").rglob("*.py")
    )
    assert [name_of(path) for path in outside if "nli.sample" in path.read_text(encoding="utf-8")] == []
    assert [name_of(path) for path in outside if any(name.startswith("nli.sample") for name in imports(path))] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_heavy_is_imported_when_a_module_is_loaded(path):
    assert not top_names(imports(path, at_load=True)) & HEAVY


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_but_an_empty_one_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("job", JOBS)
def test_help_of_every_job_answers_within_two_seconds(job):
    shown, seconds = run_timed([sys.executable, "-m", f"ray_jobs.{job}", "--help"], enough=2)
    assert shown.returncode == 0, shown.stderr
    assert "--config FILE" in shown.stdout
    assert shown.stderr == ""
    assert seconds < 2


@pytest.mark.parametrize("job", JOBS)
def test_every_job_says_how_it_is_run_locally_and_submitted(job):
    text = ast.get_docstring(ast.parse((ROOT / "ray_jobs" / f"{job}.py").read_text(encoding="utf-8")))
    assert f"python -m ray_jobs.{job}" in text
    assert "ray job submit" in text


def test_no_tracked_file_is_over_four_megabytes():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert [str(path) for path in files if path.is_file() and path.stat().st_size > 4 * 2**20] == []
