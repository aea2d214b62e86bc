"""The parent of every trainer's settings: what all of them add, and a refusal of what would do nothing.

The libraries' argument classes have 114 to 220 settings, most of which our trainers replace: a learning rate for one
optimizer, AdamW's betas, a scheduler's name. Taken in silence they would mislead; so each class here names the
inherited settings that act (`acts`), and any other that is changed is an error which says what to use instead. The
command line leaves those out of `--help`. The price is a list that must grow with what the trainers learn to use.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from transformers.integrations import get_available_reporting_integrations

from modeling_nanochat.training.devices import parse_dtype
from modeling_nanochat.training.optimizer.eras import OPTIMIZER_ERAS

# Of transformers.TrainingArguments, what acts in every trainer here.
COMMON = frozenset(
    """
    output_dir max_steps per_device_train_batch_size gradient_accumulation_steps seed use_cpu
    logging_steps logging_first_step logging_strategy report_to run_name project disable_tqdm
    log_level log_level_replica log_on_each_node trackio_space_id trackio_bucket_id trackio_static_space_id
    save_strategy save_steps save_total_limit resume_from_checkpoint restore_callback_states_from_checkpoint
    push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
    torch_compile torch_compile_backend torch_compile_mode tf32 full_determinism
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    fsdp fsdp_config accelerator_config ddp_backend ddp_timeout local_rank dataloader_pin_memory
    fp16
    """.split()  # noqa: SIM905 (a list would take forty lines); fp16 has a message of its own
)
# And in those that go over a data set more or less often, with the libraries' evaluation.
ACTS_IN_FINE_TUNING = frozenset(
    ("num_train_epochs", "eval_strategy", "eval_steps", "eval_on_start", "eval_delay", "per_device_eval_batch_size")
)
RATES = "the rates of the optimizer's groups (matrix_lr, embedding_lr, unembedding_lr, scalar_lr) or init_lr_frac"
INSTEAD = {
    "learning_rate": RATES,
    "optim": "nothing: the optimizer is MuonAdamW",
    "optim_args": RATES,
    "lr_scheduler_type": "warmdown_ratio",
    "lr_scheduler_kwargs": "warmdown_ratio",
    "weight_decay": "nothing: fine-tuning has no weight decay",
    "adam_beta1": "nothing: the betas are those of optimizer_era",
    "adam_beta2": "nothing: the betas are those of optimizer_era",
    "adam_epsilon": "nothing: epsilon is that of optimizer_era",
    "warmup_steps": "warmdown_ratio, or a lower init_lr_frac",
    "num_train_epochs": "max_steps, target_flops or tokens_per_parameter",
    "data_seed": "seed",
    "enable_jit_checkpoint": "nothing: SIGTERM saves a checkpoint by itself",
    "bf16_full_eval": "activation_dtype",
    "fp16_full_eval": "activation_dtype",
}


@dataclass
class MuonArguments:
    """Goes before a class of training arguments. A subclass adds fields, and to `acts` the inherited ones it uses."""

    acts: ClassVar[frozenset[str]] = COMMON

    optimizer_era: str | None = field(
        default=None,
        metadata={"help": "Optimizer groups and schedules of upstream's 'seed' or 'head'; by default the network's."},
    )
    activation_dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the activations over float32 weights: 'bfloat16', 'float32', or 'auto', which is "
            "bfloat16 where the hardware multiplies it."
        },
    )
    polar_dtype: str = field(
        default="auto", metadata={"help": "Dtype of Muon's orthogonalization: 'bfloat16', 'float32' or 'auto'."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Must stay false: see activation_dtype."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Must stay 0: there is no clipping here."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false: no loss is hidden."})
    report_to: str | None = field(default="none", metadata={"help": "Tracker: none, trackio, wandb, ..."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When --push_to_hub pushes: end; every_save, each checkpoint too; checkpoint or all_checkpoints, "
            "with what resuming takes."
        },
    )

    def __post_init__(self):
        refuse_what_does_nothing(self)
        self.check_ranges()
        super().__post_init__()
        missing = sorted(set(self.report_to) - set(get_available_reporting_integrations()))
        if missing:  # the Trainer would say so once the data are made
            raise ValueError(f"report_to is {', '.join(missing)}, expected none or what is installed here")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn of it

    def check_ranges(self) -> None:
        """`ValueError` for a number that makes no sense. Subclasses add theirs."""
        if self.bf16 or self.fp16:
            raise ValueError(
                f"bf16={self.bf16}, fp16={self.fp16}: mixed precision is set by activation_dtype here (float32 weights "
                "cast in forward, no autocast); expected both to be false"
            )
        if self.max_grad_norm:
            raise ValueError(f"max_grad_norm={self.max_grad_norm}, expected 0: gradients are not clipped")
        if self.logging_nan_inf_filter:
            raise ValueError("logging_nan_inf_filter=True, expected false: it shows losses that never were")
        if self.optimizer_era not in (None, *OPTIMIZER_ERAS):
            raise ValueError(f"optimizer_era is {self.optimizer_era!r}, expected one of {', '.join(OPTIMIZER_ERAS)}")
        check_range(self, "gradient_accumulation_steps", 1)
        for name in ("activation_dtype", "polar_dtype"):
            parse_dtype(getattr(self, name), name)


@dataclass
class FineTuningArguments(MuonArguments):
    """The same for trainers that go over a data set more or less often: SFT, reinforcement, preferences."""

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints on the way: no, steps, epoch; the end is always saved."}
    )

    def check_ranges(self) -> None:
        super().check_ranges()
        check_range(self, "init_lr_frac", 0)
        check_range(self, "num_train_epochs", 0)
        check_range(self, "per_device_train_batch_size", 1)
        check_range(self, "per_device_eval_batch_size", 1)


def check_range(settings: Any, name: str, low: float, high: float = float("inf")) -> None:
    """`ValueError` unless the setting is None or a number from `low` to `high`."""
    value = getattr(settings, name)
    if value is not None and not low <= value <= high:  # also refuses what is no number
        expected = f"at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value}, expected {expected}")


def unused_settings(settings_class: type) -> dict[str, str]:
    """The inherited settings that do nothing in a trainer, with what to use instead of each."""
    if not hasattr(settings_class, "acts"):
        return {}
    own = {
        name
        for base in settings_class.__mro__
        if issubclass(base, MuonArguments)
        for name in vars(base).get("__annotations__", {})
    }
    return {
        each.name: INSTEAD.get(each.name, "nothing: it has no effect here")
        for each in fields(settings_class)
        if each.init and each.name not in own | settings_class.acts
    }


def refuse_what_does_nothing(settings: MuonArguments) -> None:
    """`ValueError` for an inherited setting that was changed and would be ignored."""
    defaults = {each.name: each for each in fields(settings)}
    for name, instead in unused_settings(type(settings)).items():
        default = defaults[name].default
        if defaults[name].default_factory is not MISSING:
            default = defaults[name].default_factory()
        if not (getattr(settings, name) == default or (is_off(getattr(settings, name)) and is_off(default))):
            raise ValueError(f"{name}={getattr(settings, name)!r} would do nothing here; use {instead}")


def is_off(value: Any) -> bool:
    """Whether a setting is switched off, in any of the ways that the libraries write it."""
    return value in (None, False, "", "no", [], {})
