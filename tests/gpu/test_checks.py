"""`make gpu-check` itself: its checks work, at toy size on a CPU, and without a GPU it says what it would have done."""

import json

import pytest
import torch

from modeling_nanochat import chunked_cross_entropy
from modeling_nanochat.recipes import pretrain, rl, sft
from tests.gpu import checks, run
from tests.gpu.checks import CHECKS, Found, Machine


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return Machine(
        torch.device("cpu"), tmp_path_factory.mktemp("gpu"), depth=2, sequence_length=64, vocab_size=320, head_dim=32,
        batch_tokens=512, backend="aot_eager",
    )  # fmt: skip


@pytest.mark.parametrize(
    "check", [each for each in CHECKS if each is not checks.stages_run], ids=lambda each: each.__name__
)
def test_checks_work_on_a_cpu(check, machine, monkeypatch):
    """Speed is no matter here: what only says how fast it is may come out either way."""
    monkeypatch.setattr(chunked_cross_entropy, "_drop_ignored", lambda hidden, targets: (hidden, targets))
    found = run.run_check(check, machine)
    assert found.ok or check in (checks.rollouts, checks.faster_than_a_plain_loop), found.said
    assert "Error" not in found.said
    json.dumps(found.figures)


def test_wrong_numbers_are_found(machine):
    """A device that computes something else: here a network whose weights change on the way to it."""

    def wrong(model):
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(1.2)
        return model

    assert not checks.compare(machine, ["seed"], wrong).ok


@pytest.mark.slow
def test_a_stage_that_fails_is_named(machine, monkeypatch):
    monkeypatch.setattr(checks, "stage_commands", lambda folder: [["pretrain", "--config", "nothing/such"]])
    found = checks.stages_run(machine)
    assert not found.ok and found.said.startswith("pretrain: exit code 2: ") and "nothing/such" in found.said


def test_the_commands_of_the_stages_are_read(machine, monkeypatch):
    """Every option that they give exists; nothing is run."""

    class Read(Exception):
        pass

    def stop(*arguments):
        raise Read

    recipes = {"pretrain": pretrain, "sft": sft, "rl": rl}
    for name, *arguments in checks.stage_commands(machine.folder):
        if name in recipes:
            monkeypatch.setattr("sys.argv", [name, *arguments, "--use_cpu", "true"])
            monkeypatch.setattr(recipes[name], "Stage", stop)
            with pytest.raises(Read):
                recipes[name].main()


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["run"])
    assert run.main() == 2
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("no GPU here") and len(lines) == len(CHECKS)


def test_the_table_and_the_file(monkeypatch, capsys, tmp_path):
    """With a GPU, one check that fails does not keep the others from being run and written."""

    def breaks(machine):
        """a check that dies"""
        raise RuntimeError("kernel image\nis missing")

    def works(machine):
        """a check"""
        return Found(True, "fine", {"x": 1})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(run, "machine_facts", lambda device: {"device": "Toy", "torch": "2", "transformers": "5"})
    monkeypatch.setattr(run, "CHECKS", (breaks, works))
    monkeypatch.setattr("sys.argv", ["run", "--output", str(tmp_path / "found.json")])
    assert run.main() == 1
    written = json.loads((tmp_path / "found.json").read_text())
    assert [each["ok"] for each in written["checks"]] == [False, True] and written["machine"]["device"] == "Toy"
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "RuntimeError: kernel image" in shown and "1 of 2 as they should be" in shown
