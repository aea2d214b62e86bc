"""What all trainers here do alike, mixed into the Trainer they extend: float32 weights under activations of another
dtype, MuonAdamW with its group schedule, no clipping, and no DDP.

The optimizer reduces its own gradients (ZeRO-2), so the model stays unwrapped and rank 0's weights are broadcast once;
under FSDP2 it takes the sharded parameters as they come. Gradient norms are not computed: they cost a pass over all
gradients and nothing needs them. Which private hooks that takes, `__init__.py` of this folder lists.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from modeling_nanochat.attention_choice import choose_attention
from modeling_nanochat.training.architectures import is_nanochat, run_activations_in
from modeling_nanochat.training.devices import choose_dtype, keep_freed_memory
from modeling_nanochat.training.optimizer.eras import era_of
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import GroupScheduler, Schedule
from modeling_nanochat.training.ranks import check_that_ranks_met
from modeling_nanochat.training.trainers.checkpoints import latest_checkpoint
from modeling_nanochat.training.trainers.progress_line import show_progress_line
from modeling_nanochat.training.trainers.stopping import (
    StopOnSignal,
    Stopped,
    refuse_loss_that_is_no_number,
    refuse_weights_that_are_no_numbers,
)


class BeforeFirstStep(TrainerCallback):
    def __init__(self, trainer: "MuonTrainerMixin"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.before_first_step()


class MuonTrainerMixin:
    """Goes before a Trainer class; the trainer calls `set_up_muon` once its constructor has run.

    `param_group_settings` go to `build_param_groups`, `schedules` to `GroupScheduler`.
    """

    param_group_settings: dict[str, Any]
    schedules: dict[str, Schedule]
    keeps_end = False  # whether the last step is saved also where save_strategy saves none

    @property
    def optimizer_era(self) -> str:
        """Whose optimizer it is: as the settings say, else that of the network."""
        return self.args.optimizer_era or era_of(self.model.config)

    def set_up_muon(self, activation_dtype: str) -> None:
        check_that_ranks_met(self.args.world_size)
        self.activation_dtype = choose_dtype(activation_dtype, self.args.device, "activation_dtype")
        if self.args.device.type == "cpu":
            keep_freed_memory()
        model = self.accelerator.unwrap_model(self.model)
        run_activations_in(model, self.activation_dtype, self.args.device)
        if is_nanochat(model.config):
            self.accelerator.print(choose_attention(model, self.args.device, training=True))
        if not self.is_fsdp_enabled:  # `evaluation_mode` keeps the model out of DDP
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        elif self.args.torch_compile:
            self.compile_blocks()
        self.model_accepts_loss_kwargs = True
        self.add_callback(BeforeFirstStep(self))
        show_progress_line(self)

    def compile_blocks(self) -> None:
        """Each by itself, as FSDP2 cuts the network: one graph of all would go past the hooks that gather a block's
        weights, and accelerate's wrapper around it would be saved."""
        for module in self.model.modules():
            if type(module).__name__ in (self.model._no_split_modules or ()):
                module.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # accelerate compiles no more

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """As the Trainer's, True meaning the latest checkpoint in `output_dir` if there is one; stops for SIGTERM and
        Ctrl-C with a checkpoint. From a checkpoint of the last step, which the Trainer would overstep, none is done.

        Raises:
            Stopped: a signal came before the last step.
            ValueError: a loss or a weight is not finite.
        """
        checkpoint = self.named_checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            if state.global_step >= self.planned_steps:  # killed between the last checkpoint and the end
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return TrainOutput(state.global_step, math.nan, {})
        stop = StopOnSignal()
        self.callback_handler.callbacks.insert(0, stop)  # before those that look at what is asked for
        stop.install()
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            if self.keeps_end:
                self.save_end()
        finally:
            stop.restore()
            self.remove_callback(stop)
        if stop.number is None and stop.agreed(self.args):  # in the last step, or in what was measured after it
            stop.number = stop.received
            self.save_end()
        if stop.number is not None:
            raise Stopped(stop.number, self.state.global_step, self.state.max_steps)
        refuse_weights_that_are_no_numbers(self)
        return output

    def named_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint meant; True is the latest in `output_dir`, if there is one."""
        if resume_from_checkpoint is True:
            return latest_checkpoint(self.args.output_dir)
        return resume_from_checkpoint or None

    def save_end(self) -> None:
        """A checkpoint of the step that was reached, unless there is one."""
        if not Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").is_dir():
            self.save_checkpoint()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        refuse_loss_that_is_no_number(self, logs)
        super().log(logs, start_time)

    def save_checkpoint(self) -> None:
        refuse_weights_that_are_no_numbers(self)
        super().save_checkpoint()

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Compiled with the model: on a CPU a quarter off its time, which at depth 8 is a fifth of a short step's."""
        if self.optimizer is None:
            groups = build_param_groups(model or self.model, **self.param_group_settings)
            self.optimizer = MuonAdamW(groups, compile=True if self.args.torch_compile else None)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = GroupScheduler(optimizer or self.optimizer, num_training_steps, **self.schedules)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def before_first_step(self) -> None:
        """Once model and optimizer are prepared, and loaded if a run goes on."""
        if self.is_fsdp_enabled and is_nanochat(self.model.config):  # for evaluation, which goes past `forward`
            register_fsdp_forward_method(self.model, "token_losses")
        elif self.args.world_size > 1 and not self.is_fsdp_enabled:  # DDP would have done this
            for parameter in self.model.parameters():
                dist.broadcast(parameter.data, src=0)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> None:
        """None: nothing needs the norm."""
