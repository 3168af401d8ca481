"""jouletrace: where the joules of AI inference go."""

__version__ = "0.1.0"
