"""The parts of benchmarks/gpu_acceptance.py: each a module with ``run(small, …) -> rows`` and ``COLUMNS``."""
