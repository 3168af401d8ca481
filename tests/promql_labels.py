"""Which labels the result of a PromQL expression has, from the labels of the metrics in it.

Prometheus takes a misspelt metric or label for one that has no series: the rule is valid and never true. This finds it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import promql_parser as promql

from jouletrace.metrics import names

TARGET = frozenset({"job", "instance", "cluster"})
"""Labels that a scrape job gives; `cluster` is the one that the rules expect and may be absent."""

PROCESS = ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_start_time_seconds")
"""Metrics of the client library (docs/metrics.md, The process)."""

NO_VECTOR = ("scalar", "vector", "time")
SET_OPERATORS = ("and", "or", "unless")


def exported() -> dict[str, frozenset[str]]:
    """Return the labels of every series that a scrape of jouletrace makes, by name."""
    found = dict.fromkeys(("up", *PROCESS), TARGET)
    for metric in names.ALL:
        labels = TARGET | set(metric.labels)
        match metric.type:
            case "counter" | "gauge":
                found[metric.name] = labels
            case "summary" | "histogram":
                found[f"{metric.name}_sum"] = found[f"{metric.name}_count"] = labels
                if metric.type == "histogram":
                    found[f"{metric.name}_bucket"] = labels | {"le"}
    return found


VALUES = {(metric.name, metric.labels[-1]): metric.values for metric in names.ALL if metric.values}
"""Closed sets of label values, by metric and label."""


def result_labels(expression: str, known: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    """Return the labels of an expression's result, None for a scalar; raises ValueError for what finds nothing.

    `known`: the labels of each metric that may be used.
    """
    return _labels(promql.parse(expression), known)


def _labels(node: Any, known: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    match node:
        case promql.NumberLiteral() | promql.StringLiteral():
            return None
        case promql.VectorSelector():
            return _selected(node, known)
        case promql.MatrixSelector():
            return _selected(node.vector_selector, known)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return _labels(node.expr, known)
        case promql.Call():
            return _called(node, known)
        case promql.AggregateExpr():
            return _aggregated(node, known)
        case promql.BinaryExpr():
            return _combined(node, known)
    raise TypeError(f"no rule for {type(node).__name__}")


def _selected(selector: Any, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    name = selector.name
    if name not in known:
        raise ValueError(f"there is no metric {name}")
    for matcher in selector.matchers.matchers:
        _need({matcher.name}, known[name], name)
        values = VALUES.get((name, matcher.name))
        strange = set(re.split(r"\|", matcher.value)) - set(values) if values and matcher.value else set()
        if strange:
            raise ValueError(f"{matcher.name} of {name} is never {', '.join(sorted(strange))}")
    return known[name]


def _called(call: Any, known: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    arguments = [_labels(argument, known) for argument in call.args]
    if call.func.name in NO_VECTOR:
        return frozenset() if call.func.name == "vector" else None
    if call.func.name == "absent":
        return frozenset(matcher.name for matcher in call.args[0].matchers.matchers)
    found = next(labels for labels in arguments if labels is not None)
    return found | {call.args[1].val} if call.func.name == "label_replace" else found


def _aggregated(node: Any, known: Mapping[str, frozenset[str]]) -> frozenset[str]:
    inner = _labels(node.expr, known)
    if inner is None:
        raise ValueError(f"{node.op} of a scalar")
    if node.modifier is None:
        return inner if str(node.op) in ("topk", "bottomk") else frozenset()
    _need(node.modifier.labels, inner, str(node.op))
    if node.modifier.type == promql.AggModifierType.By:
        return frozenset(node.modifier.labels)
    return inner - set(node.modifier.labels)


def _combined(node: Any, known: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    left, right = _labels(node.lhs, known), _labels(node.rhs, known)
    if left is None or right is None:
        return right if left is None else left
    matching = node.modifier.matching if node.modifier else None
    if matching is None:
        # Series match on all labels, so two sets of labels that differ never do.
        if left != right:
            raise ValueError(f"{sorted(left)} {node.op} {sorted(right)} match nothing; say on (...)")
        return left
    _need(matching.labels, left, f"the left of {node.op}")
    _need(matching.labels, right, f"the right of {node.op}")
    if str(node.op) in SET_OPERATORS:
        return left
    if node.modifier.card == promql.VectorMatchCardinality.ManyToOne:
        _need(node.modifier.group_labels, right, f"the right of {node.op}")
        return left | set(node.modifier.group_labels)
    return frozenset(matching.labels)


def _need(labels: Iterable[str], there: frozenset[str], where: str) -> None:
    missing = set(labels) - there
    if missing:
        raise ValueError(f"{where} has no label {', '.join(sorted(missing))}, only {', '.join(sorted(there))}")
