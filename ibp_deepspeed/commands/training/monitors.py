"""Where DeepSpeed's monitors write, whether they can, and how they go on when a run does."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDERS = {"tensorboard": "tensorboard", "csv_monitor": "csv"}
"""Block of the DeepSpeed JSON → folder of a run."""
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Block of the DeepSpeed JSON → what it imports."""


MONITORS = ("tensorboard", "csv", "wandb", "comet", "none")
"""Names for --report-to."""
_BLOCKS = {"tensorboard": "tensorboard", "csv": "csv_monitor", "wandb": "wandb", "comet": "comet"}


def reporting_to(ds_config: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """A configuration in which these monitors are enabled and no others; None: as it is.

    Raises:
        ConfigError: "none" and others.
    """
    from ibp_deepspeed.errors import ConfigError

    if names is None:
        return dict(ds_config)
    if "none" in names and len(names) > 1:
        raise ConfigError(f"--report-to {' '.join(names)}: give none alone, or the others without it.")
    blocks = {block: name in names for name, block in _BLOCKS.items() if name in names or block in ds_config}
    return {**ds_config, **{block: {**ds_config.get(block, {}), "enabled": on} for block, on in blocks.items()}}


def check_monitors(ds_config: Mapping[str, Any]) -> None:
    """That the monitors which are turned on are installed.

    Raises:
        ConfigError: one is not.
    """
    from ibp_deepspeed.config.deepspeed import is_enabled
    from ibp_deepspeed.errors import ConfigError

    for block, package in _PACKAGES.items():
        if is_enabled(ds_config, block) and find_spec(package) is None:
            raise ConfigError(
                f'"{block}" is enabled and {package} is not installed: pip install {package}, or set "enabled": false.'
            )


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


def resume_monitors(monitor: Any, batches: int) -> None:
    """On rank 0, when a run goes on after so many batches: what was written of later ones is going to be written again.

    TensorBoard is told to forget it (``purge_step`` of torch's SummaryWriter, in a file of its own); of DeepSpeed's CSV
    files these rows are removed. What went to wandb and comet stays there, in a run of its own.

    Args:
        monitor: DeepSpeed's MonitorMaster, or None.
        batches: that were trained before.
    """
    if monitor is None or not monitor.enabled:
        return
    tensorboard, table = monitor.tb_monitor, monitor.csv_monitor
    if tensorboard is not None and tensorboard.summary_writer is not None:
        tensorboard.summary_writer.close()  # its next event begins a file, with the step
        tensorboard.summary_writer.purge_step = batches + 1
    if table is not None:
        for path in Path(table.log_dir).glob("*.csv"):
            _keep_rows(path, batches)
            table.filenames.append(path.stem)  # it has its header


def _keep_rows(path: Path, batches: int) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in rows if int(row[0]) <= batches)])
