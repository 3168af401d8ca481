"""The command line: `jouletrace run`, `top`, `doctor`, `record` and the others of `_parser`.

Exit codes: 0 fine, 2 usage or configuration, 3 no GPU or driver, 4 lost the driver for good; `measure` ends with
the command's own.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

import jouletrace
from jouletrace import config as configuration
from jouletrace import logs
from jouletrace.accounting import read_laws
from jouletrace.config import Config, ConfigError
from jouletrace.daemon import (
    EXIT_FINE,
    EXIT_USAGE,
    REPLAY_PREFIX,
    Daemon,
    DeviceChoiceError,
    chooser,
    demo_recording,
    exit_code,
    explanation,
    intervals,
    make_source,
)
from jouletrace.engines.doors import doors_of
from jouletrace.engines.proxy import options as proxy_options
from jouletrace.gpu.readings import Device, GpuError, NoDriverError, Source
from jouletrace.gpu.sampler import DriverLostError, Sampler
from jouletrace.trace.recording import RecordingError
from jouletrace.unix_sockets import SocketError
from jouletrace.web import access
from jouletrace.web.serve import ListenError

_GPU_PROBLEMS = (NoDriverError, GpuError, DriverLostError, DeviceChoiceError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Every expected failure is one line on standard error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.command(options)
    except (ConfigError, ListenError, RecordingError, SocketError) as failure:
        return _fail(failure, EXIT_USAGE)
    except _GPU_PROBLEMS as failure:
        return _fail(explanation(failure), exit_code(failure))
    except BrokenPipeError:
        # The reader (head, less) has gone; Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FINE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


def _fail(failure: object, code: int) -> int:
    print(f"jouletrace: {failure}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jouletrace", description="Where do the joules of AI inference go?", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"jouletrace {jouletrace.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "run the daemon: sample the GPUs and serve metrics")
    run.add_argument("--demo", action="store_true", help="replay the bundled recording of a real H200; needs no GPU")
    run.add_argument("--print-config", action="store_true", help="print the resulting configuration and exit")

    doctor = _command(commands, "doctor", _doctor, "show what this machine can measure, how well and at what cost")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    record = _command(commands, "record", _record, "record what the GPUs say into a trace file")
    record.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="file to write (.json.gz)")
    record.add_argument("--seconds", type=_positive, metavar="N", help="stop after N seconds (default: on Ctrl-C)")

    measure = _command(commands, "measure", _measure, "measure the energy of a command: measure -- CMD [ARG ...]")
    measure.add_argument("--json", action="store_true", help="print JSON on standard error's place: to standard output")
    measure.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command and its arguments")

    check = _command(commands, "check-config", _check_config, "check the configuration and exit")
    check.add_argument("--print-config", action="store_true", help="print the resulting configuration")

    analyze = commands.add_parser("analyze", help="energy of a recording, by phase", allow_abbrev=False)
    analyze.add_argument("recording", type=Path, metavar="FILE")
    analyze.add_argument("--json", action="store_true", help="print JSON")
    analyze.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts, too")
    analyze.add_argument(
        "--fidelity",
        choices=("steps", "boundaries"),
        default="steps",
        help="what requests are split by: the engine's steps (default), or their start, first token and end alone",
    )
    analyze.set_defaults(command=_analyze)

    calibrate = commands.add_parser(
        "calibrate", help="fit the step-energy law to a recording's steady phases or steps", allow_abbrev=False
    )
    calibrate.add_argument("recording", type=Path, metavar="FILE")
    calibrate.set_defaults(command=_calibrate)

    top = commands.add_parser("top", help="watch a running daemon in the terminal", allow_abbrev=False)
    top.add_argument(
        "target",
        nargs="?",
        metavar="URL",
        help="where it is, or unix:/PATH (default: unix:/run/jouletrace/web.sock, else http://127.0.0.1:9841)",
    )
    top.add_argument("--once", action="store_true", help="print one screen, or with --json one object, and exit")
    top.add_argument("--json", action="store_true", help="print a JSON object per line and second")
    top.add_argument("--token-file", type=Path, metavar="FILE", help="the file of ingest.token_file, to see requests")
    top.add_argument("--user", metavar="NAME", help="a user of the web configuration")
    top.add_argument("--password-file", type=Path, metavar="FILE", help="the file with the user's password")
    top.add_argument("--ca-file", type=Path, metavar="FILE", help="the certificate authority to trust, for https")
    top.add_argument("--cert-file", type=Path, metavar="FILE", help="the client certificate to show, for https")
    top.add_argument("--key-file", type=Path, metavar="FILE", help="its key, if that is a file of its own")
    top.set_defaults(command=_top)

    proxy = commands.add_parser(
        "proxy", help="stand before an inference server and add the energy to its answers", allow_abbrev=False
    )
    proxy_options.add_flags(proxy)
    proxy.set_defaults(command=_proxy)
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, call: object, text: str
) -> argparse.ArgumentParser:
    """Add a command that takes the configuration's file and flags."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.add_argument("--config.file", dest="config_file", type=Path, metavar="FILE", help="YAML configuration")
    configuration.add_flags(parser)
    parser.set_defaults(command=call)
    return parser


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return number


