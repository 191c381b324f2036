"""All exceptions of the package. The message of each is one sentence for the user."""

from __future__ import annotations


class InterlockingError(Exception):
    """An error that a user can mend: its message says what was seen, where, and the way out."""

    def __str__(self) -> str:
        """The message in one line: a name in it may be of a file that somebody else made, with codes for a terminal."""
        text = super().__str__()
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class ConfigError(InterlockingError, ValueError):
    """A configuration that can't be trained with."""


class DataError(InterlockingError, ValueError):
    """Data that cannot be used as they are: names the path, what was seen, what is expected, the way out."""


class ModuleError(InterlockingError, ValueError):
    """A pipeline module that can't be cut or trained as asked."""


class CheckpointError(InterlockingError):
    """A checkpoint that can't be written or read."""


class PlanError(InterlockingError, ValueError):
    """What can't be planned: a combination that can't run, with what would fit, or a bad profile."""


class TraceError(InterlockingError, ValueError):
    """A trace that can't be recorded or read."""


class OutputError(InterlockingError):
    """A file or folder that can't be written, or is there already."""


class HostsError(InterlockingError):
    """A host of the job can't train, or has something else than the first one."""


class BatchError(InterlockingError, ValueError):
    """A stage has no data, or other data than its neighbour."""


class NonFiniteError(InterlockingError):
    """A loss or a gradient of a stage is infinite or not a number."""


class BoundaryError(InterlockingError):
    """What crosses a boundary is not one floating tensor of a constant shape."""


class PeerLostError(InterlockingError):
    """A neighbouring stage ended or its connection broke."""


class ScheduleError(AssertionError):
    """A schedule that does not fit together: a bug, not a user's mistake. Ends with the grid of stages × time."""


def first_line(error: object) -> str:
    """The first line of an error's text that says anything, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
