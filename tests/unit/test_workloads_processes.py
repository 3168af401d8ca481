"""The line of a process's ancestors, on this machine's own processes and on made-up ones."""

import os
import subprocess
import sys
from pathlib import Path

from jouletrace.workloads.processes import DEEPEST, command_line, environment, family, lineage, parents


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


def test_command_line_and_environment_of_a_real_process() -> None:
    code = "import time; print(1, flush=True); time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "--port", "8001", ""],
        env={"PORT": "7", "SECRET": "x"},
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert command_line(child.pid) == [sys.executable, "-c", code, "--port", "8001", ""]
        assert environment(child.pid, {"PORT", "ABSENT"}) == {"PORT": "7"}
        assert child.pid in family(os.getpid(), parents())
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert command_line(child.pid) == []
    assert environment(child.pid, {"PORT"}) == {}


def test_a_family_is_all_that_descends() -> None:
    assert family(2, {2: 1, 3: 2, 4: 3, 5: 1, 6: 2}) == [2, 3, 6, 4]
