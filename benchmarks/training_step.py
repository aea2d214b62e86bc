"""Forward and backward of one training step: ours against the plain PyTorch network, eager and compiled.

    python -m benchmarks.training_step [--depth 4 --sequence_length 512 --rows 8 --vocab_size 8192 --rounds 5]

All variants see the same tokens and weights of the same distribution, in turn within each round, so that a machine
whose speed drifts slows them alike; the median of each and its ratio to `plain, float32, eager` (upstream's default on
a CPU) are what counts. `of limit` is the rate in FLOP/s over that of a large matrix product in the same dtype.
`exact` takes the sums of looked-up rows in order, so that compiled runs repeat to the bit. bfloat16 variants run only
where the processor multiplies it natively: emulated, they would take minutes and tell nothing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from trl import TrlParser

from benchmarks.plain_nanochat import PlainNanoChat
from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.trainers.pretrain import exact_sums

HEAD_DIM = 64
SEED = 0


@dataclass
class StepArguments:
    """What to measure."""

    depth: int = field(default=4, metadata={"help": "Number of layers."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of a row."})
    rows: int = field(default=8, metadata={"help": "Rows of a batch."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    rounds: int = field(default=5, metadata={"help": "Times each variant is measured, after one warm-up."})
    compile: bool = field(default=True, metadata={"help": "Measure the compiled variants too."})


def main() -> None:
    (arguments,) = TrlParser((StepArguments,)).parse_args_and_config()
    config = NanoChatGPTConfig.from_depth(
        arguments.depth,
        vocab_size=arguments.vocab_size,
        head_dim=HEAD_DIM,
        max_position_embeddings=arguments.sequence_length,
    )
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(arguments.vocab_size, (arguments.rows, arguments.sequence_length + 1), generator=generator)
    steps = variants(config, ids, arguments.compile)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(arguments.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number:  # the first warms up (and compiles)
                seconds[name].append(time.perf_counter() - start)
    show(seconds, config, ids[:, 1:].numel(), arguments)


def variants(config: NanoChatGPTConfig, ids: torch.Tensor, compiled: bool) -> dict[str, Callable[[], None]]:
    """Named functions that do one forward and backward pass each."""
    dtypes = [torch.float32] + [torch.bfloat16] * devices.native_bfloat16(torch.device("cpu"))
    steps = {}
    for dtype in dtypes:
        for is_compiled in (False, True) if compiled else (False,):
            mode = f"{str(dtype).removeprefix('torch.')}, {'compiled' if is_compiled else 'eager'}"
            steps[f"plain, {mode}"] = plain_step(config, ids, dtype, is_compiled)
            steps[f"ours, {mode}"] = our_step(config, ids, dtype, is_compiled)
        if compiled:  # as PretrainTrainer runs it on a CPU
            steps[f"ours, {mode}, exact"] = our_step(config, ids, dtype, True, exact=True)
    return steps


def plain_step(config: NanoChatGPTConfig, ids: torch.Tensor, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    torch.manual_seed(SEED)
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)
    model = PlainNanoChat(*shape, config.max_position_embeddings, dtype)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        forward(ids[:, :-1], ids[:, 1:]).backward()
        model.zero_grad()

    return step


def our_step(
    config: NanoChatGPTConfig, ids: torch.Tensor, dtype: torch.dtype, compiled: bool, exact: bool = False
) -> Callable[[], None]:
    torch.manual_seed(SEED)
    model = NanoChatGPTForCausalLM(config).train()
    model.set_activation_dtype(dtype)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with exact_sums(exact):
            forward(input_ids=ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:]).loss.backward()
        model.zero_grad()

    return step


def show(seconds: dict[str, list[float]], config: NanoChatGPTConfig, tokens: int, arguments: StepArguments) -> None:
    flops = scaling.flops_per_token(config, arguments.sequence_length) * tokens
    limits = {
        name: devices.matmul_flops_per_second(torch.device("cpu"), getattr(torch, name))
        for name in {name.split(", ")[1] for name in seconds}
    }
    baseline = statistics.median(seconds["plain, float32, eager"])
    print(f"depth {arguments.depth}, {config.hidden_size} wide, {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"{'forward + backward':28} {'median s':>9} {'tokens/s':>9} {'GFLOP/s':>8} {'of limit':>8} {'speed-up':>8}")
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = flops / median
        share = rate / limits[name.split(", ")[1]]
        print(
            f"{name:28} {median:9.3f} {tokens / median:9.0f} {rate / 1e9:8.1f} {share:8.0%} {baseline / median:7.2f}x"
        )


if __name__ == "__main__":
    main()
