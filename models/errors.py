"""The error of this folder."""

from ibp_deepspeed.errors import InterlockingError


class ModelError(InterlockingError, ValueError):
    """A model, or a way to cut it, that cannot be used; the message is one sentence for the user."""
