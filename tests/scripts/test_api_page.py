"""docs/api.md is what the docstrings say now, and leaves no public name out."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from tests.commands import script
from tests.forks import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    done = script("api_page.py", "--out", tmp_path / "api.md")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "api.md").read_text(encoding="utf-8") == PAGE, "run python scripts/api_page.py"


def test_every_public_name_is_there() -> None:
    """Of the package itself and of each module in it that says what is public."""
    parts = dict(re.findall(r"^## `([\w.]+)`\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
    files = (ROOT / "ibp_deepspeed").rglob("*.py")
    saying = [path for path in files if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE)]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in saying}
    assert set(parts) == modules and {"ibp_deepspeed", "ibp_deepspeed.models"} <= modules
    for module in sorted(modules):
        assert re.findall(r"^### (\w+)$", parts[module], re.MULTILINE) == sorted(import_module(module).__all__)


def test_no_name_is_without_words() -> None:
    """A signature alone documents nothing."""
    for part in re.split(r"^#{3,4} ", PAGE, flags=re.MULTILINE)[1:]:
        name, rest = part.split("\n", 1)
        assert re.sub(r"```text\n.*?```|^## .*", "", rest, flags=re.DOTALL | re.MULTILINE).strip(), name
