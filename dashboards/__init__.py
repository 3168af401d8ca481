"""Grafana dashboards of jouletrace, written in Python. `python -m dashboards` writes their JSON to generated/."""
