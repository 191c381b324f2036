"""Data: text sources, tokenizer, packed token files, and the micro-batches made of them."""

from ibp_deepspeed.data.held_out import HeldOut
from ibp_deepspeed.data.loader import MicroBatch, MicroBatchLoader
from ibp_deepspeed.data.token_file import Manifest, SplitRecord, TokenFile, open_tokens
from ibp_deepspeed.errors import DataError

__all__ = [
    "DataError",
    "HeldOut",
    "Manifest",
    "MicroBatch",
    "MicroBatchLoader",
    "SplitRecord",
    "TokenFile",
    "open_tokens",
]
