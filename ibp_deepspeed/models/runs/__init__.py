"""What a training run starts from, describes and leaves on disk."""
