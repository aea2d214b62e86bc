"""Fine-tuning: what is trained on, exact batches, the loss, and runs that do not depend on batch or ranks."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import TrainerCallback

from modeling_nanochat import NanoChatGPTForCausalLM, render_conversation
from modeling_nanochat.training.data.conversations import ConversationFile, write_rows
from modeling_nanochat.training.tokenizer import train_tokenizer
from modeling_nanochat.training.trainers.lora import ADAPTED, merged
from modeling_nanochat.training.trainers.pretrain import Evaluation
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig, NanoChatSFTTrainer, WholeBatches
from tests.ranks import run_two_ranks
from tests.toys import narrow_model

LENGTH = 64


def conversations(count: int) -> list[list[dict]]:
    """Greetings of several lengths, some with a system message, some with a call of the calculator."""
    made = []
    for i in range(count):
        messages = [{"role": "user", "content": f"{'Good day! ' * (i % 4)}What is {i} + 1?"}]
        if i % 3 == 0:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        parts = [
            {"type": "text", "text": "It is "},
            {"type": "python", "text": f"{i}+1"},
            {"type": "python_output", "text": str(i + 1)},
        ]
        messages.append({"role": "assistant", "content": parts if i % 2 else f"{i + 1}."})
        made.append(messages)
    return made


def make_tokenizer():
    return train_tokenizer([message["content"] for row in conversations(200) for message in row[:-1]], 320)


def make_trainer(
    folder: Path, count: int = 64, train=None, validation=None, evaluations=(), **overrides
) -> NanoChatSFTTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        "activation_dtype": "float32",
        "polar_dtype": "float32",
    }
    return NanoChatSFTTrainer(
        narrow_model(),
        NanoChatSFTConfig(str(folder), **(settings | overrides)),
        [{"messages": messages} for messages in conversations(count)] if train is None else train,
        [{"messages": json.dumps(messages)} for messages in conversations(21)] if validation is None else validation,
        processing_class=make_tokenizer(),
        evaluations=evaluations,
    )


def test_every_step_has_the_same_number_of_full_rows(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 2 * trainer.planned_steps
    assert 8 * trainer.planned_steps + trainer.rows_left_out == trainer.packed["train"].figures()["rows"]
    for batch in batches:
        assert batch["input_ids"].shape == batch["labels"].shape == (4, LENGTH)
        assert batch["attention_mask"].all()


def test_only_what_the_assistant_wrote_carries_loss(tmp_path):
    """The trained tokens of all rows are those of the renderer's masks, so tool output is not among them."""
    trainer = make_trainer(tmp_path)
    tokenizer, rows = trainer.processing_class, trainer.eval_dataset
    trained = sorted(label for row in rows for label in row["labels"] if label != -100)
    rendered = [render_conversation(tokenizer, messages) for messages in conversations(21)]
    assert trained == sorted(token for ids, mask in rendered for token, kept in zip(ids, mask) if kept)
    output = tokenizer.convert_tokens_to_ids("<|output_start|>")
    assert any(output in row["input_ids"] for row in rows) and output not in trained
    assert tokenizer.convert_tokens_to_ids("<|assistant_end|>") in trained
    for row in rows:
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))

    figures, tokens = trainer.packed["eval"].figures(), sum(len(ids) for ids, _ in rendered)
    assert (figures["conversations"], figures["tokens"], figures["trained_tokens"]) == (21, tokens, len(trained))
    assert figures["trained_share"] == len(trained) / tokens
    assert figures["utilisation"] == tokens / (len(rows) * LENGTH) and figures["trimmed_conversations"] == 0


def test_conversations_longer_than_a_row_are_cut_and_counted(tmp_path):
    trainer = make_trainer(tmp_path, max_length=24)
    assert trainer.packed["train"].figures()["trimmed_conversations"] > 5
    assert len(trainer.train_dataset[0]["input_ids"]) == 24


