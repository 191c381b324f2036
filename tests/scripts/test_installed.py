"""The package installed in a place of its own, used from a folder that is not the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from tests.forks import ROOT
from tests.rendezvous import rendezvous

COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip makes of the repository's files, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in tracked.stdout.decode().splitlines():
        if name.startswith(("ibp_deepspeed/", "pyproject.toml", "README.md", "LICENSE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder / "site"),
        str(source),
    ]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def anywhere(installed: Path, *words: object) -> str:
    """Output of an installed command, in an empty folder."""
    inside = os.pathsep.join([str(installed / "site/bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    with rendezvous() as meeting:
        environment = {**os.environ, **meeting, "PATH": inside, "PYTHONPATH": str(installed / "site")}
        port = ("--master_port", meeting["MASTER_PORT"]) if words[0] == "deepspeed" else ()
        command = [str(word) for word in (words[0], *port, *words[1:])]
        done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_of_the_scripts_is_installed(installed: Path) -> None:
    modules = {target.partition(":")[0] for target in COMMANDS.values()}
    assert modules == {f"ibp_deepspeed.commands.{p.stem}" for p in (ROOT / "ibp_deepspeed/commands").glob("[a-z]*.py")}
    assert sorted(p.name for p in (installed / "site/bin").iterdir()) == sorted(COMMANDS)
    for module in modules:
        assert callable(import_module(module).run)
    assert sorted(p.name for p in (installed / "site").iterdir() if p.suffix != ".dist-info") == [
        "bin",
        "ibp_deepspeed",
    ]
    assert (installed / "site/ibp_deepspeed/py.typed").exists()


def test_an_installed_package_prepares_trains_and_evaluates(installed: Path) -> None:
    """With presets and configs by their names, under the real launcher, where the repository is not."""
    shown = anywhere(installed, "ibp-train", "--version")
    assert shown.startswith("ibp_deepspeed 0.1.0, torch ") and ", deepspeed 0.19.8, transformers " in shown
    where = anywhere(installed, sys.executable, "-c", "import ibp_deepspeed; print(ibp_deepspeed.__file__)")
    assert str(installed) in where
    anywhere(installed, "ibp-prepare", "--out", "data", "--vocab-size", 300, "--max-bytes", 200_000)
    launcher = ("deepspeed", "--num_accelerators", 2, "--module", "ibp_deepspeed.commands.train_lm")
    model = ("--deepspeed_config", "pairwise_cpu", "--model", "llama-nano", "--set", "num_hidden_layers=2")
    sizes = ("--sequence-length", 32, "--micro-batch-size", 2, "--steps", 3)
    anywhere(installed, *launcher, *model, *sizes, "--data", "data", "--output", "runs/first")
    shown = anywhere(installed, "ibp-evaluate", "--checkpoint", "runs/first/checkpoint", "--max-batches", 2)
    assert "exit 1" in shown and "model" in shown
