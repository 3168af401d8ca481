"""What the pages for people name is there: keys, flags, variables, values of the chart, metrics, other pages."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml
from tests.promql_labels import exported, result_labels

from jouletrace.config import KEYS, ConfigError, load

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "jouletrace"
PAGES = sorted(
    [
        ROOT / "README.md",
        CHART / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "deploy" / "runbooks").glob("*.md"),
    ]
)
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
OTHERS = {"ledger.journal", "ledger.lock", "service.name"}
"""What looks like a key and is none: files of the state directory, an attribute of OpenTelemetry."""
TYPES_OF_FILES = (".yml", ".yaml", ".json", ".md", ".py", ".sock", ".dgram")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def words(page: Path) -> set[str]:
    """Return what stands between backticks outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", prose))


def is_key(name: str) -> bool:
    """Return whether the configuration has a key or section of this name; `section.*` is one."""
    name = name.removesuffix(".*")
    return name in KEYS or any(key.startswith(f"{name}.") for key in KEYS)


def is_value(path: str) -> bool:
    """Return whether the chart takes a value at this path."""
    node = SCHEMA
    for part in path.split("."):
        while "$ref" in node:
            node = SCHEMA["definitions"][node["$ref"].rpartition("/")[2]]
        if part in node.get("properties", {}):
            node = node["properties"][part]
        elif isinstance(node.get("additionalProperties"), dict):
            node = node["additionalProperties"]
        else:
            # What belongs to Kubernetes, the operator or web.config.yml is left open.
            return node.get("type") == "object" and "properties" not in node
    return True


@cache
def commands() -> list[str]:
    """Return the commands that the program's help shows."""
    done = subprocess.run(
        [sys.executable, "-m", "jouletrace", "--help"], capture_output=True, text=True, timeout=30, check=True
    )
    return re.findall(r"^    ([a-z-]+)(?: |$)", done.stdout, re.MULTILINE)


@cache
def flags_of(command: str) -> frozenset[str]:
    """Return the flags that a command's help shows."""
    done = subprocess.run(
        [sys.executable, "-m", "jouletrace", command, "--help"], capture_output=True, text=True, timeout=30, check=True
    )
    return frozenset(re.findall(r"(?<![\w-])(--?[a-z][a-z0-9.-]*)", done.stdout))


