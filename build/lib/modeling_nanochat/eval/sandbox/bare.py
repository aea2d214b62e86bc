"""How a module of this folder is started in a bare interpreter: by path, isolated, without site-packages.

The package itself cannot be imported there: it brings torch, which takes seconds and lies in site-packages.
"""

import os
import sys
from pathlib import Path

START = """import sys
sys.path.append({folder!r})
import {folder_name}.{module} as module
sys.path.pop()
module.main()
"""


def command(module: str, *arguments: str) -> list[str]:
    """Arguments of `Popen` that call `main` of a module of this folder."""
    folder = Path(__file__).resolve().parent
    start = START.format(folder=str(folder.parent), folder_name=folder.name, module=module)
    return [sys.executable, "-I", "-S", "-c", start, *arguments]


def environment() -> dict[str, str]:
    """Nothing, but where the system has to be told where the interpreter's own library lies."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
