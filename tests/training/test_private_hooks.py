"""Which private methods of the libraries the trainers replace: those that are listed, and all of them still called."""

import inspect
import re

import pytest

from modeling_nanochat.training import trainers
from modeling_nanochat.training.trainers.dpo import NanoChatDPOTrainer
from modeling_nanochat.training.trainers.pretrain import PretrainTrainer
from modeling_nanochat.training.trainers.reinforce import ReinforceTrainer
from modeling_nanochat.training.trainers.sft import NanoChatSFTTrainer

CLASSES = (PretrainTrainer, NanoChatSFTTrainer, NanoChatDPOTrainer, ReinforceTrainer)
LISTED = set(re.findall(r"`(_\w+)`", trainers.__doc__.split("\n\n- ")[1].split("\n\n")[0]))


def libraries(trainer: type) -> list[type]:
    return [each for each in trainer.__mro__ if each.__module__.startswith(("transformers.", "trl."))]


def replaced_hooks(trainer: type) -> set[str]:
    """Private names that our classes of a trainer define, and the libraries' too."""
    ours = [each for each in trainer.__mro__ if each.__module__.startswith("modeling_nanochat.")]
    defined = {name for each in ours for name in vars(each) if re.match("_[a-z]", name)}
    return {name for name in defined if any(name in vars(each) for each in libraries(trainer))}


def test_what_is_replaced_is_what_is_listed():
    """A hook that a library renames would be ours alone, and never called."""
    assert set().union(*map(replaced_hooks, CLASSES)) == LISTED


@pytest.mark.parametrize("trainer", CLASSES)
def test_the_libraries_still_call_what_is_replaced(trainer):
    source = "".join(inspect.getsource(each) for each in libraries(trainer))
    assert {name for name in replaced_hooks(trainer) if not re.search(rf"self\.{name}\b", source)} == set()
