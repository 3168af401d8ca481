import io
import re

import pytest
from tests.diagnosed import VERDICTS, phase, request, result, undiagnosed

from jouletrace.trace.report import LONGEST_TEXT, Terminal, cells, joules_by_verdict, phase_labels, render

ANSI = re.compile("\x1b\\[[0-9;]*m")


def line(text: str, begin: str) -> str:
    return next(one for one in text.splitlines() if one.startswith(begin))


def test_a_wide_terminal_has_one_line_a_phase() -> None:
    text = render(result(), Terminal(160, unicode=True))
    assert line(text, "phase3").split() == [
        "phase3",
        "batch=3",
        "10.00",
        "400.0",
        "4,000.0",
        "-1.0",
        "+2.0",
        "memory_bound",
        "87%",
        "[SSSSSSMMMMMMMMMTTTOOOUUU]",
    ]
    assert line(text, "phase4").endswith("power_capped")
    for verdict in VERDICTS:
        assert f"{verdict} 87%" in text


def test_a_narrow_terminal_has_the_bar_under_the_figures() -> None:
    lines = render(result(), Terminal(80)).splitlines()
    at = next(at for at, one in enumerate(lines) if one.startswith("phase4"))
    assert lines[at].endswith("compute_bound 87%")
    assert lines[at + 1].split() == ["batch=4", "[SSSSSSMMMMMMMMMTTTOOOUUU]", "power_capped"]
    assert lines[at + 2].startswith("phase5")


@pytest.mark.parametrize("width", [60, 80, 100, 132])
def test_lines_fit_the_terminal(width: int) -> None:
    found = result()
    found["phases"].append(
        phase(7, "transfer_bound", labels={"prefill_tokens": 512, "decode": 64}, flags=["low_clocks", "fp32_pipe"])
    )
    lines = render(found, Terminal(width, unicode=True)).splitlines()
    assert max(map(len, lines)) <= max(width, 80)
    assert sum("[SSSSSSMMMMMMMMMTTTOOOUUU]" in one for one in lines) == 8


def test_the_ledger_adds_up_to_the_gpu() -> None:
    text = render(result(), Terminal())
    part = text[text.index("where the joules went") :]
    joules = [float(one.replace(",", "")) for one in re.findall(r"([\d,.]+) J ", part[: part.index("the GPU")])]
    assert joules == [5_050, 2_000, 1_000, 19_950]
    assert sum(joules) == 28_000
    assert "28,000.0 J" in line(text, "  the GPU")
    assert "bug" not in text


def test_joules_that_nobody_accounts_for_are_told() -> None:
    found = result()
    found["ledger"]["residual_joules"] = 12.5
    assert "12.5 J: please report this as a bug" in line(render(found, Terminal()), "  not accounted for")


def test_the_whole() -> None:
    text = render(result(), Terminal(unicode=True))
    assert "energy 28,000.0 J from power_ring; hardware counter 28,028.0 J (-0.100 %)" in text
    assert "requests  100 (100 by steps)" in text
    # Of 1 to 100 J.
    assert "median 50.5, 95 % under 95.0, most 100.0" in text
    assert "100.0 J ± 1.0  r100  tenant0" in text
    assert "memory" in line(text, "  M ")
    assert line(text, "  M ").split()[2:] == ["10,500.0", "J", "37.5", "%"]
    assert line(text, "  balanced").split() == ["balanced", "7,000.0", "J", "in", "1", "phase"]
    assert line(text, "  power_capped").endswith("flagged in 1 phase")


def test_warnings_stand_last() -> None:
    found = result()
    found["warnings"] = ["The energy counter was set back 2 times."]
    assert render(found, Terminal()).endswith("\nwarning: The energy counter was set back 2 times.\n")


def test_a_recording_without_diagnosis() -> None:
    text = render(undiagnosed(), Terminal(160))
    assert line(text, "phase3").split() == ["phase3", "batch=3", "10.00", "400.0", "4,000.0", "-1.0", "+2.0"]
    assert "verdict" not in text
    assert "[" not in text


def test_no_counter_no_requests_no_power() -> None:
    found = undiagnosed()
    found.update(counter_joules=None, requests=[])
    found["phases"] = [phase(0, "idle", energy_joules=0.0, low=0.0, high=0.0, average_watts=None, drivers={})]
    text = render(found, Terminal(100))
    assert "no hardware counter" in text
    assert "median" not in text
    assert line(text, "phase0").split() == ["phase0", "batch=0", "10.00", "-", "0.0", "-", "-", "idle", "87%"]


