"""What a stage's record promises: done means done and unharmed, one process at a time, and inputs known by content."""

import json
import multiprocessing
import os
import shutil
from dataclasses import dataclass

import pytest
from accelerate import PartialState

from modeling_nanochat.recipes.stages import lock, record
from modeling_nanochat.recipes.stages.record import Stage, fingerprint, read_stage
from modeling_nanochat.training.whole_files import write_checksums
from tests.ranks import PROCESSES, run_two_ranks


@dataclass
class Settings:
    rate: float = 1.0


def run_stage(folder, rate=1.0, inputs=(), text="weights", stop=False) -> bool:
    """A stage that writes one file; False if it was done before."""
    stage = Stage("work", str(folder), [Settings(rate)], inputs)
    if stage.is_done():
        return False
    stage.announce(steps=1)
    (folder / "model.bin").write_text(text)
    if not stop:
        stage.finish({"loss": 1.0}, [{"loss": float("nan"), "step": 1}])
    lock.release(folder / lock.NAME)
    return True


def test_what_is_done_is_not_done_again_and_what_is_harmed_is(tmp_path, capsys):
    assert run_stage(tmp_path) and not run_stage(tmp_path)
    assert read_stage(tmp_path)["log_history"] == [{"loss": None, "step": 1}]
    (tmp_path / "model.bin").write_text("weightz")  # as long as before
    assert run_stage(tmp_path)
    assert "model.bin has changed since it was written" in capsys.readouterr().out
    (tmp_path / "model.bin").unlink()
    assert run_stage(tmp_path)


def test_a_record_is_withdrawn_before_its_files_change(tmp_path):
    """Run A finishes, run B is killed, A is asked for again: its files are B's, so it has to be done again."""
    run_stage(tmp_path)
    run_stage(tmp_path, rate=2.0, text="of run B", stop=True)
    assert read_stage(tmp_path) is None
    assert run_stage(tmp_path) and (tmp_path / "model.bin").read_text() == "weights"


@pytest.mark.parametrize("name", ["stage.json", "stage.begun.json"])
def test_a_truncated_record_says_nothing(tmp_path, name):
    run_stage(tmp_path, stop=name == "stage.begun.json")
    (tmp_path / name).write_text((tmp_path / name).read_text()[:40])
    stage = Stage("work", str(tmp_path), [Settings()])
    assert not stage.is_done() and not stage.can_continue()


