"""Whether a cut model is the uncut one: proved with a small model of the same kind, once, instead of listed."""
