"""Every exit of a trained model: evaluation and tables."""