def test_the_loss_is_the_mean_over_trained_tokens_in_training_and_validation(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.model(batch["input_ids"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)
    torch.testing.assert_close(
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1000)),
        expected * (batch["labels"][:, 1:] != -100).sum() / 1000,
    )

    rows = trainer.eval_dataset.with_format("torch")[:]
    with torch.no_grad():
        logits = trainer.model(rows["input_ids"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), rows["labels"][:, 1:].flatten().long()).item()
    for batch_size in (1, 3, 64):  # rows that fill no batch count too
        trainer.args.per_device_eval_batch_size = batch_size
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def final_weights(folder: Path, **overrides) -> dict[str, torch.Tensor]:
    trainer = make_trainer(folder, **overrides)
    trainer.train()
    folder.mkdir(exist_ok=True)
    (folder / "loss").write_text(str(trainer.evaluate()["eval_loss"]))
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def assert_same_run(folder: Path, ours: dict[str, torch.Tensor], other: Path, others: dict[str, torch.Tensor]) -> None:
    start = dict(narrow_model().named_parameters())
    for name, weight in ours.items():
        moved = (others[name] - start[name]).norm()
        assert moved > 0 and (weight - others[name]).norm() <= 0.02 * moved, name
    losses = [float((path / "loss").read_text()) for path in (folder, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_batch_of_eight_is_eight_of_one(tmp_path):
    """Rows carry loss on different numbers of tokens, so this fails if a mean of means is taken anywhere."""
    one = final_weights(tmp_path / "one", per_device_train_batch_size=8)
    eight = final_weights(tmp_path / "eight", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_same_run(tmp_path / "one", one, tmp_path / "eight", eight)


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path):
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append({name: parameter.detach() for name, parameter in trainer.model.named_parameters()})
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def train_and_save(folder: Path) -> None:
    weights = final_weights(folder, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    if torch.distributed.get_rank() == 0:
        save_file(weights, folder / "weights.safetensors")


def test_two_ranks_end_with_the_same_weights_as_one(tmp_path):
    run_two_ranks(train_and_save, folder := tmp_path / "two")
    one = final_weights(tmp_path / "one", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert_same_run(folder, load_file(folder / "weights.safetensors"), tmp_path / "one", one)


def test_a_run_learns_and_follows_its_schedule(tmp_path):
    trainer = make_trainer(tmp_path, count=400, init_lr_frac=10.0)  # rates fall with the batch, which is tiny
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert len(log) == trainer.planned_steps
    rates = [line["learning_rate"] for line in log]
    flat = round(0.8 * len(rates))
    assert rates[:flat] == [rates[0]] * flat and rates[-1] == pytest.approx(rates[0] / (len(rates) - flat), rel=0.01)
    assert trainer.state.total_flos == trainer.flops_per_token * trainer.batch_tokens * trainer.planned_steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 65}, "max_length=65, expected at most"),
        ({"per_device_train_batch_size": 1000}, "expected at least one batch of 1000 rows"),
        ({"packing": True}, "packing=True"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0, expected 0"),
        ({"activation_dtype": "float16"}, "activation_dtype is 'float16'"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_a_step_without_any_trained_token_changes_nothing_and_shows_no_loss(tmp_path):
    """Step 2 of 3: after the first, momentum alone would move every weight."""
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=1)
    after = []

    class Copy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            after.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})

    def two_without_targets(iterator, count, device, take=trainer.get_batch_samples):
        batches = list(itertools.islice(iterator, count))
        if trainer.state.global_step == 1:
            batches[0]["labels"][:] = -100
        return take(iter(batches), count, device)

    trainer.get_batch_samples = two_without_targets
    trainer.add_callback(Copy())
    trainer.train()
    assert all(torch.equal(weight, after[0][name]) for name, weight in after[1].items())
    assert any(not torch.equal(weight, after[1][name]) for name, weight in after[2].items())
    log = {line["step"]: line for line in trainer.state.log_history if "learning_rate" in line}
    assert [step for step, line in log.items() if "loss" in line] == [1, 3]
    assert log[2]["steps_without_trained_tokens"] == 1


def test_prompts_longer_than_a_row_train_nothing_and_are_counted(tmp_path):
    """Ten of them and ten short ones, a row at a time: every step once divided 0 by 0."""
    long = [{"role": "user", "content": "Good day! " * 40}, {"role": "assistant", "content": "Yes."}]
    rows = [{"messages": messages} for messages in [long] * 10 + conversations(10)]
    trainer = make_trainer(tmp_path, train=rows, per_device_train_batch_size=1)
    assert trainer.packed["train"].figures()["untrained_conversations"] == 10
    trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == trainer.planned_steps and min(losses) > 0


def test_rows_that_fill_no_batch_change_from_epoch_to_epoch():
    epoch = iter([*range(20), 0])
    sampler = WholeBatches(10, 4, seed=3, epoch=lambda: next(epoch))
    orders = []
    for _ in range(20):
        orders.append(list(sampler))
        assert len(set(orders[-1])) == len(orders[-1]) == len(sampler) == 8
    assert {row for order in orders for row in range(10) if row not in order} == set(range(10))
    assert list(sampler) == orders[0] != orders[1]
    assert list(WholeBatches(10, 4, seed=4, epoch=lambda: 0)) != orders[0]


def test_a_file_is_read_where_its_lines_lie_in_an_order_of_the_seed(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [{"messages": messages, "source": "made"} for messages in conversations(50)]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    lines = list(ConversationFile(file, seed=1))
    assert [row["where"] for row in lines] == [row["where"] for row in ConversationFile(file, seed=1)]
    assert [row["where"] for row in lines] != [row["where"] for row in ConversationFile(file, seed=2)]
    for row in lines:  # each names the line it is
        number = int(row["where"].rsplit(":", 1)[1])
        assert json.loads(row["line"]) == rows[number - 1]
    assert len(lines) == len(ConversationFile(file)) == 50
    assert [row["where"] for row in ConversationFile(file, seed=1, limit=7)] == [row["where"] for row in lines[:7]]
    with pytest.raises(ValueError, match="does not exist"):
        ConversationFile(tmp_path / "none.jsonl")


BAD_LINES = {
    '{"messages": [': "no JSON",
    '["x"]': 'expected {"messages": [...]} in one line',
    '{"text": "no conversation"}': 'expected {"messages": [...]} in one line',
    '{"messages": "x"}': "messages must be a list",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "roles must go user",
    '{"messages": [{"role": "user", "content": ""}]}': "a text is empty",
    '{"messages": [{"role": "user", "content": "x", "weight": 0}]}': "fields",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "half a surrogate pair",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_conversation_is_named_by_file_and_line_or_left_out_and_counted(tmp_path, bad):
    file = tmp_path / "train.jsonl"
    good = [json.dumps({"messages": messages}) for messages in conversations(30)]
    file.write_text("\n".join([*good[:3], bad, *good[3:]]))
    with pytest.raises(ValueError) as caught:
        make_trainer(tmp_path / "out", train=ConversationFile(file))
    assert str(caught.value).startswith(f"{file}:4: ") and BAD_LINES[bad] in str(caught.value)
    assert "\n" not in str(caught.value)
    trainer = make_trainer(tmp_path / "out", train=ConversationFile(file), skip_bad_conversations=True)
    packed = trainer.packed["train"]
    assert packed.figures()["skipped_conversations"] == 1 and packed.figures()["conversations"] == 30
    assert packed.errors[0].startswith(f"{file}:4: ")


def test_several_processes_render_the_same_rows(tmp_path):
    rows = [{"messages": messages, "where": str(number)} for number, messages in enumerate(conversations(300))]
    tokenizer = make_tokenizer()
    files = [tmp_path / "one.arrow", tmp_path / "two.arrow"]
    figures = [
        write_rows(file, rows, tokenizer, LENGTH, processes=processes).figures()
        for file, processes in zip(files, (1, 2))
    ]
    assert figures[0] == figures[1] and figures[0]["conversations"] == 300
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bits_per_byte_are_those_of_the_trained_tokens_that_are_text(tmp_path):
    trainer = make_trainer(tmp_path)
    nats = size = 0.0
    for row in trainer.eval_dataset:
        with torch.no_grad():
            scores = trainer.model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(dim=-1)
        for place, token in enumerate(row["labels"][1:]):
            if token != -100 and token not in trainer.processing_class.all_special_ids:
                nats -= scores[place, token].item()
                size += len(trainer.processing_class.convert_ids_to_tokens(token))
    assert trainer.evaluate()["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_evaluations_of_the_recipe_run_when_they_are_due(tmp_path):
    seen = []

    def measure(model, step):
        assert not model.training
        seen.append(step)
        return {"chat_core": step / 10}

    trainer = make_trainer(tmp_path, max_steps=5, evaluations=[Evaluation(measure, 2)], validation=[])
    assert trainer.evaluate() == {}  # nothing is shown where there is nothing to measure
    trainer.train()
    assert trainer.evaluate() == {"eval_chat_core": 0.5}
    assert seen == [2, 4, 5]
    assert not any("eval_loss" in line for line in trainer.state.log_history)


def test_adapters_are_trained_saved_resumed_and_merged(tmp_path):
    start = {name: weight.clone() for name, weight in narrow_model().named_parameters()}
    ended = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, lora_rank=4)
        before = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=checkpoint)
        ended.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
    assert all(torch.equal(weight, ended[1][name]) for name, weight in ended[0].items())
    loss = trainer.evaluate()["eval_loss"]
    assert loss < before
    files = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    batch = {name: torch.tensor(values) for name, values in trainer.eval_dataset[:3].items()}
    logits = trainer.model(input_ids=batch["input_ids"]).logits
    whole = merged(trainer.model, tmp_path)
    assert type(whole) is NanoChatGPTForCausalLM and (tmp_path / "adapter" / "adapter_config.json").exists()
    torch.testing.assert_close(whole(input_ids=batch["input_ids"]).logits, logits, atol=1e-4, rtol=1e-4)
    moved = {name for name, weight in whole.named_parameters() if not torch.equal(weight, start[name])}
    assert moved and all(any(part in name for part in ADAPTED) for name in moved)


def test_a_warm_start_takes_moments_and_no_rates(tmp_path):
    first = make_trainer(tmp_path / "first", max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    warm = make_trainer(
        tmp_path / "warm", max_steps=1, init_lr_frac=0.0, warm_start=str(tmp_path / "first" / "checkpoint-2")
    )
    warm.train()  # at rate 0: only the moments move
    moments = [optimizer.optimizer.state_dict()["state"] for optimizer in (first.optimizer, warm.optimizer)]
    assert [group["lr"] for group in warm.optimizer.param_groups] == [0.0] * len(warm.optimizer.param_groups)
    assert {entry["step"].item() for entry in moments[1].values() if "step" in entry} == {3}
    assert {entry["step"].item() for entry in moments[0].values() if "step" in entry} == {2}
    with pytest.raises(ValueError, match="holds 0 shards of the optimizer"):
        make_trainer(tmp_path / "none", max_steps=1, warm_start=str(tmp_path)).train()
    with pytest.raises(ValueError, match="fits whole weights only"):
        make_trainer(tmp_path / "lora", warm_start="x", lora_rank=4)


def test_steps_of_another_size_do_not_go_on(tmp_path):
    """Its position in the data is a number of steps: with others, rows would be skipped or seen again, unnoticed."""
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    other = make_trainer(tmp_path, max_steps=4, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"took \d+ rows, one of this run takes \d+ .* expected the same product"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_resumed_at_its_last_step_takes_no_other(tmp_path):
    """The Trainer took one more each time."""
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    resumed = make_trainer(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 3 and len(resumed.state.log_history) > 1
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for name, tensor in resumed.model.state_dict().items():
        assert name not in saved or torch.equal(tensor, saved[name]), name
