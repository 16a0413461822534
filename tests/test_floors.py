"""The floors of the house: what each file may import, read from the source of every file there is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import full

ROOT = Path(__file__).resolve().parents[1]

# Floors from the ground up. A file imports from lower floors or from its own folder; its own floor is not enough.
FLOORS = {
    "stages": 0,  # the package's own __init__: its version
    "stages.errors": 1,
    "stages.places": 1,
    "stages.launch": 1,
    "stages.knobs": 1,
    "stages.config": 1,
    "stages.measuring_config": 1,
    "stages.reward_knobs": 1,
    "stages.reading": 1,
    "stages.recipe": 1,
    "stages.results": 1,
    "stages.cells": 1,
    "stages.tables": 1,
    "stages.maths": 2,
    "stages.builtin": 3,
    "stages.native": 3,
    "stages.checkpoint": 3,
    "stages.data": 3,
    "stages.models": 4,
    "stages.training": 5,
    "stages.rollout": 6,
    "stages.diagnostics": 6,
    "stages.inputs": 7,  # what every stage file opens
    "stages.*": 8,  # a stage file
    "rlhf_cli": 9,
}
GROUND = (
    "stages.errors", "stages.places", "stages.launch", "stages.knobs", "stages.reward_knobs", "stages.config",
    "stages.measuring_config", "stages.reading", "stages.recipe", "stages.results", "stages.cells", "stages.tables",
)  # fmt: skip
HEAVY = {
    "torch", "transformers", "datasets", "peft", "accelerate", "safetensors", "numpy", "pandas", "pyarrow",
    "matplotlib",
}  # fmt: skip
TERMINAL = {"typer", "click", "rich", "rlhf_cli"}

# Prefix of a module's name -> packages it must not import above its functions.
LIGHT = {
    "rlhf_cli": HEAVY | {"yaml"},
    "stages.knobs": HEAVY | {"yaml"},
    "stages.config": HEAVY | {"yaml"},
    "stages.measuring_config": HEAVY | {"yaml"},
    "stages.reward_knobs": HEAVY | {"yaml"},
    "stages.recipe": HEAVY | {"yaml"},
    "stages.errors": HEAVY,
    "stages.places": HEAVY,
    "stages.launch": HEAVY,
    "stages.reading": HEAVY,
    "stages.results": HEAVY,
    "stages.cells": HEAVY,
    "stages.tables": HEAVY,
    "stages.report": HEAVY,
    "stages.builtin": HEAVY,
    "stages.data": HEAVY,
    "stages.checkpoint": HEAVY,
    "stages.inputs": HEAVY,
}
# Prefix of a module's name -> packages it must not import anywhere.
NEVER = {
    "stages": TERMINAL,
    "stages.knobs": HEAVY,
    "stages.config": HEAVY,
    "stages.measuring_config": HEAVY,
    "stages.reward_knobs": HEAVY,
    "stages.recipe": HEAVY,
    "stages.errors": HEAVY,
    "stages.places": HEAVY,
    "stages.launch": HEAVY,
    "stages.reading": HEAVY,
    "stages.results": HEAVY,
    "stages.cells": HEAVY,
    "stages.tables": HEAVY,
    "stages.report": HEAVY,
    "rlhf_cli": HEAVY,
}


def imports(source: str) -> list[tuple[str, bool, int]]:
    """Every import of a source file: (dotted name, whether it runs when the file is imported, line)."""
    found = []

    def visit(node: ast.AST, at_once: bool) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_once = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_once)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_once, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            # `from stages import config` may mean a module: both readings are listed.
            module = "." * node.level + (node.module or "")
            found.append((module, at_once, node.lineno))
            found.extend((f"{module}.{alias.name}", at_once, node.lineno) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, at_once)

    visit(ast.parse(source), True)
    return found


def room(module: str) -> str:
    """The entry of FLOORS that a module of ours belongs to."""
    parts = module.split(".")
    if parts[0] == "rlhf_cli":
        return "rlhf_cli"
    name = ".".join(parts[:2])
    if name in FLOORS:
        return name
    return "stages.*" if len(parts) > 1 else "stages"


def ours(imported: str, modules: set[str]) -> str | None:
    """The module of ours that an import names: the longest prefix of it that exists; None for other packages."""
    parts = imported.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in modules:
            return ".".join(parts[:length])
    return None


def climbs(module: str, target: str) -> bool:
    """Whether `module` importing `target` breaks the order of the floors."""
    here, there = room(module), room(target)
    if module == target:
        return False
    if here == "stages.*" and there == "stages.*":
        return True  # stages never import each other
    if here == there or (here in GROUND and there in GROUND):
        return False
    return FLOORS[there] >= FLOORS[here]


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def complaints(module: str, source: str, modules: set[str]) -> list[str]:
    """What is wrong with the imports of one file."""
    wrong = set()
    for name, at_once, line in imports(source):
        package = name.split(".")[0]
        place = f"{module}:{line} imports {name}"
        if name.startswith("."):
            wrong.add(f"{place}: write the full name")
            continue
        target = ours(name, modules)
        if target and climbs(module, target):
            wrong.add(f"{place}: not a lower floor")
        if starts_with(module, "stages.maths") and package not in sys.stdlib_module_names | {"torch"}:
            wrong.update([] if starts_with(name, "stages.maths") or name == "stages" else [f"{place}: not maths"])
        for prefix, packages in NEVER.items():
            if starts_with(module, prefix) and package in packages and not starts_with(package, prefix):
                wrong.add(f"{place}: never here")
        for prefix, packages in LIGHT.items():
            if at_once and starts_with(module, prefix) and package in packages:
                wrong.add(f"{place}: not before it is needed")
        if at_once and package == "stages" and module.startswith("rlhf_cli"):
            wrong.update([] if target in ("stages", *GROUND) else [f"{place}: a stage loads when it is certain to run"])
    return sorted(wrong)


def tree(root: Path) -> dict[str, Path]:
    """Every Python file of both packages, by its module's name."""
    found = {}
    for path in sorted([*root.glob("rlhf_cli/**/*.py"), *root.glob("stages/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


TREE = tree(ROOT)


def test_a_file_imports_only_from_below():
    found = {module: complaints(module, path.read_text(encoding="utf-8"), set(TREE)) for module, path in TREE.items()}
    assert {module: wrong for module, wrong in found.items() if wrong} == {}


def test_the_tree_is_found():
    assert {"rlhf_cli.main", "stages.config", "stages.errors", "stages.report"} <= set(TREE)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("stages.sft", "import stages.ppo", "not a lower floor"),
        ("stages.sft", "from stages import ppo", "not a lower floor"),
        ("stages.sft", "def f():\n    from stages.ppo import run", "not a lower floor"),
        ("stages.sft", "import rlhf_cli.main", "never here"),
        ("stages.training.loop", "import rich", "never here"),
        ("stages.training.loop", "from stages.rollout import generate", "not a lower floor"),
        ("stages.inputs", "def f():\n    import stages.sft", "not a lower floor"),
        ("stages.inputs", "import torch", "not before it is needed"),
        ("stages.rollout", "import stages.sft", "not a lower floor"),
        ("stages.models.base", "from stages.training.loop import go", "not a lower floor"),
        ("stages.data.rows", "from stages.models import base", "not a lower floor"),
        ("stages.data.rows", "import torch", "not before it is needed"),
        ("stages.data.rows", "try:\n    import datasets\nexcept ImportError:\n    pass", "not before it is needed"),
        ("stages.data.rows", "class A:\n    from torch import Tensor", "not before it is needed"),
        ("stages.maths.losses", "import numpy", "not maths"),
        ("stages.maths.losses", "from stages.errors import UserError", "not maths"),
        ("stages.maths.losses", "from stages.data.rows import read", "not a lower floor"),
        ("stages.config", "def f():\n    import torch", "never here"),
        ("stages.recipe", "import yaml", "not before it is needed"),
        ("stages.config", "import stages.maths.losses", "not a lower floor"),
        ("stages.report", "def f():\n    import torch", "never here"),
        ("stages.report", "from .sft import run", "write the full name"),
        ("stages", "from stages.measuring_config import STAGES", "not a lower floor"),
        ("rlhf_cli.main", "import stages.sft", "a stage loads when it is certain to run"),
        ("rlhf_cli.main", "from stages.data.rows import read", "a stage loads when it is certain to run"),
        ("rlhf_cli.main", "def f():\n    import torch", "never here"),
    ],
)
def test_what_the_table_forbids_is_noticed(module, source, reason):
    modules = set(TREE) | {"stages.sft", "stages.ppo", "stages.training", "stages.training.loop", "stages.rollout"}
    modules |= {"stages.models.base", "stages.data.rows", "stages.maths.losses"}
    found = complaints(module, source, modules)
    assert found and any(line.endswith(reason) for line in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rlhf_cli.main", "import typer\nfrom stages import __version__\nfrom stages.measuring_config import STAGES"),
        ("rlhf_cli.main", "def f():\n    import stages.sft"),
        ("stages.sft", "import torch\nfrom stages.training.loop import go\nfrom stages.models.base import Base"),
        ("stages.data.rows", "def f():\n    import torch"),
        ("stages.data.rows", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("stages.data.rows", "from stages.errors import DatasetError\nfrom stages.data import cells"),
        ("stages.maths.losses", "import math\nimport torch.nn.functional\nfrom stages.maths.kl import k1"),
        ("stages.config", "from stages.errors import ConfigError"),
    ],
)
def test_what_the_table_allows_is_left_alone(module, source):
    modules = set(TREE) | {"stages.sft", "stages.training.loop", "stages.models.base", "stages.data.rows"}
    assert complaints(module, source, modules) == []


# --- what a command really loads ----------------------------------------------------------------------------------


def loaded(*arguments: str) -> tuple[set[str], subprocess.CompletedProcess]:
    """Top-level packages that a command line loads in a fresh process, and how it ended."""
    command = [sys.executable, "-X", "importtime", "-m", "rlhf_cli", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    names = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", ended.stderr, flags=re.MULTILINE)
    return {name.split(".")[0] for name in names}, ended


@pytest.mark.parametrize("arguments", [["ppo", "--help"], *full(["--help"], ["--version"], ["ppo", "--help-all"], [])])
def test_help_and_version_load_nothing_heavy(arguments):
    packages, ended = loaded(*arguments)
    assert ended.returncode == 0 and "typer" in packages
    assert not packages & (HEAVY | {"yaml"})


def test_a_mistake_in_flags_is_answered_without_torch():
    packages, ended = loaded("sft", "--model", "m", "--dataset", "d", "--output", "o", "--batch-size", "many")
    assert ended.returncode == 2 and not packages & HEAVY
    assert "error: --batch-size: 'many' is not a whole number" in ended.stderr


def test_a_mistake_in_a_recipe_is_answered_without_torch(tmp_path):
    (tmp_path / "r.yaml").write_text("batchsize: 3\n", encoding="utf-8")
    packages, ended = loaded("sft", "--config", str(tmp_path / "r.yaml"))
    assert ended.returncode == 2 and "yaml" in packages and not packages & HEAVY
    assert "did you mean `batch_size`?" in ended.stderr


@pytest.mark.full
def test_only_commands_with_adapters_load_peft(model_folder, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "red"}\n', encoding="utf-8")
    line = ("sample", "--model", str(model_folder()), "--dataset", str(tmp_path / "p.jsonl"))
    packages, ended = loaded(*line, "--output", str(tmp_path / "s.jsonl"), "--max-response-tokens", "2")
    assert ended.returncode == 0 and "transformers" in packages and "peft" not in packages


def test_the_report_needs_no_torch(tmp_path):
    packages, ended = loaded("report", str(tmp_path))
    assert ended.returncode == 2 and not packages & HEAVY
    assert "nothing to report here" in ended.stderr
