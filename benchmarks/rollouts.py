"""How many completions a second reinforcement samples, against asking `generate` for them.

    python -m benchmarks.rollouts [--depth 4] [--vocab_size 8192] [--questions 8] [--samples 16]

The same network, prompts and lengths in all rows: a completion ends with a fixed chance at every token, 20 on average
and 64 at most. `generate` is asked for one completion at a time, for all samples of one question at a time (what
upstream does), and for everything at once. Aimed at: 3 times one question at a time.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.trainers.rollouts import sample_completions

PROMPT_LENGTHS, MAX_NEW_TOKENS, MEAN_LENGTH = range(24, 48), 64, 20
STOP, PAD = 1, 0
ROUNDS = 3  # interleaved, because the machine may be busy; the best of each counts


class FixedChanceOfStopping(LogitsProcessor):
    """An untrained network would never stop."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, STOP] = scores.logsumexp(-1) - math.log(MEAN_LENGTH)
        return scores


def make_model(depth: int, vocab_size: int) -> NanoChatGPTForCausalLM:
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(depth, vocab_size=vocab_size, head_dim=64, max_position_embeddings=512)
    return NanoChatGPTForCausalLM(config).eval()


def generate(model: NanoChatGPTForCausalLM, prompts: list[list[int]], samples: int) -> int:
    """Completions of equally long or left-padded prompts by `generate`; returns their number."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    output = model.generate(
        ids,
        attention_mask=(ids != PAD).long(),
        num_return_sequences=samples,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        top_k=0,
        eos_token_id=STOP,
        pad_token_id=PAD,
        logits_processor=LogitsProcessorList([FixedChanceOfStopping()]),
    )
    return len(output)


def ours(model: NanoChatGPTForCausalLM, prompts: list[list[int]], samples: int) -> int:
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    uniforms = torch.rand(len(repeated), MAX_NEW_TOKENS)
    completions = sample_completions(
        model, repeated, uniforms, stop_token_ids=[STOP], pad_token_id=PAD, logits_processor=FixedChanceOfStopping()
    )
    return len(completions)


def rate(work: Callable[[], int]) -> float:
    """Completions per second."""
    start = time.perf_counter()
    count = work()
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    arguments = parser.parse_args()
    model = make_model(arguments.depth, arguments.vocab_size)
    generator = torch.Generator().manual_seed(0)
    lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(0, 5 * arguments.questions, 5)]
    prompts = [torch.randint(2, arguments.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    samples = arguments.samples
    works = {
        "generate, one completion at a time": lambda: sum(generate(model, [prompt], 1) for prompt in prompts),
        "generate, one question at a time": lambda: sum(generate(model, [prompt], samples) for prompt in prompts),
        "generate, all at once": lambda: generate(model, prompts, samples),
        "sample_completions": lambda: ours(model, prompts, samples),
    }
    best = dict.fromkeys(works, 0.0)
    for _ in range(ROUNDS):
        for name, work in works.items():
            best[name] = max(best[name], rate(work))
    baseline = best["generate, one question at a time"]
    print(f"depth {arguments.depth}, {arguments.questions} questions x {samples} samples, best of {ROUNDS} rounds")
    for name, value in best.items():
        print(f"{name:36} {value:8.1f} completions/s  {value / baseline:5.2f} x")


if __name__ == "__main__":
    main()
