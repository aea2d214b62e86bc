"""What the pages quote is what the commands print."""

import re
from pathlib import Path

from trl import TrlParser

from modeling_nanochat.recipes.plan import PlanArguments, table_of_depths

MODEL_PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text()


def test_the_table_of_depths_is_what_its_command_prints():
    (command,) = re.findall(r"^    nanochat plan (--table .*)$", MODEL_PAGE, flags=re.MULTILINE)
    (arguments,) = TrlParser((PlanArguments,)).parse_args_and_config(command.split())
    assert table_of_depths(arguments) in MODEL_PAGE
