"""Cached decoding: ours as users get it against upstream's engine, one row and sixteen; the time to the first token.

    python -m benchmarks.decoding [--depth 4 --new_tokens 128 --rounds 5]

All decode the same weights (head's network) from one prompt of 64 tokens, sampling from the whole distribution.
Upstream's engine (`plain_engine.py`) runs in float32, its default on a CPU, and in bfloat16 where that is native. Ours
runs in the dtype that `auto` chooses: `generate` (pipelines) and the loop around `RunningRows` (chat, server,
evaluation, rollouts). Before anything is timed all must give the same tokens, greedily and in float32. They take turns
within each round, medians and ratios count; the first token's time is that of an answer of one token.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from trl import TrlParser

from benchmarks.plain_engine import PlainEngine
from benchmarks.plain_nanochat import PlainNanoChat, same_weights
from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.inference import cast_weights
from modeling_nanochat.running_rows import RunningRows, draw
from modeling_nanochat.training import devices

HEAD_DIM = 64
PROMPT_TOKENS = 64

Decoder = Callable[[int, int], object]  # rows, new tokens


@dataclass
class DecodingArguments:
    """What to measure."""

    depth: int = field(default=4, metadata={"help": "Number of layers."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    context: int = field(default=512, metadata={"help": "Context length."})
    new_tokens: int = field(default=128, metadata={"help": "Tokens decoded for each row."})
    rounds: int = field(default=5, metadata={"help": "Times each variant is measured, after one warm-up."})


def main() -> None:
    (arguments,) = TrlParser((DecodingArguments,)).parse_args_and_config()
    prompt = torch.randint(arguments.vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    check_equality(arguments, prompt)
    auto = devices.choose_dtype("auto", "cpu")
    name = str(auto).removeprefix("torch.")
    decoders: dict[str, Decoder] = {
        "upstream's engine, float32": partial(by_engine, PlainEngine(plain_network(arguments)), prompt)
    }
    if auto == torch.bfloat16:
        decoders["upstream's engine, bfloat16"] = partial(
            by_engine, PlainEngine(plain_network(arguments, auto)), prompt
        )
    ours = our_network(arguments, auto)
    decoders[f"generate, {name}"] = partial(by_generate, ours, prompt)
    decoders[f"RunningRows, {name}"] = partial(by_rows, ours, prompt)
    print(
        f"depth {arguments.depth}, {ours.config.hidden_size} wide, {PROMPT_TOKENS} + {arguments.new_tokens} tokens a "
        f"row, {torch.get_num_threads()} threads"
    )
    print(f"{'rows':>4} {'decoder':28} {'tokens/s':>9} {'of the best of upstream':>24} {'first token':>12}")
    for rows in (1, 16):
        measure(decoders, rows, arguments)


@torch.inference_mode()
def measure(decoders: dict[str, Decoder], rows: int, arguments: DecodingArguments) -> None:
    whole: dict[str, list[float]] = {name: [] for name in decoders}
    first: dict[str, list[float]] = {name: [] for name in decoders}
    for round_number in range(arguments.rounds + 1):
        for name, decode in decoders.items():
            for seconds, new_tokens in ((first, 1), (whole, arguments.new_tokens)):
                start = time.perf_counter()
                decode(rows, new_tokens)
                if round_number:
                    seconds[name].append(time.perf_counter() - start)
    rates = {name: rows * arguments.new_tokens / statistics.median(times) for name, times in whole.items()}
    best = max(rate for name, rate in rates.items() if "upstream" in name)
    for name, rate in rates.items():
        milliseconds = 1000 * statistics.median(first[name])
        print(f"{rows:4} {name:28} {rate:9.0f} {rate / best:23.2f}x {milliseconds:9.1f} ms", flush=True)


@torch.no_grad()
def plain_network(arguments: DecodingArguments, dtype: torch.dtype = torch.float32) -> PlainNanoChat:
    torch.manual_seed(0)
    config = our_config(arguments)
    shape = (arguments.depth, config.hidden_size, config.num_attention_heads, arguments.vocab_size, arguments.context)
    plain = PlainNanoChat(*shape, dtype, era="head").eval()
    for parameter in plain.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)  # output projections begin at zero, which would hide errors
    return plain


def our_config(arguments: DecodingArguments) -> NanoChatGPTConfig:
    return NanoChatGPTConfig.from_depth(
        arguments.depth,
        vocab_size=arguments.vocab_size,
        head_dim=HEAD_DIM,
        max_position_embeddings=arguments.context,
        era="head",
    )


def our_network(arguments: DecodingArguments, dtype: torch.dtype) -> NanoChatGPTForCausalLM:
    """As chat, server and evaluation load a model."""
    model = same_weights(plain_network(arguments), our_config(arguments))
    model.set_activation_dtype(dtype)
    cast_weights(model, dtype)
    return model


@torch.inference_mode()
def check_equality(arguments: DecodingArguments, prompt: list[int]) -> None:
    expected = PlainEngine(plain_network(arguments)).generate(prompt, 2, arguments.new_tokens, temperature=0)
    ours = our_network(arguments, torch.float32)
    generated = by_generate(ours, prompt, 2, arguments.new_tokens, do_sample=False)
    decoded = by_rows(ours, prompt, 2, arguments.new_tokens, choose=lambda scores, uniforms: scores.argmax(-1))
    if not generated.tolist() == decoded.tolist() == expected:
        raise SystemExit("the decoders disagree: the comparison would mean nothing")


def by_engine(engine: PlainEngine, prompt: list[int], rows: int, new_tokens: int) -> list[list[int]]:
    return engine.generate(prompt, rows, new_tokens)


def by_generate(
    model: NanoChatGPTForCausalLM, prompt: list[int], rows: int, new_tokens: int, do_sample: bool = True
) -> Tensor:
    """(rows, new tokens)"""
    ids = torch.tensor([prompt] * rows)
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    if do_sample:
        length["top_k"] = 0  # of all words
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=do_sample, **length)
    return tokens[:, PROMPT_TOKENS:]


def by_rows(model: NanoChatGPTForCausalLM, prompt: list[int], rows: int, new_tokens: int, choose=draw) -> Tensor:
    """(rows, new tokens); the prompt is read once, as rollouts and server do."""
    running, scores = RunningRows.read(model, [prompt], 0)
    first = torch.zeros(rows, dtype=torch.long)
    running.select(first)
    scores = scores[first]
    uniforms = torch.rand(rows, new_tokens)
    tokens = [choose(scores, uniforms[:, 0])]
    for step in range(1, new_tokens):
        tokens.append(choose(running.append(tokens[-1]), uniforms[:, step]))
    return torch.stack(tokens, dim=1)


if __name__ == "__main__":
    main()
