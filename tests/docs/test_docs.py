"""What the documents show is true: code runs, configurations parse, commands exist."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from ibp_deepspeed import InterlockingConfig
from ibp_deepspeed.config.interlocking import AuxHeadConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOW = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks(HOW, "python"))
def test_python_of_how_it_works_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "docs/how-it-works.md", "exec"), {})
    assert capsys.readouterr().out.startswith("4.10 ")


def test_python_of_the_readme_uses_names_that_exist() -> None:
    import ibp_deepspeed

    for code in blocks(README, "python"):
        compile(code, "README.md", "exec")
        for names in re.findall(r"from ibp_deepspeed import (.*)", code):
            assert all(hasattr(ibp_deepspeed, name.strip()) for name in names.split(","))


def test_configurations_of_the_readme_parse() -> None:
    for block in blocks(README, "json"):
        InterlockingConfig.parse(json.loads("{" + block + "}")["interlocking"])


def test_every_option_is_documented_with_its_name() -> None:
    for name in (*InterlockingConfig.model_fields, *AuxHeadConfig.model_fields):
        assert f"`{name}`" in HOW, name


def test_files_that_the_readme_names_exist_and_options_too() -> None:
    commands = "\n".join(blocks(README, "bash"))
    for path in re.findall(r"(?:scripts|ds_configs|benchmarks)/[\w./-]+", commands):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(((?!http)[\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    train = (ROOT / "ibp_deepspeed/commands/training/arguments.py").read_text(encoding="utf-8")
    for option in re.findall(r"train_lm\.py(.*?)(?:\n[a-z]|\Z)", commands, flags=re.DOTALL)[0].split():
        if option.startswith("--"):
            assert f'"{option}"' in train, option


@pytest.mark.parametrize(
    ("term", "definition"),
    [
        (r"exits?\b", "is an *exit*: it has an auxiliary head with a loss"),
        (r"width\b", "N is the *width*"),
        (r"window\b", "In mode `window`, the presets', a stage's gradient is the mean"),
        (r"M\b", "A batch is M *micro-batches*"),
    ],
)
def test_the_readme_defines_a_term_where_it_is_used_first(term: str, definition: str) -> None:
    text = " ".join(README.split())
    first = re.search(rf"(?<![\w-]){term}", text)
    assert first is not None and definition in text
    start = text.index(definition)
    assert start <= first.start() < start + len(definition)


def test_the_readme_says_how_to_reach_the_environment() -> None:
    """Before the first command that needs it; the CPU build is the version that requirements.txt asks for."""
    commands = "\n".join(blocks(README, "bash"))
    assert commands.index("source .venv/bin/activate") < commands.index("deepspeed --quiet")
    (version,) = re.findall(r"^torch==([\d.]+)$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert f".venv/bin/pip install torch=={version} --index-url https://download.pytorch.org/whl/cpu" in commands


def test_all_pages_say_the_same_about_gpus() -> None:
    """Two say it, others lead there: what has run on a GPU is written once."""
    statement = "Nothing has run on a GPU yet"
    pages = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
    saying = {name for name, text in pages.items() if statement in text}
    assert {"README.md", "performance.md"} <= saying
    assert all("performance.md#on-a-gpu" in pages[name] for name in saying - {"performance.md"})
    rivals = r"not (?:been )?(?:run|measured|tried) on (?:a |any )?GPU|no machine of ours|have no GPU"
    assert not {name for name, text in pages.items() if re.search(rivals, text, re.IGNORECASE)}


def test_the_slurm_script_is_printed_whole_and_parses() -> None:
    script = ROOT / "scripts" / "slurm" / "train.sbatch"
    page = (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8")
    assert script.read_text(encoding="utf-8") in blocks(page, "bash")
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