def _load(options: argparse.Namespace) -> Config:
    return configuration.load(options.config_file, os.environ, options)


def _run(options: argparse.Namespace) -> int:
    if options.demo:
        if getattr(options, "source", None) is not None:
            raise ConfigError("--demo and --source exclude each other: leave one of them out")
        options.source = f"{REPLAY_PREFIX}{demo_recording()}"
    config = _load(options)
    if options.print_config:
        sys.stdout.write(configuration.to_yaml(config))
        return EXIT_FINE
    logs.configure(config.log.level, config.log.format)
    return asyncio.run(Daemon(config, lambda: _load(options)).run())


def _check_config(options: argparse.Namespace) -> int:
    config = _load(options)
    # The files that it names are part of it.
    config.ingest.tokens()
    doors_of(config.engines.targets)
    read_laws(config.ledger.laws_file)
    access.check(config.web.config.file)
    sys.stdout.write(configuration.to_yaml(config) if options.print_config else "the configuration is fine\n")
    return EXIT_FINE


@contextlib.contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple[Source, Sequence[Device]]]:
    """Open the configured source and choose its devices, for commands that read GPUs themselves."""
    config = _load(options)
    logs.configure("warning" if config.log.level == "info" else config.log.level, config.log.format)
    source = make_source(config)
    try:
        yield source, chooser(config.devices)(source.open())
    finally:
        source.close()


def _doctor(options: argparse.Namespace) -> int:
    from jouletrace import doctor  # noqa: PLC0415  (commands load what they need)

    with _opened(options) as (source, devices):
        found = doctor.examine(source, devices)
        if options.json:
            print(json.dumps(doctor.as_json(source, found), indent=2))
        else:
            sys.stdout.write(doctor.render(source, found))
    return EXIT_FINE


def _record(options: argparse.Namespace) -> int:
    from jouletrace.trace.record import record  # noqa: PLC0415

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with _opened(options) as (source, devices):
        written = record(source, devices, options.output, seconds=options.seconds, stop=stop)
    for one in written:
        print(one.path)
        if one.problem:
            _fail(f"{one.path} ends early: {one.problem}", 1)
    return 1 if any(one.problem for one in written) else EXIT_FINE


def _analyze(options: argparse.Namespace) -> int:
    from jouletrace.trace import analyze, events, recording, report  # noqa: PLC0415

    recorded = recording.read(options.recording)
    result = analyze.analyze(recorded, fidelity=events.Fidelity(options.fidelity))
    if options.html is not None:
        from jouletrace.trace import diagnosis, page  # noqa: PLC0415

        page.write(options.html, page.render(result, recorded, diagnosis.series(recorded)))
    if options.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        sys.stdout.write(report.render(result, report.Terminal.of(sys.stdout)))
    return EXIT_FINE


def _calibrate(options: argparse.Namespace) -> int:
    """Print the law as JSON, which is YAML too: `law` goes into the configuration as it is."""
    from jouletrace.requests.calibrate import CalibrationRefusedError  # noqa: PLC0415
    from jouletrace.trace import analyze, recording  # noqa: PLC0415

    try:
        found = analyze.calibrate(recording.read(options.recording))
    except CalibrationRefusedError as refusal:
        return _fail(f"{options.recording}: {refusal}", EXIT_USAGE)
    result = {
        "law": msgspec.to_builtins(found.law),
        "half_fixed_batch": found.law.half_fixed_batch if found.law.decode_sequence_joules else None,
        "samples": found.samples,
        "mean_error": found.mean_error,
        "worst_error": found.worst_error,
    }
    print(json.dumps(result, indent=2))
    return EXIT_FINE


def _top(options: argparse.Namespace) -> int:
    from jouletrace import top  # noqa: PLC0415  (Rich is loaded for this command alone)

    try:
        target = top.find_target(
            options.target,
            token_file=options.token_file,
            user=options.user,
            password_file=options.password_file,
            ca_file=options.ca_file,
            cert_file=options.cert_file,
            key_file=options.key_file,
        )
        return top.run(target, once=options.once, as_json=options.json)
    except top.StreamError as failure:
        return _fail(failure, 1)


def _proxy(options: argparse.Namespace) -> int:
    from jouletrace.engines.proxy.run import run  # noqa: PLC0415

    return run(proxy_options.read_options(options))


def _measure(options: argparse.Namespace) -> int:
    from jouletrace import measure  # noqa: PLC0415

    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        return _fail("measure needs a command: jouletrace measure -- CMD [ARG ...]", EXIT_USAGE)
    config = _load(options)
    logs.configure("warning" if config.log.level == "info" else config.log.level, config.log.format)
    failures: list[BaseException] = []
    sampler = Sampler(make_source(config), intervals(config), choose=chooser(config.devices), on_end=failures.append)
    sampler.start()
    try:
        outcome = measure.measure(sampler, argv, lambda: failures[0] if failures else None)
    except measure.MeasureError as failure:
        return _fail(failure, failure.exit_code)
    finally:
        sampler.stop()
    if options.json:
        print(json.dumps(measure.as_json(outcome), indent=2))
    else:
        sys.stderr.write(measure.render(outcome))
    return outcome.exit_code
