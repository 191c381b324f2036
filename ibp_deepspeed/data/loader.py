"""Micro-batches of a token file's samples."""

import torch

from ibp_deepspeed.data.sample_loader import Indices, MicroBatch, SampleLoader
from ibp_deepspeed.data.samples import Samples, samples_of
from ibp_deepspeed.data.share import Share, at_least
from ibp_deepspeed.data.token_file import TokenFile

__all__ = ["MicroBatch", "MicroBatchLoader", "micro_batch"]


class MicroBatchLoader(SampleLoader):
    """An endless iterator over micro-batches `(input_ids, labels, sample_ids)` of one data-parallel rank.

    Where documents are kept apart there is a fourth tensor, `position_ids` [B, S], the place of each token in its
    document. `document_masks`: whether they are; None: if the data have their bounds.

    With B = micro_batch_size and S = sequence_length, all int64 on the CPU: `input_ids` [B, S], `labels`
    [B, S] (the token that follows each input token, so already shifted; -100 where it does not count in the
    loss), `sample_ids` [B]. What sample i is, a window of a text or a row of dialogues, `samples` says
    (samples.py); its id is i in every epoch. Their order: see SampleLoader.

    Raises DataError when an argument is out of range or the data have less than one global micro-batch.
    """

    def __init__(
        self,
        token_file: TokenFile,
        sequence_length: int,
        micro_batch_size: int,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        start: int = 0,
        document_masks: bool | None = None,
    ) -> None:
        at_least("sequence_length", sequence_length, 1)
        share = Share(micro_batch_size, data_parallel_rank, data_parallel_size)
        self.samples: Samples = samples_of(token_file, sequence_length, document_masks)
        super().__init__(self.samples, share, seed=seed, shuffle=shuffle, start=start)

    def _take(self, samples: Indices, epoch: int) -> MicroBatch:
        return micro_batch(self.samples, samples)


def micro_batch(samples: Samples, indices: Indices) -> MicroBatch:
    """Some samples as a micro-batch of their own memory."""
    arrays = [*samples.take(indices), indices.copy()]
    positions = samples.positions(indices)
    return tuple(torch.from_numpy(array) for array in (arrays if positions is None else [*arrays, positions]))