def calls(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of jouletrace that a page shows, with their words up to `--`."""
    for text in blocks(page, "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"[|;&]+|\$\(", re.sub(r"(^|\s)#.*", "", line)):
                # Behind the program, or the image, whose entry point it is.
                found = re.search(rf"(?:^|[\s/])jouletrace(?::\S+)?\s+({'|'.join(commands())})(?=\s|$)(.*)$", part)
                if found:
                    yield found[1], re.split(r"\s--\s", f"{found[2]} ")[0].split()


@each_page
def test_keys_and_values_exist(page: Path) -> None:
    roots = SECTIONS | SCHEMA["properties"].keys()
    named = {word.split("=")[0].split(":")[0].strip() for word in words(page)}
    dotted = {
        name
        for name in named
        if re.fullmatch(r"[a-zA-Z_]+(\.[a-zA-Z_]+|\.\*)+", name)
        and name.partition(".")[0] in roots
        and not name.endswith(TYPES_OF_FILES)
    }
    assert {
        name for name in dotted - OTHERS if not is_key(name.removeprefix("config.")) and not is_value(name)
    } == set()


@each_page
def test_flags_and_variables_exist(page: Path) -> None:
    wrong = [
        (command, word)
        for command, arguments in calls(page)
        for word in arguments
        if word.startswith("-") and word.split("=")[0] not in flags_of(command)
    ]
    assert wrong == []
    variables = set(re.findall(r"\bJOULETRACE_[A-Z_]+\b", page.read_text())) - {key.variable for key in KEYS.values()}
    source = "".join(file.read_text() for file in (ROOT / "exporter").rglob("*.py"))
    assert {variable for variable in variables if variable not in source} == set()


@each_page
def test_values_that_are_set_are_the_charts(page: Path) -> None:
    for text in blocks(page, "sh"):
        for command in text.replace("\\\n", " ").splitlines():
            if command.startswith("helm "):
                given = shlex.split(command, comments=True)
                paths = [given[at + 1].split("=")[0] for at, word in enumerate(given[:-1]) if word == "--set"]
                assert [path for path in paths if not is_value(path)] == []


@each_page
def test_files_are_taken_by_who_reads_them(page: Path, tmp_path: Path) -> None:
    """Those with sections of the chart or of the daemon alone are theirs; others are somebody else's."""
    for text in blocks(page, "yaml"):
        document = next(iter(yaml.safe_load_all(text)))
        problems = []
        if isinstance(document, dict) and document.keys() <= SCHEMA["properties"].keys():
            problems.append([error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(document)])
        if isinstance(document, dict) and document.keys() <= SECTIONS | KEYS.keys():
            problems.append(daemon_problems(text, tmp_path))
        assert [] in problems or not problems, (text, problems)


def daemon_problems(text: str, folder: Path) -> list[str]:
    """Return what the daemon has against a configuration."""
    file = folder / "jouletrace.yml"
    file.write_text(text)
    try:
        load(file, {}, None)
    except ConfigError as error:
        return [str(error)]
    return []


@each_page
def test_metrics_exist(page: Path) -> None:
    known = exported().keys() | {"jouletrace_"}
    named = set(re.findall(r"\bjouletrace_[a-z][a-z0-9_]*", page.read_text()))
    assert {name for name in named if not any(one == name or one.startswith(name) for one in known)} == set()


@each_page
def test_queries_find_something(page: Path) -> None:
    rules = [file.read_text() for file in (ROOT / "deploy" / "prometheus" / "recording").glob("*.yml")]
    known: dict[str, frozenset[str]] = exported()
    for text in [*rules, *blocks(page, "yaml")]:
        document = next(iter(yaml.safe_load_all(text)))
        for group in document.get("groups", ()) if isinstance(document, dict) else ():
            for rule in group["rules"]:
                known[rule["record"]] = result_labels(rule["expr"], known) or frozenset()
    for text in blocks(page, "promql"):
        # A line that is indented goes on with the one before.
        for query in re.split(r"\n(?=\S)", re.sub(r"(^|\s)#.*", "", text, flags=re.MULTILINE).strip()):
            result_labels(query, known)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.prometheus
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_joules_of_a_slurm_job_are_summed_over_nodes_and_shared_by_jobs(tmp_path: Path) -> None:
    """Job 1 has a GPU of 300 W on one node and half of one of 600 W on another; job 2 has the other half."""
    (rules,) = [text for text in blocks(ROOT / "docs" / "install-slurm.md", "yaml") if text.startswith("groups:")]
    (tmp_path / "rules.yml").write_text(rules)
    info = 'jouletrace_gpu_process_info{cluster="c",gpu="0",uuid="%s",instance="%s",process_name="%s",slurm_job="%s"}'
    energy = 'jouletrace_gpu_energy_joules_total{cluster="c",gpu="0",uuid="%s",instance="%s"}'
    rows = [
        (info % ("GPU-a", "n1", "python", "1"), "1x20"),
        (info % ("GPU-a", "n1", "nccl", "1"), "1x20"),
        (info % ("GPU-b", "n2", "python", "1"), "1x20"),
        (info % ("GPU-b", "n2", "python", "2"), "1x20"),
        (info % ("GPU-b", "n2", "Xorg", ""), "1x20"),
        (energy % ("GPU-a", "n1"), "0+4500x20"),
        (energy % ("GPU-b", "n2"), "0+9000x20"),
    ]
    watts = [("1", 600), ("2", 300)]
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": series, "values": values} for series, values in rows],
                "promql_expr_test": [
                    {
                        "expr": "slurm_job:gpu_power:watts",
                        "eval_time": "4m",
                        "exp_samples": [
                            {"labels": f'slurm_job:gpu_power:watts{{cluster="c",slurm_job="{job}"}}', "value": watt}
                            for job, watt in watts
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
