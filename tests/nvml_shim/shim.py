"""Build the simulated driver, describe what it simulates, and drive it.

Two ways to use it. A daemon under test runs in its own process with :func:`environment`, on real time, and a
control file switches faults on and off. A unit test loads the library into its own process with
:class:`Shim` and moves a virtual clock. A scenario's ``*_s`` times count from its epoch, which is the first
``nvmlInit`` unless ``Scenario.epoch_ns`` fixes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

SHIM_VARIABLE: Final = "JOULETRACE_NVML_SHIM"
LIBRARY_NAME: Final = "libnvidia-ml.so.1"
SOURCES: Final = Path(__file__).parent
BUILD_FOLDER: Final = SOURCES / ".build"
COMPILER: Final = "gcc"
FLAGS: Final = (
    "-std=c11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Werror",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    f"-Wl,-soname,{LIBRARY_NAME}",
)
LIBRARIES: Final = ("-lm", "-lpthread")

Level = float | tuple[float, float]
"""A value, or the pair (while the power function is active, while it is not)."""


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


# ---- building ----


def build(cache_dir: Path = BUILD_FOLDER, without: Sequence[str] = (), flags: Sequence[str] = ()) -> Path:
    """Compile the library, or find it compiled; return the path of ``libnvidia-ml.so.1``.

    The default folder is shared by all tests of a checkout, and has to be by those that load the library into
    one process: a second copy from elsewhere would be a second driver.

    ``without`` names functions that the library shall not export, as a driver too old to have them. ``flags``
    are added to the compiler's. The result lies in a folder of ``cache_dir`` named after the sources and the
    flags, so any change builds anew and concurrent builds do not disturb each other. Raises BuildError.
    """
    sources = sorted(SOURCES.glob("*.c"))
    text = "".join(path.read_text() for path in [*sources, *sorted(SOURCES.glob("*.h"))])
    for symbol in without:
        if symbol not in text:
            raise BuildError(f"The simulated driver has no function {symbol} that could be left out.")
    options = [*FLAGS, *flags]
    recipe = "\0".join([text, *options, "without", *sorted(without), platform.machine()])
    folder = cache_dir / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    library = folder / LIBRARY_NAME
    if library.exists():
        return library
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise BuildError(f"The simulated driver needs a C compiler, and {COMPILER} is not installed.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if without:
            # Symbols made local are invisible to dlsym: pynvml then reports FUNCTION_NOT_FOUND by itself.
            script = Path(scratch, "exports.map")
            script.write_text("{ global: *; local: " + " ".join(f"{symbol};" for symbol in without) + " };\n")
            options.append(f"-Wl,--version-script={script}")
        output = Path(scratch, LIBRARY_NAME)
        command = [compiler, *options, *map(str, sources), "-o", str(output), *LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{COMPILER} could not build the simulated driver:\n{done.stderr}")
        output.replace(library)  # atomic: nobody ever sees half a library
    return library


def environment(library: Path, scenario: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a process that shall see the simulated driver; ``base`` defaults to ours."""
    variables = dict(os.environ if base is None else base)
    search = [str(library.parent), variables.get("LD_LIBRARY_PATH", "")]
    variables["LD_LIBRARY_PATH"] = os.pathsep.join(part for part in search if part)
    variables[SHIM_VARIABLE] = str(scenario)
    return variables


# ---- the scenario ----


def _level(level: Level) -> str:
    return "/".join(map(str, level)) if isinstance(level, tuple) else str(level)


def _settings(settings: Mapping[str, float | int | str | None]) -> str:
    """Render ``key=value`` words; None means the setting is not given."""
    words = []
    for key, value in settings.items():
        if value is not None:
            text = str(value)
            words.append(f'{key}="{text}"' if " " in text else f"{key}={text}")
    return " ".join(words)


@dataclass(frozen=True)
class Constant:
    """Always the same power, watts."""

    watts: float

    def text(self) -> str:
        """Return the words of the ``power`` directive."""
        return f"constant watts={self.watts}"


@dataclass(frozen=True)
class Square:
    """High for the first ``duty`` of every period, low for the rest; one period starts at ``phase_s``."""

    low_watts: float
    high_watts: float
    period_s: float
    duty: float = 0.5
    phase_s: float = 0.0

    def text(self) -> str:
        """Return the words of the ``power`` directive."""
        return (
            f"square low_w={self.low_watts} high_w={self.high_watts} period_s={self.period_s}"
            f" duty={self.duty} phase_s={self.phase_s}"
        )


