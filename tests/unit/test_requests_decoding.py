import json
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jouletrace.requests.decoding import SLICE_BYTES, SLICE_LINES, LineError, RecordDecoder, TooManyRecordsError, slices
from jouletrace.requests.records import (
    EngineRecord,
    LoadRecord,
    Record,
    RecordKind,
    RequestRecord,
    Status,
    StepRecord,
    Unit,
    Usage,
)

REQUEST = RecordDecoder(RecordKind.REQUEST)
STEP = RecordDecoder(RecordKind.STEP)
ENGINE = RecordDecoder(RecordKind.ENGINE)
ANY = RecordDecoder()


def decoded(decoder: RecordDecoder, body: bytes) -> tuple[list[Record], list[str]]:
    slices = list(decoder.body(body).slices())
    return [r for s in slices for r in s.records], [str(e) for s in slices for e in s.errors]


def only_error(decoder: RecordDecoder, body: bytes) -> str:
    records, errors = decoded(decoder, body)
    assert not records
    [error] = errors
    return error


FULL_REQUEST = """{"request_id": "chatcmpl-1", "engine_id": "vllm-0", "attempt": 1, "model": "llama", "tenant": "acme",
 "trace_id": "0af7651916cd43dd8448eb211c80319c", "arrival_ns": 1, "scheduled_ns": 2, "first_token_ns": 3,
 "end_ns": 4, "status": "finished", "usage": {"input": 812, "cached_input": 512, "output": 256}, "new": [1, {}]}"""


def test_a_request_with_everything_over_several_lines() -> None:
    [record], errors = decoded(REQUEST, FULL_REQUEST.encode())
    assert errors == []
    assert record == RequestRecord(
        request_id="chatcmpl-1",
        engine_id="vllm-0",
        attempt=1,
        model="llama",
        tenant="acme",
        trace_id="0af7651916cd43dd8448eb211c80319c",
        arrival_ns=1,
        scheduled_ns=2,
        first_token_ns=3,
        end_ns=4,
        status=Status.FINISHED,
        usage=Usage(input=812, cached_input=512, output=256),
    )


def test_a_step_and_an_engine() -> None:
    [step], _ = decoded(
        STEP,
        b'{"engine_id":"e","start_ns":1,"end_ns":2,"prefill":[{"request_id":"a","tokens":7}],"decode":["b","c"],'
        b'"kv_usage":0.5,"flops":1e15}',
    )
    assert isinstance(step, StepRecord)
    assert step.prefill is not None
    assert [(part.request_id, part.tokens) for part in step.prefill] == [("a", 7)]
    assert step.decode == ("b", "c")
    assert (step.flops, step.kv_usage) == (1e15, 0.5)
    [engine], _ = decoded(
        ENGINE, b'{"engine_id":"e","kind":"vllm","models":["m"],"gpu_uuids":["GPU-1"],"role":"decode"}'
    )
    assert engine == EngineRecord(engine_id="e", kind="vllm", models=("m",), gpu_uuids=("GPU-1",), role="decode")  # type: ignore[arg-type]


def test_the_three_forms_of_a_body_are_one() -> None:
    one, two = b'{"request_id":"a"}', b'{"request_id":"b","usage":{"unit":"image","count":2}}'
    ndjson = decoded(REQUEST, one + b"\n" + two)
    assert ndjson == decoded(REQUEST, b" [" + one + b",\n" + two + b"]\n")
    assert ndjson == decoded(REQUEST, one + b"\r\n\n  \n" + two + b"\r\n")
    [first, second], [] = ndjson
    assert first == RequestRecord(request_id="a")
    assert isinstance(second, RequestRecord)
    assert second.usage == Usage(unit=Unit.IMAGE, count=2)


