"""The documents: links resolve, and what is read first stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "deploy" / "README.md",
    ROOT / "engine" / "bundled" / "README.md",
)
LINK = re.compile(r"\]\((?!https?://)(?P<file>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
PATH = re.compile(r"`(?P<path>(?:\.ci|benchmarks|clients|deploy|docs|engine|kernels|server|tests|training)/[\w./-]*)`")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    return CODE.sub("", path.read_text("utf-8"))


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_resolve(document: Path) -> None:
    for link in LINK.finditer(prose(document)):
        target = document.parent / link["file"] if link["file"] else document
        assert target.exists(), link[0]
        assert link["anchor"] is None or link["anchor"] in anchors(target), link[0]


# Lab notes are not in this list: they name files as they were on their date.
@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each.parent.name != "lab_notes"], ids=name)
def test_named_paths_exist(document: Path) -> None:
    for path in PATH.findall(prose(document)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_what_is_read_first_is_short(document: str) -> None:
    assert len((ROOT / document).read_text("utf-8").splitlines()) <= 120


def test_every_lab_note_is_in_the_index() -> None:
    notes = ROOT / "docs" / "lab_notes"
    linked = {link["file"] for link in LINK.finditer((notes / "README.md").read_text("utf-8"))}
    assert {note.name for note in notes.glob("*.md")} - {"README.md"} <= linked
