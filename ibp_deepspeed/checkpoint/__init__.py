"""Files of a checkpoint: their names, their manifest, writing, reading, loading into another shape."""
