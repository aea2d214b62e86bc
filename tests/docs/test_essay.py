"""The essay's pointers, pictures and links lead somewhere, and every picture is drawn by the script of its name."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import NAMES, ROOT, links, prose

CHAPTERS = sorted((ROOT / "docs/essay").glob("*.md"))
IMAGES = sorted((ROOT / "docs/images").glob("*.png"))
POINTER = re.compile(r"`([\w/.-]+\.\w+)(?::([\w.]+))?`")
MOST_BYTES = 100_000


@cache
def symbols(file: Path) -> set[str]:
    """What a Python file defines: functions, classes, constants, and Class.member."""
    found = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                for name in ast.walk(node):
                    if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                        found.add(prefix + name.id)
            elif isinstance(node, ast.AnnAssign):
                found.add(prefix + node.target.id)

    add(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found


def test_the_essay_is_whole():
    contents = (ROOT / "docs/how-training-works.md").read_text()
    assert [f"essay/{chapter.name}" for chapter in CHAPTERS] == [link for link in links(contents) if "essay/" in link]
    assert sum(len(chapter.read_text().split()) for chapter in CHAPTERS) > 10_000


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_pointers_into_the_code(chapter):
    text = chapter.read_text()
    _, _, pointers = text.partition("## In the code")
    assert pointers.count("\n- ") >= 3
    for path, symbol in POINTER.findall(text):
        if symbol or path.count("/") or path.startswith("docs"):
            if path.startswith("out/"):
                continue  # what a run makes
            assert (ROOT / path).is_file(), f"there is no {path}"
            if symbol:
                assert symbol in symbols(ROOT / path), f"{path} defines no {symbol}"


@pytest.mark.parametrize("name", NAMES)
def test_links_inside_the_repository(name):
    for target in links((ROOT / name).read_text()):
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if heading and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", prose(file.read_text()), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
            assert heading in slugs, f"{name} links to {target}, but the headings are {sorted(slugs)}"


def test_every_picture_has_its_script_and_its_place():
    shown = {link.rsplit("/", 1)[1] for name in NAMES for link in links((ROOT / name).read_text()) if "images/" in link}
    assert shown == {image.name for image in IMAGES}
    for image in IMAGES:
        assert (ROOT / f"docs/figures/{image.stem}.py").is_file(), f"nothing draws {image.name}"
        assert image.stat().st_size < MOST_BYTES, f"{image.name} is too large for a repository"
