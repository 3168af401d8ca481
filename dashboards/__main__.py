"""`python -m dashboards` writes the dashboards to generated/; with `--check` it says which are not current."""

import sys

from dashboards.boards import GENERATED, stale, write


def main() -> int:
    """Return 1 when `--check` finds a file that differs from what would be written."""
    if "--check" not in sys.argv[1:]:
        write(GENERATED)
        return 0
    for name in (found := stale(GENERATED)):
        print(f"dashboards/generated/{name} is not current: run `make dashboards`", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
