"""The published JSON Schema of the records, made from the structs that decode them."""

import functools
import json

import msgspec

from jouletrace.requests.records import EngineRecord, LoadRecord, RequestRecord, StepRecord

SCHEMA_ID = "https://github.com/jouletrace/jouletrace/blob/main/docs/schema/records.schema.json"


@functools.cache
def records_schema() -> str:
    """Return the schema as indented JSON: `$defs` has the record structs of `requests.records` and their parts.

    The field `record` is not required by it: it is needed on sockets only, over HTTP the path says what a record is.
    """
    references, definitions = msgspec.json.schema_components(
        [EngineRecord, StepRecord, RequestRecord, LoadRecord], ref_template="#/$defs/{name}"
    )
    for definition in definitions.values():
        if "record" in definition.get("properties", {}):
            definition["required"].remove("record")
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "jouletrace records",
        "anyOf": list(references),
        "$defs": definitions,
    }
    return json.dumps(schema, indent=2) + "\n"
