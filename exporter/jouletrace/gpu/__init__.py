"""Readings: what a GPU says, from NVML or from a recording, behind one Protocol."""
