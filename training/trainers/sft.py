"""Supervised fine-tuning on conversations: TRL's SFTTrainer with our rendering, packing, loss and optimizer.

Replaced are six things, each because TRL's own cannot express it. The mask is made token by token while a conversation
is rendered: tool output inside an assistant's turn must not be trained on, which a mask by role does not know. Rows are
filled best-fit without cropping any conversation, where TRL's packings truncate, split or wrap; they are written to
disk once and mapped (`data/conversations.py`), where TRL renders on every rank. The loss is the model's own chunked
one, as in pretraining, instead of the fused head (and its accuracy and entropy, which cost a synchronization a step).
The validation loss is a mean over tokens, not of batch means, so that it does not depend on batch or ranks, with bits
per byte beside it. The optimizer is MuonAdamW with its group schedule.

All rows have one length and all steps the same number of rows, so every batch has one shape. Conversations in one row
see those before them, as documents do in pretraining; the price of padding and of rows that fill no batch (others in
every epoch), of conversations cut, left out or without a target is reported, not hidden.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from modeling_nanochat.chunked_cross_entropy import IGNORE_INDEX
from modeling_nanochat.inference import eval_mode, token_losses
from modeling_nanochat.tokenization_nanochat_gpt import token_bytes
from modeling_nanochat.training import scaling
from modeling_nanochat.training.architectures import whole_rows
from modeling_nanochat.training.data.conversations import PackedConversations, rows_for_all_ranks, write_rows
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import sft_schedules
from modeling_nanochat.training.trainers.checkpoints import WholeCheckpointsMixin, load_optimizer_state
from modeling_nanochat.training.trainers.lora import (
    LORA_SETTINGS,
    LoraArguments,
    lora_param_groups,
    with_adapters,
)
from modeling_nanochat.training.trainers.muon_trainer import MuonTrainerMixin
from modeling_nanochat.training.trainers.pretrain import Evaluation
from modeling_nanochat.training.trainers.settings import (
    ACTS_IN_FINE_TUNING,
    COMMON,
    FineTuningArguments,
    check_range,
)

USUAL_ROWS = 16  # of a device's micro-batch
STEPS_AT_LEAST = 60  # that small data should give, by smaller batches
# The square root of the batch suits long runs. A short one has too few steps to get anywhere at a small batch's rates:
# it takes those of this batch at least. That is the setting the demo was found to learn with; no sweep was made.
SHORT_RUN_STEPS, SHORT_RUN_BATCH_TOKENS = 1000, 65_536


@dataclass
class NanoChatSFTConfig(FineTuningArguments, LoraArguments, SFTConfig):
    """Settings of `NanoChatSFTTrainer`: TRL's own, and those of the optimizer's groups.

    A batch is `per_device_train_batch_size` rows for each device and accumulation step.
    """

    acts: ClassVar[frozenset[str]] = COMMON | ACTS_IN_FINE_TUNING | LORA_SETTINGS | {
        "dataset_num_proc", "average_tokens_across_devices", "packing", "padding_free", "assistant_only_loss",
        "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    }  # fmt: skip

    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of a micro-batch; by default 16, or fewer if small data would give under 60 steps."},
    )
    init_lr_frac: float | None = field(
        default=None,
        metadata={
            "help": "Learning rates at the start, as a fraction of pretraining's; by default 1, and more for a short "
            "run in small batches."
        },
    )
    warmdown_ratio: float = field(
        default=0.2, metadata={"help": "Share of the run at its end over which the learning rates fall to zero."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens in a packed row; the network's context length by default."}
    )

    warm_start: str | None = field(
        default=None,
        metadata={"help": "Checkpoint folder of pretraining whose optimizer state to begin with; fresh if unset."},
    )
    skip_bad_conversations: bool = field(
        default=False, metadata={"help": "Leave out conversations that cannot be rendered, and count them."}
    )

    def check_ranges(self) -> None:
        super().check_ranges()
        self.check_lora_ranges()
        check_range(self, "dataset_num_proc", 1)
        if self.warm_start and (self.lora_rank or self.fsdp):
            raise ValueError(
                f"warm_start={self.warm_start} with lora_rank={self.lora_rank}, fsdp={self.fsdp}: the state of "
                "pretraining's optimizer fits whole weights only; expected neither"
            )
        check_range(self, "warmdown_ratio", 0, 1)
        check_range(self, "max_length", 2)
        if self.packing or self.padding_free or self.assistant_only_loss:
            raise ValueError(
                f"packing={self.packing}, padding_free={self.padding_free}, assistant_only_loss="
                f"{self.assistant_only_loss}: rows are packed and masked by this trainer itself; expected all false"
            )


class WholeBatches(Sampler[int]):
    """The rows of an epoch in a random order, without those that fill no batch; which ones these are changes from epoch
    to epoch. The order depends on the seed and the epoch alone, so a resumed run goes on with the same rows."""

    def __init__(self, rows: int, batch_rows: int, seed: int, epoch: Callable[[], int]):
        self.rows, self.batch_rows, self.seed, self.epoch = rows, batch_rows, seed, epoch

    def __len__(self) -> int:
        return self.rows - self.rows % self.batch_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch()) % 2**32)
        return iter(torch.randperm(self.rows, generator=generator)[: len(self)].tolist())


class AskForEvaluation(TrainerCallback):
    """Beside what `eval_strategy` says, asks for evaluation when one of the recipe's own is due."""

    def __init__(self, evaluations: Sequence[Evaluation]):
        self.evaluations = evaluations

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        control.should_evaluate |= any(each.every_steps and step % each.every_steps == 0 for each in self.evaluations)


