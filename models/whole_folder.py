"""A folder that appears when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ibp_deepspeed.atomic_files import replace_folder
from models.errors import ModelError


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which gets that name at the end, or goes when something fails.

    Raises:
        ModelError: ``out`` exists, or can't be written.
    """
    if out.exists():
        raise ModelError(f"{out} exists already: give another --out or remove it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            yield temporary
            temporary.chmod(0o755)
            replace_folder(temporary, out, temporary.with_name(f"{temporary.name}.old"))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"can't write {out}: {getattr(error, 'strerror', None) or error}") from error
