"""Every command that the Makefile, the scripts and the pages spell out is one that its program understands.

Recipes, accelerate, torchrun and make parse what is shown, by their own parsers, and stop there. A command of a program
that is not known here fails: it has to be added, not left unread.
"""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser
from trl import TrlParser

from modeling_nanochat.training import devices
from nanochat_command import recipes
from tests.docs.pages import ASSIGNMENT, NAMES, ROOT, blocks, commands

PRINT = '#!/usr/bin/env bash\necho "RUN $0 $*"\n'
RECIPE = re.compile(r"(?:-m modeling_nanochat\.recipes\.|\bnanochat )([a-z_]+)((?: .*)?)$", re.MULTILINE)
LEFT_OUT = ("...", "…", "NAME", "RECIPE", "FILE", "FILE.yaml", "FOLDER")  # what a reader has to fill in
NAMED_FILE = re.compile(r"# (\S+\.(?:yaml|jsonl|json))\n")  # first line of a block that shows a file


class Parsed(Exception):
    pass


@pytest.fixture(autouse=True)
def stop_after_parsing(monkeypatch):
    """Recipes raise `Parsed` once they have understood their arguments."""

    def parse(parse_arguments):
        def parse_and_stop(*args, **kwargs):
            parse_arguments(*args, **kwargs)
            raise Parsed

        return parse_and_stop

    plain_parse = HfArgumentParser.parse_args_into_dataclasses  # which TrlParser needs as it is
    monkeypatch.setattr(TrlParser, "parse_args_into_dataclasses", plain_parse)
    monkeypatch.setattr(TrlParser, "parse_args_and_config", parse(TrlParser.parse_args_and_config))
    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse(plain_parse))
    monkeypatch.setattr(devices, "native_float8", lambda device: True)  # pages show what only a GPU does
    monkeypatch.chdir(ROOT)


def check_recipe(name: str, arguments: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"nanochat {name}", *arguments])
    if "--help" in arguments:
        with pytest.raises(SystemExit) as end:
            importlib.import_module(f"modeling_nanochat.recipes.{name}").main()
        assert end.value.code == 0
        return
    with pytest.raises(Parsed):
        importlib.import_module(f"modeling_nanochat.recipes.{name}").main()


def check_module(module: str, arguments: list[str], monkeypatch) -> None:
    """`-m module`: a recipe's arguments are parsed, any other has to be there."""
    if module.startswith("modeling_nanochat.recipes."):
        check_recipe(module.rsplit(".", 1)[1], arguments, monkeypatch)
    else:
        assert importlib.util.find_spec(module) is not None, f"there is no module {module}"


def check_launch(parser, arguments: list[str], script: str, monkeypatch) -> None:
    parsed, unknown = parser.parse_known_args(arguments)
    assert not unknown
    if hasattr(parsed, "config_file") and parsed.config_file:
        assert Path(parsed.config_file).is_file(), parsed.config_file
    rest = getattr(parsed, f"{script}_args")
    if parsed.module:
        check_module(getattr(parsed, script), rest, monkeypatch)
    else:
        assert Path(getattr(parsed, script)).is_file()


def extras() -> set[str]:
    """The extras that setup.py offers."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "extras_require"]
    return {key.value for key in call.value.keys}


def check(command: str, monkeypatch) -> None:
    """Parse one command of a page; AssertionError or SystemExit if its program would not take it."""
    words = shlex.split(re.split(r" (?:[|;&]|>)", command)[0])
    while ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    program, arguments = Path(words[0]).name, words[1:]
    if any(word in LEFT_OUT for word in arguments):
        return
    if program == "nanochat":
        if arguments and arguments != ["--help"]:
            assert arguments[0] in recipes(), f"there is no recipe {arguments[0]}"
            check_recipe(arguments[0], arguments[1:], monkeypatch)
    elif program == "accelerate":
        assert arguments[0] == "launch"
        if "-m" in arguments:
            check_launch(launch_command_parser(), arguments[1:], "training_script", monkeypatch)
    elif program == "torchrun":
        if "-m" in arguments:
            check_launch(get_args_parser(), arguments, "training_script", monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), flags=re.MULTILINE)
        wanted = [word for word in arguments if "=" not in word]
        assert set(wanted) <= set(targets), f"the Makefile has no target {set(wanted) - set(targets)}"
    elif program == "bash":
        assert Path(arguments[0]).is_file(), arguments[0]
    elif program in ("python", "python3"):
        if arguments[0] == "-m":
            check_module(arguments[1], arguments[2:], monkeypatch)
        elif arguments[0] == "-c":
            ast.parse(arguments[1])
        else:
            assert Path(arguments[0]).is_file(), arguments[0]
    elif program == "pip":
        assert arguments[0] == "install"
        named = re.findall(r"\.\[([a-z,]+)\]", " ".join(arguments))
        assert {extra for group in named for extra in group.split(",")} <= extras()
    elif program == "hf":
        assert all(Path(word).is_file() for word in arguments if word.endswith(".py")), arguments
    elif program == "curl":
        json.loads(arguments[arguments.index("-d") + 1])
    else:
        assert program in ("transformers", "git"), f"no test knows how to read {program}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_of_a_page(name, tmp_path, monkeypatch):
    text = (ROOT / name).read_text()
    for file in ROOT.iterdir():
        if file.name not in (".venv", "out", ".git"):
            (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for block in blocks(text):  # what the page tells its reader to write
        if shown := NAMED_FILE.match(block.text):
            file = tmp_path / shown.group(1)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
    failed = []
    for command in commands(text):
        try:
            check(command, monkeypatch)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            failed.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_shows_its_help(name, monkeypatch):
    """A bare percent sign in a help text is a traceback."""
    check_recipe(name, ["--help"], monkeypatch)


def test_commands_are_found():
    """The reader of pages overlooks nothing of what it is there for."""
    page = "Try `make demo` or `nanochat`.\n\n    nanochat plan \\\n        --depth 4  # small\n    [plan] done\n"
    page += "\n```sh\nls\n```\n"
    assert [" ".join(command.split()) for command in commands(page)] == ["nanochat plan --depth 4", "ls", "make demo"]
    assert sum(len(commands((ROOT / name).read_text())) for name in NAMES) > 25


def commands_of(script: str, folder: Path, **variables: str) -> list[str]:
    """What a script runs under some variables, of a copy of the project's programs that only print how they were
    called."""
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
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin"} | variables,
    )  # fmt: skip
    return [found for found in RECIPE.findall(run.stdout) if found[0] in recipes()]


def commands_of_makefile() -> list[tuple[str, str]]:
    text = (ROOT / "Makefile").read_text()
    text = text.replace("\\\n", " ").replace("$(LAUNCH)", "-m").replace("$(DEMO)", "recipes/configs/demo")
    return [(name, re.split(r"[`|;]|\.\.\.| #", rest)[0]) for name, rest in RECIPE.findall(text) if name in recipes()]


@pytest.mark.parametrize(
    "source", ["Makefile", "recipes/speedrun.sh", "ERA=head recipes/speedrun.sh", "recipes/runcpu.sh"]
)
def test_commands_of_scripts(source, tmp_path, monkeypatch):
    *settings, file = source.split()
    variables = dict(setting.split("=") for setting in settings)
    found = commands_of(file, tmp_path, **variables) if file.endswith(".sh") else commands_of_makefile()
    assert len(found) >= 8
    for name, arguments in found:
        check_recipe(name, shlex.split(arguments), monkeypatch)
