"""Pretraining through Transformers' Trainer: MuonAdamW, group schedules, exact resumption, nothing else in the step.

The Trainer keeps what it is good at (devices, accumulation, logging, trackers, the Hub). Replaced are: optimizer and
scheduler; the wrapping of the model (the optimizer reduces its own gradients, so there is no DDP); gradient norms and
clipping (none: they cost a pass over all gradients, and the recipe does not clip); the counts in the log (FLOPs by
formula, utilisation, tokens per second); evaluation (functions that the recipe hands in); and checkpoints, which here
are whole or absent, sharded like the optimizer, and hold the position in the data. Some of the hooks used are private
ones of the Trainer, as `__init__.py` of this folder says.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from modeling_nanochat.inference import eval_mode
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.architectures import is_nanochat, whole_rows
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.float8 import multiply_in_float8
from modeling_nanochat.training.optimizer.eras import optimizer_era, pretraining_schedules
from modeling_nanochat.training.trainers.checkpoints import WholeCheckpointsMixin
from modeling_nanochat.training.trainers.muon_trainer import MuonTrainerMixin
from modeling_nanochat.training.trainers.settings import COMMON, MuonArguments, check_range

# A run this long pays for its compilation, which takes about a minute. On two CPU cores it then saves 7% of a float32
# step (depth 3, rows of 256) to 32% (depth 4, rows of 512 with windows); where bfloat16 is native 28 to 46%, and is
# paid for after 2e13 FLOP at depth 4 to 1.1e14 at depth 8. In FLOPs, so that a resumed run decides alike.
COMPILE_FROM_FLOPS = {"cpu": 1e14, "cuda": 1e16}


@dataclass
class PretrainConfig(MuonArguments, TrainingArguments):
    """Settings of `PretrainTrainer`: the Trainer's own, leaner by default, and those of the optimizer's groups."""

    acts: ClassVar[frozenset[str]] = COMMON | {"warmup_steps", "eval_on_start"}

    per_device_train_batch_size: int = field(
        default=0,
        metadata={"help": "Rows of a micro-batch; 0: on a GPU what its memory holds, on a CPU what is fastest."},
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "Compile the model; by default if the run is long enough to pay for it."}
    )
    fp8: bool = field(
        default=False,
        metadata={"help": "Train the blocks' matrix products in float8 (Hopper, Ada, Blackwell); compile with it."},
    )
    embedding_lr: float | None = field(
        default=None, metadata={"help": "Base rate of the embedding tables; by default the era's."}
    )
    unembedding_lr: float | None = field(
        default=None, metadata={"help": "Base rate of the head; by default the era's."}
    )
    matrix_lr: float | None = field(default=None, metadata={"help": "Rate of Muon's matrices; by default the era's."})
    scalar_lr: float | None = field(default=None, metadata={"help": "Base rate of the scalars; by default the era's."})
    weight_decay: float | None = field(
        default=None, metadata={"help": "Muon's weight decay; by default scaled from the shape by the era's rule."}
    )
    warmup_steps: float | None = field(
        default=None,
        metadata={"help": "Steps over which the learning rates rise, or below 1 a share; by default the era's."},
    )
    warmdown_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the run at its end over which the learning rates fall; by default the era's."},
    )
    final_lr_frac: float | None = field(
        default=None,
        metadata={"help": "What the learning rates fall to, as a fraction of their height; by default the era's."},
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step by itself."})
    save_steps: float = field(default=500, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    ignore_data_skip: bool = field(default=True, metadata={"help": "Must stay true: the loader knows its position."})
    average_tokens_across_devices: bool = field(
        default=False, metadata={"help": "Must stay false: all rows are full, so there is nothing to count."}
    )

    def __post_init__(self):
        warmup = self.warmup_steps
        self.warmup_steps = warmup or 0  # the parent knows no None
        super().__post_init__()
        self.warmup_steps = warmup
        if self.fp8 and not devices.native_float8(self.device):
            raise ValueError(
                "fp8 needs a GPU that multiplies float8 (compute capability 8.9 or more: Ada, Hopper, Blackwell); this "
                f"is {self.device}: expected no --fp8 here"
            )

    def check_ranges(self) -> None:
        super().check_ranges()
        check_range(self, "per_device_train_batch_size", 0)
        for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "warmup_steps"):
            check_range(self, name, 0)
        for name in ("warmdown_ratio", "final_lr_frac"):
            check_range(self, name, 0, 1)
        if not self.ignore_data_skip or self.average_tokens_across_devices:
            raise ValueError(
                f"ignore_data_skip={self.ignore_data_skip}, average_tokens_across_devices="
                f"{self.average_tokens_across_devices}; expected true and false: rows are full and know their position"
            )


@dataclass
class Evaluation:
    """Something to measure while training: `run` gets the model in eval mode and the step, and gives figures to log.

    It is called on all ranks, every `every_steps` steps and after the last one; with 0, only after the last.
    """

    run: Callable[[PreTrainedModel, int], dict[str, float]]
    every_steps: int = 0

    def due(self, step: int, last_step: int) -> bool:
        return step == last_step or (self.every_steps > 0 and step % self.every_steps == 0)


class StepSchedule(TrainerCallback):
    """Asks for evaluation when one is due, and for a line of the log with each checkpoint: so the loss that a line
    averages never began before the checkpoint a run resumes from."""

    def __init__(self, evaluations: Sequence[Evaluation]):
        self.evaluations = evaluations

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = any(each.due(state.global_step, state.max_steps) for each in self.evaluations)
        control.should_log |= control.should_save


def store_tables_in_bfloat16(model: PreTrainedModel) -> None:
    """Token and value embeddings in bfloat16, as upstream keeps them: a row is only looked up and cast, and the tables
    are the larger half of the memory of weights, gradients and AdamW's moments."""
    model.get_input_embeddings().to(torch.bfloat16)
    model.model.value_embeddings.to(torch.bfloat16)


