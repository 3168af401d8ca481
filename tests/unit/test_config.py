import argparse
import os
import string
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jouletrace import config as configuration
from jouletrace.config import KEYS, Config, ConfigError, add_flags, load, reference_markdown, to_yaml

STATE = {"STATE_DIRECTORY": "/var/lib/jouletrace"}


def parse_flags(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config.file", dest="config_file")
    add_flags(parser)
    return parser.parse_args(arguments)


def from_text(tmp_path: Path, text: str | bytes) -> Config:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(file, STATE, None)


def refusal(tmp_path: Path, text: str | bytes) -> str:
    """Return the error without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        from_text(tmp_path, text)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message.replace(str(tmp_path / "c.yaml"), "c.yaml")


def test_defaults() -> None:
    config = load(None, STATE, None)
    assert config == Config(state_dir="/var/lib/jouletrace")
    assert config.source == "nvml"
    assert config.replay_file is None
    assert config.devices == ()
    assert (config.log.level, config.log.format) == ("info", "auto")
    assert config.web.listen_address == (":9841",)
    assert config.web.telemetry_path == "/metrics"
    assert config.sampling.ring_interval == 1.0
    assert config.sampling.activity_interval == 0.5
    assert config.sampling.state_interval == 1.0
    assert config.sampling.health_interval == 10.0
    assert config.sampling.counter_interval == 10.0
    assert config.sampling.power_polling_hertz == 100
    assert config.sampling.cpu_budget_ratio == 0.03
    assert config.readiness.stale_after == 5.0
    assert config.driver.give_up_after == 120.0
    assert (config.replay.speed, config.replay.loop) == (1.0, True)


def test_the_defaults_themselves_are_valid() -> None:
    everything = {key.name: key.form.write(key.default) for key in KEYS.values()}
    for key in KEYS.values():
        assert key.form.read(everything[key.name]) == key.default, key.name


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().log.level = "debug"  # type: ignore[misc]


def test_a_whole_file(tmp_path: Path) -> None:
    config = from_text(
        tmp_path,
        """
        source: replay:/srv/a b.json.gz
        state_dir: /srv/state
        devices: [0, "3", GPU-8932f937]
        log: {level: debug, format: json}
        web:
          listen_address: ["[::1]:9841", "localhost:0"]
          telemetry_path: /federate/gpu
        sampling:
          ring_interval: 1s500ms
          cpu_budget_ratio: 1
          power_polling_hertz: 250
        readiness: # the default
        driver: {give_up_after: 1h30m}
        replay: {speed: 2.5, loop: false}
        """,
    )
    assert config.replay_file == Path("/srv/a b.json.gz")
    assert config.state_dir == "/srv/state"
    assert config.devices == (0, 3, "GPU-8932f937")
    assert (config.log.level, config.log.format) == ("debug", "json")
    assert config.web.listen_address == ("[::1]:9841", "localhost:0")
    assert config.web.telemetry_path == "/federate/gpu"
    assert config.sampling.ring_interval == 1.5
    assert config.sampling.cpu_budget_ratio == 1.0
    assert config.sampling.power_polling_hertz == 250
    assert config.sampling.counter_interval == 10.0
    assert config.readiness.stale_after == 5.0
    assert config.driver.give_up_after == 5400
    assert (config.replay.speed, config.replay.loop) == (2.5, False)


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "# only a comment\n", "---\n", "{}", "~", "log:\nweb:\n", "\ufefflog: {level: info}\n"],
)
def test_a_file_that_sets_nothing(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, text) == load(None, STATE, None)


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("log: {level: error, format: json}\nsampling: {ring_interval: 2s, state_interval: 2s}\n")
    environment = STATE | {"JOULETRACE_LOG_LEVEL": "warning", "JOULETRACE_SAMPLING_RING_INTERVAL": "1500ms"}
    flags = parse_flags("--log.level", "debug", "--config.file", "ignored")
    config = load(file, environment, flags)
    assert config.log.level == "debug"
    assert config.sampling.ring_interval == 1.5
    assert config.sampling.state_interval == 2.0
    assert config.log.format == "json"
    assert config.sampling.health_interval == 10.0


def test_every_key_has_a_flag_and_a_variable_of_its_own() -> None:
    assert KEYS["sampling.activity_interval"].flag == "--sampling.activity-interval"
    assert KEYS["sampling.activity_interval"].variable == "JOULETRACE_SAMPLING_ACTIVITY_INTERVAL"
    assert len({key.flag for key in KEYS.values()}) == len(KEYS)
    assert len({key.variable for key in KEYS.values()}) == len(KEYS)


OTHER_VALUES = {
    "source": ("replay:x.gz", "replay:x.gz"),
    "state_dir": ("/srv/s", "/srv/s"),
    "devices": ("1,GPU-ab", (1, "GPU-ab")),
    "log.level": ("error", "error"),
    "log.format": ("console", "console"),
    "web.listen_address": ("127.0.0.1:1,unix:/run/web.sock", ("127.0.0.1:1", "unix:/run/web.sock")),
    "web.metrics_listen_address": ("10.0.0.5:9841", ("10.0.0.5:9841",)),
    "web.telemetry_path": ("/m", "/m"),
    "web.config.file": ("/etc/web.yml", "/etc/web.yml"),
    "ingest.listen_address": (":9842", (":9842",)),
    "ingest.stream_socket": ("/run/a b.sock", "/run/a b.sock"),
    "ingest.datagram_socket": ("off", "off"),
    "ingest.socket_access": ("owner", "owner"),
    "ingest.token_file": ("/etc/token", "/etc/token"),
    "ingest.max_body_mebibytes": ("256", 256.0),
    "ingest.queue_records": ("1024", 1024.0),
    "ingest.queue_mebibytes": ("8", 8.0),
    "otlp.listen_address": (":4318", (":4318",)),
    "otlp.grpc_listen_address": ("127.0.0.1:4317,[::1]:4317", ("127.0.0.1:4317", "[::1]:4317")),
    "otlp.forward_url": ("https://otlp.example:4318/v1/traces?x=1", "https://otlp.example:4318/v1/traces?x=1"),
    "otlp.forward_headers_file": ("/etc/headers", "/etc/headers"),
    "otlp.forward_buffer_mebibytes": ("65536", 65536.0),
    "engines.discover": ("false", False),
    "engines.targets": (
        "http://127.0.0.1:8000,https://[::1]:1",
        (
            configuration.EngineTarget(url="http://127.0.0.1:8000"),
            configuration.EngineTarget(url="https://[::1]:1"),
        ),
    ),
    "workloads.processes": ("true", True),
    "workloads.pods": ("true", True),
    "workloads.pod_resources_socket": ("/kubelet.sock", "/kubelet.sock"),
    "workloads.pod_logs_dir": ("/logs", "/logs"),
    "ledger.laws_file": ("/etc/jouletrace/laws.json", "/etc/jouletrace/laws.json"),
    "ledger.in_flight_requests": ("1000", 1000.0),
    "ledger.settled_requests": ("5000", 5000.0),
    "ledger.tenants_per_model": ("20", 20.0),
    "sampling.ring_interval": ("100ms", 0.1),
    "sampling.activity_interval": ("10s", 10.0),
    "sampling.graphics_interval": ("20s", 20.0),
    "sampling.state_interval": ("1m", 60.0),
    "sampling.health_interval": ("1m30s", 90.0),
    "sampling.counter_interval": ("1s", 1.0),
    "sampling.power_polling_hertz": ("1000", 1000.0),
    "sampling.cpu_budget_ratio": ("0.005", 0.005),
    "diagnosis.parked_after": ("20m", 1200.0),
    "readiness.stale_after": ("1m", 60.0),
    "driver.give_up_after": ("24h", 86400.0),
    "replay.speed": ("0.5", 0.5),
    "replay.loop": ("false", False),
}


def test_other_values_name_every_key() -> None:
    assert list(OTHER_VALUES) == list(KEYS)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_each_key_by_flag_variable_and_file(tmp_path: Path, name: str) -> None:
    text, value = OTHER_VALUES[name]
    key = KEYS[name]
    flag = [key.flag, text]
    if isinstance(value, bool):
        flag = [key.flag] if value else [f"--no-{name}"]
    by_flag = load(None, STATE, parse_flags(*flag))
    by_variable = load(None, STATE | {key.variable: text}, None)
    assert key.value_in(by_flag) == key.value_in(by_variable) == value != key.default
    assert by_flag == by_variable == from_text(tmp_path, to_yaml(by_flag))


def test_a_repeated_flag_makes_a_list() -> None:
    flags = parse_flags("--web.listen-address", ":1", "--web.listen-address=[::1]:2", "--devices=2", "--devices=0")
    config = load(None, STATE, flags)
    assert config.web.listen_address == (":1", "[::1]:2")
    assert config.devices == (2, 0)


def test_absent_flags_leave_no_trace() -> None:
    assert vars(parse_flags()) == {"config_file": None}


def test_help_can_be_printed() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    assert "--sampling.ring-interval DURATION" in text
    assert "--no-replay.loop" in text
    assert "(default: 500ms)" in text


def test_an_empty_variable_is_not_set() -> None:
    environment = STATE | {"JOULETRACE_LOG_LEVEL": "", "JOULETRACE_DEVICES": ""}
    assert load(None, environment, None) == load(None, STATE, None)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("JOULETRACE_NVML_SHIM", "1"),
        ("JOULETRACE_SERVICE_HOST", "10.0.0.7"),
        ("JOULETRACE_SERVICE_PORT", "9841"),
        ("JOULETRACE_SERVICE_PORT_METRICS", "9841"),
        ("JOULETRACE_PORT", "tcp://10.0.0.7:9841"),
        ("JOULETRACE_PORT_9841_TCP", "tcp://10.0.0.7:9841"),
        ("JOULETRACE_PORT_9841_TCP_ADDR", "10.0.0.7"),
        ("JOULETRACE_PORT_9841_TCP_PROTO", "tcp"),
        ("JOULETRACE_GATEWAY_PORT", "tcp://10.0.0.7:80"),
        ("JOULETRACE_GATEWAY_SERVICE_HOST", "10.0.0.7"),
        ("UNRELATED", "x"),
        ("JOULETRACER", "x"),
    ],
)
def test_variables_of_others_are_ignored(variable: str, value: str) -> None:
    assert load(None, STATE | {variable: value}, None) == load(None, STATE, None)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "JOULETRACE_LOG_LEVL",
            "s3cret",
            "environment variable JOULETRACE_LOG_LEVL: is not a known key; did you mean JOULETRACE_LOG_LEVEL?",
        ),
        (
            "JOULETRACE_WEB_PORT",
            "9000",
            "environment variable JOULETRACE_WEB_PORT: is not a known key; remove it from the environment",
        ),
        (
            "JOULETRACE_LOG_LEVEL",
            "loud",
            'environment variable JOULETRACE_LOG_LEVEL: log.level: "loud" is not one of the choices; '
            "write debug, info, warning or error",
        ),
        (
            "JOULETRACE_SAMPLING_RING_INTERVAL",
            "1",
            'environment variable JOULETRACE_SAMPLING_RING_INTERVAL: sampling.ring_interval: "1" has no unit; write 1s',
        ),
        (
            "JOULETRACE_REPLAY_SPEED",
            "nan",
            'environment variable JOULETRACE_REPLAY_SPEED: replay.speed: "nan" is not a finite number; '
            "write a number such as 1 or 0.5",
        ),
        (
            "JOULETRACE_REPLAY_LOOP",
            "maybe",
            'environment variable JOULETRACE_REPLAY_LOOP: replay.loop: "maybe" is neither true nor false; '
            "write true or false",
        ),
        (
            "JOULETRACE_WEB_LISTEN_ADDRESS",
            ":9841,,:9842",
            'environment variable JOULETRACE_WEB_LISTEN_ADDRESS: web.listen_address: "" is not an address to '
            "listen on; write host:port, [IPv6]:port, :port for all interfaces, or unix:/path for a Unix socket",
        ),
        (
            "JOULETRACE_SOURCE",
            "a\nb\x1b[31m",
            r'environment variable JOULETRACE_SOURCE: source: "a\nb\x1b[31m" holds characters that cannot be '
            "printed; write nvml or replay:FILE",
        ),
    ],
)
def test_refused_variables(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, STATE | {variable: value}, None)
    assert str(caught.value) == message


def test_refused_flags() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, STATE, parse_flags("--sampling.activity-interval", "50ms"))
    assert str(caught.value) == (
        'flag --sampling.activity-interval: sampling.activity_interval: "50ms" is out of range; '
        "write a duration from 100ms to 10s"
    )


def test_a_wrong_value_is_refused_even_when_it_is_overridden(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("log: {level: loud}")
    with pytest.raises(ConfigError, match=r"c\.yaml:1: log\.level"):
        load(file, STATE, parse_flags("--log.level=info"))


HOSTS = "write host:port, [IPv6]:port or :port for all interfaces"
HOSTS_OR_PATHS = "write host:port, [IPv6]:port, :port for all interfaces, or unix:/path for a Unix socket"
PATH = "write a path such as /metrics, not under /-/"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # the shape of the file
        ("- source: nvml", "c.yaml:1: the file holds a list; write keys such as source: nvml"),
        ("just words", "c.yaml:1: the file holds a plain value; write keys such as source: nvml"),
        ("\nlog: info", "c.yaml:2: log: is a section, not a plain value; write below it, indented, level, format"),
        ("log: [level]", "c.yaml:1: log: is a section, not a list; write below it, indented, level, format"),
        ("source: nvml\n\nsource: nvml", "c.yaml:3: source: is already set in line 1; remove one of the two"),
        (
            "log:\n  level: info\n  level: debug",
            "c.yaml:3: log.level: is already set in line 2; remove one of the two",
        ),
        ("log: {}\nlog: {}", "c.yaml:2: log: is already set in line 1; remove one of the two"),
        ("? [a, b]\n: 1", "c.yaml:1: the file: a key must be a word; remove the brackets"),
        (
            "log: &a {level: info}\nweb: *a",
            "c.yaml:1: anchors and aliases (& and *) are not allowed; write the value out",
        ),
        ("log: *nothing", "c.yaml:1: anchors and aliases (& and *) are not allowed; write the value out"),
        (
            "devices: " + "[" * 5000,
            "c.yaml:1: the file is nested too deeply; write sections with keys below them",
        ),
        (
            "log:\n  level: info\n format: json",
            "c.yaml:3: the file is not valid YAML (while parsing a block mapping, did not find expected key); "
            "mend this line or the one before it",
        ),
        (
            "source: nvml\n---\nsource: nvml",
            "c.yaml:2: the file is not valid YAML (expected a single document in the stream, but found another "
            "document); mend this line or the one before it",
        ),
        # unknown keys
        ("log:\n  levle: info", "c.yaml:2: log.levle: is not a known key; did you mean log.level?"),
        ("ring_interval: 1s", "c.yaml:1: ring_interval: is not a known key; did you mean sampling.ring_interval?"),
        (
            "web: {telemetry-path: /m}",
            "c.yaml:1: web.telemetry-path: is not a known key; did you mean web.telemetry_path?",
        ),
        ("Log: {}", "c.yaml:1: Log: is not a known key; did you mean log?"),
        (
            "log.level: info",
            'c.yaml:1: log.level: is not a known key; write "log:" and, indented below it, "level:"',
        ),
        ("log: {42: 1}", "c.yaml:1: log.42: is not a known key; known here: level, format"),
        ("log: {<<: {level: info}}", "c.yaml:1: log.<<: is not a known key; known here: level, format"),
        # types
        ("source: 1", "c.yaml:1: source: 1 is not text; write nvml or replay:FILE"),
        ("source:", "c.yaml:1: source: the key has no value; write nvml or replay:FILE, or remove the line"),
        ("source: {a: b}", "c.yaml:1: source: the dict is not text; write nvml or replay:FILE"),
        ("source: nvidia", 'c.yaml:1: source: "nvidia" is not valid; write nvml or replay:FILE'),
        ("source: 'replay:'", 'c.yaml:1: source: "replay:" is not valid; write nvml or replay:FILE'),
        ('source: "replay:a\\0b"', r'c.yaml:1: source: "replay:a\x00b" holds characters that cannot be printed; '
         "write nvml or replay:FILE"),
        ("state_dir: state", 'c.yaml:1: state_dir: "state" is not valid; write an absolute path'),
        ("state_dir: ~/state", 'c.yaml:1: state_dir: "~/state" is not valid; write an absolute path'),
        ("devices: 0", "c.yaml:1: devices: 0 is not a list; write its items in brackets and with commas "
         "between, as in [a, b]"),
        ("devices: [0, '0']", 'c.yaml:1: devices: "0" stands there twice; remove one'),
        ("devices: [-1]", "c.yaml:1: devices: -1 is not a GPU; write an index such as 0 or a UUID such as "
         "GPU-8932f937"),
        ("devices: [true]", "c.yaml:1: devices: true is not a GPU; write an index such as 0 or a UUID such as "
         "GPU-8932f937"),
        ("devices: [gpu0]", 'c.yaml:1: devices: "gpu0" is not a GPU; write an index such as 0 or a UUID such as '
         "GPU-8932f937"),
        ("devices: [0x" + "f" * 5000 + "]", "c.yaml:1: devices: the number is not a GPU; write an index such as 0 "
         "or a UUID such as GPU-8932f937"),
        ("log: {level: [info]}", "c.yaml:1: log.level: the list is not one of the choices; write debug, info, "
         "warning or error"),
        ("log: {format: text}", 'c.yaml:1: log.format: "text" is not one of the choices; write auto, json or console'),
        ("replay: {loop: 1}", "c.yaml:1: replay.loop: 1 is neither true nor false; write true or false"),
        ("replay: {speed: fast}", 'c.yaml:1: replay.speed: "fast" is not a number; write a number such as 1 or 0.5'),
        ("replay: {speed: true}", "c.yaml:1: replay.speed: true is not a number; write a number such as 1 or 0.5"),
        # numbers
        ("replay: {speed: .nan}", "c.yaml:1: replay.speed: .nan is not a finite number; write a number such as "
         "1 or 0.5"),
        ("replay: {speed: .inf}", "c.yaml:1: replay.speed: .inf is not a finite number; write a number such as "
         "1 or 0.5"),
        ("replay: {speed: 0}", "c.yaml:1: replay.speed: 0 is out of range; write a number from 0.1 to 1000"),
        ("replay: {speed: 0x" + "f" * 999 + "}", f"c.yaml:1: replay.speed: 0x{'f' * 58}... is out of range; write "
         "a number from 0.1 to 1000"),
        ("replay: {speed: 0x_}", 'c.yaml:1: replay.speed: "0x_" cannot be read; write a number from 0.1 to 1000'),
        ("sampling:\n  cpu_budget_ratio: 1.5", "c.yaml:2: sampling.cpu_budget_ratio: 1.5 is out of range; write "
         "a number from 0.005 to 1"),
        # durations
        ("sampling: {ring_interval: 10}", "c.yaml:1: sampling.ring_interval: 10 has no unit; write 10s"),
        ("sampling: {ring_interval: 0.5}", "c.yaml:1: sampling.ring_interval: 0.5 has no unit; write 500ms"),
        ("sampling: {ring_interval: 3s}", 'c.yaml:1: sampling.ring_interval: "3s" is out of range; write a '
         "duration from 100ms to 2s"),
        ("sampling: {ring_interval: 99ms}", 'c.yaml:1: sampling.ring_interval: "99ms" is out of range; write a '
         "duration from 100ms to 2s"),
        ("sampling: {activity_interval: soon}", 'c.yaml:1: sampling.activity_interval: "soon" is not a duration; '
         "write a duration such as 500ms, 10s, 1m30s or 2h"),
        ("driver: {give_up_after: 2024-02-31}", 'c.yaml:1: driver.give_up_after: "2024-02-31" cannot be read; '
         "write a duration from 1s to 24h"),
        # addresses and paths
        ("web: {listen_address: []}", "c.yaml:1: web.listen_address: the empty list is out of range; write a list "
         "of host:port, [IPv6]:port, :port or unix:/path"),
        ("web: {listen_address: [9841]}", f"c.yaml:1: web.listen_address: 9841 is not an address; {HOSTS_OR_PATHS}"),
        ("ingest: {listen_address: ['unix:/a']}", 'c.yaml:1: ingest.listen_address: "unix:/a" is not an address to '
         f"listen on; {HOSTS}"),
        ("web: {listen_address: [unix:web.sock]}", 'c.yaml:1: web.listen_address: "unix:web.sock" is not an address '
         f"to listen on; {HOSTS_OR_PATHS}"),
        ("web: {listen_address: [localhost]}", 'c.yaml:1: web.listen_address: "localhost" is not an address to '
         f"listen on; {HOSTS_OR_PATHS}"),
        ("web: {listen_address: [':1', 'a:1']}", "c.yaml:1: web.listen_address: a:1 is already part of :1, which "
         "is all interfaces; remove one of them"),
        ("web: {telemetry_path: /}", f'c.yaml:1: web.telemetry_path: "/" is not valid; {PATH}'),
        # combinations
        (
            "readiness: {stale_after: 1s}",
            "c.yaml:1: readiness.stale_after 1s and sampling.ring_interval 1s do not go together: every GPU would "
            "be stale between two samples; set readiness.stale_after to more than 1s",
        ),
        (
            "driver: {give_up_after: 4s}",
            "c.yaml:1: driver.give_up_after 4s and readiness.stale_after 5s do not go together: the process would "
            "end while it is still ready; set driver.give_up_after to 5s or more",
        ),
        (
            "readiness: {stale_after: 10m}",
            "c.yaml:1: driver.give_up_after 2m and readiness.stale_after 10m do not go together: the process "
            "would end while it is still ready; set driver.give_up_after to 10m or more",
        ),
    ],
)  # fmt: skip
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"log:\n  level: \xff\n") == (
        "configuration file c.yaml is not UTF-8 text (line 2); save it as UTF-8"
    )
    assert "not valid YAML" in refusal(tmp_path, b"source: a\x00b")


def test_a_tag_cannot_make_an_object(tmp_path: Path) -> None:
    message = refusal(tmp_path, "source: !!python/object/apply:os.getcwd []")
    assert message.startswith("c.yaml:1: the file is not valid YAML")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    for file, problem in (
        (tmp_path / "none.yaml", "does not exist; create it or point --config.file elsewhere"),
        (tmp_path, "is a directory; point --config.file at a file in it"),
        (large, "is larger than 1 MiB; point --config.file at a configuration file"),
        (large / "below", "cannot be read (Not a directory); point --config.file at a readable file"),
        (Path("a\0b"), "cannot be read (embedded null byte); point --config.file at a readable file"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(file, STATE, None)
        assert str(caught.value).endswith(problem)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.touch(mode=0o000)
    with pytest.raises(ConfigError, match="may not be read by this user"):
        load(file, STATE, None)


def test_a_file_of_exactly_one_mebibyte_is_read(tmp_path: Path) -> None:
    assert from_text(tmp_path, b"#" * ((1 << 20) - 1) + b"\n") == load(None, STATE, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1ms", 0.001),
        ("500ms", 0.5),
        ("10s", 10),
        ("1m30s", 90),
        ("90m", 5400),
        ("2h", 7200),
        ("1h2m3s4ms", 3723.004),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert configuration.parse_duration(text) == seconds
    assert configuration.parse_duration(configuration.format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "1", "s", "1.5s", "-1s", "1s ", "1s1m", "1S", "1 s", "١s", "1d", "1s1s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        configuration.parse_duration(text)


@given(st.integers(0, 10**9))
def test_durations_keep_their_milliseconds(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert configuration.parse_duration(configuration.format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        (":9841", (None, 9841)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),  # noqa: S104 - nothing is bound
        ("node-7.example:65535", ("node-7.example", 65535)),
        ("[::]:80", ("::", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_addresses(address: str, parts: tuple[str | None, int]) -> None:
    assert configuration.split_address(address) == parts


@pytest.mark.parametrize(
    "address",
    ["", ":", "9841", "host:", "host:x", "host:65536", "::1:9841", "[::1]", "[::g]:1", "[]:1", "1.2.3:1",
     "256.1.1.1:1", "a b:1", "http://a:1", "-a:1", "a:٣", ":-1", "a:1\n"],
)  # fmt: skip
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="has no"):
        configuration.split_address(address)


@pytest.mark.parametrize(
    ("path", "fine"),
    [
        ("/metrics", True),
        ("/a/b-c_d.e~f", True),
        ("/-metrics", True),
        ("/-x/y", True),
        ("/..metrics", True),
        ("/", False),
        ("metrics", False),
        ("/-", False),
        ("/-/", False),
        ("/-/metrics", False),
        ("/metrics/", False),
        ("//metrics", False),
        ("/a/../-/ready", False),
        ("/./a", False),
        ("/a b", False),
        ("/{name}", False),
        ("/a?b", False),
        ("/a%2f", False),
    ],
)
def test_telemetry_paths(path: str, fine: bool) -> None:
    environment = STATE | {"JOULETRACE_WEB_TELEMETRY_PATH": path}
    if fine:
        assert load(None, environment, None).web.telemetry_path == path
    else:
        with pytest.raises(ConfigError, match=r"web\.telemetry_path"):
            load(None, environment, None)


def test_addresses_that_share_a_port_or_ask_for_free_ones() -> None:
    for addresses in ("127.0.0.1:1,[::1]:1", ":0,127.0.0.1:0", ":1,127.0.0.1:2"):
        config = load(None, STATE | {"JOULETRACE_WEB_LISTEN_ADDRESS": addresses}, None)
        assert ",".join(config.web.listen_address) == addresses


@pytest.mark.parametrize(
    ("environment", "user_id", "directory"),
    [
        ({"STATE_DIRECTORY": "/run/a:/run/b", "HOME": "/root"}, 0, "/run/a"),
        ({"STATE_DIRECTORY": "/run/a", "XDG_STATE_HOME": "/x"}, 1000, "/run/a"),
        ({"HOME": "/root", "XDG_STATE_HOME": "/x"}, 0, "/var/lib/jouletrace"),
        ({"HOME": "/home/u", "XDG_STATE_HOME": "/x"}, 1000, "/x/jouletrace"),
        ({"HOME": "/home/u", "XDG_STATE_HOME": "x"}, 1000, "/home/u/.local/state/jouletrace"),
        ({"HOME": "/home/u", "STATE_DIRECTORY": ""}, 1000, "/home/u/.local/state/jouletrace"),
        ({}, 1000, "/var/lib/jouletrace"),
    ],
)
def test_default_state_dir(environment: Mapping[str, str], user_id: int, directory: str) -> None:
    assert configuration.default_state_dir(environment, user_id) == directory


@pytest.mark.parametrize(
    ("environment", "stream", "datagram"),
    [
        ({}, "", ""),
        ({"RUNTIME_DIRECTORY": "/run/j"}, "/run/j/ingest.sock", "/run/j/ingest.dgram"),
        ({"RUNTIME_DIRECTORY": "/run/j:/run/k"}, "/run/j/ingest.sock", "/run/j/ingest.dgram"),
        ({"RUNTIME_DIRECTORY": "j"}, "", ""),
        ({"RUNTIME_DIRECTORY": "/run/j", "JOULETRACE_INGEST_STREAM_SOCKET": "off"}, "off", "/run/j/ingest.dgram"),
        ({"JOULETRACE_INGEST_DATAGRAM_SOCKET": "/tmp/d"}, "", "/tmp/d"),
    ],
)
def test_sockets_are_where_systemd_made_room(environment: Mapping[str, str], stream: str, datagram: str) -> None:
    ingest = load(None, STATE | environment, None).ingest
    assert (ingest.stream_socket, ingest.datagram_socket) == (stream, datagram)


def test_a_socket_that_is_off_has_no_path() -> None:
    ingest = configuration.Ingest(stream_socket="off", datagram_socket="/run/d")
    assert (ingest.stream_path, ingest.datagram_path) == (None, Path("/run/d"))
    assert configuration.Ingest().stream_path is None


def test_tokens_are_the_words_in_their_file(tmp_path: Path) -> None:
    file = tmp_path / "word"
    ingest = configuration.Ingest(token_file=str(file))
    with pytest.raises(ConfigError, match="word cannot be read"):
        ingest.tokens()
    for content in (
        b"",
        b" \n",
        b"two words",
        b"a\nb c\n",
        b"\xff",
        b"x" * 1025,
        "é".encode(),
        b"x\n" * 9,
        b"\n" * 9000,
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"does not hold a token.* 8 in all, on lines of their own"):
            ingest.tokens()
    file.write_text("s3cret\n")
    assert ingest.tokens() == ("s3cret",)
    file.write_bytes(b" old \r\n\r\nnew")
    assert ingest.tokens() == ("old", "new")
    file.write_bytes(b"\r\n".join([b"x" * 1024] * 8) + b"\r\n")
    assert [len(token) for token in ingest.tokens()] == [1024] * 8
    assert configuration.Ingest().tokens() == ()


def test_an_engines_key_is_one_word(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("one\n")
    assert configuration.read_token("engines.targets", file) == "one"
    file.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"does not hold a token; .*`openssl rand -hex 32`$"):
        configuration.read_token("engines.targets", file)


def test_an_empty_state_dir_is_chosen_and_a_given_one_kept(tmp_path: Path) -> None:
    assert from_text(tmp_path, "state_dir: ''").state_dir == "/var/lib/jouletrace"
    assert from_text(tmp_path, "state_dir: /srv").state_dir == "/srv"


def test_print_config_is_readable_yaml() -> None:
    tree = yaml.safe_load(to_yaml(load(None, STATE, None)))
    assert tree["sampling"]["activity_interval"] == "500ms"
    assert tree["sampling"]["power_polling_hertz"] == 100
    assert tree["web"]["listen_address"] == [":9841"]
    assert tree["replay"] == {"speed": 1, "loop": True}


def milliseconds_between(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low, high).map(lambda milliseconds: milliseconds / 1000)


printable = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1, max_size=20)
words = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
configs = st.builds(
    Config,
    source=st.just("nvml") | printable.map("replay:{}".format),
    state_dir=printable.map("/{}".format),
    devices=st.lists(st.integers(0, 9999) | words.map("GPU-{}".format), unique=True, max_size=4).map(tuple),
    log=st.builds(
        configuration.Log,
        level=st.sampled_from(["debug", "info", "warning", "error"]),
        format=st.sampled_from(["auto", "json", "console"]),
    ),
    web=st.builds(
        configuration.Web,
        listen_address=st.lists(
            st.builds("{}:{}".format, words.map("h{}".format) | st.just("[::1]"), st.integers(0, 65535)),
            min_size=1,
            max_size=3,
            unique=True,
        ).map(tuple),
        telemetry_path=words.map("/{}".format),
    ),
    sampling=st.builds(
        configuration.Sampling,
        ring_interval=milliseconds_between(100, 2000),
        activity_interval=milliseconds_between(100, 10_000),
        state_interval=milliseconds_between(100, 60_000),
        health_interval=milliseconds_between(1000, 600_000),
        counter_interval=milliseconds_between(1000, 60_000),
        power_polling_hertz=st.floats(1, 1000),
        cpu_budget_ratio=st.floats(0.005, 1),
    ),
    readiness=st.builds(configuration.Readiness, stale_after=milliseconds_between(2001, 600_000)),
    driver=st.builds(configuration.Driver, give_up_after=milliseconds_between(600_000, 86_400_000)),
    replay=st.builds(configuration.Replay, speed=st.floats(0.1, 1000), loop=st.booleans()),
)


@given(config=configs)
def test_print_config_round_trips(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(file, {}, None) == config


def accepts_or_refuses_in_one_line(file: Path) -> None:
    try:
        result: object = load(file, STATE, None)
    except ConfigError as error:
        message = str(error)
        assert message
        assert message.isprintable()
        assert len(message) < 1000
    else:
        assert isinstance(result, Config)


yaml_pieces = st.sampled_from(
    [*KEYS, *(name.rpartition(".")[2] for name in KEYS), "log", "web", "sampling", ": ", ":", "\n", "\n  ", "- ",
     "[", "]", "{", "}", ",", "&a ", "*a", "!!", "!x ", "!!int ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ",
     "!!float ", "!!bool ", "<<", "=", "? ", "|", ">", "'", '"', "#", "---\n", "...", "%YAML 1.1\n", "~", "null",
     "0x", "0b_", "1:60", "1e999", ".nan", "-.inf", "10", "1s", "2024-99-99", "2024-01-01T99:99:99Z", "\t",
     "\x00", "\u2028", "\ufeff", "\x85", "\U0001f600", "\x1b[0m"],
)  # fmt: skip


@given(content=st.binary(max_size=200) | st.lists(yaml_pieces, max_size=30).map(lambda p: "".join(p).encode()))
def test_garbage_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "garbage.yaml"
    file.write_bytes(content)
    accepts_or_refuses_in_one_line(file)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=90) | st.dates()
trees = st.recursive(scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(words | scalars, t, max_size=3))


@given(name=st.sampled_from(list(KEYS)), value=trees)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: object
) -> None:
    section, _, word = name.rpartition(".")
    tree: dict[str, Any] = {section: {word: value}} if section else {word: value}
    file = tmp_path_factory.getbasetemp() / "value.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    accepts_or_refuses_in_one_line(file)


@given(name=st.sampled_from(list(KEYS)), text=st.text(max_size=90))
def test_any_variable_is_taken_or_refused_in_one_line(name: str, text: str) -> None:
    try:
        load(None, STATE | {KEYS[name].variable: text}, None)
    except ConfigError as error:
        assert name in str(error)
        assert str(error).isprintable()


def test_the_reference_page_names_everything() -> None:
    page = reference_markdown()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(KEYS)
    for key, row in zip(KEYS.values(), rows, strict=True):
        names, _default, values, meaning = row.strip("| ").split(" | ")
        assert names == f"`{key.name}`<br>`{key.flag}`<br>`{key.variable}`"
        assert values
        assert meaning[0].isupper()
        assert meaning.endswith(".")
    assert "| 500ms | a duration from 100ms to 10s |" in page
    example = page.split("```yaml\n")[1].split("```")[0]
    assert to_yaml(Config()) == example


def test_importing_is_cheap() -> None:
    """The heavy ones are imported when they are needed."""
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, jouletrace.config; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ).stdout.split()
    assert not {"yaml", "numpy", "aiohttp", "structlog", "asyncio", "prometheus_client"} & set(modules)


def test_headers_for_the_collector(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    file.write_text("x-api-key: a b:c\n\n  Authorization:Basic eHg=  \n")
    otlp = configuration.Otlp(forward_headers_file=str(file))
    assert otlp.forward_headers() == {"x-api-key": "a b:c", "Authorization": "Basic eHg="}
    assert configuration.Otlp().forward_headers() == {}


@pytest.mark.parametrize("line", ["no colon", "na me: v", "name:", "näme: v", "name: v\x01", ": v"])
def test_what_is_no_header_is_refused_without_its_value(tmp_path: Path, line: str) -> None:
    file = tmp_path / "headers"
    file.write_text(f"good: 1\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        configuration.Otlp(forward_headers_file=str(file)).forward_headers()
    assert str(caught.value).startswith(f"otlp.forward_headers_file: line 2 of {file} is not a header; write Name: ")
    with pytest.raises(ConfigError, match="cannot be read"):
        configuration.Otlp(forward_headers_file=str(tmp_path / "gone")).forward_headers()


@pytest.mark.parametrize(
    "url", ["collector:4318", "http://collector:4318", "ftp://c/v1/traces", "http://u:p@c/v1/traces"]
)
def test_a_collector_is_named_by_its_whole_url(tmp_path: Path, url: str) -> None:
    assert "write a URL such as http://collector:4318/v1/traces" in refusal(tmp_path, f"otlp: {{forward_url: '{url}'}}")


def test_engines_as_mappings(tmp_path: Path) -> None:
    text = "engines:\n  targets:\n    - http://a:1\n    - {url: 'http://b:2', kind: nim, gpu_uuids: [GPU-1, GPU-2]}\n"
    config = from_text(tmp_path, text)
    assert config.engines.targets == (
        configuration.EngineTarget(url="http://a:1"),
        configuration.EngineTarget(url="http://b:2", kind="nim", gpu_uuids=("GPU-1", "GPU-2")),
    )
    assert from_text(tmp_path, to_yaml(config)) == config


def test_an_engine_with_a_key_and_an_authority_of_its_own(tmp_path: Path) -> None:
    text = """engines:
  targets:
    - url: https://a:1
      authorization: {credentials_file: /keys/a}
      tls_config: {ca_file: /etc/ca.pem, server_name: engine.example}
    - {url: "http://b:2", authorization: {type: Basic, credentials_file: /keys/b}}
"""
    config = from_text(tmp_path, text)
    assert config.engines.targets == (
        configuration.EngineTarget(
            url="https://a:1",
            authorization=configuration.EngineAuthorization(credentials_file="/keys/a"),
            tls_config=configuration.EngineTlsConfig(ca_file="/etc/ca.pem", server_name="engine.example"),
        ),
        configuration.EngineTarget(
            url="http://b:2",
            authorization=configuration.EngineAuthorization(type="Basic", credentials_file="/keys/b"),
        ),
    )
    assert from_text(tmp_path, to_yaml(config)) == config
    # A key stands in a file of its own, so that no printed configuration shows it.
    assert "is not an engine" in refusal(
        tmp_path, "engines:\n  targets: [{url: 'http://a:1', authorization: {credentials: x}}]\n"
    )
    assert "has a tls_config, which http does not use" in refusal(
        tmp_path, "engines:\n  targets: [{url: 'http://a:1', tls_config: {insecure_skip_verify: true}}]\n"
    )


@pytest.mark.parametrize("item", ["{url: 3}", "[1]", "http://x/metrics", "{url: 'http://a', kind: foo}", "{urk: a}"])
def test_what_is_no_engine(tmp_path: Path, item: str) -> None:
    assert "is not an engine" in refusal(tmp_path, f"engines:\n  targets:\n    - {item}\n")
