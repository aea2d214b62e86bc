"""The settings of evaluation, one group for each subject; `pretrain` and `sft` share the group of CORE."""

from dataclasses import dataclass, field

from modeling_nanochat.eval.core.prompts import CONTROLS

DTYPES = ("float32", "bfloat16")


@dataclass
class EvaluateArguments:
    """What to measure, and of which models."""

    models: list[str] = field(
        default_factory=lambda: ["out/demo/base", "out/demo/sft", "out/demo/rl"],
        metadata={"help": "Folders or Hub names of causal language models; one column each."},
    )
    tasks: list[str] = field(
        default_factory=lambda: ["bits_per_byte", "multiple_choice", "problems"],
        metadata={"help": "bits_per_byte, multiple_choice, problems, spelling, human_eval, core."},
    )
    data: str = field(default="out/demo/data", metadata={"help": "Folder that `nanochat prepare_data` has written."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the record; `eval` beside the last model if unset."}
    )
    output_json: str | None = field(
        default=None, metadata={"help": "File for accuracies by model and task; scores.json in the folder if unset."}
    )
    log_samples: bool = field(
        default=False, metadata={"help": "Write every example's prompt, scores and decision beside the record."}
    )
    rerun: bool = field(default=False, metadata={"help": "Measure again what has been measured."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the activations: float32, or bfloat16: faster, and 0.6%% of CORE's decisions flip."},
    )
    text: str | None = field(
        default=None, metadata={"help": "File whose text bits per byte is measured on, instead of validation data."}
    )
    validation_bytes: int = field(default=1_000_000, metadata={"help": "Bytes of text that bits per byte reads."})
    batch_tokens: int = field(default=16384, metadata={"help": "Tokens read at once, padding included."})
    seed: int = field(default=0, metadata={"help": "Of the sampling, and of the choice of questions."})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.batch_tokens < 1 or self.validation_bytes < 1:
            raise ValueError(
                f"batch_tokens={self.batch_tokens}, validation_bytes={self.validation_bytes}; expected at least 1"
            )


@dataclass
class ChatTaskArguments:
    """How much is asked of a chat model, and how its answers are sampled."""

    max_questions: int = field(default=300, metadata={"help": "Questions of each source of multiple choice, at most."})
    max_problems: int = field(default=200, metadata={"help": "Problems, words and programs, at most."})
    num_samples: int = field(
        default=8, metadata={"help": "Samples of each of `problems` and `human_eval`; `spelling` gets one."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Of those samples; 0 is greedy, and then num_samples counts as 1."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Length at which an answer is cut off."})
    batch_rows: int = field(default=128, metadata={"help": "Rows sampled at once."})
    allow_weak_sandbox: bool = field(
        default=False, metadata={"help": "Run `human_eval` even where the system refuses a part of the isolation."}
    )

    @property
    def samples_drawn(self) -> int:
        """Of each problem: greedy answers are all the same."""
        return self.num_samples if self.temperature > 0 else 1


@dataclass
class CoreArguments:
    """Which part of CORE is measured, and how."""

    core_bundle: str = field(
        default="out/eval_bundle",
        metadata={"help": "Folder of upstream's eval_bundle.zip, unpacked; fetched if it is not there."},
    )
    core_bundle_url: str = field(
        default="https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
        metadata={"help": "Where the bundle is fetched from."},
    )
    core_tasks: list[str] | None = field(
        default=None, metadata={"help": "Labels of CORE's tasks; all that the bundle has by default."}
    )
    core_examples: int | None = field(
        default=None, metadata={"help": "Examples of each of CORE's tasks; all if unset, which alone is CORE."}
    )
    core_max_length: int | None = field(
        default=None,
        metadata={"help": "Crop CORE's prompts on the left to so many tokens; by default where the model must."},
    )
    core_control: str | None = field(
        default=None, metadata={"help": "Ask CORE as a control: no_shots, wrong_shots or shuffled_answers."}
    )

    def __post_init__(self) -> None:
        if self.core_control not in (None, *CONTROLS):
            raise ValueError(f"core_control is {self.core_control!r}, expected one of {', '.join(CONTROLS)}")
        for name in ("core_examples", "core_max_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value}, expected at least 2")


@dataclass
class OnTheWayArguments:
    """What of `nanochat evaluate` is measured while a network is trained."""

    measure_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks of `nanochat evaluate` to measure, such as core bits_per_byte multiple_choice."},
    )
    measure_every: int = field(default=2000, metadata={"help": "Steps between these measurements; 0: only at the end."})
    measure_data: str = field(
        default="out/demo/data", metadata={"help": "Folder that `nanochat prepare_data` has written, for these tasks."}
    )
    measure_examples: int = field(
        default=500, metadata={"help": "Examples of each of CORE's tasks, questions and problems, at most."}
    )
    core_bundle: str = field(
        default="out/eval_bundle", metadata={"help": "Folder of CORE's bundle; fetched if it is not there."}
    )

    def __post_init__(self) -> None:
        if self.measure_every < 0 or self.measure_examples < 2:
            raise ValueError(
                f"measure_every={self.measure_every}, measure_examples={self.measure_examples}; expected at least 0 "
                "and 2"
            )
