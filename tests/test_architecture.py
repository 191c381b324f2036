"""The folder list is the architecture: imports point one way, and every public name is found from the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

import ibp_deepspeed

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    {"errors", "measures"},
    {
        "atomic_files",
        "batches",
        "cli",
        "compilation",
        "documents",
        "folders",
        "json_text",
        "pipeline",
        "rng",
        "running_statistics",
    },
    {"config", "comm", "data"},
    {"strategy", "objectives", "checkpoint", "optimizer"},
    {"schedule", "stage", "single_process"},
    {"trace"},
    {"engine", "planner"},
    {"models"},
    {"commands"},
    {"scripts", "benchmarks"},
]
"""Of a floor, a room may import from all floors before, and from itself."""
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


def sources() -> list[Path]:
    return [p for folder in ("ibp_deepspeed", "scripts", "benchmarks") for p in (ROOT / folder).rglob("*.py")]


def room(parts: tuple[str, ...]) -> str:
    """The room of a module: a folder or file of the library, or another top-level folder."""
    return parts[1] if parts[0] == "ibp_deepspeed" and len(parts) > 1 else parts[0]


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of the project that a file imports, also inside functions; those for type checking alone left out."""
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "ibp_deepspeed":  # a module of the root, or a public name, which any file above may use
                names = [
                    f"ibp_deepspeed.{a.name}" for a in node.names if (ROOT / f"ibp_deepspeed/{a.name}.py").exists()
                ]
        yield from (tuple(n.split(".")) for n in names if n.split(".")[0] == "ibp_deepspeed")


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_time_nodes(child)


def test_imports_point_one_way() -> None:
    wrong = []
    for path in sources():
        here = room(path.relative_to(ROOT).with_suffix("").parts)
        if here == "__init__":
            continue
        for module in imported(path):
            there = room(module)
            if there != here and FLOOR[there] >= FLOOR[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(module)}")
    assert not wrong, wrong


def test_rooms_are_one_level_deep_and_have_their_floors() -> None:
    """Those of models and of commands are houses of their own: one level more."""
    for path in (ROOT / "ibp_deepspeed").rglob("*.py"):
        parts = path.relative_to(ROOT / "ibp_deepspeed").with_suffix("").parts
        deepest = 3 if parts[0] in {"models", "commands"} else 2
        assert len(parts) <= deepest and (parts == ("__init__",) or parts[0] in FLOOR), path


def test_the_checker_sees_an_import_that_points_back(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from ibp_deepspeed.engine.engine import InterlockedPipelineEngine\n")
    assert [room(module) for module in imported(path)] == ["engine"] and FLOOR["engine"] > FLOOR["stage"]


@pytest.mark.parametrize("name", ibp_deepspeed.__all__)
def test_public_names_are_found_from_the_top(name: str) -> None:
    assert getattr(ibp_deepspeed, name).__name__ == name


def test_a_fresh_interpreter_finds_every_public_name() -> None:
    """Each name alone could hide a cycle of imports that depends on which is first."""
    first, last = sorted(ibp_deepspeed.__all__)[0], sorted(ibp_deepspeed.__all__)[-1]
    for one, other in product((first, last), repeat=2):
        code = f"from ibp_deepspeed import {one}, {other}; from ibp_deepspeed import *; print({one}.__name__)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip().endswith(one), done.stderr