@dataclass(frozen=True)
class Ramp:
    """A sawtooth: from low to high watts over every period."""

    low_watts: float
    high_watts: float
    period_s: float
    phase_s: float = 0.0

    def text(self) -> str:
        """Return the words of the ``power`` directive."""
        return f"ramp low_w={self.low_watts} high_w={self.high_watts} period_s={self.period_s} phase_s={self.phase_s}"


@dataclass(frozen=True)
class Steps:
    """Piecewise constant: pairs of (start in seconds, watts); the first also holds before, the last after."""

    points: Sequence[tuple[float, float]]
    active_above_watts: float | None = None
    repeat_s: float | None = None

    def text(self) -> str:
        """Return the words of the ``power`` directive."""
        points = ",".join(f"{at_s}:{watts}" for at_s, watts in self.points)
        more = _settings({"active_above_w": self.active_above_watts, "repeat_s": self.repeat_s})
        return f"steps points={points} {more}".rstrip()


@dataclass(frozen=True)
class PowerFile:
    """Piecewise constant from a file of ``t_ns milliwatts`` lines; its first time is the epoch."""

    path: Path
    active_above_watts: float | None = None
    repeat_s: float | None = None

    def text(self) -> str:
        """Return the words of the ``power`` directive."""
        more = _settings({"path": str(self.path), "active_above_w": self.active_above_watts, "repeat_s": self.repeat_s})
        return f"file {more}"


Power = Constant | Square | Ramp | Steps | PowerFile


@dataclass(frozen=True)
class Process:
    """A process on a GPU: memory in MiB, from and to in seconds, SM use in percent."""

    pid: int
    memory_mib: float
    from_s: float | None = None
    to_s: float | None = None
    sm_percent: Level | None = None

    def text(self) -> str:
        """Return the settings of the ``process`` directive."""
        sm = None if self.sm_percent is None else _level(self.sm_percent)
        return _settings(
            {"pid": self.pid, "memory_mib": self.memory_mib, "from": self.from_s, "to": self.to_s, "sm": sm}
        )


@dataclass(frozen=True)
class Device:
    """One GPU. ``profile`` is h200, a100, ada, t4, pascal or average_only; README.md lists the settings.

    ``features`` switches parts of the profile, as ``{"ring": "off", "mig": "on"}``. The other mappings fill
    the directives of the same name; a level may be a pair (while active, while not).
    """

    profile: str = "h200"
    power: Power = Constant(100.0)
    uuid: str | None = None
    name: str | None = None
    features: Mapping[str, str] = field(default_factory=dict)
    sensor: Mapping[str, Level] = field(default_factory=dict)
    gpm: Mapping[str, Level] = field(default_factory=dict)
    state: Mapping[str, Level] = field(default_factory=dict)
    throttle: Mapping[str, Level] = field(default_factory=dict)
    health: Mapping[str, int] = field(default_factory=dict)
    processes: Sequence[Process] = ()

    def lines(self, gpu: int) -> list[str]:
        """Return this GPU's lines; ``gpu`` is its index."""
        identity = {"profile": self.profile, "uuid": self.uuid, "name": self.name}
        lines = [f"device {_settings({**identity, **self.features})}", f"power gpu={gpu} {self.power.text()}"]
        for directive in ("sensor", "gpm", "state", "throttle", "health"):
            levels: Mapping[str, Level] = getattr(self, directive)
            if levels:
                words = _settings({key: _level(level) for key, level in levels.items()})
                lines.append(f"{directive} gpu={gpu} {words}")
        lines += [f"process gpu={gpu} {process.text()}" for process in self.processes]
        return lines


