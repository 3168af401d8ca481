"""Who runs on a device: processes, and what they belong to."""
