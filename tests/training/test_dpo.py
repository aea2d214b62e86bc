"""Preference learning: what is compared, the reference, and that the margin grows."""

import json
from functools import partial

import pytest
import torch

from modeling_nanochat import render_conversation
from modeling_nanochat.eval.tasks.rows import read_rows
from modeling_nanochat.recipes.dpo import FORM, as_pair
from modeling_nanochat.training.trainers.dpo import NanoChatDPOConfig, NanoChatDPOTrainer
from tests.toys import narrow_model
from tests.training.test_sft import LENGTH, make_tokenizer


def pairs(count: int) -> list[dict]:
    made = []
    for i in range(count):
        call = [
            {"type": "python", "text": f"{i}+1"},
            {"type": "python_output", "text": str(i + 1)},
            {"type": "text", "text": "."},
        ]
        made.append(
            {
                "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
                "chosen": [{"role": "assistant", "content": call}],
                "rejected": [{"role": "assistant", "content": f"It is {i}."}],
            }
        )
    return made


def make_trainer(folder, rows=None, **overrides) -> NanoChatDPOTrainer:
    settings = {
        "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True, "activation_dtype": "float32",
        "polar_dtype": "float32", "init_lr_frac": 0.2,
    }  # fmt: skip
    config = NanoChatDPOConfig(str(folder), **(settings | overrides))
    rows = pairs(24) if rows is None else rows
    return NanoChatDPOTrainer(narrow_model(), config, rows, pairs(6), processing_class=make_tokenizer())


@pytest.mark.parametrize("rank", [0, 4])
def test_the_margin_of_the_chosen_answers_grows(tmp_path, rank):
    trainer = make_trainer(tmp_path, lora_rank=rank)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: network and reference are equal
    reference = None if rank else {name: weight.clone() for name, weight in trainer.ref_model.named_parameters()}
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/margins"] > 0.05 and after["eval_loss"] < before["eval_loss"]
    if not rank:
        assert all(torch.equal(weight, reference[name]) for name, weight in trainer.ref_model.named_parameters())


def test_what_is_compared_are_the_answers_without_the_calculators_output(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[3]])
    for row, answer in enumerate(("chosen", "rejected")):
        ids, mask = render_conversation(trainer.processing_class, pairs(4)[3]["prompt"] + pairs(4)[3][answer])
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["completion_mask"][row].tolist()[: len(ids)] == mask
        assert batch["completion_mask"][row, len(ids) :].sum() == 0


def test_pairs_that_do_not_fit_are_left_out_and_counted(tmp_path):
    long = {**pairs(1)[0], "rejected": [{"role": "assistant", "content": "no " * 2 * LENGTH}]}
    assert make_trainer(tmp_path, [long, *pairs(5)]).left_out == {"train": 1, "eval": 0}
    with pytest.raises(ValueError, match="of the pairs none fits 64 tokens"):
        make_trainer(tmp_path, [long])


def test_both_forms_of_a_pair_are_read():
    pair, take = pairs(1)[0], partial(as_pair, tokenizer=make_tokenizer())
    whole = {name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")}
    assert take(whole) == take(pair) == pair
    assert take(json.loads(json.dumps(pair))) == pair
    with pytest.raises(ValueError, match="do not follow the same"):
        take({"chosen": whole["chosen"], "rejected": whole["rejected"][1:]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "Hi", "chosen": "yes", "rejected": "no"}', "must be lists of messages"),
        (b'{"chosen": [], "rejected": []}', "at least one user message"),
        ('{"chosen": "caf\u00e9"}'.encode("latin-1"), r"no UTF-8 \(byte 0xe9 at 15\)"),
        (json.dumps({**pairs(1)[0], "rejected": [{"role": "assistant", "content": "\ud800"}]}).encode(), "surrogate"),
        (b'{"prompt": [{"role": "user"', "no JSON"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "train.jsonl").write_bytes(json.dumps(pairs(1)[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"train.jsonl:2: .*{message}.*; expected"):
        read_rows(tmp_path / "train.jsonl", partial(as_pair, tokenizer=make_tokenizer()), FORM)
