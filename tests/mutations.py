"""JSON as somebody hostile or careless would change it: valid files with parts replaced, removed or added."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

_NAMES = ["../x", "/etc/passwd", "", "a\nb", "\ud800", "a\0b", "auto", "every", "x" * 300]
_NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    2**31,
    2**63,
    10**12,
    10**30,
    -(10**30),
    0.5,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]

scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(_NUMBERS), st.sampled_from(_NAMES), st.integers(), st.text(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _deep(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


@st.composite
def mutated(draw: st.DrawFn, *whole: Any) -> str:
    """The text of one of these values with up to four changes, and now and then another text altogether."""
    if draw(st.integers(0, 15)) == 0:
        return draw(st.sampled_from(["", "{", "[]", "null", "[" * 100_000, '{"a":' * 500, "1" * 5000]) | st.text())
    root = {"": copy.deepcopy(draw(st.sampled_from(whole)))}
    for _ in range(draw(st.integers(0, 4))):
        _change(draw, root)
    return json.dumps(root[""])


def _change(draw: st.DrawFn, root: dict[str, Any]) -> None:
    """At a place that a walk from the root finds."""
    owner: Any = root
    key: Any = ""
    while isinstance(owner[key], dict | list) and owner[key] and draw(st.integers(0, 3)):
        owner = owner[key]
        key = draw(st.sampled_from(sorted(owner) if isinstance(owner, dict) else range(len(owner))))
    what = draw(st.sampled_from(["replace", "replace", "remove", "add", "deep"]))
    if what == "remove" and owner is not root:
        del owner[key]
    elif what == "add" and isinstance(owner[key], dict):
        owner[key][draw(st.sampled_from(_NAMES) | st.text(max_size=8))] = draw(values)
    elif what == "deep":
        owner[key] = _deep(draw(st.sampled_from([30, 70, 300])))
    else:
        owner[key] = draw(values)
