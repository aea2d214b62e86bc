"""Muon-AdamW against AdamW on a small Qwen3 in the stock Trainer: how many steps to AdamW's final loss.

    nanochat prepare_data --config demo/data
    nanochat train_tokenizer --config demo/tokenizer --vocab_size 512 --output_dir out/muon/tokenizer
    OMP_NUM_THREADS=1 python -m benchmarks.muon

Both see the same rows in the same order, with the same warm-up and a linear fall to zero. Each gets the same number of
settings at the full number of steps: AdamW six rates, Muon-AdamW three rates of Muon times two of AdamW. Then the
best Muon-AdamW runs anew, each time with a schedule of its own length, for ever fewer steps: the fewest that end below
AdamW's best loss are the result. The best settings of both are run from two more seeds, to show the noise.
Losses are of held-out documents. One core needs about ten minutes.
"""

import itertools
import tempfile
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    enable_full_determinism,
)
from transformers.utils import logging
from trl import TrlParser

from modeling_nanochat.training.data.documents import open_documents
from modeling_nanochat.training.data.row_source import RowSource
from modeling_nanochat.training.muon import muon

BETAS = (0.9, 0.95)  # of AdamW in both
WARMUP = 0.05  # of the steps


@dataclass
class MuonBenchmarkArguments:
    """What to compare."""

    data: str = field(default="out/demo/data/pretrain", metadata={"help": "Documents."})
    tokenizer: str = field(default="out/muon/tokenizer", metadata={"help": "Folder of the tokenizer."})
    layers: int = field(default=2, metadata={"help": "Layers of the Qwen3."})
    hidden_size: int = field(default=64, metadata={"help": "Its width."})
    sequence_length: int = field(default=128, metadata={"help": "Tokens of a row."})
    rows: int = field(default=8, metadata={"help": "Rows of a batch."})
    steps: int = field(default=240, metadata={"help": "Steps of the full budget."})
    validation_tokens: int = field(default=20_000, metadata={"help": "Tokens of validation text."})
    adamw_rates: list[float] = field(
        default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
        metadata={"help": "Rates to try for AdamW alone."},
    )
    muon_rates: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.04], metadata={"help": "For Muon."})
    beside_rates: list[float] = field(
        default_factory=lambda: [1.6e-2, 3.2e-2], metadata={"help": "For the AdamW beside it."}
    )
    shares: list[float] = field(
        default_factory=lambda: [0.8, 0.7, 0.6, 0.5, 0.4], metadata={"help": "Of the steps, for Muon to try."}
    )


class Comparison:
    """Rows, and runs on them."""

    def __init__(self, arguments: MuonBenchmarkArguments):
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        source = RowSource(open_documents(arguments.data, "text"), self.tokenizer, arguments.sequence_length)
        batches = itertools.islice(iter(source.training(arguments.rows)), arguments.steps)
        self.training = as_dataset([batch["input_ids"] for batch in batches])
        validation = source.validation(arguments.validation_tokens, arguments.rows)
        self.validation = as_dataset([batch["input_ids"] for batch in validation])

    def model(self) -> Qwen3ForCausalLM:
        width, head_dim = self.arguments.hidden_size, 16
        config = Qwen3Config(
            vocab_size=len(self.tokenizer), hidden_size=width, intermediate_size=3 * width, head_dim=head_dim,
            num_hidden_layers=self.arguments.layers, num_attention_heads=width // head_dim,
            num_key_value_heads=width // head_dim, max_position_embeddings=self.arguments.sequence_length,
            tie_word_embeddings=False, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return Qwen3ForCausalLM(config)

    def loss(self, optimizer: tuple, steps: int, seed: int = 0) -> float:
        """Nats a token on the validation rows after a run."""
        enable_full_determinism(seed)
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=self.arguments.rows, use_cpu=True,
                per_device_eval_batch_size=self.arguments.rows, lr_scheduler_type="linear", warmup_steps=WARMUP,
                report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
                train_sampling_strategy="sequential",
            )  # fmt: skip
            trainer = Trainer(
                self.model(), settings, train_dataset=self.training, eval_dataset=self.validation,
                optimizer_cls_and_kwargs=optimizer,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return trainer.evaluate()["eval_loss"]


def as_dataset(ids: list[torch.Tensor]) -> Dataset:
    rows = [row for batch in ids for row in batch.tolist()]
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def adamw(lr: float) -> tuple:
    return torch.optim.AdamW, {"lr": lr, "betas": BETAS, "weight_decay": 0.0}


def main() -> None:
    (arguments,) = TrlParser((MuonBenchmarkArguments,)).parse_args_and_config()
    logging.disable_progress_bar()
    comparison, steps = Comparison(arguments), arguments.steps
    size = sum(parameter.numel() for parameter in comparison.model().parameters())
    print(f"Qwen3 of {size:,} parameters, {steps} steps of {arguments.rows * arguments.sequence_length} tokens")
    alone, both = {}, {}
    for lr in arguments.adamw_rates:
        alone[lr] = comparison.loss(adamw(lr), steps)
        print(f"AdamW {lr:g}: {alone[lr]:.4f}", flush=True)
    for lr, beside in itertools.product(arguments.muon_rates, arguments.beside_rates):
        both[lr, beside] = comparison.loss(muon(lr=lr, adamw_lr=beside, betas=BETAS), steps)
        print(f"Muon {lr:g} beside AdamW {beside:g}: {both[lr, beside]:.4f}", flush=True)
    best_alone, (best, beside) = min(alone, key=alone.get), min(both, key=both.get)
    target = alone[best_alone]
    for share in arguments.shares:
        fewer = round(share * steps)
        loss = comparison.loss(muon(lr=best, adamw_lr=beside, betas=BETAS), fewer)
        print(f"Muon {best:g} beside AdamW {beside:g}, {fewer} steps: {loss:.4f}, AdamW's {target:.4f}", flush=True)
        if loss > target:
            break
    for name, optimizer, first in (
        ("AdamW", adamw(best_alone), target),
        ("Muon", muon(lr=best, adamw_lr=beside, betas=BETAS), both[best, beside]),
    ):
        losses = [first, *(comparison.loss(optimizer, steps, seed) for seed in (1, 2))]
        print(f"{name} from three seeds: {', '.join(f'{loss:.4f}' for loss in losses)}", flush=True)


if __name__ == "__main__":
    main()
