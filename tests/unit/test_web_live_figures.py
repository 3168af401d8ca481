import re
from importlib import resources

import pytest

from jouletrace.metrics import names
from jouletrace.web.live.figures import Figure, all_figures, reference_markdown
from jouletrace.web.live.page import ASSETS

SCRIPTS = "".join(
    resources.files("jouletrace.web.live").joinpath(name).read_text(encoding="utf-8")
    for name in ASSETS
    if name.endswith("js")
)


@pytest.mark.parametrize("figure", tuple(all_figures()), ids=lambda figure: figure.key)
def test_each_is_one_sentence_and_stands_on_the_page(figure: Figure) -> None:
    assert figure.sentence.endswith(".")
    assert not re.search(r"[.] [A-Z]", figure.sentence)
    assert f'"{figure.key}"' in SCRIPTS
    assert figure.metric is None or figure.metric in names.ALL


def test_what_prometheus_has_too_is_explained_in_its_words() -> None:
    [coverage] = [figure for figure in all_figures() if figure.key == "coverage"]
    assert names.ATTRIBUTION_COVERAGE_RATIO.help.startswith(coverage.sentence)


def test_the_page_of_the_docs_has_every_figure() -> None:
    page = reference_markdown()
    assert all(f"| {figure.label} | {figure.sentence} |" in page for figure in all_figures())