def test_a_recording_cannot_drive_the_terminal() -> None:
    found = result()
    found["phases"] = [phase(0, "idle", name="\x1b]0;owned\x07", labels={"\x1b[2J": "\u202egnp.exe\r\n"})]
    found["requests"] = [request(1, 5.0, id="\x9b31m", tenant="\x1b[8mhidden")]
    found["gpu"]["name"] = "H200\nwarning: all is well"
    found["warnings"] = ["\x1b[2J", "x" * 10_000]
    text = render(found, Terminal(100, unicode=True))
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "\nwarning: all is well" not in text
    assert max(map(len, text.splitlines())) <= LONGEST_TEXT + len("warning: ")


def test_ascii_where_the_terminal_has_no_more() -> None:
    found = result()
    found["phases"][0]["name"] = "größe"
    text = render(found, Terminal(100))
    assert text.isascii()
    assert "gr??e" in text


def test_colour_changes_no_letter() -> None:
    plain = render(result(), Terminal(120))
    coloured = render(result(), Terminal(120, colour=True))
    assert ANSI.sub("", coloured) == plain
    assert "\x1b" not in plain
    assert coloured != plain


@pytest.mark.parametrize(
    ("terminal", "environment", "colour"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colour_on_a_terminal_only(terminal: bool, environment: dict[str, str], colour: bool) -> None:
    class Stream(io.TextIOWrapper):
        def isatty(self) -> bool:
            return terminal

    assert Terminal.of(Stream(io.BytesIO(), "utf-8"), environment).colour is colour


@pytest.mark.parametrize(("encoding", "unicode"), [("utf-8", True), ("ascii", False), ("latin-1", False)])
def test_the_encoding_decides_on_letters(encoding: str, unicode: bool) -> None:
    assert Terminal.of(io.TextIOWrapper(io.BytesIO(), encoding), {}).unicode is unicode


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([1, 1, 1], [4, 3, 3]),
        ([0.96, 0.04], [10, 0]),
        ([3.0, -1.0, 1.0], [8, 0, 2]),
        ([0.0, 0.0], [0, 0]),
        ([1e-300], [10]),
    ],
)
def test_cells_add_up(parts: list[float], expected: list[int]) -> None:
    assert cells(parts, 10) == expected


def test_labels_are_broken_at_separators_and_lists_are_no_python() -> None:
    expected = ["balanced", "compute_bound", "memory_bound"]
    phases = [phase(0, "idle", name="matrix product fp16", labels={"expected": expected, "batch": 96})]
    lines = render({**result(), "phases": phases}, Terminal(60)).splitlines()
    text = "\n".join(lines)
    assert "['" not in text
    assert phase_labels(phases[0]) == "expected=balanced|compute_bound|memory_bound batch=96"
    left = [line.split("  ")[0] for line in lines[1 : lines.index("")]]
    assert "".join(left).replace(" ", "") == "matrixproductfp16expected=balanced|compute_bound|memory_boundbatch=96"
    assert all(part.endswith(("|", "_", "=")) for part in left if part and not part[-1].isalnum())
    assert "bound|" in text


def test_a_word_longer_than_its_column_is_cut() -> None:
    phases = [phase(0, "idle", name="x" * 70, labels={"名": "漢" * 40})]
    lines = render({**result(), "phases": phases}, Terminal(60, unicode=True)).splitlines()
    assert sum(line.split("  ")[0].count("x") for line in lines) == 70
    assert sum(line.count("漢") for line in lines) == 40


def test_a_phase_of_which_nothing_is_known_shows_dashes() -> None:
    nothing = dict.fromkeys(("energy_joules", "low", "high", "average_watts", "verdict", "confidence"))
    phases = [phase(0, "idle"), {**phase(1, "idle", flags=[], drivers={}, evidence={}), **nothing}]
    lines = render({**result(), "phases": phases}, Terminal(140)).splitlines()
    assert lines[2].split()[2:8] == ["10.00", "-", "-", "-", "-", "-"]
    assert joules_by_verdict(phases) == [("idle", 1, 1000.0)]
