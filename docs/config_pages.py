"""The configuration tree as the commented file of the Debian package and as its manual page."""

import json
import textwrap

from jouletrace.config import KEYS, Key

WIDTH = 100
HEADER = """\
## Configuration of jouletrace. Everything has a default, which stands here as a comment; jouletrace.yml(5) says more.
## Check a change with `jouletrace check-config --config.file=/etc/jouletrace/jouletrace.yml`, then
## `systemctl reload jouletrace`: the log names what needs a restart.
##
## Under systemd the units say where to listen: web.listen_address is replaced by jouletrace.socket, and
## ingest.stream_socket, ingest.datagram_socket and ingest.socket_access by jouletrace-ingest.socket.
"""


def example_file() -> str:
    """Return a YAML file of comments: every key with its default behind `#`, its meaning above it behind `##`."""
    lines = [HEADER]
    section = ""
    for key in KEYS.values():
        parent, _, name = key.name.rpartition(".")
        if parent != section:
            section = parent
            *outer, inner = parent.split(".")
            lines += [f"#{'  ' * len(outer)}{inner}:"] if outer else ["", f"#{inner}:"]
        indent = "  " * key.name.count(".")
        about = f"{_plain(key.description)} Write {key.form.allowed(key.meta)}."
        lines += [f"##{indent} {line}" for line in textwrap.wrap(about, WIDTH)]
        lines.append(f"#{indent}{name}: {_default(key)}")
    return "\n".join(lines) + "\n"


def manual_page() -> str:
    """Return jouletrace.yml(5) for man(7)."""
    lines = [
        '.\\" Generated from exporter/jouletrace/config.py. Do not edit: run `make docs`.',
        '.TH JOULETRACE.YML 5 "" jouletrace',
        ".SH NAME",
        "jouletrace.yml \\- configuration of jouletrace(1)",
        ".SH DESCRIPTION",
        "A YAML file that \\fB\\-\\-config.file\\fR names. Everything has a default. Environment variables are over "
        "the file and flags over both: \\fBlog.level\\fR is \\fBJOULETRACE_LOG_LEVEL\\fR and \\fB\\-\\-log.level\\fR.",
        "Durations are written as 500ms, 10s, 1m30s or 2h. What is unknown, set twice or impossible is refused.",
    ]
    section = None
    for key in KEYS.values():
        parent = key.name.rpartition(".")[0]
        if parent != section:
            section = parent
            lines.append(f".SH {section.upper() or 'TOP LEVEL'}")
        about = _plain(key.description)
        lines += [
            ".TP",
            f".B {_roff(key.name)}",
            _roff(f"{about} Values: {key.form.allowed(key.meta)}. Default: {_default(key)}"),
        ]
    lines += [".SH FILES", ".I /etc/jouletrace/jouletrace.yml", ".SH SEE ALSO", ".BR jouletrace (1)"]
    return "\n".join(lines) + "\n"


def _default(key: Key) -> str:
    """Return a key's default as YAML; JSON is that, on one line."""
    return json.dumps(key.form.write(key.default))


def _plain(text: str) -> str:
    return text.replace("`", "")


def _roff(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")
