"""Recordings: what a GPU said while known work ran on it, kept in a file."""
