"""What layers, heads and messages of a model take on the device at hand, measured."""
