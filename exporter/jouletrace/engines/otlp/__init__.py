"""The spans that engines export over OTLP: taken in as request records, and passed on to whoever collects them."""
