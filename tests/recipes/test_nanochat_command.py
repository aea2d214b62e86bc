"""The command `nanochat` without a library: a list of recipes, and help that is kept."""

import os
import subprocess
import sys

import pytest

import nanochat_command


def test_the_list_of_recipes_loads_no_library():
    code = "import sys, nanochat_command; nanochat_command.main(); print('torch' in sys.modules, file=sys.stderr)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # tests/no_bfloat16 loads torch
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "pretrain " in run.stdout and "command_line" not in run.stdout and run.stderr.strip() == "False"


def test_help_is_kept_until_the_code_changes(tmp_path, monkeypatch, capsys):
    calls = []

    def call(name, arguments):
        calls.append(name)
        print(f"options of {name}, asked {len(calls)} times")
        raise SystemExit(0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nanochat_command, "call", call)
    monkeypatch.setattr(sys, "argv", ["nanochat", "plan", "--depth", "20", "--help"])
    for _ in range(2):
        nanochat_command.main()
    assert calls == ["plan"] and capsys.readouterr().out == 2 * "options of plan, asked 1 times\n"
    monkeypatch.setattr(nanochat_command, "fingerprint", lambda: "another")
    nanochat_command.main()
    assert "asked 2 times" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "nanochat" / "help").iterdir()] == ["plan-another.txt"]


def test_help_is_what_the_recipe_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["nanochat plan", "--help"])
    shown = nanochat_command.help_of("plan")
    with pytest.raises(SystemExit):
        nanochat_command.call("plan", ["--help"])
    assert shown == capsys.readouterr().out and "--depth" in shown


def test_an_unknown_recipe_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nanochat", "pretrian"])
    with pytest.raises(SystemExit, match="there is no recipe 'pretrian'; expected one of chat"):
        nanochat_command.main()
