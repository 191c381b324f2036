"""Entry points, and what they share."""
