"""What one stage has and does: layers, micro-batches in flight, losses, the proof of equal samples."""
