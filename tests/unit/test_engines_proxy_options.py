from pathlib import Path

import pytest
from tests.daemon_process import run_command


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--upstream", "localhost:8000"], "--upstream: 'localhost:8000' is not a URL such as http://127.0.0.1:8000"),
        (["--upstream", "http://h:99999"], "--upstream: 'http://h:99999' is not a URL"),
        (["--upstream", "http://h", "--jouletrace", "run/x"], "or the absolute path of a Unix socket"),
        (["--upstream", "http://h", "--listen", "8088"], "--listen: '8088' has no port; write HOST:PORT"),
        (["--upstream", "http://h", "--energy-budget", "1"], "--energy-budget: '1' is not a duration"),
        (["--upstream", "http://h", "--engine-kind", "vllm"], "--engine-kind: announces an engine"),
        (["--upstream", "http://h", "--gpu-uuid", "GPU-1"], "--gpu-uuid: belongs to an engine"),
        (["--upstream", "http://h", "--token-file", "/nowhere"], "--token-file: /nowhere cannot be read"),
    ],
)
def test_mistakes_are_one_line_with_the_mend(arguments: list[str], complaint: str) -> None:
    done = run_command("proxy", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_empty_token_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    done = run_command("proxy", "--upstream", "http://h", "--token-file", str(tmp_path / "token"))
    assert (done.returncode, "is empty" in done.stderr) == (2, True)
