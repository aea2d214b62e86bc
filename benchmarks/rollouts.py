"""How many completions a second reinforcement samples, against TRL's own trainer and other ways to ask `generate`.

    python -m benchmarks.rollouts [--depth 4] [--vocab_size 8192] [--questions 8] [--samples 16] [--rounds 3]

The same network, questions and lengths in all rows: a completion ends with a fixed chance at every token, 20 on average
and 64 at most. TRL's stock GRPOTrainer asks `generate` for a whole batch, in which every prompt stands as often as it
is sampled; `generate` is also asked for one question at a time (what upstream does), and for one completion. The
variants take turns, medians count. Aimed at: 3 times TRL's.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from datasets import Dataset
from transformers import LogitsProcessor, LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer, TrlParser

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.completions import sample_completions
from modeling_nanochat.training.tokenizer import train_tokenizer

PROMPT_LENGTHS, MAX_NEW_TOKENS, MEAN_LENGTH = range(24, 48), 64, 20
TEXT = "".join(chr(number) for number in range(32, 127)) + " one two three four five six seven eight nine ten"


@dataclass
class RolloutArguments:
    """What to measure."""

    depth: int = field(default=4, metadata={"help": "Number of layers."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    questions: int = field(default=8, metadata={"help": "Questions of a step."})
    samples: int = field(default=16, metadata={"help": "Samples of each question."})
    rounds: int = field(default=3, metadata={"help": "Times each variant is measured, after one warm-up."})


class FixedChanceOfStopping(LogitsProcessor):
    """An untrained network would never stop."""

    def __init__(self, stop: int):
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.stop] = scores.logsumexp(-1) - math.log(MEAN_LENGTH)
        return scores


class Rollouts:
    """The variants, each a function that samples every question and returns the number of completions."""

    def __init__(self, arguments: RolloutArguments):
        torch.manual_seed(0)
        config = NanoChatGPTConfig.from_depth(
            arguments.depth, vocab_size=arguments.vocab_size, head_dim=64, max_position_embeddings=512
        )
        self.model, self.samples = NanoChatGPTForCausalLM(config).eval(), arguments.samples
        tokenizer = train_tokenizer([TEXT * 20], 320)  # its special tokens are all that counts
        self.pad, self.stop = tokenizer.pad_token_id, tokenizer.eos_token_id
        lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(0, 5 * arguments.questions, 5)]
        self.prompts = [torch.randint(320, arguments.vocab_size, (length,)).tolist() for length in lengths]
        self.stopping = FixedChanceOfStopping(self.stop)
        self.trl = self.stock_trainer(tokenizer, arguments)

    def stock_trainer(self, tokenizer, arguments: RolloutArguments) -> GRPOTrainer:
        settings = GRPOConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=arguments.questions * arguments.samples,
            num_generations=arguments.samples, max_completion_length=MAX_NEW_TOKENS, bf16=False, report_to="none",
            top_k=0, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            self.model, lambda **columns: [0.0], settings, Dataset.from_dict({"prompt": ["?"]}),
            processing_class=tokenizer,
        )  # fmt: skip
        generate = self.model.generate
        self.model.generate = partial(generate, logits_processor=LogitsProcessorList([self.stopping]))
        return trainer

    def stock(self) -> int:
        prompts = [prompt for prompt in self.prompts for _ in range(self.samples)]
        return len(self.trl._generate_single_turn(prompts, None, {}, self.samples)[0])

    def generate(self, prompt: list[int], samples: int) -> int:
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=samples, max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True, top_k=0, eos_token_id=self.stop, pad_token_id=self.pad,
        )  # fmt: skip
        return len(output)

    def one_completion_at_a_time(self) -> int:
        return sum(self.generate(prompt, 1) for prompt in self.prompts)  # of each question one, which is slow enough

    def one_question_at_a_time(self) -> int:
        return sum(self.generate(prompt, self.samples) for prompt in self.prompts)

    def ours(self) -> int:
        prompts = [prompt for prompt in self.prompts for _ in range(self.samples)]
        completions, _ = sample_completions(
            self.model, prompts, torch.rand(len(prompts), MAX_NEW_TOKENS), stop_token_ids=[self.stop],
            pad_token_id=self.pad, logits_processor=self.stopping,
        )  # fmt: skip
        return len(completions)


def rate(work: Callable[[], int]) -> float:
    """Completions per second."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def main() -> None:
    (arguments,) = TrlParser(RolloutArguments).parse_args_and_config()
    rollouts = Rollouts(arguments)
    variants = {
        "GRPOTrainer, as TRL has it": rollouts.stock,
        "generate, one question at a time": rollouts.one_question_at_a_time,
        "generate, one completion at a time": rollouts.one_completion_at_a_time,
        "ours (sample_completions)": rollouts.ours,
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(arguments.rounds + 1):
        for name, work in variants.items():
            found = rate(work)
            if round_:
                rates[name].append(found)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    stock = medians["GRPOTrainer, as TRL has it"]
    print(
        f"depth {arguments.depth}, {arguments.questions} questions x {arguments.samples} samples, median of "
        f"{arguments.rounds} rounds"
    )
    for name, value in medians.items():
        print(f"{name:36} {value:8.1f} completions/s  {value / stock:5.2f} x")


if __name__ == "__main__":
    main()
