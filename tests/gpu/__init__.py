"""Runs on a real GPU; see docs/accuracy.md for what they showed."""
