"""The sources of a training, where --data names several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibp_deepspeed.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ibp_deepspeed.data import TokenFile
    from ibp_deepspeed.data.mixture import MixtureLoader


@dataclass(frozen=True)
class Mixture:
    """Two or more sources of one tokenizer.

    Attributes:
        folders: of the prepared data.
        names: the folders' names, or their paths where two have the same.
        shares: of the samples; their sum is 1.
        train, held_out: the splits of each.
    """

    folders: list[Path]
    names: list[str]
    shares: list[float]
    train: list[TokenFile]
    held_out: list[TokenFile]

    def loader(self, sequence_length: int, micro_batch_size: int, **options: Any) -> MixtureLoader:
        """Of the training splits, see :class:`ibp_deepspeed.data.mixture.MixtureLoader`."""
        from ibp_deepspeed.data.mixture import MixtureLoader

        return MixtureLoader(self.train, self.shares, self.names, sequence_length, micro_batch_size, **options)

    def shared(self) -> list[tuple[TokenFile, float]]:
        """The training split of each source, and its share."""
        return list(zip(self.train, self.shares, strict=True))

    def describe(self) -> str:
        """Sources and shares in words."""
        parts = (f"{share:.1%} {name}" for share, name in zip(self.shares, self.names, strict=True))
        return f"a mixture of {', '.join(parts)}"

    def counts(self, vocabulary_size: int) -> npt.NDArray[np.int64]:
        """How often each token occurs in a long training, [V]: of each source by its share."""
        import numpy as np

        counts = [file.counts(vocabulary_size) for file in self.train]
        scale = max(int(each.sum()) for each in counts)
        shares = [share * each / each.sum() for share, each in zip(self.shares, counts, strict=True)]
        return np.round(scale * sum(shares, np.zeros(1))).astype(np.int64)


def open_mixture(args: argparse.Namespace, *, verify: bool) -> Mixture | None:
    """The sources of the command line; None: there is one.

    Raises:
        DataError: one without a weight, one that is there twice, other tokenizers, or what can't be read.
    """
    if len(args.mixture) == 1:
        return None
    from ibp_deepspeed.data import open_tokens
    from ibp_deepspeed.data.joined import check_same_tokenizer
    from ibp_deepspeed.data.mixture import shares_of

    folders = [source.folder for source in args.mixture]
    for folder, weight in args.mixture:
        if weight is None:
            raise DataError(
                f"--data {folder} has no weight, and there are several: write --data {folder}=0.7 other=0.3"
            )
    _check_once(folders)
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    shares = shares_of([source.weight for source in args.mixture], names)
    train, held_out = (
        [open_tokens(folder, split, verify=verify) for folder in folders] for split in ("train", "heldout")
    )
    check_same_tokenizer(train)
    return Mixture(folders, names, shares.tolist(), train, held_out)


def _check_once(folders: Sequence[Path]) -> None:
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise DataError(f"--data names {folder} twice: give it once, with one weight")
        seen.add(folder.resolve())
