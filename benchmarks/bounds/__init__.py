"""Minimal scripts, each of which shows a bound that a goal meets."""