@contextmanager
def exact_sums(wanted: bool) -> Iterator[None]:
    """Compiled CPU code adds the gradients of a looked-up row by atomic additions, whose order the threads decide: two
    runs differ in the last bits. In here it takes the kernel that adds in order, so that runs repeat to the bit on any
    number of threads; the price is measured by `benchmarks/training_step.py`."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every new tensor, for nothing
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class PretrainTrainer(MuonTrainerMixin, WholeCheckpointsMixin, Trainer):
    """Trains a network, nanochat's or a stock one, on endless packed rows.

    Args:
        model: the network; weights float32.
        args: its `max_steps` and `gradient_accumulation_steps` are what the run does (see `training/scaling.py`).
        rows: batches of `{"input_ids", "shift_labels"}` for this rank.
        evaluations: what to measure on the way.
        processing_class: a tokenizer to be saved with each checkpoint.
        callbacks: the Trainer's own kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: PretrainConfig,
        rows: RowLoader,
        *,
        evaluations: Sequence[Evaluation] = (),
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        if args.max_steps < 1:
            raise ValueError(f"max_steps={args.max_steps}, expected at least 1: rows never end")
        self.rows, self.evaluations = rows, evaluations
        self.flops_per_token = scaling.flops_per_token(model.config, rows.sequence_length)
        self.batch_tokens = rows.rows * rows.ranks * rows.sequence_length * args.gradient_accumulation_steps
        self._choose_compilation(args)
        args.per_device_train_batch_size = rows.rows
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one device: the Trainer would take all, by DataParallel
        super().__init__(model=model, args=args, processing_class=processing_class, callbacks=callbacks)
        for name in ("warmup_steps", "warmdown_ratio", "final_lr_frac"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(optimizer_era(self.optimizer_era), name))
        self.set_up_muon(args.activation_dtype)
        self.model_accepts_loss_kwargs = False  # the mean over a micro-batch is right: all rows are full
        self.has_own_loss = is_nanochat(model.config)
        bfloat16_on_gpu = args.device.type == "cuda" and self.activation_dtype == torch.bfloat16
        if self.has_own_loss and bfloat16_on_gpu and not self.is_fsdp_enabled:
            store_tables_in_bfloat16(model)  # FSDP2 wants one dtype
        self.add_callback(StepSchedule(evaluations))
        if args.fp8:
            if not self.has_own_loss or self.activation_dtype != torch.bfloat16:
                raise ValueError(
                    f"fp8 with {model.config.model_type} in {self.activation_dtype}; expected one of nanochat's own "
                    "networks, with activations in bfloat16"
                )
            multiply_in_float8(self.accelerator.unwrap_model(self.model))
        peak = devices.peak_flops_per_second(args.device, self.activation_dtype)
        self.peak_flops_per_second = peak * args.world_size
        self._last_seconds = {"evaluate": 0.0, "save": 0.0}
        self._start_clock()

    def _choose_compilation(self, args: PretrainConfig) -> None:
        if args.torch_compile is None:
            threshold = COMPILE_FROM_FLOPS.get(args.device.type, math.inf)
            args.torch_compile = self.flops_per_token * self.batch_tokens * args.max_steps >= threshold
            args.torch_compile_backend = "inductor" if args.torch_compile else None

    def get_train_dataloader(self) -> RowLoader:
        return self.rows

    @property
    def param_group_settings(self) -> dict[str, Any]:
        args, decay = self.args, self.args.weight_decay
        if decay is None:
            decay = scaling.scaled_weight_decay(self.model.config, self.batch_tokens, era=self.optimizer_era)
        base_rates = {name: getattr(args, name) for name in optimizer_era(self.optimizer_era).base_rates}
        return {
            "era": self.optimizer_era,
            "batch_tokens": self.batch_tokens,
            "weight_decay": decay,
            "polar_dtype": args.polar_dtype,
            **{name: rate for name, rate in base_rates.items() if rate is not None},
        }

    @property
    def schedules(self) -> dict[str, Any]:
        args = self.args
        return pretraining_schedules(
            self.optimizer_era,
            warmup_steps=args.warmup_steps,
            warmdown_ratio=args.warmdown_ratio,
            final_lr_frac=args.final_lr_frac,
        )

    def compute_loss(self, model, inputs, *args, **kwargs):
        """A stock network counts targets only beside labels, and would keep a cache and look for packed texts."""
        if self.has_own_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        targets = inputs["shift_labels"].contiguous()
        inputs = {"input_ids": inputs["input_ids"], "labels": targets, "shift_labels": targets, "use_cache": False}
        with whole_rows(self.model):
            return super().compute_loss(model, inputs, *args, **kwargs)

    # ---------------------------------------------------------------- log and evaluation

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        return self.flops_per_token * inputs["input_ids"].numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds tokens seen, tokens per second and utilisation of all devices (MFU) to the lines that carry a loss."""
        self.state.epoch = self.state.global_step / self.state.max_steps  # the Trainer's own starts anew at a resume
        if "loss" in logs:
            steps = self.state.global_step - self._logged_step
            seconds = time.perf_counter() - self._clock - self._seconds_aside
            tokens_per_second = steps * self.batch_tokens / seconds
            logs["tokens"] = self.state.global_step * self.batch_tokens
            logs["tokens_per_second"] = tokens_per_second
            logs["mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops_per_second
            self._start_clock()
        super().log(logs, start_time)

    @property
    def seconds_of_the_end(self) -> float:
        """What the last evaluation and the last save took: about what comes after the last step."""
        return self._last_seconds["evaluate"] + self._last_seconds["save"]

    def _start_clock(self) -> None:
        self._clock, self._seconds_aside, self._logged_step = time.perf_counter(), 0.0, self.state.global_step

    @contextmanager
    def _time_aside(self, what: str) -> Iterator[None]:
        """What happens in here is not counted as training in the log."""
        start = time.perf_counter()
        yield
        self._last_seconds[what] = time.perf_counter() - start
        self._seconds_aside += self._last_seconds[what]

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Run the evaluations that are due at this step, in eval mode, and log their figures."""
        metrics: dict[str, float] = {}
        with self._time_aside("evaluate"):
            with eval_mode(self.model):
                for evaluation in self.evaluations:
                    if evaluation.due(self.state.global_step, self.state.max_steps):
                        metrics |= evaluation.run(self.model, self.state.global_step)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---------------------------------------------------------------- checkpoints

    @property
    def planned_steps(self) -> int:
        return self.args.max_steps

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs) -> TrainOutput:
        """Train, from a checkpoint if one is named; True means the latest in `output_dir` if there is one."""
        checkpoint = self.named_checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self.rows.load(checkpoint)
        with exact_sums(bool(self.args.torch_compile) and self.args.device.type == "cpu"):
            return super().train(checkpoint, **kwargs)

    def save_checkpoint(self) -> None:
        with self._time_aside("save"):
            super().save_checkpoint()

    def save_position(self, folder: Path) -> None:
        self.rows.save(folder)
