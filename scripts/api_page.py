"""Writes docs/api.md, the public names of the library, from their docstrings.

Public is what a module's __all__ names, and of a class what has a docstring and no underscore. Needs griffelib
(requirements-dev.txt).
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import griffe

from ibp_deepspeed import cli

ROOT = Path(__file__).resolve().parents[1]
HEADER = """# Public names

Made by `python scripts/api_page.py` from the docstrings, which is where to change it. K is the number of stages, M of
micro-batches in a batch of a replica, N the width: how many exits train a stage ([how-it-works.md](how-it-works.md)).
The engine and the module have the methods of DeepSpeed's `PipelineEngine` and `PipelineModule` too.
"""
# One description may be of several arguments, of which griffe warns.
_READING = griffe.GoogleOptions(warnings=False, returns_multiple_items=False)
Member = griffe.Attribute | griffe.Function
_LONG = 100  # characters of a signature on one line


def page() -> str:
    """The whole page."""
    return "\n".join([HEADER, *(part for module in public_modules() for part in _module(module))])


def public_modules() -> list[griffe.Module]:
    """The modules that say by __all__ what is public, packages before what is inside them."""
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)], docstring_parser="google", docstring_options=_READING)
    package = loader.load("ibp_deepspeed")
    loader.resolve_aliases()
    return sorted((m for m in _modules(package) if m.exports is not None), key=lambda module: module.path)


def public_names(module: griffe.Module) -> list[str]:
    """What its __all__ holds."""
    return sorted(str(name) for name in module.exports or [])


def _modules(module: griffe.Object | griffe.Alias) -> Iterator[griffe.Module]:
    if isinstance(module, griffe.Module):
        yield module
        for inner in module.modules.values():
            yield from _modules(inner)


def _module(module: griffe.Module) -> Iterator[str]:
    yield f"## `{module.path}`\n\n{_text(module)}\n"
    for name in public_names(module):
        yield from _name(module, name)


def _name(module: griffe.Module, name: str) -> Iterator[str]:
    """One public name, wherever it is from."""
    yield f"### {name}\n"
    thing = _target(module, name)
    if thing is None:
        yield "DeepSpeed's own.\n"
    elif isinstance(thing, griffe.Class):
        yield from _class(thing)
    elif isinstance(thing, griffe.Function):
        yield _code(_signature(name, thing.parameters, thing.returns))
        yield from _sections(thing)
    elif isinstance(thing, griffe.Attribute):
        yield _code(f"{name} = {thing.value}")
        yield f"{_text(thing)}\n"


def _target(module: griffe.Module, name: str) -> griffe.Object | None:
    """The object that the name is of; None for one of another library."""
    thing: griffe.Object | griffe.Alias = module[name]
    try:
        return thing.final_target if isinstance(thing, griffe.Alias) else thing
    except griffe.AliasResolutionError:
        return None


def _class(cls: griffe.Class) -> Iterator[str]:
    bases = f"({', '.join(map(str, cls.bases))})" if cls.bases else ""
    if "dataclass" in cls.labels or "__init__" in cls.members:
        yield _code(f"class {_signature(cls.name, cls.parameters)}")
    else:
        yield _code(f"class {cls.name}{bases}")
    yield from _sections(cls)
    fields = [_field(member) for member in _members(cls) if _is_field(member)]
    if fields:
        yield "**Fields**\n\n" + "\n".join(fields) + "\n"
    for member in _members(cls):
        if not _is_field(member):
            yield from _member(member)


def _members(cls: griffe.Class) -> list[Member]:
    """Public members with a docstring or, of configurations, a default; also those of base classes of ours."""
    everything = {**cls.inherited_members, **cls.members}
    found = [member.final_target if isinstance(member, griffe.Alias) else member for member in everything.values()]
    public = [member for member in found if isinstance(member, Member) and not member.name.startswith("_")]
    return [member for member in public if member.docstring is not None or _is_option(member)]


def _is_option(member: Member) -> bool:
    """Whether it is a key of a configuration, which docs/how-it-works.md may explain alone."""
    parent = member.parent
    in_model = isinstance(parent, griffe.Class) and "BaseModel" in map(str, parent.bases)
    return _is_field(member) and in_model and member.name != "model_config"


def _is_field(member: Member) -> TypeGuard[griffe.Attribute]:
    return isinstance(member, griffe.Attribute) and "property" not in member.labels


def _field(member: griffe.Attribute) -> str:
    kind = f": {member.annotation}" if member.annotation is not None else ""
    value = f" = {member.value}" if member.value is not None else ""
    words = f": {_joined(member.docstring.value)}" if member.docstring else ""
    return f"* `{member.name}{kind}{value}`{words}"


def _member(member: Member) -> Iterator[str]:
    if isinstance(member, griffe.Function):
        shown = _signature(member.name, member.parameters, member.returns)
    else:
        shown = f"{member.name}: {member.annotation}"
    yield f"#### {member.name}\n"
    yield _code(shown)
    yield from _sections(member)


def _signature(name: str, parameters: griffe.Parameters, returns: object = None) -> str:
    """As in the source, without ``self``; an argument a line where it is long."""
    shown, bare_star = [], False
    for parameter in parameters:
        kind = parameter.kind or griffe.ParameterKind.positional_or_keyword
        if parameter.name in ("self", "cls"):
            continue
        if kind is griffe.ParameterKind.var_positional:
            bare_star = True
        if kind is griffe.ParameterKind.keyword_only and not bare_star:
            shown.append("*")
            bare_star = True
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        default = f" = {parameter.default}" if parameter.default is not None and not stars else ""
        shown.append(f"{stars}{parameter.name}{annotation}{default}")
    end = f" -> {returns}" if returns is not None else ""
    line = f"{name}({', '.join(shown)}){end}"
    return line if len(line) <= _LONG else f"{name}(\n    " + ",\n    ".join(shown) + f",\n){end}"


def _sections(thing: griffe.Object) -> Iterator[str]:
    """A docstring's text, and its arguments, attributes, results and errors as lists."""
    for section in thing.docstring.parsed if thing.docstring is not None else []:
        if section.kind is griffe.DocstringSectionKind.text:
            yield f"{_plain(section.value)}\n"
            continue
        title = {"parameters": "Arguments"}.get(section.kind.value, section.kind.value.capitalize())
        yield f"**{title}**\n\n" + "\n".join(map(_item, section.value)) + "\n"


def _item(item: griffe.DocstringElement) -> str:
    name = getattr(item, "name", "") or (str(item.annotation) if isinstance(item, griffe.DocstringRaise) else "")
    return f"* `{name}`: {_joined(item.description)}" if name else f"* {_joined(item.description)}"


def _text(thing: griffe.Object) -> str:
    return _plain(thing.docstring.value) if thing.docstring is not None else ""


def _joined(text: str) -> str:
    return " ".join(_plain(text).split())


def _plain(text: str) -> str:
    """Sphinx's roles and double backticks as Markdown."""
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def _code(text: str) -> str:
    return f"```text\n{text}\n```\n"


def main(phase: cli.SameOnAllRanks) -> None:
    """Write the page."""
    parser = cli.parser(__doc__)
    out = ROOT / "docs" / "api.md"
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help="to write (default: docs/api.md)")
    parser.parse_args().out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