def test_inputs_are_known_by_their_contents(tmp_path):
    data, output = tmp_path / "own", tmp_path / "out"
    data.mkdir()
    for number in range(3):
        (data / f"shard_{number}.txt").write_text(f"text {number}")
    assert run_stage(output, inputs=[str(data)]) and not run_stage(output, inputs=[str(data)])
    shutil.copytree(data, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(data)  # whenever it was written
    before = fingerprint(data)
    for change in (
        lambda: (data / "shard_1.txt").write_text("text X"),
        lambda: (data / "shard_3.txt").write_text("one more"),
        lambda: (data / "shard_0.txt").unlink(),
    ):
        change()
        assert fingerprint(data) != before
        before = fingerprint(data)
    assert run_stage(output, inputs=[str(data)])


def test_an_input_that_is_no_longer_as_its_stage_left_it_is_refused(tmp_path):
    run_stage(tmp_path / "made")
    assert run_stage(tmp_path / "out", inputs=[str(tmp_path / "made")])
    (tmp_path / "made" / "model.bin").write_text("flipped")
    with pytest.raises(ValueError, match=r"made is not as the stage work left it: model.bin has changed"):
        run_stage(tmp_path / "out", inputs=[str(tmp_path / "made")])


def test_a_file_of_a_stage_is_held_against_its_record_and_what_was_added_counts(tmp_path):
    """As fine-tuning names its inputs: files two levels below the record; and a shard put beside those of a stage."""
    made, train = tmp_path / "made", tmp_path / "made" / "sft" / "train.jsonl"
    train.parent.mkdir(parents=True)
    train.write_text("a conversation")
    run_stage(made)
    before, of_folder = fingerprint(train), fingerprint(made)
    (made / "sft" / "added.jsonl").write_text("one more")
    assert fingerprint(train) == before and fingerprint(made) != of_folder
    (made / "README.md").write_text("a card")
    (made / "checkpoint-3").mkdir()
    (made / "checkpoint-3" / "model.bin").write_text("weights")
    added = fingerprint(made)
    (made / "checkpoint-3" / "model.bin").write_text("others")
    (made / "README.md").write_text("another card")
    assert fingerprint(made) == added
    train.write_text("a conversatiom")
    with pytest.raises(ValueError, match=r"made is not as the stage work left it: sft/train.jsonl has changed"):
        fingerprint(train)


def test_a_pattern_is_known_by_the_files_it_finds(tmp_path):
    for number in range(2):
        (tmp_path / f"text_{number}.txt").write_text(f"text {number}")
    pattern = str(tmp_path / "*.txt")
    before = fingerprint(pattern)
    assert before != "by name" and fingerprint("owner/name") == "by name"
    (tmp_path / "text_1.txt").write_text("text X")
    assert fingerprint(pattern) != before


@pytest.mark.parametrize("named", ["", "*.txt"])
def test_a_link_that_points_nowhere_is_a_change(tmp_path, named):
    (tmp_path / "text.txt").write_text("text")
    before = fingerprint(tmp_path / named)
    (tmp_path / "more.txt").symlink_to(tmp_path / "gone.txt")
    assert fingerprint(tmp_path / named) != before


def test_a_damaged_checkpoint_is_no_input(tmp_path):
    (tmp_path / "model.bin").write_text("weights")
    write_checksums(tmp_path)
    assert fingerprint(tmp_path) != "by name"
    (tmp_path / "model.bin").write_text("weightz")
    with pytest.raises(ValueError, match=r"is damaged: model.bin has changed since it was written"):
        fingerprint(tmp_path)


def take_over(folder, ready, taken):
    ready.wait()
    try:
        lock.take(folder)
        taken.put(True)
    except ValueError as error:
        assert "is at work in" in str(error)
        taken.put(False)
    ready.wait()  # a holder that ends frees the lock


def test_of_many_processes_one_takes_over_the_lock_of_a_dead_one(tmp_path):
    dead = json.dumps({"host": lock.socket.gethostname(), "process": 1, "started": "never"})
    for _ in range(2):
        (tmp_path / lock.NAME).write_text(dead)
        ready, taken = PROCESSES.Barrier(4), PROCESSES.Queue()
        racers = [PROCESSES.Process(target=take_over, args=(tmp_path, ready, taken), daemon=True) for _ in range(4)]
        for racer in racers:
            racer.start()
        assert sorted(taken.get(timeout=60) for _ in racers) == [False, False, False, True]
        for racer in racers:
            racer.join()


def test_one_process_at_a_time(tmp_path):
    run_stage(tmp_path, stop=True)
    other = multiprocessing.get_context("spawn").Process(target=os.getpid)
    other.start()
    held = {"host": lock.socket.gethostname(), "process": other.pid, "started": lock.started(other.pid)}
    (tmp_path / lock.NAME).write_text(json.dumps(held))
    if lock.started(other.pid):  # still there
        with pytest.raises(ValueError, match=rf"process {other.pid} on .* is at work in {tmp_path}; expected to wait"):
            run_stage(tmp_path)
    other.join()
    assert run_stage(tmp_path) and not (tmp_path / lock.NAME).exists()  # its process is gone
    (tmp_path / lock.NAME).write_text(json.dumps(held | {"host": "elsewhere"}))
    with pytest.raises(ValueError, match=r"on elsewhere is at work.*stage.lock to be removed"):
        lock.take(tmp_path)


def ask_on_each_rank(folder):
    """Reading inputs and finished files is left to the first rank; what it finds, an error too, is everybody's."""
    if not PartialState(cpu=True).is_main_process:
        record.damage = record.sampled_hash = record.checksums = None  # calling one would be an error
    stage = Stage("work", str(folder / "out"), [Settings()], [str(folder / "own")])
    assert stage.identity["inputs"][str(folder / "own")] == (folder / "expected").read_text()
    assert stage.is_done()
    with pytest.raises(ValueError, match="is not as the stage work left it"):
        Stage("work", str(folder / "other"), [Settings()], [str(folder / "harmed")])


def test_of_several_ranks_the_first_reads_and_tells_the_others(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "text.txt").write_text("text")
    (tmp_path / "expected").write_text(fingerprint(tmp_path / "own"))
    run_stage(tmp_path / "out", inputs=[str(tmp_path / "own")])
    run_stage(tmp_path / "harmed")
    (tmp_path / "harmed" / "model.bin").write_text("flipped")
    run_two_ranks(ask_on_each_rank, tmp_path)
