"""What a stage does in a batch, as instructions; their validation and simulation without devices."""
