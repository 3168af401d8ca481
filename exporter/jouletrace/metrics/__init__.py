"""What Prometheus sees: the metric names, the collectors that fill them, and the formats."""
