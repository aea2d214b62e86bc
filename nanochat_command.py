"""The command `nanochat`: help comes at once, everything else goes to a recipe.

    nanochat                      # the recipes, a line each
    nanochat plan --help
    nanochat plan --depth 20

Loading PyTorch and Transformers takes seconds, and a recipe's options are known only after that. So a recipe's help is
kept when it is first asked for, and shown from there until a version or a file of the code is another. This module lies
outside the package, whose import loads those libraries. The price: the first help of a recipe is as slow as its import,
and lies as a small file in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
from pathlib import Path

PACKAGE = Path(importlib.util.find_spec("modeling_nanochat").origin).parent
# An installed package holds the folders; in a clone they lie beside it.
FOLDER = next(parent / "recipes" for parent in (PACKAGE, PACKAGE.parent) if (parent / "recipes").is_dir())
LIBRARIES = ("torch", "transformers", "trl", "accelerate")  # whose settings the recipes show


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: nanochat RECIPE [options]      (nanochat RECIPE --help shows a recipe's options)\n")
        print("\n".join(f"  {recipe:16} {purpose}" for recipe, purpose in recipes().items()))
    elif name not in recipes():
        raise SystemExit(f"nanochat: there is no recipe {name!r}; expected one of {', '.join(recipes())}")
    elif {"-h", "--help"} & set(arguments):
        print(help_of(name), end="")
    else:
        call(name, arguments)


def recipes() -> dict[str, str]:
    """Name and purpose of every recipe: the files in recipes/ that have a `main`, and how each of them opens."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def call(name: str, arguments: list[str]) -> None:
    """Run a recipe; what the user got wrong ends the process with one line."""
    try:
        from modeling_nanochat.recipes.command_line import run  # here: seconds

        recipe = importlib.import_module(f"modeling_nanochat.recipes.{name}").main
    except KeyboardInterrupt:
        print(f"nanochat {name}: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    sys.argv = [f"nanochat {name}", *arguments]
    run(recipe)


def help_of(name: str) -> str:
    """A recipe's help, kept from an earlier time if there was one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat" / "help"
    file = cache / f"{name}-{fingerprint()}.txt"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        call(name, ["--help"])
    with contextlib.suppress(OSError):  # a home that cannot be written to only costs the time
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(f"{name}-*.txt"):
            old.unlink(missing_ok=True)
        whole = file.with_suffix(f".{os.getpid()}")
        whole.write_text(written.getvalue(), encoding="utf-8")
        whole.replace(file)
    return written.getvalue()


def fingerprint() -> str:
    """Of everything that help depends on: versions, the code's files by size and time, the terminal's width."""
    facts = [sys.version, str(shutil.get_terminal_size().columns)]
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts.append(importlib.metadata.version(library))
    for folder in (PACKAGE, FOLDER, FOLDER.parent / "training", FOLDER.parent / "eval"):
        for file in sorted(folder.rglob("*.py")):
            facts.append(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
