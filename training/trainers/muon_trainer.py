"""What all trainers here do alike, mixed into the Trainer they extend: float32 weights under activations of another
dtype, MuonAdamW with its group schedule, no clipping, and no DDP.

The optimizer reduces its own gradients (ZeRO-2), so the model stays unwrapped and rank 0's weights are broadcast once;
under FSDP2 it takes the sharded parameters as they come. Gradient norms are not computed: they cost a pass over all
gradients and nothing needs them. The price is that these are the Trainer's private hooks, which hold for the pinned
version.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainingArguments

from modeling_nanochat.attention_choice import choose_attention
from modeling_nanochat.training.devices import choose_dtype, parse_dtype
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import GroupScheduler, Schedule
from modeling_nanochat.training.trainers.progress_line import show_progress_line


def check_precision_and_clipping(arguments: TrainingArguments) -> None:
    """`ValueError` for a dtype that is none, and for the Trainer's own mixed precision and clipping, which no trainer
    here does."""
    for setting in ("activation_dtype", "polar_dtype"):
        parse_dtype(getattr(arguments, setting), setting)
    if arguments.bf16 or arguments.fp16:
        raise ValueError(
            f"bf16={arguments.bf16}, fp16={arguments.fp16}: mixed precision is set by activation_dtype here "
            "(float32 weights cast in forward, no autocast); expected both to be false"
        )
    if arguments.max_grad_norm:
        raise ValueError(f"max_grad_norm={arguments.max_grad_norm}, expected 0: gradients are not clipped")


@dataclass
class MuonArguments:
    """Goes before a class of training arguments: settings of the optimizer's groups and of precision, and defaults that
    differ from TRL's."""

    era: str = field(default="seed", metadata={"help": "Optimizer groups of upstream's 'seed' (2026-02) or 'head'."})
    init_lr_frac: float = field(
        default=1.0, metadata={"help": "Learning rates at the start, as a fraction of pretraining's."}
    )
    activation_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the activations over float32 weights: 'bfloat16', 'float32', or 'auto', which is "
            "bfloat16 where the hardware multiplies it."
        },
    )
    polar_dtype: str = field(
        default="auto", metadata={"help": "Dtype of Muon's orthogonalisation: 'bfloat16', 'float32' or 'auto'."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Must stay false: see activation_dtype."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must stay 0: there is no clipping here."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of activation_checkpointing, which is off by default here."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints on the way: no, steps, epoch; the end is always saved."}
    )
    report_to: str | None = field(default="none", metadata={"help": "Tracker: none, trackio, wandb, ..."})

    def __post_init__(self):
        super().__post_init__()
        check_precision_and_clipping(self)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn of it


class MuonTrainerMixin:
    """Goes before a Trainer class; the trainer calls `set_up_muon` once its constructor has run.

    `param_group_settings` go to `build_param_groups`, `schedules` to `GroupScheduler`.
    """

    param_group_settings: dict[str, Any]
    schedules: dict[str, Schedule]

    def set_up_muon(self, activation_dtype: str) -> None:
        self.activation_dtype = choose_dtype(activation_dtype, self.args.device, "activation_dtype")
        model = self.accelerator.unwrap_model(self.model)
        model.set_activation_dtype(self.activation_dtype)
        self.accelerator.print(choose_attention(model, self.args.device, training=True))
        if not self.is_fsdp_enabled:  # `evaluation_mode` keeps the model out of DDP
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.model_accepts_loss_kwargs = True
        show_progress_line(self)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = MuonAdamW(build_param_groups(model or self.model, **self.param_group_settings))
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = GroupScheduler(optimizer or self.optimizer, num_training_steps, **self.schedules)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:  # for evaluation, which does not go through `forward`
            register_fsdp_forward_method(self.model, "token_losses")
        elif self.args.world_size > 1:  # DDP would have done this
            for parameter in self.model.parameters():
                dist.broadcast(parameter.data, src=0)
        return prepared

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """None: nothing needs the norm."""
