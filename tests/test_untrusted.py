"""Rules that keep files which somebody else made from running code: each call that could is seen in the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from ibp_deepspeed.errors import DataError
from tests.forks import ROOT
from tests.test_architecture import sources

_UNPICKLES = "ibp_deepspeed/checkpoint/tensor_file.py"  # catches what torch's own unpickler raises

_RUNS_WHAT_IT_READS = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml")


def risks(code: str) -> Iterator[str]:
    """What in a source could run what a file or a path says."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"imports {name}" for name in names if name in _RUNS_WHAT_IT_READS)
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
        if called in ("eval", "exec", "os.system", "os.popen") or options.get("shell", "False") != "False":
            yield f"{called} runs a text"
        if called == "torch.load" and options.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            yield "numpy.load of pickles"
        code_of_hub = called.startswith("Auto") and called.endswith(".from_pretrained")
        if options.get("trust_remote_code", "None" if code_of_hub else "False") != "False":
            yield f"{called} may run, or ask whether to run, a model's own code"


def test_no_source_runs_what_a_file_says() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {risk}" for path in sources() for risk in risks(path.read_text(encoding="utf-8"))
    ]
    assert found == [f"{_UNPICKLES}: imports pickle"]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from yaml import load\nimport yaml",
        "eval(text)",
        "subprocess.run(f'rm {path}', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_rule_sees(code: str) -> None:
    assert list(risks(code))


def test_the_rule_lets_pass_what_runs_nothing() -> None:
    assert not list(risks("model.eval()\nsubprocess.run([a, b])\ntorch.load(p, weights_only=True)\nnp.load(p)"))


def test_a_message_is_one_line_whatever_it_names() -> None:
    """A name with line ends, codes of a terminal, and half of a surrogate pair, which can't be printed."""
    said = str(DataError("no field 'a\nerror: b\x1b[2J\ud800', but ‘naïve ☃’"))
    assert said == "no field 'a\\nerror: b\\x1b[2J\\ud800', but ‘naïve ☃’"
    said.encode()