def test_good_lines_count_and_bad_ones_are_named_by_their_number() -> None:
    body = b"\n".join(
        [
            b'{"request_id":"a"}',
            b"",
            b'{"request_id":"b","usage":{"output":"1"}}',
            b'{"request_id":',
            b'{"usage":{}}',
            b"\xff\xfe",
            b'{"request_id":"\xff"}',
            b"[1]",
            b"17",
            b'{"request_id":"z"}',
        ]
    )
    records, errors = decoded(REQUEST, body)
    assert records == [RequestRecord(request_id="a"), RequestRecord(request_id="z")]
    assert errors == [
        "line 3: usage.output: expected int, got str",
        "line 4: is not valid JSON (Input data was truncated)",
        "line 5: request_id: is missing",
        "line 6: is not valid JSON (invalid character (byte 0))",
        "line 7: holds text that is not UTF-8",
        "line 8: expected object, got array",
        "line 9: expected object, got int",
    ]


def test_elements_of_an_array_are_counted_like_lines() -> None:
    records, errors = decoded(REQUEST, b'[{"request_id":"a"}, {"request_id":1}, null]')
    assert records == [RequestRecord(request_id="a")]
    assert errors == ["line 2: request_id: expected str, got int", "line 3: expected object, got null"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"request_id":""}', "request_id: expected str of length >= 1"),
        (b'{"request_id":"' + b"x" * 1_000_000 + b'"}', "request_id: expected str of length <= 256"),
        (b'{"request_id":"a","model":"' + b"x" * 129 + b'"}', "model: expected str of length <= 128"),
        (b'{"request_id":"a","arrival_ns":-1}', "arrival_ns: expected int >= 0"),
        (b'{"request_id":"a","arrival_ns":1.5}', "arrival_ns: expected int or null, got float"),
        (b'{"request_id":"a","arrival_ns":1e9}', "arrival_ns: expected int or null, got float"),
        (b'{"request_id":"a","arrival_ns":true}', "arrival_ns: expected int or null, got bool"),
        (b'{"request_id":"a","arrival_ns":99999999999999999999}', "arrival_ns: expected int <= 9223372036854775807"),
        (b'{"request_id":"a","arrival_ns":NaN}', "is not valid JSON (invalid character (byte 31))"),
        (b'{"request_id":"a","arrival_ns":5,"end_ns":4}', "end_ns: lies before arrival_ns"),
        (b'{"request_id":"a","first_token_ns":5,"end_ns":4}', "end_ns: lies before first_token_ns"),
        (b'{"request_id":"a","status":"done"}', "status: invalid enum value 'done'"),
        (b'{"request_id":"a","trace_id":"0AF"}', "trace_id: expected str matching regex '^[0-9a-f]{32}$'"),
        (b'{"request_id":"a","usage":{"input":1,"cached_input":2}}', "usage.cached_input: is more than usage.input"),
        (b'{"request_id":"a","usage":{"count":2}}', "usage.unit: is missing beside usage.count"),
        (b'{"request_id":"a","status":"finished","usage":{"output":2}}', "model: is missing"),
        (b'{"record":"step","request_id":"a"}', "record: does not fit here"),
        (b'{"request_id":"\\ud800"}', "is not valid JSON"),
    ],
)
def test_what_a_request_may_not_be(line: bytes, error: str) -> None:
    assert only_error(REQUEST, line).startswith(f"line 1: {error}")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ('"start_ns":2,"end_ns":1,"decode":[]', "end_ns: lies before start_ns"),
        ('"start_ns":1,"end_ns":2', "decode: a step needs its members"),
        ('"start_ns":1,"end_ns":2,"decode":[],"decode_requests":1', "decode_requests: is given beside decode"),
        ('"start_ns":1,"end_ns":2,"prefill":[{"tokens":1}]', "prefill[0].request_id: is missing"),
        ('"start_ns":1,"end_ns":2,"decode":["a"],"kv_usage":1.5', "kv_usage: expected float <= 1.0"),
        ('"start_ns":1,"end_ns":2,"decode":["a"],"flops":1e999', "flops: number out of range"),
    ],
)
def test_what_a_step_may_not_be(fields: str, error: str) -> None:
    assert only_error(STEP, f'{{"engine_id":"e",{fields}}}'.encode()).startswith(f"line 1: {error}")


