"""Image classifiers cut into pipeline stages: residual networks and vision Transformers."""
