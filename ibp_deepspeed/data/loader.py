"""Micro-batches of a token file's samples."""

import torch

from ibp_deepspeed.data.sample_loader import Indices, MicroBatch, SampleLoader
from ibp_deepspeed.data.samples import Samples, samples_of
from ibp_deepspeed.data.share import Share, at_least
from ibp_deepspeed.data.token_file import TokenFile

__all__ = ["MicroBatch", "MicroBatchLoader"]


class MicroBatchLoader(SampleLoader):
    """An endless iterator over micro-batches `(input_ids, labels, sample_ids)` of one data-parallel rank.

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
    ) -> None:
        at_least("sequence_length", sequence_length, 1)
        share = Share(micro_batch_size, data_parallel_rank, data_parallel_size)
        self.samples: Samples = samples_of(token_file, sequence_length)
        super().__init__(self.samples, share, seed=seed, shuffle=shuffle, start=start)

    def _take(self, samples: Indices, epoch: int) -> MicroBatch:
        inputs, labels = self.samples.take(samples)
        return torch.from_numpy(inputs), torch.from_numpy(labels), torch.from_numpy(samples.copy())
