"""Runs that end early: by a signal, with everything kept; by a number that is not finite, with nothing spoilt."""

import errno
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_nanochat.training.trainers import stopping
from modeling_nanochat.training.trainers.checkpoints import latest_checkpoint
from modeling_nanochat.training.trainers.stopping import Stopped
from tests.training.test_pretrain import tiny_trainer


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, number):
    whole = tiny_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    trainer = tiny_trainer(tmp_path / "run", max_steps=6)
    trainer.add_callback(At(2, lambda: os.kill(os.getpid(), number)))
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after step [23] of 6, which is saved") as stopped:
        trainer.train()
    assert stopped.value.number == number and signal.getsignal(number) == before
    resumed = tiny_trainer(tmp_path / "run", max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_signal_that_is_passed_on_is_one_and_a_later_one_acts_at_once(tmp_path, monkeypatch):
    """torchrun sends its processes the Ctrl-C that the terminal has sent them already."""

    def twice():
        signal.raise_signal(signal.SIGINT)  # is handled before it returns: `os.kill` may make one of two
        signal.raise_signal(signal.SIGINT)

    trainer = tiny_trainer(tmp_path, max_steps=6)
    trainer.add_callback(At(2, twice))
    with pytest.raises(Stopped, match=r"stopped by SIGINT after step [23] of 6"):
        trainer.train()
    monkeypatch.setattr(stopping, "SECONDS_OF_ONE_SIGNAL", -1.0)
    trainer = tiny_trainer(tmp_path, max_steps=6)
    trainer.add_callback(At(2, twice))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a suite in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path):
    """It used to be forgotten: the run measured, saved and ended as if nothing had been."""
    whole = tiny_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    trainer = tiny_trainer(tmp_path / "run", max_steps=4, save_strategy="no")
    trainer.add_callback(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 4 of 4, which is saved"):
        trainer.train()
    resumed = tiny_trainer(tmp_path / "run", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=8, save_strategy="steps", save_steps=2, save_total_limit=1, logging_steps=3
    )
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    trainer.add_callback(At(3, lambda: weight.data.fill_(float("nan"))))
    with pytest.raises(ValueError, match=r"at step \d.*The last good checkpoint is .*checkpoint-2; expected lower"):
        trainer.train()
    assert latest_checkpoint(tmp_path, print).endswith("checkpoint-2")
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_weights_that_are_no_numbers_are_named_and_not_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=2, logging_steps=100)
    weight = trainer.model.model.layers[1].self_attn.o_proj.weight
    trainer.add_callback(At(2, lambda: weight.data.view(-1)[0].fill_(float("inf"))))
    with pytest.raises(
        ValueError, match=r"model.layers.1.self_attn.o_proj.weight is not finite at step 2.*no checkpoint"
    ):
        trainer.train()
    assert latest_checkpoint(tmp_path) is None


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=3)
    trainer.train()
    said = []
    assert latest_checkpoint(tmp_path, said.append).endswith("checkpoint-6") and not said
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    weights.write_bytes(content)
    (tmp_path / "checkpoint-4" / "scheduler.pt").unlink()
    assert latest_checkpoint(tmp_path, said.append).endswith("checkpoint-2")
    assert "model.safetensors has changed" in said[0] and "scheduler.pt is missing" in said[1]
    (tmp_path / "checkpoint-2" / "checksums.json").unlink()
    assert latest_checkpoint(tmp_path, said.append) is None


def test_resuming_takes_new_settings(tmp_path):
    """Rates, decay and length are those of the settings; moments and step come from the checkpoint."""
    tiny_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    longer = tiny_trainer(tmp_path, max_steps=8, matrix_lr=0.5, weight_decay=3.0)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert longer.state.global_step == 8
    fresh = tiny_trainer(tmp_path / "fresh", max_steps=8, matrix_lr=0.5, weight_decay=3.0)
    fresh.train()
    wanted = {group["name"]: group for group in fresh.optimizer.param_groups}
    for group in longer.optimizer.param_groups:
        same = {name: value for name, value in group.items() if name != "params"}
        assert same == {name: value for name, value in wanted[group["name"]].items() if name != "params"}


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 824640 vs 824528"), 0),
        (SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"), 2 << 20),
    ],
)
def test_a_full_disk_is_said_and_keeps_what_was_whole(tmp_path, monkeypatch, error, free):
    """The second as when the library has removed its half file again, so that there is room."""
    trainer = tiny_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    plain_save = torch.save

    def save(value, file, *args, **kwargs):
        if "checkpoint-4" in str(file):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
            raise error
        plain_save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"the disk is full: .*could not be written.*what was whole before is kept"):
        trainer.train()
    assert not (tmp_path / ".incomplete").exists()
    assert latest_checkpoint(tmp_path, print).endswith("checkpoint-2")
