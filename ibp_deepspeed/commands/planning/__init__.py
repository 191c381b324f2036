"""The parts of plan.py."""
