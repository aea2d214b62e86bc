"""Cached greedy decoding: `generate` against a plain PyTorch loop with a preallocated cache, one row and sixteen.

    python -m benchmarks.decoding [--depth 4 --new_tokens 128 --rounds 3]

The plain loop is what one would write by hand for this network alone: keys and values in tensors made once, no library
around it. `generate` runs as it comes; with the library's two caches in place of the one that grows in place, which
has to earn its lines here; and with a static cache and a compiled step, which its first call pays for. All decode the
same weights from the same prompt and must give the same tokens; they take turns, medians and ratios count.
"""

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CompileConfig
from trl import TrlParser

from benchmarks.plain_nanochat import PlainNanoChat, rms, rotate, same_weights
from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, modeling_nanochat_gpt

HEAD_DIM = 64
COMPILED = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default", fullgraph=True)}
COMPILED["compile_config"]._compile_all_devices = True  # generate() compiles on accelerators only, unless told so
PROMPT_TOKENS = 64


@dataclass
class DecodingArguments:
    """What to measure."""

    depth: int = field(default=4, metadata={"help": "Number of layers."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    context: int = field(default=512, metadata={"help": "Context length; a window spans half of it."})
    new_tokens: int = field(default=128, metadata={"help": "Tokens decoded for each row."})
    rounds: int = field(default=3, metadata={"help": "Times each variant is measured, after one warm-up."})


class PlainDecoder:
    """Decodes a `PlainNanoChat` with keys and values in preallocated tensors."""

    def __init__(self, model: PlainNanoChat, rows: int, length: int):
        self.model = model
        hidden, heads = model.embed.embedding_dim, model.blocks[0].heads
        shape = (len(model.blocks), 2, rows, heads, length, hidden // heads)
        self.cache = torch.zeros(shape)

    def forward(self, ids: Tensor, start: int) -> Tensor:
        """Logits (B, V) after `ids` (B, T), which begin at position `start`."""
        model, end = self.model, start + ids.size(1)
        cos, sin = model.cos[start:end], model.sin[start:end]
        x = first = rms(model.embed(ids))
        for i, block in enumerate(model.blocks):
            x = model.resid_lambdas[i] * x + model.x0_lambdas[i] * first
            table = model.value_embeddings[str(i)](ids) if str(i) in model.value_embeddings else None
            x = x + self.attention(block, i, rms(x), table, cos, sin, start, end)
            x = x + block.down(F.relu(block.up(rms(x))).square())
        return 15 * torch.tanh(model.head(rms(x[:, -1])) / 15)

    def attention(self, block, i, x, table, cos, sin, start, end) -> Tensor:
        rows, length, hidden = x.shape
        q, k, v = (part(x).view(rows, length, block.heads, -1) for part in (block.q, block.k, block.v))
        if block.gate is not None:
            v = v + (2 * torch.sigmoid(block.gate(x[..., :32]))).unsqueeze(-1) * table.view_as(v)
        q, k = rms(rotate(q, cos, sin)), rms(rotate(k, cos, sin))
        keys, values = self.cache[i]
        keys[:, :, start:end], values[:, :, start:end] = k.transpose(1, 2), v.transpose(1, 2)
        mask = None
        if length > 1:
            mask = self.model.mask[start:end, :end] if block.window else self.model.mask.new_ones(length, end).tril()
            first = 0
        else:
            first = max(0, end - 1 - block.window) if block.window else 0
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys[:, :, first:end], values[:, :, first:end], attn_mask=mask
        )
        return block.o(y.transpose(1, 2).reshape(rows, length, hidden))

    def generate(self, prompt: Tensor, new_tokens: int) -> Tensor:
        ids, start, tokens = prompt, 0, []
        for _ in range(new_tokens):
            logits = self.forward(ids, start)
            start += ids.size(1)
            ids = logits.argmax(-1, keepdim=True)
            tokens.append(ids)
        return torch.cat(tokens, dim=1)


@torch.inference_mode()
def main() -> None:
    (arguments,) = TrlParser((DecodingArguments,)).parse_args_and_config()
    config = NanoChatGPTConfig.from_depth(
        arguments.depth, vocab_size=arguments.vocab_size, head_dim=HEAD_DIM, max_position_embeddings=arguments.context
    )
    torch.manual_seed(0)
    heads = config.num_attention_heads
    plain = PlainNanoChat(arguments.depth, config.hidden_size, heads, arguments.vocab_size, arguments.context).eval()
    for parameter in plain.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)  # output projections begin at zero, which would hide errors
    model = same_weights(plain, config)
    options = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens, "do_sample": False}
    print(f"depth {arguments.depth}, {config.hidden_size} wide, {PROMPT_TOKENS} + {arguments.new_tokens} tokens a row")
    print(f"{'rows':>4} {'decoder':>18} {'tokens/s':>9} {'of plain':>9} {'first call':>11}")
    for rows in (1, 16):
        prompt = torch.randint(arguments.vocab_size, (rows, PROMPT_TOKENS))
        model.__dict__.pop("_compiled_call", None)  # compiled for the rows before
        decoders = {
            "plain": partial(plain_tokens, plain, prompt, arguments.new_tokens),
            "generate": partial(our_tokens, model, prompt, **options),
            "dynamic cache": partial(tokens_by_dynamic_cache, model, prompt, **options),
            "static cache": partial(
                our_tokens, model, prompt, cache_implementation="static", disable_compile=True, **options
            ),
            "generate, compiled": partial(our_tokens, model, prompt, **options, **COMPILED),
        }
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(arguments.rounds + 1):
            tokens = []
            for name, decode in decoders.items():
                start = time.perf_counter()
                tokens.append(decode())
                seconds[name].append(time.perf_counter() - start)
            expected, *eager, compiled = tokens
            # Fused kernels round otherwise, which turns a close decision now and then, and all that follows it.
            same = all(torch.equal(each, expected) for each in eager)
            if not same or (compiled == expected).all(dim=1).sum() < rows / 2:
                raise SystemExit("the decoders disagree: the comparison would mean nothing")
        rates = {name: rows * arguments.new_tokens / statistics.median(times[1:]) for name, times in seconds.items()}
        for name, rate in rates.items():
            print(f"{rows:4} {name:>18} {rate:9.0f} {rate / rates['plain']:8.2f}x {seconds[name][0]:9.1f} s")


def plain_tokens(plain: PlainNanoChat, prompt: Tensor, new_tokens: int) -> Tensor:
    return PlainDecoder(plain, len(prompt), prompt.shape[1] + new_tokens).generate(prompt, new_tokens)


def our_tokens(model: NanoChatGPTForCausalLM, prompt: Tensor, **options) -> Tensor:
    """(rows, new tokens)"""
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, PROMPT_TOKENS:]


def tokens_by_dynamic_cache(model: NanoChatGPTForCausalLM, prompt: Tensor, **options) -> Tensor:
    """Without the caches that grow in place."""
    with mock.patch.object(modeling_nanochat_gpt, "grow_in_place", lambda cache: None):
        return our_tokens(model, prompt, **options)


if __name__ == "__main__":
    main()
