"""All stages in one process: the oracle of every test, and the way to study K stages on one device."""
