"""What the pages quote is what the commands print."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from trl import TrlParser

import nanochat_command
from modeling_nanochat.recipes.plan import PlanArguments, table_of_depths
from modeling_nanochat.training.data.documents import open_documents

MODEL_PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text()


def test_the_table_of_depths_is_what_its_command_prints():
    (command,) = re.findall(r"^    nanochat plan (--table .*)$", MODEL_PAGE, flags=re.MULTILINE)
    (arguments,) = TrlParser((PlanArguments,)).parse_args_and_config(command.split())
    assert table_of_depths(arguments) in MODEL_PAGE


TROUBLES = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


def assert_quoted(said: str) -> None:
    """The page has a line that says this, or how it begins, up to an ellipsis."""
    quoted = [line.strip().removesuffix("...") for line in TROUBLES.splitlines() if line.startswith("    ")]
    assert any(said.startswith(line) for line in quoted if len(line) > 20), said


@pytest.mark.parametrize(
    "command",
    ["plan --config mine", "plan --depth 0", "pretrain --learning_rate 0.1"],
)
def test_messages_that_the_page_on_troubles_quotes(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanochat", *shlex.split(command)])
    with pytest.raises(SystemExit) as end:
        nanochat_command.main()
    assert end.value.code == 2
    assert_quoted(capsys.readouterr().err.strip())


def test_a_batch_that_cannot_be_shared_is_explained_as_the_page_says(monkeypatch, capsys):
    command = "nanochat plan --gpus 8 --total_batch_tokens 300000 --device H100"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    nanochat_command.main()
    assert_quoted(capsys.readouterr().out.strip().splitlines()[-1].strip())


@pytest.mark.parametrize("name", ["you/nothing", "out/nothing/*.parquet"])
def test_data_that_is_not_there_is_named_as_the_page_says(name):
    with pytest.raises(ValueError) as error:
        open_documents(name, "text")
    assert_quoted(f"nanochat pretrain: {error.value}")
