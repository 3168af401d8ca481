import os
import subprocess
import sys
from pathlib import Path

from jouletrace.engines.otlp.senders import RECENT_SECONDS, REPEAT_SECONDS, SENDERS, Senders, find_process, identity
from jouletrace.engines.otlp.spans import Value
from jouletrace.requests.records import EngineRecord, Role


def process(proc: Path, pid: int, command: str, *inner: int, parent: int = 1) -> None:
    """Write what /proc shows of a process, with its ids in the namespaces below ours."""
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    ids = "\t".join(str(one) for one in (pid, *inner))
    (folder / "status").write_text(f"Name:\tx\nPid:\t{pid}\nNSpid:\t{ids}\nThreads:\t1\n")
    (folder / "stat").write_text(f"{pid} (x) S {parent} 0 0\n")


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    def __init__(self, proc: Path, *known: EngineRecord) -> None:
        self.known = list(known)
        self.time = Time()
        proc.mkdir(exist_ok=True)
        self.senders = Senders(lambda: self.known, proc=proc, monotonic=self.time)

    def engine(self, kind: str = "vllm", **resource: Value) -> tuple[str | None, EngineRecord | None]:
        named = {name.replace("__", "."): value for name, value in resource.items()}
        sender = self.senders.look_up(identity(named, kind, Role.MIXED))
        return sender.engine_id, sender.record


def test_an_engine_of_its_own_by_service_place_and_process(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc")
    process(tmp_path / "proc", 16445, "python -m vllm.entrypoints.openai.api_server")
    engine_id, record = rig.engine(service__name="chat", vllm__process_id="16445", host__name="node-7")
    assert engine_id == "chat-node-7-16445"
    assert record == EngineRecord(engine_id="chat-node-7-16445", kind="vllm", pid=16445)


def test_a_service_without_a_name_is_called_after_its_kind(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc")
    assert rig.engine(service__name="unknown_service", vllm__process_id="7")[0] == "vllm-7"
    assert rig.engine("tgi")[0] == "tgi"


def test_an_operators_name_wins(tmp_path: Path) -> None:
    known = EngineRecord(engine_id="scraped", kind="vllm", pid=5)
    rig = Rig(tmp_path / "proc", known)
    process(tmp_path / "proc", 5, "vllm serve m")
    told = {"jouletrace__engine_id": "scraped", "vllm__process_id": "99"}
    assert rig.engine(**told) == ("scraped", None)
    # One that nobody has announced is announced from here, with its process.
    other = rig.engine(jouletrace__engine_id="mine", vllm__process_id="5")
    assert other == ("mine", EngineRecord(engine_id="mine", kind="vllm", pid=5))


def test_a_name_whose_ranks_are_engines_of_their_own_is_none_of_them(tmp_path: Path) -> None:
    """Else the server would be an engine beside its ranks, and share their GPUs' energy with them."""
    ranks = [EngineRecord(engine_id=f"chat-dp{rank}", kind="vllm", pid=5) for rank in range(2)]
    rig = Rig(tmp_path / "proc", *ranks)
    process(tmp_path / "proc", 5, "vllm serve m")
    assert rig.engine(jouletrace__engine_id="chat", vllm__process_id="5") == (None, None)
    assert rig.engine(jouletrace__engine_id="chat-dp1", vllm__process_id="5") == ("chat-dp1", None)


def test_an_engine_that_another_feed_announced_is_found_by_its_process(tmp_path: Path) -> None:
    # In a container the server is process 7, on the node 4242; the other feed named its launcher, 4200.
    rig = Rig(tmp_path / "proc", EngineRecord(engine_id="plugin", kind="vllm", pid=4200))
    process(tmp_path / "proc", 4200, "vllm serve m", 1)
    process(tmp_path / "proc", 4242, "VLLM::APIServer", 7, parent=4200)
    process(tmp_path / "proc", 7, "kworker")
    assert rig.engine(service__name="chat", vllm__process_id="7") == ("plugin", None)


def test_of_two_containers_with_the_same_ids_inside_neither_is_taken(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc", EngineRecord(engine_id="plugin", kind="vllm", pid=4200))
    process(tmp_path / "proc", 4200, "vllm serve a", 1)
    process(tmp_path / "proc", 4300, "vllm serve b", 1)
    engine_id, record = rig.engine(service__name="chat", vllm__process_id="1")
    assert engine_id == "chat-1"
    assert record is not None
    assert record.pid is None


def test_a_process_with_several_announced_engines_is_none_of_them(tmp_path: Path) -> None:
    ranks = [EngineRecord(engine_id=f"plugin-dp{rank}", kind="vllm", pid=5) for rank in range(2)]
    rig = Rig(tmp_path / "proc", *ranks)
    process(tmp_path / "proc", 5, "vllm serve m")
    assert rig.engine(service__name="chat", vllm__process_id="5") == (None, None)


def test_one_without_a_process_is_the_only_engine_of_its_kind(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc", EngineRecord(engine_id="a", kind="sglang"), EngineRecord(engine_id="b", kind="vllm"))
    assert rig.engine("sglang", service__name="s", service__instance__id="1") == ("a", None)
    # A second one means that nobody knows which of the two is the announced one.
    engine_id, record = rig.engine("sglang", service__name="t", service__instance__id="2")
    assert engine_id == "t"
    assert record is not None
    rig.time.now += RECENT_SECONDS + 1
    assert rig.engine("sglang", service__name="s", service__instance__id="3") == ("a", None)


def test_its_own_engines_are_not_somebody_elses(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc")
    engine_id, record = rig.engine("sglang", service__name="s", service__instance__id="1")
    assert record is not None
    rig.known.append(record)
    assert rig.engine("sglang", service__name="s", service__instance__id="1") == (engine_id, record)


def test_it_is_looked_again_each_minute(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc")
    who = identity({"service.name": "s"}, "sglang", Role.MIXED)
    assert rig.senders.find(who) is None
    rig.senders.look_up(who)
    assert rig.senders.find(who) is not None
    rig.known.append(EngineRecord(engine_id="scraped", kind="sglang"))
    rig.time.now += REPEAT_SECONDS
    assert rig.senders.find(who) is None
    assert rig.senders.look_up(who).engine_id == "scraped"


def test_models_that_requests_name_become_the_engines(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc")
    sender = rig.senders.look_up(identity({"service.name": "s"}, "sglang", Role.MIXED))
    for model in ("base", "adapter", "base", None):
        sender.serve(model)
    assert sender.record is not None
    assert sender.record.models == ("base", "adapter")


def test_an_operator_may_say_which_model_it_serves(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc")
    _, record = rig.engine(service__name="s", gen_ai__request__model="llama-3.1-8b")
    assert record is not None
    assert record.models == ("llama-3.1-8b",)


def test_senders_are_bounded(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "proc")
    everybody = [identity({"service.name": f"s{number}"}, "sglang", Role.MIXED) for number in range(SENDERS + 1)]
    for who in everybody:
        rig.senders.look_up(who)
    assert rig.senders.find(everybody[0]) is None
    assert rig.senders.find(everybody[1]) is not None


def test_a_real_process_is_found_in_the_real_proc() -> None:
    script = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, "a-kind-of-its-own"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout is not None
    try:
        running.stdout.readline()  # From then on /proc has its command line.
        inner = int(Path(f"/proc/{running.pid}/status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1])
        assert find_process(inner, "a-kind-of-its-own") == running.pid
        assert find_process(inner, "another-kind") is None
    finally:
        running.communicate()
    assert find_process(os.getpid(), "a-kind-of-its-own") is None
