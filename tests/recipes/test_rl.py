"""Reinforcement as a person runs it: rewards by name, problems from a file, what is refused, what is shown."""

import itertools
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.tasks import arithmetic, factors
from modeling_nanochat.eval.tasks.checkers import is_right
from modeling_nanochat.recipes import rl
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.recipes.stages.record import read_stage
from modeling_nanochat.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and problems of two kinds, some after another turn."""
    folder = tmp_path_factory.mktemp("rl")
    sums, puzzles = (list(itertools.islice(task.generate(0), 40)) for task in (arithmetic, factors))
    tokenizer = train_tokenizer([row["messages"][0]["content"] for row in sums], 320)
    config = NanoChatGPTConfig.from_depth(2, vocab_size=320, head_dim=16, max_position_embeddings=192)
    save_checkpoint(NanoChatGPTForCausalLM(config), tokenizer, str(folder / "model"))
    longer = [{**row, "messages": sums[0]["messages"] + row["messages"]} for row in sums]
    for split, rows in (("train", [*sums, *puzzles, *longer[:4]]), ("validation", [puzzles[0], sums[0]])):
        file = folder / "data" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder, monkeypatch, *options: str):
    settings = {
        "model": "model", "data": "data", "output_dir": "out", "max_steps": 1, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "num_generations": 2, "num_generations_eval": 2, "max_completion_length": 6,
    }  # fmt: skip
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["rl", *(f"--{name}={value}" for name, value in settings.items()), *options])
    rl.main()


def test_own_rewards_and_problems_of_several_kinds(folder, monkeypatch, capsys):
    (folder / "own_rewards.py").write_text(
        "def brevity(text, problem):\n    return -len(text) / len(problem['answer'])\n"
    )
    monkeypatch.syspath_prepend(folder)
    run(folder, monkeypatch, "--rewards", "checker", "own_rewards:brevity", "--reward_weights", "1", "0.1")
    printed = capsys.readouterr().out
    assert "call rate" in printed and "before ✗" in printed and "after  ✗" in printed
    record = read_stage(folder / "out")
    (step,) = (entry for entry in record["log_history"] if "call_rate" in entry)
    assert step["rewards/own_rewards:brevity/mean"] < 0
    assert [sample["task"] for sample in record["samples"]] == ["before", "before", "after", "after"]
    assert record["inputs"][str(folder / "own_rewards.py")] != "by name"  # changed rewards are another run


def test_adapters_alone_learn_and_are_merged_at_the_end(folder, monkeypatch):
    (folder / "lengths.py").write_text("def length(text, problem):\n    return len(text)\n")
    monkeypatch.syspath_prepend(folder)
    run(folder, monkeypatch, "--rewards", "lengths:length", "--lora_rank", "2", "--lora_lr", "0.1",
        "--output_dir", "adapted", "--max_steps", "2")  # fmt: skip
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "adapted"))
    assert before.keys() == after.keys() and (folder / "adapted" / "adapter" / "adapter_model.safetensors").exists()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".layers." in name for name in moved)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json", "reward 'json': expected checker, number, factor, letter, program or module:function"),
        ("nowhere:brevity", "reward 'nowhere:brevity': nowhere cannot be imported from here"),
        ("json:brevity", "reward 'json:brevity': json has no function 'brevity'"),
    ],
)
def test_a_reward_that_is_none_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        rl.find_reward(name)


@pytest.mark.parametrize("name", ["checker", "number"])
def test_an_answer_that_was_cut_off_earns_nothing(name):
    reward, problem = rl.find_reward(name), {"answer": "42"}
    assert reward("#### 42<|assistant_end|>", problem) and not reward("#### 41<|assistant_end|>", problem)
    assert not reward("#### 42\n####\n####", problem)  # right, and without an end: nothing else would pay for one


def test_a_prompt_without_room_for_an_answer_is_refused_by_file_and_row(folder, monkeypatch):
    file = folder / "data" / "train.jsonl"
    rows, message = file.read_text(), r"train.jsonl:85: the prompt has \d+ tokens, and the model's context room"
    too_long = {"messages": [{"role": "user", "content": "What is 1 + 1? " * 40}], "answer": "2"}
    try:
        file.write_text(rows + json.dumps(too_long) + "\n")
        with pytest.raises(ValueError, match=message):
            run(folder, monkeypatch, "--rerun", "true")
    finally:
        file.write_text(rows)


def test_factors_are_judged_by_division():
    for row in itertools.islice(factors.generate(3), 50):
        *_, final = row["messages"][1]["content"]
        assert is_right(final["text"], row)
    problem = {"answer": "15743", "checker": "factor"}  # 7 * 13 * 173
    for right in ("[15743/13 = 1211]\n#### 13", "#### 7", "#### 173", "#### 91"):
        assert is_right(right, problem)
    for wrong in ("#### 1", "#### 15743", "#### 11", "#### 0", "13", "#### 11\n#### 13", "#### -7"):
        assert not is_right(wrong, problem)
    with pytest.raises(ValueError, match="checker is 'sum', expected one of number"):
        is_right("", {"checker": "sum"})


def test_people_break_a_search_off_and_a_teacher_shows_it_whole():
    def tries(row):
        return [int(part["text"].split("/")[1]) for part in row["messages"][1]["content"] if part["type"] == "python"]

    found = 0
    for row in itertools.islice(factors.generate(3), 200):
        (fits,) = (prime for prime in factors.PRIMES if int(row["answer"]) % prime == 0)
        assert fits not in tries(row)[:-1] and len(set(tries(row))) == len(tries(row))
        found += tries(row)[-1] == fits
    assert 40 < found < 100  # of 200; the others name a factor that their work does not show
    for row in itertools.islice(factors.generate(3, systematic=True), 50):
        (fits,) = (prime for prime in factors.PRIMES if int(row["answer"]) % prime == 0)
        assert tries(row) == [prime for prime in factors.PRIMES if prime <= fits]
