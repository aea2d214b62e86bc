"""Supervised fine-tuning on conversations: TRL's SFTTrainer with our rendering, packing, loss and optimizer.

Replaced are five things, each because TRL's own cannot express it. The mask is made token by token while a conversation
is rendered: tool output inside an assistant's turn must not be trained on, which a mask by role does not know. Rows are
filled best-fit without cropping any conversation, where TRL's packings truncate, split or wrap. The loss is the model's
own chunked one, as in pretraining, instead of the fused head (and its accuracy and entropy, which cost a
synchronisation a step). The validation loss is a mean over tokens, not of batch means, so that it does not depend on
batch or ranks. The optimizer is MuonAdamW with its group schedule.

All rows have one length and all steps the same number of rows, so every batch has one shape. Conversations in one row
see those before them, as documents do in pretraining; the price of padding and of the last rows, which fill no batch,
is reported, not hidden.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from modeling_nanochat import render_conversation
from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX
from modeling_nanochat.inference import eval_mode
from modeling_nanochat.training import scaling
from modeling_nanochat.training.data.packing import PackingStats, pack_with_padding
from modeling_nanochat.training.optimizer.schedules import sft_schedules
from modeling_nanochat.training.trainers.checkpoints import WholeCheckpointsMixin
from modeling_nanochat.training.trainers.muon_trainer import MuonTrainerMixin
from modeling_nanochat.training.trainers.settings import (
    ACTS_IN_FINE_TUNING,
    COMMON,
    MuonArguments,
    check_fine_tuning_ranges,
    check_range,
)


@dataclass
class NanoChatSFTConfig(MuonArguments, SFTConfig):
    """Settings of `NanoChatSFTTrainer`: TRL's own, and those of the optimizer's groups.

    A batch is `per_device_train_batch_size` rows for each device and accumulation step.
    """

    acts: ClassVar[frozenset[str]] = COMMON | ACTS_IN_FINE_TUNING | {
        "dataset_num_proc", "average_tokens_across_devices", "packing", "padding_free", "assistant_only_loss",
        "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    }  # fmt: skip

    init_lr_frac: float = field(
        default=1.0, metadata={"help": "Learning rates at the start, as a fraction of pretraining's."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints on the way: no, steps, epoch; the end is always saved."}
    )
    warmdown_ratio: float = field(
        default=0.2, metadata={"help": "Share of the run at its end over which the learning rates fall to zero."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens in a packed row; the network's context length by default."}
    )

    def check_ranges(self) -> None:
        super().check_ranges()
        check_fine_tuning_ranges(self)
        check_range(self, "warmdown_ratio", 0, 1)
        check_range(self, "max_length", 2)
        if self.packing or self.padding_free or self.assistant_only_loss:
            raise ValueError(
                f"packing={self.packing}, padding_free={self.padding_free}, assistant_only_loss="
                f"{self.assistant_only_loss}: rows are packed and masked by this trainer itself; expected all false"
            )


@dataclass
class PackedConversations:
    """What became of a data set: the counts of the packing, and how many tokens carry loss."""

    packing: PackingStats
    trained_tokens: int

    def figures(self) -> dict[str, float]:
        """For logs and reports: counts, and shares between 0 and 1."""
        positions = self.packing.tokens + self.packing.padding_tokens
        return {
            "conversations": self.packing.sequences,
            "rows": self.packing.rows,
            "tokens": self.packing.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": self.trained_tokens / max(self.packing.tokens, 1),
            "utilisation": self.packing.tokens / max(positions, 1),
            "trimmed_conversations": self.packing.trimmed_sequences,
        }


class NanoChatSFTTrainer(MuonTrainerMixin, WholeCheckpointsMixin, SFTTrainer):
    """Fine-tunes on conversations.

    Args:
        model: the network; weights float32.
        args: settings.
        train_dataset: a column `messages` with the messages of each conversation, or their JSON (a column cannot hold
            content that is a string here and a list of parts there). The order is kept: shuffle it before.
        eval_dataset: the same, for the validation loss.
        processing_class: the tokenizer with the nine special tokens.
        callbacks: the Trainer's own kind.

    `packed` holds the figures of each data set, `train` and `eval`; `rows_left_out` counts the last training rows,
    which fill no batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: NanoChatSFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] | None = None,
    ):
        context = model.config.max_position_embeddings
        args.max_length = args.pad_to_multiple_of = args.max_length or context
        if args.max_length > context:
            raise ValueError(f"max_length={args.max_length}, expected at most the model's context length, {context}")
        self.packed: dict[str, PackedConversations] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks or ()),
        )
        self.set_up_muon(args.activation_dtype)
        batch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = len(self.train_dataset)
        if rows < batch_rows:
            raise ValueError(
                f"the conversations fill {rows} rows of {args.max_length} tokens, expected at least one batch of "
                f"{batch_rows} rows: lower per_device_train_batch_size, gradient_accumulation_steps or max_length"
            )
        self.rows_left_out = rows % batch_rows
        self.train_dataset = self.train_dataset.select(range(rows - self.rows_left_out))
        self.batch_tokens = batch_rows * args.max_length
        self.flops_per_token = scaling.flops_per_token(model.config, args.max_length)
        self.param_group_settings = {
            "era": self.optimizer_era,
            "batch_tokens": self.batch_tokens,
            "init_lr_frac": args.init_lr_frac,
            "weight_decay": 0.0,
            "polar_dtype": args.polar_dtype,
        }
        self.schedules = sft_schedules(args.warmdown_ratio)

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: NanoChatSFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset:
        """Conversations to rows of `input_ids` and `labels`, both (rows, max_length)."""
        if "messages" not in dataset.column_names:
            raise ValueError(f"the {dataset_name} data set has the columns {dataset.column_names}, expected 'messages'")
        with args.main_process_first(local=True, desc=f"rendering {dataset_name}"):
            rendered = dataset.map(
                render_row,
                fn_kwargs={"tokenizer": processing_class},
                remove_columns=dataset.column_names,
                num_proc=args.dataset_num_proc,
                desc=f"Rendering {dataset_name} conversations",
            )
        pairs = ((row["ids"], row["mask"]) for row in rendered)
        rows, stats = pack_with_padding(pairs, args.max_length, processing_class.pad_token_id)
        self.packed[dataset_name] = PackedConversations(stats, int((rows["labels"] != IGNORE_INDEX).sum()))
        return Dataset.from_dict(rows)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss: summed over the micro-batch, divided by the targets of the whole step.

        Rows are full and padding comes last, so no attention mask is needed.
        """
        inputs = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "use_cache": False}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss over all trained-on tokens of the validation rows, the same for any batch size and ranks."""
        total, count, rows = 0.0, 0, 0
        with eval_mode(self.model):
            for batch in dataloader:
                targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T)
                losses = self.model.token_losses(batch["input_ids"], targets)  # (B, T)
                counts = (targets != IGNORE_INDEX).sum(dim=1)
                sums, counts = self.accelerator.gather_for_metrics((losses.sum(dim=1), counts))  # each (rows,)
                total, count, rows = total + sums.double().sum().item(), count + counts.sum().item(), rows + len(sums)
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        steps_of_an_epoch = len(self.train_dataset) * self.args.max_length // self.batch_tokens
        return math.ceil(steps_of_an_epoch * self.args.num_train_epochs)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        return self.flops_per_token * inputs["input_ids"].numel()


def render_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """One conversation, its messages given as such or as JSON, to token ids and the mask of those trained on."""
    messages = row["messages"]
    ids, mask = render_conversation(tokenizer, json.loads(messages) if isinstance(messages, str) else messages)
    return {"ids": ids, "mask": mask}
