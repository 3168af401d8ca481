"""Processes and their ancestors, from /proc."""

from pathlib import Path

DEEPEST = 64
"""Longest line of ancestors that is followed; containers under containers are about ten deep."""


def lineage(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Return a process and its ancestors, nearest first, without process 0; empty when it is gone.

    An engine's workers hold the GPU, but the process that tells of them is often their parent.
    """
    line: list[int] = []
    while pid > 0 and len(line) < DEEPEST:
        try:
            stat = (proc / str(pid) / "stat").read_bytes()
        except OSError:
            break
        line.append(pid)
        # The name in parentheses may hold anything, parentheses and halves of characters too; the parent is the
        # second word after it.
        pid = int(stat.rpartition(b")")[2].split()[1])
    return line
