"""Reinforcement learning on questions with a checkable answer: TRL's GRPOTrainer, reduced to plain REINFORCE.

Each step samples several completions of each question, with the calculator in the loop, and rewards them. A sample's
advantage is its reward less the mean reward of its question; the loss is -sum(advantage * log p) over the sampled
tokens, divided by their number. One update follows each batch of samples, so nothing is off policy: no ratio, no
clipping, no old log-probabilities, no reference model and no second forward pass. Tokens that the calculator forced
were not sampled: the network reads them, but they carry no loss.

GRPOTrainer at these settings has the same gradient (a test holds the two equal). `_compute_loss` is written out
because it then says what it is, and costs less: samples whose question was answered alike by all have advantage zero
and are not run at all, rows carry no left padding, and the head only sees tokens with loss. The price is that it takes
a network with `weighted_loss`: those of this package.

The samples of a step depend on the seed and the step alone: any number of ranks draws the same ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, SupportsFloat

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from modeling_nanochat import render_prompt
from modeling_nanochat.tokenization_nanochat_gpt import generation_token_ids
from modeling_nanochat.tool_use import CalculatorLogitsProcessor
from modeling_nanochat.training import scaling
from modeling_nanochat.training.optimizer.schedules import rl_schedules
from modeling_nanochat.training.ranks import over_ranks
from modeling_nanochat.training.trainers.checkpoints import WholeCheckpointsMixin
from modeling_nanochat.training.trainers.muon_trainer import MuonTrainerMixin
from modeling_nanochat.training.trainers.rollouts import sample_completions
from modeling_nanochat.training.trainers.settings import (
    ACTS_IN_FINE_TUNING,
    COMMON,
    MuonArguments,
    check_fine_tuning_ranges,
    check_range,
)

# What makes GRPO into REINFORCE, and what sampling from the whole distribution at temperature 1 means.
PLAIN_REINFORCE = {
    "num_iterations": 1,
    "beta": 0.0,
    "scale_rewards": "none",
    "loss_type": "dapo",
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "use_vllm": False,
    "mask_truncated_completions": False,
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "multi_objective_aggregation": "sum_then_normalize",
}
EVALUATION_STREAM = 2**31  # seeds of evaluations lie behind those of any training step


@dataclass
class ReinforceConfig(MuonArguments, GRPOConfig):
    """Settings of `ReinforceTrainer`: TRL's own, and those of the optimizer's groups.

    A step samples `per_device_train_batch_size * gradient_accumulation_steps * devices` completions, `num_generations`
    of each question; the defaults are upstream's 16 questions x 16 samples.
    """

    acts: ClassVar[frozenset[str]] = COMMON | ACTS_IN_FINE_TUNING | {
        "generation_batch_size", "steps_per_generation", "shuffle_dataset", *PLAIN_REINFORCE
    }  # fmt: skip

    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training data."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(
        default="no", metadata={"help": "Checkpoints on the way: no, steps, epoch; the end is always saved."}
    )
    init_lr_frac: float = field(
        default=0.05, metadata={"help": "Learning rates at the start, as a fraction of pretraining's."}
    )
    embedding_lr: float = field(default=0.2, metadata={"help": "Base learning rate of the embeddings."})
    scalar_lr: float = field(default=0.5, metadata={"help": "Base learning rate of the scalars."})
    num_generations: int | None = field(default=16, metadata={"help": "Samples of each question in a step."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Samples in one backward pass."})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "Backward passes in a step."})
    max_completion_length: int | None = field(default=256, metadata={"help": "Longest completion in tokens."})
    num_generations_eval: int | None = field(default=8, metadata={"help": "Samples of each question for pass@k."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Samples drawn at once for pass@k."})
    scale_rewards: str = field(default="none", metadata={"help": "Must stay 'none': advantages are not scaled."})

    def check_ranges(self) -> None:
        super().check_ranges()
        check_fine_tuning_ranges(self)
        for name in ("embedding_lr", "scalar_lr"):
            check_range(self, name, 0)
        for name in ("num_generations", "num_generations_eval", "max_completion_length"):
            check_range(self, name, 1)
        for name, expected in PLAIN_REINFORCE.items():
            if getattr(self, name) != expected:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected {expected!r}: this is plain REINFORCE")

    def __post_init__(self):
        super().__post_init__()
        if self.steps_per_generation != self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation}, expected gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}): one update follows each batch of samples"
            )


class ReinforceTrainer(MuonTrainerMixin, WholeCheckpointsMixin, GRPOTrainer):
    """Reinforces completions that a checker rewards.

    Args:
        model: the network; weights float32.
        args: settings.
        train_dataset: columns `prompt` (messages, the user's last) and `answer` (what the reward compares with).
        eval_dataset: the same, held out, for pass@k.
        reward: (text of a completion with its special tokens, answer) -> reward; at least 1 is a pass.
        summarize: (passes of each held-out question, samples of each) -> named figures, such as pass@k.
        processing_class: the tokenizer with the nine special tokens.
        callbacks: the Trainer's own kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ReinforceConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        reward: Callable[[str, str], float],
        summarize: Callable[[Sequence[int], int], dict[str, SupportsFloat]],
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] | None = None,
    ):
        self.reward, self.summarize = reward, summarize
        self.calculator = CalculatorLogitsProcessor(processing_class)
        super().__init__(
            model=model,
            reward_funcs=self.checker,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks or ()),
        )
        if self.is_fsdp_enabled:
            raise ValueError("reinforcement does not run under FSDP: sampling needs whole weights on every rank")
        self.rollout_func = self._roll_out
        self.set_up_muon(args.activation_dtype)
        self.generation_token_ids = generation_token_ids(processing_class)
        self.param_group_settings = {
            "era": self.optimizer_era,
            "batch_tokens": scaling.REFERENCE_BATCH_TOKENS,  # upstream's rates do not depend on the batch here
            "init_lr_frac": args.init_lr_frac,
            "embedding_lr": args.embedding_lr,
            "scalar_lr": args.scalar_lr,
            "weight_decay": 0.0,
            "polar_dtype": args.polar_dtype,
        }
        self.schedules = rl_schedules()

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        questions = self.args.generation_batch_size // self.args.num_generations
        return math.ceil(len(self.train_dataset) // questions * self.args.num_train_epochs)

    # ---------------------------------------------------------------- samples and rewards

    def sample(
        self, prompts: Sequence[list[dict]], stream: int, start: int, total: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """One completion of each prompt (messages): token ids of the prompts, and of the completions.

        They are the samples `start`, `start + 1`, ... of the `total` that the seed and the stream determine, whichever
        rank draws them.
        """
        uniforms = draw_uniforms(self.args.seed, stream, total, self.args.max_completion_length)
        prompt_ids = [render_prompt(self.processing_class, prompt) for prompt in prompts]
        completion_ids = sample_completions(
            self.accelerator.unwrap_model(self.model),
            prompt_ids,
            uniforms[start : start + len(prompts)],
            stop_token_ids=self.generation_token_ids["eos_token_id"],
            pad_token_id=self.generation_token_ids["pad_token_id"],
            logits_processor=self.calculator,
        )
        return prompt_ids, completion_ids

    def _roll_out(self, prompts: list[list[dict]], trainer: GRPOTrainer) -> dict[str, Any]:
        """Samples of a training step, in the form that TRL asks of a rollout function."""
        start = self.accelerator.process_index * len(prompts)
        total = self.accelerator.num_processes * len(prompts)
        prompt_ids, completion_ids = self.sample(prompts, self.state.global_step, start, total)
        sampled = [[1 - forced for forced in self.calculator.forced_token_mask(ids)] for ids in completion_ids]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, "env_mask": sampled}

    def checker(self, completion_ids: list[list[int]], answer: list[str], **columns: Any) -> list[float]:
        """The reward of each completion, in the form that TRL asks of a reward function."""
        texts = self.processing_class.batch_decode(completion_ids)
        return [float(self.reward(text, right)) for text, right in zip(texts, answer)]

    # ---------------------------------------------------------------- loss

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """-sum(advantage * log p) over this micro-batch's sampled tokens, divided by the step's number of them.

        The optimizer averages gradients over ranks, so a rank divides by its share of the number.
        """
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # (B, P + C)
        real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        sampled = inputs["completion_mask"] * inputs["tool_mask"]  # (B, C), 0 where the calculator wrote
        num_sampled = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        weights = sampled * inputs["advantages"].unsqueeze(1) / num_sampled
        weights = F.pad(weights, (inputs["prompt_ids"].shape[1] - 1, 0))  # (B, P + C - 1), of each next token
        model = self.accelerator.unwrap_model(model)
        return model.weighted_loss(tokens[:, :-1], tokens[:, 1:], weights, real[:, :-1])

    # ---------------------------------------------------------------- pass@k

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, SupportsFloat]:
        """Sample `num_generations_eval` answers to every held-out question, count the passes, and log what the recipe
        makes of them. The same numbers choose the samples every time, so two evaluations differ by the weights only.
        """
        questions = self.eval_dataset if eval_dataset is None else eval_dataset
        if questions is None:
            raise ValueError("there is no eval_dataset: expected held-out questions to evaluate on")
        samples = self.num_generations_eval
        at_once = max(1, self.args.per_device_eval_batch_size // samples)
        quiet = self.args.disable_tqdm or self.accelerator.process_index > 0

        def passes_from(starts: Sequence[int]) -> list[list[int]]:
            return [
                self._count_passes(questions, range(start, min(start + at_once, len(questions))))
                for start in tqdm(starts, desc="pass@k", leave=False, disable=quiet)
            ]

        passes = over_ranks(passes_from, range(0, len(questions), at_once), self.model)
        figures = self.summarize([count for counts in passes for count in counts], samples)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log({name: float(value) for name, value in metrics.items()})  # trackers take numbers; it adds the epoch
        self.state.log_history[-1] |= metrics  # the record keeps what the numbers were, such as intervals
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _count_passes(self, questions: Dataset, indices: range) -> list[int]:
        """How many samples of each of these held-out questions are right."""
        samples = self.num_generations_eval
        rows = [questions[index] for index in indices for _ in range(samples)]
        _, completions = self.sample(
            [row["prompt"] for row in rows], EVALUATION_STREAM, indices.start * samples, len(questions) * samples
        )
        passed = [reward >= 1 for reward in self.checker(completions, [row["answer"] for row in rows])]
        return [sum(passed[start : start + samples]) for start in range(0, len(passed), samples)]


def draw_uniforms(seed: int, stream: int, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) numbers in [0, 1), others for every seed and every stream.

    Both are the key of a counter-based generator (Philox: Salmon et al. 2011): torch's own on a CPU keeps 32 bits of
    its seed, too few for two numbers.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))
    return torch.from_numpy(generator.random((rows, columns), dtype=np.float32))
