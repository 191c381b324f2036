"""DeepSpeed's pipeline engine, following the validated schedule."""