@dataclass(frozen=True)
class Xid:
    """A critical error event of a GPU, at a second after the epoch."""

    gpu: int
    code: int
    at_s: float = 0.0

    def text(self) -> str:
        """Return the scenario line."""
        return f"xid gpu={self.gpu} at={self.at_s} code={self.code}"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong. Make one with the class methods.

    Common settings: ``gpu`` (default: all), ``from_s``/``to_s`` in seconds after the epoch (in a control
    file: after it was read), ``from_call``/``to_call`` to hit the n-th to m-th such call, ``every`` to hit
    every n-th.
    """

    words: str

    def text(self) -> str:
        """Return the scenario line."""
        return f"fault {self.words}"

    @classmethod
    def _make(cls, words: str, **settings: float | str | None) -> Fault:
        renamed = {
            key.removesuffix("_s") if key in ("from_s", "to_s", "at_s") else key: value
            for key, value in settings.items()
        }
        return cls(f"{words} {_settings(renamed)}".strip())

    @classmethod
    def error(cls, call: str, code: int, *, field: int | None = None, **when: float | None) -> Fault:
        """``call`` (a function name, or ``*``) returns ``code``; with ``field``, that field value alone."""
        return cls._make("", call=call, code=code, field=field, **when)

    @classmethod
    def hang(cls, call: str, **when: float | None) -> Fault:
        """``call`` does not return before the fault is over."""
        return cls._make("hang", call=call, **when)

    @classmethod
    def slow(cls, call: str, latency_us: float, *, burn: bool = False, **when: float | None) -> Fault:
        """``call`` takes ``latency_us`` microseconds more, asleep or (``burn``) busy."""
        return cls._make("burn" if burn else "", call=call, latency_us=latency_us, **when)

    @classmethod
    def garbage(cls, call: str, *, value: float | None = None, field: int | None = None, **when: float | None) -> Fault:
        """``call`` succeeds with ``value``, by default what real drivers show: all ones, 255 degrees, NaN."""
        return cls._make("garbage", call=call, value=value, field=field, **when)

    @classmethod
    def lost(
        cls, gpu: int, *, from_s: float | None = None, to_s: float | None = None, same_handle: bool = False
    ) -> Fault:
        """The GPU is off the bus. After ``to_s`` a new handle works, an old one only with ``same_handle``."""
        return cls._make("lost", gpu=gpu, from_s=from_s, to_s=to_s, same_handle=int(same_handle) or None)

    @classmethod
    def driver_mismatch(cls, *, from_s: float | None = None, to_s: float | None = None) -> Fault:
        """Every call fails with LIB_RM_VERSION_MISMATCH, as after a driver update under a running process."""
        return cls._make("driver_mismatch", from_s=from_s, to_s=to_s)

    @classmethod
    def counter_reset(cls, gpu: int, at_s: float = 0.0) -> Fault:
        """The energy counter starts again from zero."""
        return cls._make("counter_reset", gpu=gpu, at_s=at_s)


@dataclass(frozen=True)
class Latency:
    """What a call costs: microseconds of CPU time, or of sleep; or a whole table of them."""

    words: str

    @classmethod
    def call(cls, call: str, us: float, *, sleep: bool = False) -> Latency:
        """``call`` (a function name, or ``*``) costs ``us`` microseconds."""
        return cls(_settings({"call": call, "us": us, "mode": "sleep" if sleep else "burn"}))

    @classmethod
    def field_value(cls, field_id: int, us: float) -> Latency:
        """A batch of field values that holds ``field_id`` costs ``us`` microseconds more."""
        return cls(_settings({"field": field_id, "us": us}))

    @classmethod
    def h200(cls) -> Latency:
        """What spaced calls cost on an H200."""
        return cls("profile=h200")

    def text(self) -> str:
        """Return the scenario line."""
        return f"latency {self.words}"


@dataclass(frozen=True)
class Scenario:
    """Everything that the simulated driver shall show."""

    devices: Sequence[Device] = (Device(),)
    faults: Sequence[Fault] = ()
    xids: Sequence[Xid] = ()
    latencies: Sequence[Latency] = ()
    epoch_ns: int | None = None
    seed: int | None = None
    control: Path | None = None
    driver: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return the scenario in the library's language."""
        lines: list[str] = []
        if self.epoch_ns is not None:
            lines.append(f"epoch ns={self.epoch_ns}")
        if self.seed is not None:
            lines.append(f"seed value={self.seed}")
        if self.driver:
            lines.append(f"driver {_settings(self.driver)}")
        if self.control is not None:
            lines.append(f"control {_settings({'path': str(self.control)})}")
        for gpu, device in enumerate(self.devices):
            lines += device.lines(gpu)
        lines += [latency.text() for latency in self.latencies]
        lines += [xid.text() for xid in self.xids]
        lines += [fault.text() for fault in self.faults]
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> Path:
        """Write the scenario file and return its path."""
        path.write_text(self.text())
        return path


def write_control(path: Path, lines: Sequence[Fault | Xid] = ()) -> None:
    """Replace the run-time faults of a scenario whose ``control`` is ``path``; no lines: no faults.

    A running library notices within 20 ms. Events and counter resets are not undone.
    """
    fresh = path.with_name(path.name + ".new")
    fresh.write_text("".join(line.text() + "\n" for line in lines))
    fresh.replace(path)  # the library must not read half a file


# ---- driving it in this process ----


