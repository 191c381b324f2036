"""A transport for tests that keeps NCCL's rules, because no machine of ours has two GPUs."""
