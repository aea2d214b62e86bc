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

The samples of a step depend on the seed and the step alone: any number of ranks draws the same ones. They are drawn,
rewarded and, where it is asked for, replaced before TRL sees them; it makes tensors and advantages of them.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
from modeling_nanochat.completions import NoNumbers, sample_completions
from modeling_nanochat.tokenization_nanochat_gpt import generation_token_ids
from modeling_nanochat.tool_use import CalculatorLogitsProcessor
from modeling_nanochat.training import scaling
from modeling_nanochat.training.architectures import is_nanochat
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import cosine_to_zero, linear_to_zero, rl_schedules
from modeling_nanochat.training.ranks import over_ranks
from modeling_nanochat.training.trainers.checkpoints import WholeCheckpointsMixin
from modeling_nanochat.training.trainers.lora import LORA_SETTINGS, LoraArguments, lora_param_groups, with_adapters
from modeling_nanochat.training.trainers.muon_trainer import MuonTrainerMixin
from modeling_nanochat.training.trainers.settings import (
    ACTS_IN_FINE_TUNING,
    COMMON,
    FineTuningArguments,
    check_range,
)
from modeling_nanochat.training.trainers.stopping import where_no_numbers_are

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
    "entropy_coef": 0.0,
    "top_entropy_quantile": 1.0,
    "multi_objective_aggregation": "sum_then_normalize",
}
# The uniform numbers of step s are stream s, of its round r of dynamic sampling s + r * ROUND, of evaluations one
# behind any step's.
EVALUATION_STREAM, ROUND = 2**31, 2**32
SCHEDULES = {"linear": linear_to_zero, "cosine": cosine_to_zero}

Problem = dict[str, Any]  # `prompt` (messages, the user's last), and whatever the rewards read, such as `answer`
Reward = Callable[[str, Problem], SupportsFloat | None]  # (text with its special tokens, problem); None: not applicable


@dataclass
class ReinforceConfig(FineTuningArguments, LoraArguments, GRPOConfig):
    """Settings of `ReinforceTrainer`: TRL's own, and those of the optimizer's groups.

    A step samples `per_device_train_batch_size * gradient_accumulation_steps * devices` completions, `num_generations`
    of each question; the defaults are upstream's 16 questions x 16 samples.
    """

    acts: ClassVar[frozenset[str]] = COMMON | ACTS_IN_FINE_TUNING | LORA_SETTINGS | {
        "generation_batch_size", "steps_per_generation", "shuffle_dataset", "reward_weights", "lr_scheduler_type",
        "mask_truncated_completions", *PLAIN_REINFORCE
    }  # fmt: skip

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
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": "Rounds in which questions that all samples answered alike, which give no gradient, are replaced "
            "by others; each round costs their samples."
        },
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "How the rates fall to 0: linear or cosine."})
    scale_rewards: str = field(default="none", metadata={"help": "Must stay 'none': advantages are not scaled."})

    def check_ranges(self) -> None:
        super().check_ranges()
        self.check_lora_ranges()
        for name in ("embedding_lr", "scalar_lr"):
            check_range(self, name, 0)
        for name in ("num_generations", "num_generations_eval", "max_completion_length"):
            check_range(self, name, 1)
        check_range(self, "dynamic_sampling", 0)
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type is {self.lr_scheduler_type!r}, expected linear or cosine")
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


@dataclass
class Samples:
    """Completions that were drawn and judged: one for each problem in `problems`, where problems repeat.

    `sampled` is 0 for tokens that the calculator forced. `rewards` is (N, rewards), NaN where one does not apply.
    """

    problems: list[Problem]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    log_probabilities: list[list[float]]
    sampled: list[list[int]]
    texts: list[str]
    rewards: torch.Tensor

    def put(self, positions: Sequence[int], others: "Samples") -> None:
        """Replace the samples at these positions."""
        for name, values in vars(self).items():
            for position, value in zip(positions, getattr(others, name), strict=True):
                values[position] = value

    @property
    def passed(self) -> list[bool]:
        """Whether each is right, as the first reward has it."""
        return (self.rewards[:, 0] >= 1).tolist()

    @property
    def called(self) -> list[bool]:
        """Whether the calculator answered in it."""
        return [0 in sampled for sampled in self.sampled]