class Shim:
    """The simulated driver inside this process, before ``pynvml.nvmlInit`` looks for the real one.

    A context manager: leaving it resets the library, so that the next test starts afresh. The library itself
    stays mapped until the process ends (pynvml never unloads one), so one process can use one build only.
    """

    def __init__(self, library: Path, scenario: Scenario | str, folder: Path) -> None:
        """Load ``library``; the scenario file is kept in ``folder``."""
        self._file = folder / "scenario.txt"
        self._before = os.environ.get(SHIM_VARIABLE)
        self._write(scenario)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        found = ctypes.CDLL(LIBRARY_NAME)
        if found._handle != self._library._handle:
            raise RuntimeError(f"Another {LIBRARY_NAME} is already loaded here; use a fresh process.")
        self._declare()
        self._library.shim_reset()

    def _declare(self) -> None:
        time_ns, gpu = ctypes.c_int64, ctypes.c_int
        signatures: dict[str, tuple[list[type], type | None]] = {
            "shim_set_time_ns": ([time_ns], None),
            "shim_advance_ns": ([time_ns], None),
            "shim_use_real_time": ([], None),
            "shim_time_ns": ([], time_ns),
            "shim_epoch_ns": ([], time_ns),
            "shim_step_clock_ns": ([time_ns], None),
            "shim_true_energy_joules": ([gpu, time_ns, time_ns], ctypes.c_double),
            "shim_true_watts": ([gpu, time_ns], ctypes.c_double),
            "shim_true_gpm_integral": ([gpu, ctypes.c_uint, time_ns, time_ns], ctypes.c_double),
            "shim_call_count": ([ctypes.c_char_p, gpu], ctypes.c_uint64),
            "shim_poll_control": ([], None),
            "shim_reset": ([], None),
        }
        for name, (arguments, result) in signatures.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = result

    def _write(self, scenario: Scenario | str) -> None:
        self._file.write_text(scenario if isinstance(scenario, str) else scenario.text())
        os.environ[SHIM_VARIABLE] = str(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset the library and restore the environment variable."""
        self._library.shim_reset()
        if self._before is None:
            with contextlib.suppress(KeyError):
                del os.environ[SHIM_VARIABLE]
        else:
            os.environ[SHIM_VARIABLE] = self._before

    def reset(self, scenario: Scenario | str | None = None) -> None:
        """Return to the state of a library just loaded, with a new scenario if given.

        That is real time, call counts at zero, every handle and initialisation gone. No call may be in
        flight.
        """
        if scenario is not None:
            self._write(scenario)
        self._library.shim_reset()

    def set_time_ns(self, now_ns: int) -> None:
        """Stop the clock at ``now_ns`` since the Unix epoch."""
        self._library.shim_set_time_ns(now_ns)

    def advance_ns(self, delta_ns: int) -> None:
        """Move the stopped clock."""
        self._library.shim_advance_ns(delta_ns)

    def advance(self, seconds: float) -> None:
        """Move the stopped clock by whole nanoseconds nearest to ``seconds``."""
        self._library.shim_advance_ns(round(seconds * 1e9))

    def use_real_time(self) -> None:
        """Let the clock follow CLOCK_REALTIME again."""
        self._library.shim_use_real_time()

    def time_ns(self) -> int:
        """Return the model's time, ns since the Unix epoch, without clock steps."""
        return int(self._library.shim_time_ns())

    def epoch_ns(self) -> int:
        """Return the instant that scenario times count from; -1 before the first ``nvmlInit``."""
        return int(self._library.shim_epoch_ns())

    def step_clock_ns(self, delta_ns: int) -> None:
        """Let the wall clock jump: later driver time stamps are shifted, the model is not."""
        self._library.shim_step_clock_ns(delta_ns)

    def true_energy_joules(self, gpu: int, from_ns: int, to_ns: int) -> float:
        """Return the exact energy over (from_ns, to_ns], joules."""
        return float(self._library.shim_true_energy_joules(gpu, from_ns, to_ns))

    def true_watts(self, gpu: int, at_ns: int) -> float:
        """Return the exact power at an instant, watts."""
        return float(self._library.shim_true_watts(gpu, at_ns))

    def true_gpm_integral(self, gpu: int, metric: int, from_ns: int, to_ns: int) -> float:
        """Return a GPM metric's exact integral over (from_ns, to_ns]: percent seconds, or MiB."""
        return float(self._library.shim_true_gpm_integral(gpu, metric, from_ns, to_ns))

    def call_count(self, name: str, gpu: int = -1) -> int:
        """Return how often ``name`` was called, on one GPU or (-1) at all; failed calls count."""
        return int(self._library.shim_call_count(name.encode(), gpu))

    def poll_control(self) -> None:
        """Read the control file now instead of within 20 ms."""
        self._library.shim_poll_control()
