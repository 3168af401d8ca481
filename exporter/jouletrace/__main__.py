"""`python -m jouletrace` is the console script."""

from jouletrace.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
