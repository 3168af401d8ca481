"""All boards, from the general to the special, and the files that they are written to."""

from pathlib import Path
from typing import Final

from dashboards import diagnosis, exporter, fleet, gpu, requests, waste
from dashboards.board import Board

GENERATED: Final = Path(__file__).parent / "generated"


def boards() -> tuple[Board, ...]:
    """Return every board."""
    return tuple(module.board() for module in (fleet, gpu, requests, diagnosis, waste, exporter))


def files() -> dict[str, str]:
    """Return the JSON of every board by its file's name."""
    return {f"{board.uid}.json": board.json() for board in boards()}


def write(folder: Path) -> None:
    """Write every board to a folder, and delete what is there of boards that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    content = files()
    for old in folder.glob("*.json"):
        if old.name not in content:
            old.unlink()
    for name, text in content.items():
        (folder / name).write_text(text)


def stale(folder: Path) -> list[str]:
    """Return the files of a folder that differ from what would be written, missing and left-over ones too."""
    content = files()
    there = {file.name: file.read_text() for file in folder.glob("*.json")}
    return sorted(name for name in content.keys() | there.keys() if content.get(name) != there.get(name))
