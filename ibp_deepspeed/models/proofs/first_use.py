"""Whether models of a config may be cut: known from the package, or from the user's cache, or proved now."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from ibp_deepspeed.errors import first_line
from ibp_deepspeed.models.errors import ModelError
from ibp_deepspeed.models.proofs.kind import kind_of

TABLE = Path(__file__).parent / "proven.json"
"""Kinds of configs that the package was proved with; written by ``python -m ibp_deepspeed.models.proofs.table``."""
_PATIENCE = 60.0  # seconds for another process that proves the same
_MODELS = Path(__file__).parents[1]
_proving: ContextVar[bool] = ContextVar("proving", default=False)
_known: dict[tuple[str, str], Mapping[str, float]] = {}
"""Of this process, by model type and kind."""


def require_proof(config: PretrainedConfig) -> Mapping[str, float]:
    """Let a config pass whose models, cut, have been proved to be the uncut ones, or prove it now.

    A kind of config in ``TABLE`` costs nothing where the version of transformers is the table's. Another one is
    proved once on a host, by the first process that needs it, and the others wait for that.

    Returns:
        check → difference, of those that such a model can take.

    Raises:
        ModelError: it differs, by name of the check and with the difference.
    """
    key = (config.model_type, kind_of(config))
    if _proving.get():
        return {}
    if key not in _known:
        _known[key] = _in_table(*key) or _first_use(config, key)
    return _known[key]


def in_table(model_type: str, kind: str) -> bool:
    """Whether the package was proved with this kind of config and the transformers that is installed."""
    return _in_table(model_type, kind) is not None


def _in_table(model_type: str, kind: str) -> Mapping[str, float] | None:
    found: Mapping[str, float] | None = _table()["types"].get(model_type, {}).get(kind)
    return found if _table()["transformers"] == transformers.__version__ else None


@contextmanager
def proving() -> Iterator[None]:
    """In it models are cut without a proof: they are its subject."""
    before = _proving.set(True)
    try:
        yield
    finally:
        _proving.reset(before)


def cache_folder() -> Path:
    """Where proofs of this user are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ibp_deepspeed" / "proofs"


@functools.cache
def code_digest() -> str:
    """Of the files that cut models."""
    found = hashlib.sha256()
    for path in sorted(_MODELS.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def _table() -> dict[str, Any]:
    if not TABLE.exists():
        return {"transformers": None, "types": {}}
    found: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def _first_use(config: PretrainedConfig, key: tuple[str, str]) -> Mapping[str, float]:
    """From the cache, where a proof counts for the same versions and code alone, or proved now."""
    state = json.dumps([*key, transformers.__version__, torch.__version__, code_digest()])
    path = cache_folder() / f"{key[0]}-{hashlib.sha256(state.encode()).hexdigest()[:24]}.json"
    with _alone(path.with_suffix(".lock")):
        found = _read(path)
        if found is None:
            found = _proved(config)
            _write(path, found)
    if found["refusal"] is not None:
        raise ModelError(str(found["refusal"]))
    differences: Mapping[str, float] = found["differences"]
    return differences


def _proved(config: PretrainedConfig) -> dict[str, Any]:
    try:
        from ibp_deepspeed.models.proofs.proof import prove  # cuts models, which asks here

        with proving():
            return prove(config).to_dict()
    except ImportError as error:
        raise ModelError(
            f"the cut of model type '{config.model_type}' can't be proved, because transformers "
            f"{transformers.__version__} has other internals: {first_line(error)}"
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    """A proof of the cache; one that is damaged is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(found, dict) and isinstance(found.get("refusal", 0), str | None)
    return found if is_whole and isinstance(found.get("differences"), dict) else None


def _write(path: Path, proof: dict[str, Any]) -> None:
    """Complete or not at all; without a place for it every process proves for itself."""
    new = path.with_suffix(f".{os.getpid()}.new")
    try:
        new.write_text(json.dumps(proof, indent=1), encoding="utf-8")
        os.replace(new, path)
    except OSError:
        with suppress(OSError):
            new.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of a host at a time; after a while, or where files can't be locked, all the same."""
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError:
        yield
        return
    with file:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
