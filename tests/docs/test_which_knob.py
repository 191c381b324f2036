"""The page of knobs names options, keys, presets and commands that exist."""

from __future__ import annotations

import re
import shlex

import pytest

from ibp_deepspeed import AuxHeadConfig, InterlockingConfig
from ibp_deepspeed.config.deepspeed import load_ds_config
from tests.docs.test_docs import README, ROOT, blocks
from tests.parsers import parser_of

PAGE = (ROOT / "docs" / "which-knob.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
COMMANDS = [
    shlex.split(line)
    for block in blocks(PAGE, "bash")
    for line in block.replace("\\\n", " ").splitlines()
]  # fmt: skip


def test_the_readme_leads_to_five_tasks() -> None:
    assert "](docs/which-knob.md)" in README
    assert re.findall(r"^## (\d)\. ", PAGE, flags=re.MULTILINE) == list("12345")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_is_understood(words: list[str]) -> None:
    at = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
    assert words[0] in ("python", "deepspeed")
    parser_of(words[at]).parse_args(words[at + 1 :])


def test_options_of_the_page_exist() -> None:
    """Of the script that is named beside them, or of train_lm.py."""
    known: dict[str, set[str]] = {}
    checked = 0
    for text in CODE:
        script = next(iter(re.findall(r"\w+\.py", text)), "train_lm.py")
        for option in re.findall(r"--[a-z][\w-]+", text):
            if script not in known:
                actions = parser_of(f"scripts/{script}")._actions
                commands = [c for a in actions if isinstance(a.choices, dict) for c in a.choices.values()]
                actions = [*actions, *(action for command in commands for action in command._actions)]
                known[script] = {name for action in actions for name in action.option_strings}
            assert option in known[script], f"{script} has no {option}"
            checked += 1
    assert checked > 30


def test_keys_and_presets_of_the_page_exist() -> None:
    preset = load_ds_config(ROOT / "ds_configs" / "pairwise_gpu.json")
    known = {*InterlockingConfig.model_fields, *AuxHeadConfig.model_fields, *preset, *preset["pipeline"]}
    known |= {"stage", "type"}
    for text in CODE:
        for found in re.findall(r'"(\w+)"(?=:)|^"(\w+)"$', text):
            assert "".join(found) in known, text
        for name in re.findall(r"\w+_\*\.json", text):
            assert len(list((ROOT / "ds_configs").glob(name))) == 2, name
