"""The arrows between the folders: recipes -> {training, eval} -> modeling_nanochat, read from the imports."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("modeling_nanochat", "training", "eval", "recipes")
ALLOWED = {
    "modeling_nanochat": set(),
    "training": {"modeling_nanochat"},
    "eval": {"modeling_nanochat"},
    "recipes": {"modeling_nanochat", "training", "eval"},
}


FILES = {file: room for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))}


def imports(file: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file, names of imported things included; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, f"{node.module}.{alias.name}" if node.module else "") for alias in node.names]
    return found


def module_name(file: Path) -> str:
    """The name under which a file is imported: all folders lie under one."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "modeling_nanochat" else ("modeling_nanochat", *parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def imported_files(file: Path) -> set[Path]:
    """The project's own files that a file imports."""
    found = set()
    for level, name in imports(file):
        absolute = f"modeling_nanochat.{name}" if level else name
        while absolute not in MODULES and "." in absolute:
            absolute = absolute.rpartition(".")[0]
        if absolute in MODULES:
            found.add(MODULES[absolute])
    return found - {file}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_arrows_allow(room):
    files = [file for file in FILES if FILES[file] == room]
    assert files
    for file in files:
        siblings = {FILES[other] for other in imported_files(file)} - {room}
        assert siblings <= ALLOWED[room], f"{file.relative_to(ROOT)} imports {siblings - ALLOWED[room]}"


def test_nothing_is_imported_by_a_name_that_other_packages_have():
    for file in FILES:
        tops = {name.split(".")[0] for level, name in imports(file) if not level}
        assert not tops & {"training", "eval", "recipes", "tests"}, file


def test_imports_have_no_circle():
    done: set[Path] = set()

    def visit(file: Path, path: tuple[Path, ...]) -> None:
        assert file not in path, " -> ".join(str(each.relative_to(ROOT)) for each in (*path, file))
        if file not in done:
            for other in imported_files(file):
                visit(other, (*path, file))
            done.add(file)

    for file in FILES:
        visit(file, ())


def test_the_model_ships_flat_and_alone():
    """The Hub's copier follows `from .x import y` and nothing else, and a user may have only torch and transformers
    (which brings huggingface_hub, whose `strict` every Transformers configuration is decorated with)."""
    assert [path.name for path in (ROOT / "modeling_nanochat").iterdir() if path.is_dir()] in ([], ["__pycache__"])
    for file in sorted((ROOT / "modeling_nanochat").glob("*.py")):
        for level, name in imports(file):
            if level:
                assert level == 1, f"{file.name} reaches outside its folder"
                assert name, f"{file.name} has 'from . import x', which the Hub copier does not follow"
            else:
                top = name.split(".")[0]
                allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
                assert top in allowed, f"{file.name} imports {name}"
