"""The errors of this folder."""

from ibp_deepspeed.errors import InterlockingError


class ModelError(InterlockingError, ValueError):
    """A model, or a way to cut it, that cannot be used; the message is one sentence for the user."""


class AllTrained(ModelError):
    """A run that is resumed has all the batches that it is to have: nothing is wrong, and nothing left to do."""
