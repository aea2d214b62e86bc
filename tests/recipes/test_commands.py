"""Every command that the Makefile, the scripts and the README spell out is one that its recipe understands."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser
from trl import TrlParser

from modeling_nanochat.recipes.command_line import recipes

ROOT = Path(__file__).parents[2]
PRINT = '#!/usr/bin/env bash\necho "RUN $0 $*"\n'
RECIPE = re.compile(r"(?:-m modeling_nanochat\.recipes\.|\bnanochat )([a-z_]+)((?: .*)?)$", re.MULTILINE)


class Parsed(Exception):
    pass


def commands_of(script: str, folder: Path) -> list[str]:
    """What a script runs, of a copy of the project's programs that only print how they were called."""
    for program in (
        ".venv/bin/accelerate",
        ".venv/bin/nanochat",
        ".venv/bin/python",
        ".venv/bin/pip",
        "bin/make",
        "bin/nvidia-smi",
    ):
        (folder / program).parent.mkdir(parents=True, exist_ok=True)
        (folder / program).write_text(PRINT)
        (folder / program).chmod(0o755)
    run = subprocess.run(
        ["bash", str(ROOT / script)], cwd=folder, capture_output=True, text=True, check=True,
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin"},
    )  # fmt: skip
    return [found for found in RECIPE.findall(run.stdout) if found[0] in recipes()]


def commands_of_text(text: str) -> list[tuple[str, str]]:
    """What a page or a Makefile shows, lines that go on with a backslash joined."""
    text = text.replace("\\\n", " ").replace("$(LAUNCH)", "-m").replace("$(DEMO)", "recipes/configs/demo")
    return [(name, re.split(r"[`|;]|\.\.\.| #", rest)[0]) for name, rest in RECIPE.findall(text) if name in recipes()]


def collect(source: str, folder: Path) -> list[tuple[str, str]]:
    return commands_of(source, folder) if source.endswith(".sh") else commands_of_text((ROOT / source).read_text())


@pytest.mark.parametrize(
    ("source", "least"),
    [("Makefile", 8), ("recipes/speedrun.sh", 8), ("recipes/runcpu.sh", 8), ("README.md", 5), ("docs/scaling.md", 1)],
)
def test_commands_are_understood(source, least, tmp_path, monkeypatch):
    def parse(parse_arguments):
        def parse_and_stop(*args, **kwargs):
            parse_arguments(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    commands = collect(source, tmp_path)
    assert len(commands) >= least
    monkeypatch.chdir(ROOT)
    plain_parse = HfArgumentParser.parse_args_into_dataclasses  # which TrlParser needs as it is
    monkeypatch.setattr(TrlParser, "parse_args_into_dataclasses", plain_parse)
    monkeypatch.setattr(TrlParser, "parse_args_and_config", parse(TrlParser.parse_args_and_config))
    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse(plain_parse))
    for name, arguments in commands:
        monkeypatch.setattr(sys, "argv", [name, *shlex.split(arguments)])
        with pytest.raises(Parsed):
            importlib.import_module(f"modeling_nanochat.recipes.{name}").main()