def test_a_body_that_is_no_list_of_records() -> None:
    assert decoded(REQUEST, b"") == ([], [])
    assert decoded(REQUEST, b" \n\n ") == ([], [])
    assert decoded(REQUEST, b"[]") == ([], [])
    assert only_error(REQUEST, b'[{"request_id":"a"},') == "line 1: is not valid JSON (Input data was truncated)"
    assert only_error(REQUEST, b"[" * 1_000_000) == "line 1: is nested too deeply"
    deep = b'{"request_id":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert only_error(REQUEST, deep) == "line 1: is nested too deeply"


def test_on_a_socket_each_record_says_what_it_is() -> None:
    lines = [
        b'{"record":"engine","engine_id":"e"}',
        b'{"record":"step","engine_id":"e","start_ns":1,"end_ns":2,"decode":["a"]}',
        b'{"record":"request","request_id":"a"}',
        b'{"record":"load","engine_id":"e","start_ns":1,"end_ns":2,"models":[{"model":"m","usage":{"output":5}}]}',
        b'{"request_id":"a"}',
        b'{"record":"load","engine_id":"e","start_ns":3,"end_ns":2}',
        b'{"record":"load","engine_id":"e","start_ns":1,"end_ns":2,"models":[{"model":"m","usage":{"cached_input":5}}]}',
        b'{"record":"token","request_id":"a"}',
    ]
    part = ANY.lines(lines)
    assert [type(record) for record in part.records] == [EngineRecord, StepRecord, RequestRecord, LoadRecord]
    assert [str(error) for error in part.errors] == [
        "line 5: record: is missing",
        "line 6: end_ns: lies before start_ns",
        "line 7: usage.cached_input: is more than usage.input, which includes it",
        "line 8: record: does not fit here; on a socket it is one of engine, step, request, load",
    ]


def test_what_we_encode_we_decode() -> None:
    for record in (
        EngineRecord(engine_id="e", pid=7),
        StepRecord(engine_id="e", start_ns=1, end_ns=2, decode_requests=3, prefill_tokens=4),
        RequestRecord(request_id="a", model="m", status=Status.FAILED, usage=Usage(output=1)),
    ):
        part = ANY.lines([msgspec.json.encode(record)])
        assert (part.records, part.errors) == ([record], [])


def test_too_many_records_are_refused_as_a_whole() -> None:
    small = RecordDecoder(RecordKind.REQUEST, max_records=3)
    line = b'{"request_id":"a"}\n'
    assert len(list(small.body(line * 3).slices())) == 1
    for body in (line * 4, b"[" + b",".join([line] * 4) + b"]"):
        with pytest.raises(TooManyRecordsError, match="holds 4 records and 3 are allowed"):
            small.body(body)


def test_a_large_body_comes_in_slices_with_their_lines() -> None:
    body = b"".join(b'{"request_id":"%d"}\n' % i for i in range(SLICE_LINES * 2 + 10)) + b"nonsense\n"
    one = REQUEST.body(body)
    slices = list(one.slices())
    assert [(s.first_line, len(s.records)) for s in slices] == [
        (1, SLICE_LINES),
        (SLICE_LINES + 1, SLICE_LINES),
        (2 * SLICE_LINES + 1, 10),
    ]
    assert slices[2].errors == [LineError(2 * SLICE_LINES + 11, "", "is not valid JSON (invalid character (byte 4))")]
    assert one.count() == 2 * SLICE_LINES + 11
    assert one.count(2 * SLICE_LINES + 1) == 11


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=12,
)
FIELDS = sorted({*RequestRecord.__struct_fields__, *StepRecord.__struct_fields__, *EngineRecord.__struct_fields__})
near_records = st.dictionaries(st.sampled_from([*FIELDS, "record", "x"]), json_values, max_size=8).map(
    lambda tree: json.dumps(tree).encode()
)


