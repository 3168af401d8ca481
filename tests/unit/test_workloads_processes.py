"""The line of a process's ancestors, on this machine's own processes and on made-up ones."""

import os
import subprocess
import sys
from pathlib import Path

from jouletrace.workloads.processes import DEEPEST, lineage


def test_a_real_child_and_its_parents() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert lineage(child.pid)[:2] == [child.pid, os.getpid()]
        child.communicate(b"\n")
    assert lineage(child.pid) == []


def test_names_with_parentheses_and_endless_lines(tmp_path: Path) -> None:
    for pid, parent in ((7, 8), (8, 7)):
        (tmp_path / str(pid)).mkdir()
        # The kernel cuts names at 15 bytes, in the middle of a character if need be.
        (tmp_path / str(pid) / "stat").write_bytes(b"%d (evil ) 1 (\xc3) S %d 1 1" % (pid, parent))
    assert lineage(7, tmp_path) == [7, 8] * (DEEPEST // 2)
