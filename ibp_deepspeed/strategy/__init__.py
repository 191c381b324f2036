"""Which losses train which trunk, over stages, micro-batches and batches."""
