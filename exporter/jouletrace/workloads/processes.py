"""Processes and their ancestors, from /proc."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

DEEPEST = 64
"""Longest line of ancestors that is followed; containers under containers are about ten deep."""
LONGEST_COMMAND = 256 << 10
"""What is read of a process's arguments or environment; Linux allows 128 kB for one argument."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from those that had its pid before by when it started."""

    pid: int
    start_ticks: int
    """Since boot, in the kernel's clock ticks."""


def process_of(pid: int, proc: Path = Path("/proc")) -> tuple[Process, str] | None:
    """Return a process and its name, the first 15 bytes of its program's unless it has set another; None when gone."""
    try:
        stat = (proc / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # proc_pid_stat(5): the name, field 2, stands in parentheses and may hold some; starttime is field 22.
    head, _, rest = stat.rpartition(b")")
    name = head.partition(b"(")[2].decode(errors="replace")
    return Process(pid, int(rest.split()[19])), "".join(one if one.isprintable() else "?" for one in name)


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


def command_line(pid: int, proc: Path = Path("/proc")) -> list[str]:
    """Return a process's arguments, its program first; empty for one that is gone, may not be read, or is the kernel's.

    A process may write its title there instead (vLLM: `VLLM::EngineCore`).
    """
    try:
        with (proc / str(pid) / "cmdline").open("rb") as file:
            content = file.read(LONGEST_COMMAND)
    except OSError:
        return []
    return content.decode(errors="replace").removesuffix("\0").split("\0") if content else []


def environment(pid: int, names: Collection[str], proc: Path = Path("/proc")) -> dict[str, str]:
    """Return the named ones of the environment variables that a process was started with; others may be secrets."""
    wanted = {name.encode() for name in names}
    try:
        with (proc / str(pid) / "environ").open("rb") as file:
            pairs = [pair.partition(b"=") for pair in file.read(LONGEST_COMMAND).split(b"\0")]
    except OSError:
        return {}
    return {name.decode(): value.decode(errors="replace") for name, _, value in pairs if name in wanted}


def parents(proc: Path = Path("/proc")) -> dict[int, int]:
    """Return the parent of every process. Takes 15 us for each."""
    found = {}
    for folder in proc.iterdir():
        if folder.name.isdecimal():
            try:
                stat = (folder / "stat").read_bytes()
            except OSError:
                continue
            found[int(folder.name)] = int(stat.rpartition(b")")[2].split()[1])
    return found


def family(pid: int, parent_of: Mapping[int, int]) -> list[int]:
    """Return a process and all that descend from it, parents before children."""
    children: dict[int, list[int]] = {}
    for child, parent in parent_of.items():
        children.setdefault(parent, []).append(child)
    line = [pid]
    for one in line:
        line.extend(children.pop(one, ()))
    return line