class NanoChatSFTTrainer(MuonTrainerMixin, WholeCheckpointsMixin, SFTTrainer):
    """Fine-tunes on conversations.

    Args:
        model: the network; weights float32.
        args: settings. Rows are kept in `output_dir/packed` while the trainer is used.
        train_dataset: rows with `messages`, or their JSON, or lines of a `ConversationFile`; and `where` each comes
            from, for errors. Read once. Which conversations share a row follows from the order: shuffle it before.
        eval_dataset: the same, for the validation loss; None, or one without any row, if there is none.
        processing_class: the tokenizer with the nine special tokens.
        callbacks: the Trainer's own kind.
        evaluations: what else to measure on the way and after the last step.

    `packed` holds the figures of each data set, `train` and `eval`; `rows_left_out` counts the training rows that fill
    no batch of an epoch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: NanoChatSFTConfig,
        train_dataset: Iterable[dict[str, Any]],
        eval_dataset: Iterable[dict[str, Any]] | None = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] | None = None,
        evaluations: Sequence[Evaluation] = (),
    ):
        context = model.config.max_position_embeddings
        args.max_length = args.pad_to_multiple_of = args.max_length or context
        if args.max_length > context:
            raise ValueError(f"max_length={args.max_length}, expected at most the model's context length, {context}")
        args.dataset_kwargs = {"skip_prepare_dataset": True}  # rows come packed
        self.packed: dict[str, PackedConversations] = {}
        self.evaluations = evaluations
        train_rows = self.pack("train", train_dataset, args, processing_class)
        eval_rows = None if eval_dataset is None else self.pack("eval", eval_dataset, args, processing_class)
        args.per_device_train_batch_size = args.per_device_train_batch_size or rows_of_micro_batch(
            args, len(train_rows)
        )
        batch_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if len(train_rows) < batch_rows:
            raise ValueError(
                f"the conversations fill {len(train_rows)} rows of {args.max_length} tokens, expected at least one "
                f"batch of {batch_rows} rows: lower per_device_train_batch_size, gradient_accumulation_steps or "
                "max_length"
            )
        super().__init__(
            model=with_adapters(model, args),
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows if eval_rows is not None and len(eval_rows) else None,
            processing_class=processing_class,
            callbacks=[AskForEvaluation(evaluations), *(callbacks or ())],
        )
        self.set_up_muon(args.activation_dtype)
        self.token_bytes = torch.tensor(token_bytes(processing_class), device=args.device)  # (V,)
        self.steps_without_tokens = 0  # since the last line of the log
        self.last_logged_step: int | None = None
        self.batch_rows, self.rows_left_out = batch_rows, len(train_rows) % batch_rows
        self.batch_tokens = batch_rows * args.max_length
        self.init_lr_frac = self.choose_init_lr_frac()
        self.flops_per_token = scaling.flops_per_token(model.config, args.max_length)
        self.param_group_settings = {
            "era": self.optimizer_era,
            "batch_tokens": self.batch_tokens,
            "init_lr_frac": self.init_lr_frac,
            "weight_decay": 0.0,
            "polar_dtype": args.polar_dtype,
        }
        self.schedules = sft_schedules(args.warmdown_ratio)

    def pack(
        self, name: str, rows: Iterable[dict[str, Any]], args: NanoChatSFTConfig, tokenizer: PreTrainedTokenizerBase
    ) -> Dataset:
        """Conversations to rows of `input_ids` and `labels`, both (rows, max_length), in a file that all ranks read."""
        named = ({"where": f"{name} conversation {number}", **row} for number, row in enumerate(rows, start=1))
        write = partial(
            write_rows,
            rows=named,
            tokenizer=tokenizer,
            row_length=args.max_length,
            skip_bad=args.skip_bad_conversations,
            processes=args.dataset_num_proc,
        )
        file = Path(args.output_dir, "packed", f"{name}.arrow")
        dataset, self.packed[name] = rows_for_all_ranks(file, write, args.process_index == 0)
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        return WholeBatches(
            len(self.train_dataset), self.batch_rows, self.args.seed, lambda: int(self.state.epoch or 0)
        )

    # ---------------------------------------------------------------- a step, and its loss

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of a step, and its targets on all devices. Rows have some; a step that has none anyway must
        change nothing."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.step_has_targets = bool(count)
        self.steps_without_tokens += not self.step_has_targets
        if self.last_logged_step is None:  # a run that is resumed begins later than 0
            self.last_logged_step = self.state.global_step
        return batches, count

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        if self.step_has_targets:
            return super().training_step(model, inputs, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(False)  # so the optimizer does not move by its momentum
        return torch.zeros((), device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Without the steps that had no target, the loss of which is nothing and not 0."""
        if "loss" in logs:
            steps = self.state.global_step - self.last_logged_step
            counted = steps - self.steps_without_tokens
            loss = logs.pop("loss")
            logs |= {"loss": loss * steps / counted} if counted > 0 else {"steps_without_trained_tokens": steps}
            self.last_logged_step, self.steps_without_tokens = self.state.global_step, 0
        super().log(logs, start_time)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's own loss: summed over the micro-batch, divided by the targets of the whole step.

        Rows are full and padding comes last, so no attention mask is needed.
        """
        inputs = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "use_cache": False}
        with whole_rows(self.model):
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean loss over all trained-on tokens of the validation rows, and bits per byte of those that stand for text:
        the same for any batch size and ranks."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # nats, tokens, nats of text, bytes
        rows = 0
        with eval_mode(self.model):
            for batch in dataloader:
                targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T)
                losses = token_losses(self.model, batch["input_ids"], targets).double()  # (B, T)
                sizes = self.token_bytes[targets.clamp(min=0)] * (targets != IGNORE_INDEX)  # (B, T)
                of_rows = (losses, targets != IGNORE_INDEX, losses * (sizes > 0), sizes)
                gathered = self.accelerator.gather_for_metrics(
                    torch.stack([each.sum(dim=1) for each in of_rows], dim=1)
                )
                sums, rows = sums + gathered.sum(dim=0), rows + len(gathered)
        nats, tokens, text_nats, size = sums.tolist()
        metrics = {f"{metric_key_prefix}_loss": nats / tokens}
        if size:
            metrics[f"{metric_key_prefix}_bits_per_byte"] = text_nats / (math.log(2) * size)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Validation loss, if there are validation rows, and the recipe's own evaluations that are due."""
        metrics = {}
        if self.eval_dataset is not None:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        step, last = self.state.global_step, self.state.max_steps
        with eval_mode(self.model):
            figures = [each.run(self.model, step) for each in self.evaluations if step and each.due(step, last)]
        others = {f"{metric_key_prefix}_{name}": value for each in figures for name, value in each.items()}
        if others:
            self.log(dict(others))
        return metrics | others

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.args.lora_rank and self.optimizer is None:
            self.optimizer = MuonAdamW(lora_param_groups(model or self.model, self.args))
        return super().create_optimizer(model)

    def before_first_step(self) -> None:
        super().before_first_step()
        if self.args.warm_start and self.state.global_step == 0:
            self.take_moments(Path(self.args.warm_start))

    def take_moments(self, checkpoint: Path) -> None:
        """The optimizer's state of pretraining, without its rates."""
        optimizer = self.optimizer.optimizer  # without accelerate's wrapper
        settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
        rank, ranks = self.args.process_index, self.args.world_size
        optimizer.load_state_dict(load_optimizer_state(checkpoint, rank, ranks, optimizer.merge_state_dicts))
        for group, own in zip(optimizer.param_groups, settings):
            group.update(own)

    def choose_init_lr_frac(self) -> float:
        """As the settings say; else 1, or in a short run of small batches what makes up for their rates."""
        if self.args.init_lr_frac is not None:
            return self.args.init_lr_frac
        short = self.planned_steps <= SHORT_RUN_STEPS
        return max(1.0, math.sqrt(SHORT_RUN_BATCH_TOKENS / self.batch_tokens)) if short else 1.0

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        steps_of_an_epoch = len(self.train_dataset) // self.batch_rows
        return math.ceil(steps_of_an_epoch * self.args.num_train_epochs)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        return self.flops_per_token * inputs["input_ids"].numel()


def rows_of_micro_batch(args: NanoChatSFTConfig, rows: int) -> int:
    """The usual number, or as many as leave small data enough steps."""
    rows_of_run = rows if args.max_steps > 0 else rows * args.num_train_epochs
    micro_batches = args.gradient_accumulation_steps * args.world_size
    return max(1, min(USUAL_ROWS, int(rows_of_run / STEPS_AT_LEAST / micro_batches)))
