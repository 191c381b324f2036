"""Data: text sources, tokenizer, packed token files, and the micro-batches made of them."""

from ibp_deepspeed.data.loader import MicroBatch, MicroBatchLoader
from ibp_deepspeed.data.token_file import DataError, Manifest, SplitRecord, TokenFile, open_tokens

__all__ = [
    "DataError",
    "Manifest",
    "MicroBatch",
    "MicroBatchLoader",
    "SplitRecord",
    "TokenFile",
    "open_tokens",
]
