"""Processes that torchrun started on a machine without GPUs: told so, they work together; untold, none trains."""

from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from transformers import Trainer, TrainingArguments

from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.muon import muon
from modeling_nanochat.training.ranks import meet
from modeling_nanochat.training.trainers.pretrain import PretrainConfig, PretrainTrainer
from tests.ranks import run_two_ranks
from tests.training.test_pretrain import ListedRows
from tests.training.toy_networks import build

ROWS = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4


def meet_and_count(folder: Path) -> None:
    meet()
    assert PartialState().num_processes == 2
    assert TrainingArguments(str(folder)).world_size == 2  # without use_cpu
    assert PretrainConfig(str(folder)).world_size == 2


def train_untold(folder: Path) -> None:
    message = r"2 processes were launched, .* TrainingArguments\(use_cpu=True\)"
    settings = {"max_steps": 1, "report_to": "none"}
    trainer = Trainer(
        build("llama"), TrainingArguments(str(folder), **settings), train_dataset=ROWS,
        optimizer_cls_and_kwargs=muon(lr=0.01, adamw_lr=0.001),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        trainer.train()
    rows = RowLoader(lambda stream, streams: ListedRows(np.ones((8, 5), dtype=int)), 2, 4)
    with pytest.raises(ValueError, match=message):
        PretrainTrainer(build("llama"), PretrainConfig(str(folder), **settings), rows)


@pytest.mark.parametrize("work", [meet_and_count, train_untold])
def test_two_processes(work, tmp_path):
    run_two_ranks(work, tmp_path)
