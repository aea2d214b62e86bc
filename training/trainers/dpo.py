"""Preference learning (DPO): TRL's own DPOTrainer with our rendering and optimizer.

The loss is TRL's: -log sigmoid(beta * (the margin of the chosen over the rejected answer, less the reference's)). Three
things are replaced. Answers are rendered token by token, so that outputs of the calculator count for neither side. The
optimizer is MuonAdamW, or AdamW on adapters. The reference is a copy of the network in memory (with adapters, the
network without them), where TRL would load it again from its folder and ask to trust the code there.

Memory: the copy costs the weights once more; `lora_rank` needs none.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from modeling_nanochat.tokenization_nanochat_gpt import render_conversation, render_prompt
from modeling_nanochat.training import scaling
from modeling_nanochat.training.architectures import run_activations_in
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import rl_schedules
from modeling_nanochat.training.trainers.checkpoints import WholeCheckpointsMixin
from modeling_nanochat.training.trainers.lora import LORA_SETTINGS, LoraArguments, lora_param_groups, with_adapters
from modeling_nanochat.training.trainers.muon_trainer import MuonTrainerMixin
from modeling_nanochat.training.trainers.settings import (
    ACTS_IN_FINE_TUNING,
    COMMON,
    FineTuningArguments,
    check_range,
)

ANSWERS = ("chosen", "rejected")


@dataclass
class NanoChatDPOConfig(FineTuningArguments, LoraArguments, DPOConfig):
    """Settings of `NanoChatDPOTrainer`: TRL's own, and those of the optimizer's groups."""

    acts: ClassVar[frozenset[str]] = COMMON | ACTS_IN_FINE_TUNING | LORA_SETTINGS | {
        "beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence_type", "ld_alpha",
        "dataloader_num_workers",
    }  # fmt: skip

    init_lr_frac: float = field(
        default=0.02, metadata={"help": "Learning rates at the start, as a fraction of pretraining's; they fall to 0."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of question and answer; the network's context length by default."}
    )

    def check_ranges(self) -> None:
        super().check_ranges()
        self.check_lora_ranges()
        check_range(self, "beta", 0)
        check_range(self, "max_length", 2)


class NanoChatDPOTrainer(MuonTrainerMixin, WholeCheckpointsMixin, DPOTrainer):
    """Prefers the chosen answers.

    Args:
        model: the network; weights float32.
        args: settings.
        train_dataset: rows `{"prompt": messages, "chosen": messages, "rejected": messages}`, each answer the one
            assistant message that follows the prompt.
        eval_dataset: the same, held out.
        processing_class: the tokenizer with the nine special tokens.
        callbacks: the Trainer's own kind.

    `left_out` counts the pairs of each data set, `train` and `eval`, of which an answer does not fit `max_length`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: NanoChatDPOConfig,
        train_dataset: Iterable[dict[str, Any]],
        eval_dataset: Iterable[dict[str, Any]] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] | None = None,
    ):
        context = model.config.max_position_embeddings
        args.max_length = args.max_length or context
        if args.max_length > context:
            raise ValueError(f"max_length={args.max_length}, expected at most the model's context length, {context}")
        args.remove_unused_columns = False  # the answers' masks are columns that TRL does not know
        self.left_out: dict[str, int] = {}
        train = self.render("train", train_dataset, args.max_length, processing_class)
        held_out = [] if eval_dataset is None else self.render("eval", eval_dataset, args.max_length, processing_class)
        if not train:
            raise ValueError(
                f"of the pairs none fits {args.max_length} tokens ({self.left_out['train']} were left out)"
            )
        super().__init__(
            model=with_adapters(model, args),
            ref_model=None if args.lora_rank else copy.deepcopy(model),
            args=args,
            data_collator=PairCollator(processing_class.pad_token_id, args.max_length),
            train_dataset=Dataset.from_list(train),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=processing_class,
            callbacks=list(callbacks or ()),
        )
        self.set_up_muon(args.activation_dtype)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            run_activations_in(reference, self.activation_dtype, self.args.device)
        self.param_group_settings = {
            "era": self.optimizer_era,
            "batch_tokens": scaling.REFERENCE_BATCH_TOKENS,  # rates do not depend on the batch, as in reinforcement
            "init_lr_frac": args.init_lr_frac,
            "weight_decay": 0.0,
            "polar_dtype": args.polar_dtype,
        }
        self.schedules = rl_schedules()

    def render(
        self, name: str, rows: Iterable[dict[str, Any]], max_length: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, list[int]]]:
        pairs = [render_pair(row, tokenizer) for row in rows]
        fitting = [
            pair for pair in pairs
            if len(pair["prompt_ids"]) + max(len(pair[f"{answer}_ids"]) for answer in ANSWERS) <= max_length
        ]  # fmt: skip
        self.left_out[name] = len(pairs) - len(fitting)
        return fitting

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        """Pairs are rendered already."""
        return dataset

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.args.lora_rank and self.optimizer is None:
            self.optimizer = MuonAdamW(lora_param_groups(model or self.model, self.args))
        return super().create_optimizer(model)


def render_pair(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Ids of the prompt and of both answers, and of each answer a mask: 1 where the assistant wrote.

    Raises:
        ValueError: a prompt or an answer of another form.
    """
    prompt_ids = render_prompt(tokenizer, row["prompt"])
    rendered = {"prompt_ids": prompt_ids}
    for answer in ANSWERS:
        if len(row[answer]) != 1:
            raise ValueError(f"{answer} has {len(row[answer])} messages, expected one, the assistant's")
        ids, mask = render_conversation(tokenizer, [*row["prompt"], *row[answer]])
        rendered |= {f"{answer}_ids": ids[len(prompt_ids) :], f"{answer}_mask": mask[len(prompt_ids) :]}
    return rendered


class PairCollator(DataCollatorForPreference):
    """TRL's, with the calculator's outputs taken out of what is compared."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        masks = [(example, f"{answer}_mask") for answer in ANSWERS for example in examples]
        for row, (example, name) in enumerate(masks):
            start = len(example["prompt_ids"])
            batch["completion_mask"][row, start : start + len(example[name])] = torch.tensor(example[name])
        return batch
