"""The errors of this folder."""

from ibp_deepspeed.errors import InterlockingError


class ModelError(InterlockingError, ValueError):
    """A model, or a way to cut it, that cannot be used; the message is one sentence for the user."""


class AllTrained(ModelError):
    """A run that is resumed has all the batches that it is to have: nothing is wrong, and nothing left to do."""


_LONGEST = 200  # characters of another's error


def in_words(error: Exception) -> str:
    """An error of any kind, as transformers' models and configs raise them, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ModelError) else f"{type(error).__name__}: {text[:_LONGEST]}"
