"""Transformers' own Trainer on this network: it evaluates, has logits for metrics, and keeps the best model."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from tests.modeling.test_modeling_training import tiny_model

ROWS = torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()


def make_trainer(folder, **settings) -> Trainer:
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ROWS])
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, per_device_eval_batch_size=2, eval_strategy="steps",
        eval_steps=2, save_steps=2, learning_rate=3e-3, report_to="none", use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    return Trainer(tiny_model(), arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)


def accuracy(prediction) -> dict[str, float]:
    """Over the next tokens, of which the logits of the last position have none."""
    logits, labels = prediction.predictions, prediction.label_ids
    assert logits.shape == (8, 24, 96) and labels.shape == (8, 24)
    return {"accuracy": float(np.mean(logits[:, :-1].argmax(-1) == labels[:, 1:]))}


def test_it_evaluates_and_loads_the_best_model(tmp_path):
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="accuracy")
    trainer.train()
    evaluations = [each for each in trainer.state.log_history if "eval_loss" in each]
    assert len(evaluations) == 2 and evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert trainer.state.best_metric == max(each["eval_accuracy"] for each in evaluations)
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        loss = trainer.model.eval()(ids, labels=ids).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_loss_alone_is_enough(tmp_path):
    trainer = make_trainer(tmp_path, prediction_loss_only=True, save_strategy="no")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and "eval_accuracy" not in metrics
