"""The laws file, and where an engine's devices come from."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jouletrace.accounting import PlacedLedger, belongs, payer, read_laws
from jouletrace.config import ConfigError
from jouletrace.energy.timeline import Timeline
from jouletrace.requests.devices import DeviceView
from jouletrace.requests.law import Law, LawBook, PrefillSchedule, Provenance
from jouletrace.requests.ledger import Limits
from jouletrace.requests.records import EngineRecord, RequestRecord, Role, Status

S = 1_000_000_000
LLAMA = "{parameters: 8.03e9, layers: 32, kv_heads: 8, head_dim: 128}"


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "laws.yaml"
    file.write_text(text)
    return str(file)


def test_laws_by_engine_and_model_and_priors_from_descriptions(tmp_path: Path) -> None:
    known = read_laws(
        written(
            tmp_path,
            "engines: {e: {fixed_joules: 2.5, prefill_token_joules: 0.0154, decode_sequence_joules: 0.04}}\n"
            "models: {m: {fixed_joules: 3, prefill_token_joules: 0.02, decode_sequence_joules: 0.05}}\n"
            "schedules: {e: exclusive}\n"
            f"descriptions: {{llama: {LLAMA}}}\n"
            "gpu: H200\n",
        )
    )
    book = known.laws
    assert set(known.descriptions) == {"llama"}
    assert book.law("e", ["m"]) == Law(
        fixed_joules=2.5, prefill_token_joules=0.0154, decode_sequence_joules=0.04, provenance=Provenance.CONFIGURED
    )
    assert book.law("other", ["m"]).fixed_joules == 3
    assert book.schedule("e", "vllm") is PrefillSchedule.EXCLUSIVE
    # The coefficients that two H200s gave for such a model: 2.48 J, 15.4 mJ, 40.5 mJ.
    estimate = book.law("other", ["llama"])
    assert estimate.provenance is Provenance.PRIOR
    assert estimate.fixed_joules == pytest.approx(2.48, rel=0.1)
    assert estimate.prefill_token_joules == pytest.approx(15.4e-3, rel=0.15)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[1, 2]", "Expected `object`"),
        ("engines: {e: {fixed_joules: -1, prefill_token_joules: 0, decode_sequence_joules: 1}}", "fixed_joules"),
        ("engine: {}", "unknown field `engine`"),
        (f"descriptions: {{llama: {LLAMA}}}", "gpu: '' is not one of A100"),
        ("descriptions: {m: {parameters: -1, layers: 1, kv_heads: 1, head_dim: 1}}\ngpu: H100", "parameters"),
        ("a: [", "calibrate"),
    ],
)
def test_a_bad_laws_file_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as failure:
        read_laws(written(tmp_path, text))
    assert problem in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_laws_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ledger\.laws_file: .* cannot be read"):
        read_laws(str(tmp_path / "none.json"))


def test_no_file_means_the_generic_prior() -> None:
    assert read_laws("").laws.law("e", []).provenance is Provenance.PRIOR


def never(record: EngineRecord) -> bool:
    return False


def test_an_engine_is_looked_for_until_its_process_holds_a_gpu_also_after_a_restart() -> None:
    lines = {uuid: Timeline(0) for uuid in "gh"}
    for line in lines.values():
        line.extend([t * S for t in range(1, 101)], [100.0] * 100)
    devices = {uuid: DeviceView(line, held=True) for uuid, line in lines.items()}
    holders: dict[int | None, tuple[str, ...]] = {}

    def placed(record: EngineRecord) -> EngineRecord:
        return msgspec.structs.replace(record, gpu_uuids=record.gpu_uuids or holders.get(record.pid, ()))

    first = PlacedLedger.begin(None, Limits(), LawBook(), 0, placed, never)
    first.settle(devices, S)
    first.add_engine(EngineRecord(engine_id="e", models=("m",), pid=7), S)
    first.settle(devices, 2 * S)
    assert [record.gpu_uuids for record in first.engines] == [()]
    again = PlacedLedger.begin(first.dump(), Limits(), LawBook(), 2 * S, placed, never)
    holders[7] = ("h",)
    record = RequestRecord(request_id="x", arrival_ns=40 * S, first_token_ns=40 * S)
    again.add_request(record, 40 * S)
    again.add_request(RequestRecord(request_id="x", end_ns=50 * S), 50 * S)
    again.settle(devices, 101 * S, close_ns=100 * S)
    assert [(engine.pid, engine.gpu_uuids) for engine in again.engines] == [(7, ("h",))]
    answer = again.price("x")
    assert answer is not None and answer.final
    assert answer.energy_joules == pytest.approx(1000)


def test_the_namespace_of_an_engines_pod_pays_for_requests_that_name_nobody() -> None:
    line = Timeline(0)
    line.extend([t * S for t in range(1, 101)], [100.0] * 100)
    namespaces: dict[str, str] = {}
    ledger = PlacedLedger.begin(None, Limits(), LawBook(), 0, lambda record: record, never)
    ledger.payer = partial(payer, lambda: namespaces)
    ledger.add_engine(EngineRecord(engine_id="e", models=("m",), pod_uid="uid", gpu_uuids=("g",)), S)

    def serve(request_id: str, start: int, tenant: str | None = None) -> str | None:
        ledger.add_request(
            RequestRecord(
                request_id=request_id, model="m", tenant=tenant, arrival_ns=start * S, first_token_ns=start * S
            ),
            start * S,
        )
        ledger.add_request(RequestRecord(request_id=request_id, end_ns=(start + 9) * S), (start + 9) * S)
        ledger.settle({"g": DeviceView(line, held=True)}, (start + 10) * S)
        answer = ledger.price(request_id)
        return answer.tenant if answer else None

    assert serve("before", 10) == ""
    namespaces["uid"] = "team-a"
    assert serve("after", 30) == "team-a"
    assert serve("named", 50, "acme") == "acme"
    # The pod's processes are gone; what comes late is still its own.
    namespaces.clear()
    assert serve("late", 70) == "team-a"


def test_an_engine_is_in_a_pod_by_what_it_says_of_itself() -> None:
    def paid(**where: Any) -> str:
        return payer(lambda: {"uid": "team-a", "c" * 64: "team-b"}, EngineRecord(engine_id="e", **where))

    assert paid(pod_uid="uid") == "team-a"
    assert paid(container_id="c" * 64) == paid(container_id="c" * 12) == "team-b"
    assert paid(container_id="c" * 11) == ""
    assert paid(pod_uid="other") == paid(pid=os.getpid()) == paid() == ""


def test_an_engine_whose_process_is_there_bears_the_idle_energy_of_the_whole_night() -> None:
    line = Timeline(0)
    line.extend([t * S for t in range(1, 801)], [100.0] * 800)
    devices = {"g": DeviceView(line, held=True)}
    limits = Limits(engine_expiry_ns=200 * S)
    for is_there, night_seconds in ((True, 800), (False, 200)):

        def is_alive(record: EngineRecord, is_there: bool = is_there) -> bool:
            return is_there and record.pid == 7

        ledger = PlacedLedger.begin(None, limits, LawBook(), 0, lambda record: record, is_alive)
        ledger.add_engine(EngineRecord(engine_id="e", models=("m",), pid=7), 0)
        for second in range(0, 831, 10):
            ledger.settle(devices, second * S)
            ledger.expire(second * S)
        assert [record.engine_id for record in ledger.engines] == ["e"] * is_there
        assert ledger.snapshot().idle_joules["g", "parked"] == pytest.approx(80_000)
        # Without its process it is gone after 200 s; what was settled by then trails by up to 20 s.
        assert ledger.snapshot().allocated_joules["m", "", "e"] == pytest.approx(night_seconds * 100, abs=2000)


def test_the_requests_of_an_engine_that_died_take_nothing_of_the_next_one() -> None:
    line = Timeline(0)
    line.extend([t * S for t in range(1, 101)], [100.0] * 100)
    devices = {"g": DeviceView(line, held=True)}
    there = {7, 8}
    ledger = PlacedLedger.begin(None, Limits(), LawBook(), 0, lambda record: record, lambda record: record.pid in there)
    for pid in (7, 8):  # Two workers of one server.
        ledger.add_engine(EngineRecord(engine_id="e", models=("m",), pid=pid), S)
        running = RequestRecord(request_id=f"of-{pid}", arrival_ns=10 * S, first_token_ns=11 * S)
        ledger.add_request(running, 11 * S)
    for second in range(12, 100):
        if second == 20:
            there.discard(7)
        if second == 30:
            there.discard(8)
        if second == 31:
            there.add(9)
            ledger.add_engine(EngineRecord(engine_id="e", models=("m",), pid=9), 31 * S)
            ledger.add_request(RequestRecord(request_id="next", arrival_ns=31 * S, first_token_ns=31 * S), 31 * S)
        if second == 50:
            ledger.add_request(RequestRecord(request_id="next", end_ns=50 * S), 50 * S)
        ledger.settle(devices, second * S)
        ledger.expire(second * S)
    found = {name: ledger.price(name) for name in ("of-7", "of-8", "next")}
    assert {name: None if one is None else (one.status, one.final) for name, one in found.items()} == {
        "of-7": (Status.FAILED, True),
        "of-8": (Status.FAILED, True),
        "next": (Status.FINISHED, True),
    }
    # Both ran until the last of their processes was gone: 20 s at 100 W between them.
    assert sum(one.energy_joules for name, one in found.items() if one and name != "next") == pytest.approx(2000)
    assert found["next"] is not None and found["next"].energy_joules == pytest.approx(1900)


def test_what_one_feed_leaves_out_of_an_engine_stays_as_another_told_it() -> None:
    lines = {uuid: DeviceView(Timeline(0), held=True) for uuid in "gh"}
    there = {7, 30}
    ledger = PlacedLedger.begin(None, Limits(), LawBook(), 0, lambda record: record, lambda record: record.pid in there)
    ledger.settle(lines, S)
    scraped = EngineRecord(
        engine_id="e", kind="vllm", models=("m",), pid=7, gpu_uuids=("g",), role=Role.DECODE, max_num_seqs=256
    )
    ledger.add_engine(scraped, S)
    # The proxy says what its flags say; on a socket the kernel adds the proxy's own process.
    ledger.add_engine(EngineRecord(engine_id="e", kind="vllm"), 2 * S)
    assert list(ledger.engines) == [scraped]
    ledger.add_engine(EngineRecord(engine_id="e", kind="vllm", pid=30), 3 * S)
    assert list(ledger.engines) == [scraped]
    # A new life of the engine, somewhere else.
    there.discard(7)
    again = EngineRecord(engine_id="e", kind="vllm", models=("n",), pid=8)
    ledger.add_engine(again, 4 * S)
    assert list(ledger.engines) == [again]


def test_processes_that_belong_to_an_engine(tmp_path: Path) -> None:
    container, pod = "3f" * 32, "2c48913c-b29f-11e7-9350-020968147796"
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text("7 (worker) S 5 7 7")
    (tmp_path / "7" / "cgroup").write_text(f"0::/kubepods/burstable/pod{pod}/{container}\n")

    def is_ours(**says: Any) -> bool:
        return belongs(7, EngineRecord(engine_id="e", **says), tmp_path)

    assert is_ours(pid=7)
    assert not is_ours(pid=8)
    assert is_ours(container_id=container)
    assert is_ours(container_id=container[:12])
    assert not is_ours(container_id=container[:11])
    assert not is_ours(container_id="4" + container[1:])
    assert is_ours(pod_uid=pod)
    assert not is_ours(pod_uid=pod.replace("2", "3"))
    assert not belongs(8, EngineRecord(engine_id="e", pod_uid=pod), tmp_path)
