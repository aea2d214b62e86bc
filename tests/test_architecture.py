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


def imports(file: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file; level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_arrows_allow(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        siblings = {name.split(".")[0] for level, name in imports(file) if level == 0} & set(ROOMS) - {room}
        assert siblings <= ALLOWED[room], f"{file.relative_to(ROOT)} imports {siblings - ALLOWED[room]}"


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
