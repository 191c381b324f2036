"""What scripts on trained models print and draw."""