class ReinforceTrainer(MuonTrainerMixin, WholeCheckpointsMixin, GRPOTrainer):
    """Reinforces completions that are rewarded.

    Args:
        model: the network; weights float32.
        args: settings.
        train_problems: of each its `prompt` (messages, the user's last) and whatever the rewards read.
        eval_problems: the same, held out, for pass@k.
        rewards: by name; `args.reward_weights` weigh their sum. The first decides what is a pass: at least 1.
        summarize: (passes of each held-out question, samples of each) -> named figures, such as pass@k.
        processing_class: the tokenizer with the nine special tokens.
        callbacks: the Trainer's own kind.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ReinforceConfig,
        train_problems: Sequence[Problem],
        eval_problems: Sequence[Problem] | None = None,
        *,
        rewards: Mapping[str, Reward],
        summarize: Callable[[Sequence[int], int], dict[str, SupportsFloat]],
        processing_class: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] | None = None,
    ):
        if not is_nanochat(model.config):
            raise ValueError(
                f"reinforcement got a network of type {model.config.model_type!r}, expected nanochat's own: it learns "
                "by `weighted_loss`, which stock networks do not have"
            )
        self.rewards, self.summarize = dict(rewards), summarize
        self.calculator = CalculatorLogitsProcessor(processing_class)
        super().__init__(
            model=with_adapters(model, args),
            reward_funcs=[named(name) for name in rewards],
            args=args,
            train_dataset=as_dataset(train_problems),
            eval_dataset=None if eval_problems is None else as_dataset(eval_problems),
            processing_class=processing_class,
            callbacks=list(callbacks or ()),
        )
        if self.is_fsdp_enabled:
            raise ValueError("reinforcement does not run under FSDP: sampling needs whole weights on every rank")
        samples_of_a_rank = args.generation_batch_size // args.world_size
        if args.dynamic_sampling and samples_of_a_rank % args.num_generations:
            raise ValueError(
                f"dynamic_sampling needs whole questions on a device, which draws {samples_of_a_rank} samples: "
                f"expected a multiple of num_generations ({args.num_generations})"
            )
        self.rollout_func = self._roll_out
        self.set_up_muon(args.activation_dtype)
        self.generation_token_ids = generation_token_ids(processing_class)
        self.eos_token_ids = self.generation_token_ids["eos_token_id"]  # what else TRL would call cut off
        self.param_group_settings = {
            "era": self.optimizer_era,
            "batch_tokens": scaling.REFERENCE_BATCH_TOKENS,  # upstream's rates do not depend on the batch here
            "init_lr_frac": args.init_lr_frac,
            "embedding_lr": args.embedding_lr,
            "scalar_lr": args.scalar_lr,
            "weight_decay": 0.0,
            "polar_dtype": args.polar_dtype,
        }
        self.schedules = rl_schedules(SCHEDULES[args.lr_scheduler_type])

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        questions = self.args.generation_batch_size // self.args.num_generations
        return math.ceil(len(self.train_dataset) // questions * self.args.num_train_epochs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.args.lora_rank and self.optimizer is None:
            self.optimizer = MuonAdamW(lora_param_groups(model or self.model, self.args))
        return super().create_optimizer(model)

    # ---------------------------------------------------------------- samples and rewards

    def sample(self, problems: Sequence[Problem], stream: int, positions: Sequence[int], total: int) -> Samples:
        """One rewarded completion of each problem: those at `positions` of the `total` samples that the seed and the
        stream determine, whichever rank draws them.
        """
        uniforms = draw_uniforms(self.args.seed, stream, total, self.args.max_completion_length)
        prompt_ids = [render_prompt(self.processing_class, problem["prompt"]) for problem in problems]
        completion_ids, log_probabilities = sample_completions(
            self.accelerator.unwrap_model(self.model),
            prompt_ids,
            uniforms[list(positions)],
            stop_token_ids=self.generation_token_ids["eos_token_id"],
            pad_token_id=self.generation_token_ids["pad_token_id"],
            logits_processor=self.calculator,
        )
        sampled = [[1 - forced for forced in self.calculator.forced_token_mask(ids)] for ids in completion_ids]
        texts = self.processing_class.batch_decode(completion_ids)
        rewards = torch.tensor([self._rewards_of(text, problem) for text, problem in zip(texts, problems)])
        return Samples(list(problems), prompt_ids, completion_ids, log_probabilities, sampled, texts, rewards)

    def _rewards_of(self, text: str, problem: Problem) -> list[float]:
        found = []
        for name, reward in self.rewards.items():
            value = reward(text, problem)
            try:
                found.append(math.nan if value is None else float(value))
            except (TypeError, ValueError):
                raise ValueError(f"the reward {name} returned {value!r}, expected a number or None") from None
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The tensors of a step, from this rank's questions, each `num_generations` times in succession."""
        self.drawn = self._draw_step([json.loads(row["prompt"]) for row in inputs])
        self._log_samples(self.drawn)
        return super()._generate_and_score_completions(
            [{"prompt": problem["prompt"]} for problem in self.drawn.problems]
        )

    def _draw_step(self, problems: list[Problem]) -> Samples:
        step, count, ranks = self.state.global_step, len(problems), self.accelerator.num_processes
        first, total = self.accelerator.process_index * count, ranks * count
        try:
            samples = self.sample(problems, step, range(first, first + count), total)
        except NoNumbers as error:
            raise ValueError(f"{error} at step {where_no_numbers_are(self)}") from None
        for round_ in range(1, self.args.dynamic_sampling + 1):
            alike = self._answered_alike(samples)
            self._metrics["train"]["questions_replaced"].append(float(self._mean(alike)))
            if not any(alike):
                continue  # other ranks may have some, and all count them together
            chooser = np.random.Generator(np.random.Philox(key=[self.args.seed, step + round_ * ROUND]))
            others = chooser.integers(len(self.train_dataset), size=total // self.num_generations)
            places = [place for place in range(count) if alike[place // self.num_generations]]
            positions = [first + place for place in places]
            chosen = [self.train_dataset[int(others[position // self.num_generations])] for position in positions]
            chosen = [json.loads(row["prompt"]) for row in chosen]
            samples.put(places, self.sample(chosen, step + round_ * ROUND, positions, total))
        return samples

    def _answered_alike(self, samples: Samples) -> list[bool]:
        """Of each question, whether all its samples earned the same."""
        earned = (samples.rewards * self.reward_weights).nansum(dim=1).view(-1, self.num_generations)
        return (earned.amax(dim=1) - earned.amin(dim=1) < 1e-6).tolist()

    def _mean(self, values: Sequence[float]) -> float:
        """Over the values of all ranks; NaN if there are none."""
        sums = torch.tensor([sum(values), len(values)], dtype=torch.float64).float().to(self.accelerator.device)
        total, count = self.accelerator.reduce(sums).tolist()
        return total / count if count else math.nan

    def _log_samples(self, samples: Samples) -> None:
        """Beside what TRL logs: entropy, estimated by the surprise at the tokens that were sampled; use of the
        calculator, and how often it helped."""
        tokens = zip(samples.log_probabilities, samples.sampled)
        surprise = [-value for values, free in tokens for value, was_free in zip(values, free) if was_free]
        right_given_a_call = [passed for passed, called in zip(samples.passed, samples.called) if called]
        for name, values in {
            "entropy": surprise,
            "accuracy": samples.passed,
            "call_rate": samples.called,
            "accuracy_given_a_call": right_given_a_call,
        }.items():
            self._metrics["train"][name].append(self._mean(values))

    def _roll_out(self, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        """The samples of a step, in the form that TRL asks of a rollout function."""
        drawn = self.drawn
        return {
            "prompt_ids": drawn.prompt_ids,
            "completion_ids": drawn.completion_ids,
            "logprobs": None,
            "env_mask": drawn.sampled,
        }

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """(samples of all ranks, rewards)."""
        return self.accelerator.gather(self.drawn.rewards.to(self.accelerator.device))

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
        self, eval_dataset: Sequence[Problem] | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, SupportsFloat]:
        """Sample `num_generations_eval` answers to every held-out question, count the passes, and log what the recipe
        makes of them. The same numbers choose the samples every time, so two evaluations differ by the weights only.
        """
        problems = self.eval_dataset if eval_dataset is None else as_dataset(eval_dataset)
        if problems is None:
            raise ValueError("there are no eval_problems: expected held-out problems to evaluate on")
        samples = self.num_generations_eval
        at_once = max(1, self.args.per_device_eval_batch_size // samples)
        quiet = self.args.disable_tqdm or self.accelerator.process_index > 0

        def judged_from(starts: Sequence[int]) -> list[list[tuple[bool, bool]]]:
            return [
                self._judge(problems, range(start, min(start + at_once, len(problems))))
                for start in tqdm(starts, desc="pass@k", leave=False, disable=quiet or None)
            ]

        batches = over_ranks(judged_from, range(0, len(problems), at_once), self.model)
        judged = [sample for batch in batches for sample in batch]  # (passed, called) of every sample
        passed = [passed for passed, _ in judged]
        given_a_call = [passed for passed, called in judged if called]
        figures = self.summarize([sum(passed[i : i + samples]) for i in range(0, len(passed), samples)], samples)
        figures["call_rate"] = len(given_a_call) / len(judged)
        if given_a_call:
            figures["accuracy_given_a_call"] = sum(given_a_call) / len(given_a_call)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log({name: float(value) for name, value in metrics.items()})  # trackers take numbers; it adds the epoch
        self.state.log_history[-1] |= metrics  # the record keeps what the numbers were, such as intervals
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _judge(self, problems: Dataset, indices: range) -> list[tuple[bool, bool]]:
        """Of every sample of these held-out problems: did it pass, and did it call the calculator."""
        each = self.num_generations_eval
        chosen = [json.loads(problems[index]["prompt"]) for index in indices for _ in range(each)]
        positions = range(indices.start * each, indices.stop * each)
        samples = self.sample(chosen, EVALUATION_STREAM, positions, len(problems) * each)
        return list(zip(samples.passed, samples.called))


def as_dataset(problems: Sequence[Problem]) -> Dataset:
    """Problems as JSON in the one column that TRL wants: a table could not hold content that is a string in one message
    and a list of parts in another, nor fields that only some problems have."""
    if not problems:
        raise ValueError("there are no problems, expected at least one")
    return Dataset.from_dict({"prompt": [json.dumps(problem) for problem in problems]})


def named(name: str) -> Callable[..., None]:
    """A reward function for TRL to know the name of; the rewards themselves come from `_calculate_rewards`."""

    def reward(**columns: Any) -> None:
        raise NotImplementedError

    reward.__name__ = name
    return reward


def draw_uniforms(seed: int, stream: int, rows: int, columns: int) -> torch.Tensor:
    """(rows, columns) numbers in [0, 1), others for every seed and every stream.

    Both are the key of a counter-based generator (Philox: Salmon et al. 2011): torch's own on a CPU keeps 32 bits of
    its seed, too few for two numbers.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))
    return torch.from_numpy(generator.random((rows, columns), dtype=np.float32))
