"""Where DeepSpeed's monitors write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDERS = {"tensorboard": "tensorboard", "csv_monitor": "csv"}
"""Block of the DeepSpeed JSON → folder of a run."""


def monitors_under(output: Path, ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose monitors write into a run's own folder, unless it names another.

    Without a path DeepSpeed writes all runs into one folder of the directory that they were started in.
    """
    changed = dict(ds_config)
    for block, folder in FOLDERS.items():
        options = changed.get(block)
        if isinstance(options, Mapping) and options.get("enabled") and not options.get("output_path"):
            where = {"output_path": str(output / folder), "job_name": options.get("job_name", "")}
            changed[block] = {**options, **where}
    return changed