# What JSON allows and few expect, and what it does not allow and many write.
odd_values = st.sampled_from(
    [
        *("1e400", "-1e400", "NaN", "Infinity", "-0", "0.1e-999", "1" * 5000, "9223372036854775808", "1.0", "1e3"),
        *(
            '"\\ud800"',
            '"\\udc00\\ud800"',
            '"\\u0000"',
            '"\x00"',
            '"\x7f\u2028"',
            '"\U0001f600"',
            '"\\x41"',
            '"' + "x" * 300 + '"',
        ),
        *(
            "[" * 2000,
            "[" * 600 + "]" * 600,
            '{"a":' * 600 + "1" + "}" * 600,
            "[[]]",
            "{}",
            "[null]",
            "",
            "'a'",
            "01",
            "+1",
            "tru",
        ),
    ]
)
odd_records = st.lists(st.tuples(st.sampled_from([*FIELDS, "record", "x"]), odd_values), max_size=6).map(
    # Joined by hand: keys may come twice.
    lambda fields: ("{" + ",".join(f'"{name}":{value}' for name, value in fields) + "}").encode()
)


def never_raises(body: bytes) -> None:
    for decoder in (REQUEST, STEP, ENGINE, ANY):
        one = decoder.body(body)
        slices = list(one.slices())
        for part in slices:
            for error in part.errors:
                assert error.message
                assert len(str(error)) < 400
        assert sum(len(s.records) + len(s.errors) for s in slices) <= max(1, one.count())


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_are_taken_or_explained(body: bytes) -> None:
    never_raises(body)


@given(st.lists(near_records, max_size=5), st.sampled_from([b"\n", b",", b"\r\n", b" "]), st.booleans())
@settings(max_examples=200)
def test_anything_near_a_record_is_taken_or_explained(lines: list[bytes], between: bytes, array: bool) -> None:
    body = between.join(lines)
    never_raises(b"[" + body + b"]" if array else body)


@given(st.lists(odd_records, max_size=4), st.booleans())
@settings(max_examples=300, deadline=None)
def test_odd_values_in_any_field_are_taken_or_explained(lines: list[bytes], array: bool) -> None:
    never_raises(b"[" + b",".join(lines) + b"]" if array else b"\n".join(lines))


def test_of_a_key_that_comes_twice_the_last_counts() -> None:
    [record], [] = decoded(REQUEST, b'{"request_id":"a","request_id":"b"}')
    assert record == RequestRecord(request_id="b")


def test_slices_are_bounded_in_bytes_too() -> None:
    long = b'{"request_id":"' + b"x" * 200 + b'","y":"' + b"y" * (SLICE_BYTES // 4) + b'"}'
    assert list(slices([long] * 10)) == [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    assert list(slices([b"{}" * SLICE_BYTES, b"{}"])) == [range(0, 1), range(1, 2)]
    assert list(slices([])) == []


@pytest.mark.parametrize(
    ("decoder", "line"),
    [
        (REQUEST, FULL_REQUEST.replace("\n", "").encode()),
        (REQUEST, b'{"request_id":"a"}'),
        (
            STEP,
            b'{"engine_id":"e","start_ns":1,"end_ns":2,"decode":[%s]}' % b",".join(b'"%d"' % i for i in range(9999)),
        ),
        (
            STEP,
            b'{"engine_id":"e","start_ns":1,"end_ns":2,"prefill":[%s]}'
            % b",".join(b'{"request_id":"chatcmpl-%020d","tokens":%d}' % (i, i + 300) for i in range(999)),
        ),
    ],
)
def test_what_records_take_in_memory_is_known_within_a_factor_of_two(decoder: RecordDecoder, line: bytes) -> None:
    lines = [line] * 200
    tracemalloc.start()
    part = decoder.lines(lines)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(part.records) == 200
    assert taken / 2 < part.held_bytes < taken * 2.5


@given(st.integers(0, len(FULL_REQUEST)), st.binary(max_size=3))
@settings(max_examples=200)
def test_a_record_damaged_anywhere_is_taken_or_explained(at: int, damage: bytes) -> None:
    whole = FULL_REQUEST.encode()
    never_raises(whole[:at] + damage + whole[at + len(damage) :])
    never_raises(whole[:at])
