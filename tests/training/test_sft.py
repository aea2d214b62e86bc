"""Fine-tuning: what is trained on, exact batches, the loss, and runs that do not depend on batch or ranks."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, render_conversation
from modeling_nanochat.recipes.sft import read_conversations
from modeling_nanochat.training.tokenizer import train_tokenizer
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig, NanoChatSFTTrainer
from tests.ranks import run_two_ranks

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


def make_model() -> NanoChatGPTForCausalLM:
    """Two narrow layers with every weight drawn: where blocks give zero, some gradients are mere rounding."""
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        2, vocab_size=320, head_dim=32, max_position_embeddings=LENGTH, hidden_size=64, num_attention_heads=2
    )
    model = NanoChatGPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def make_trainer(folder: Path, count: int = 64, **overrides) -> NanoChatSFTTrainer:
    settings = {
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        "activation_dtype": "float32",
        "polar_dtype": "float32",
    }
    return NanoChatSFTTrainer(
        make_model(),
        NanoChatSFTConfig(str(folder), **(settings | overrides)),
        Dataset.from_dict({"messages": [json.dumps(messages) for messages in conversations(count)]}),
        Dataset.from_dict({"messages": [json.dumps(messages) for messages in conversations(21)]}),
        processing_class=make_tokenizer(),
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
    start = dict(make_model().named_parameters())
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


def test_reading_a_mixture(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [{"messages": messages, "source": "made"} for messages in conversations(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [json.loads(messages) for messages in read_conversations(str(file), seed=1)]
    assert found != conversations(50) and sorted(map(str, found)) == sorted(map(str, conversations(50)))
    assert [json.dumps(messages) for messages in found] == read_conversations(str(file), seed=1)
    file.write_text('{"messages": []}\n{"text": "no conversation"}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:2: expected .*got '{\"text\": \"no conv"):
        read_conversations(str(file), seed=1)
