"""One whole training step, optimizer included: ours against upstream's network as a plain PyTorch module.

    python -m benchmarks.training_step [--depth 4 --sequence_length 512 --rows 8 --window_pattern L --rounds 5]

Upstream runs in three settings: float32 and eager (the seed era's default on a CPU), float32 and compiled (head's
default), and bfloat16 and compiled (head's best, where the processor multiplies bfloat16 itself; emulated, a step would
take minutes). Ours is head's network, eager and compiled, in the dtype that `auto` chooses. All variants see the same
tokens, in turn within each round, so that a machine whose speed drifts slows them alike; the median of each and its
ratio to the first count, and where neighbours make steps of one variant differ by a half, those of the fastest steps.
`of limit` is the rate in FLOP/s over that of a large matrix product in the same dtype, which is measured in each round
too. Compiled steps of ours take the sums of looked-up rows in order, as `PretrainTrainer` does, so that runs repeat to
the bit; `any order` is what that costs.

    python -m benchmarks.training_step --only "ours, bfloat16, compiled"     (a part of the names is enough)

measures some variants alone; if one, what the kernel counted as the peak of the process's memory is said too.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from trl import TrlParser

from benchmarks.memory import peak_memory
from benchmarks.optimizer_step import PlainOptimizer
from benchmarks.plain_nanochat import PlainNanoChat
from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import ADAMW_DEFAULTS, MUON_DEFAULTS, MuonAdamW
from modeling_nanochat.training.trainers.pretrain import exact_sums

HEAD_DIM = 64
SEED = 0
AUTO = devices.choose_dtype("auto", "cpu")


@dataclass
class StepArguments:
    """What to measure."""

    depth: int = field(default=4, metadata={"help": "Number of layers."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of a row."})
    rows: int = field(default=8, metadata={"help": "Rows of a batch."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    window_pattern: str = field(default="SSSL", metadata={"help": "Short (S) and long (L) layers, tiled."})
    rounds: int = field(default=5, metadata={"help": "Times each variant is measured, after one warm-up."})
    only: list[str] = field(default_factory=list, metadata={"help": "Parts of the names of the variants to measure."})


def main() -> None:
    (arguments,) = TrlParser((StepArguments,)).parse_args_and_config()
    devices.keep_freed_memory()  # as our trainers do; it helps upstream's steps as much
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(arguments.vocab_size, (arguments.rows, arguments.sequence_length + 1), generator=generator)
    configs = {era: network(arguments, era) for era in ("seed", "head")}
    builders = variants(configs, ids, arguments.window_pattern)
    steps = {name: builders[name]() for name in chosen(list(builders), arguments.only)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    limits: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for round_number in range(arguments.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number:  # the first warms up (and compiles)
                seconds[name].append(time.perf_counter() - start)
            else:
                print(f"{name}: the first step took {time.perf_counter() - start:.1f} s", flush=True)
        for dtype, rates in limits.items():
            if dtype in str(AUTO) or dtype == "float32":
                rates.append(devices.matmul_flops_per_second("cpu", getattr(torch, dtype)))
    show(seconds, limits, configs, arguments)
    if len(steps) == 1:
        print(f"peak memory of the process: {peak_memory() / 1e6:,.0f} MB")


def chosen(names: list[str], parts: list[str]) -> list[str]:
    """The names that the parts mean: a whole name itself, any other part all names that contain it; no parts, all."""
    meant = [[part] if part in names else [name for name in names if part in name] for part in parts]
    for part, own in zip(parts, meant):
        if not own:
            raise SystemExit(f"--only {part!r} names no variant, expected parts of: {'; '.join(names)}")
    return [name for name in names if not parts or any(name in own for own in meant)]


def network(arguments: StepArguments, era: str) -> NanoChatGPTConfig:
    return NanoChatGPTConfig.from_depth(
        arguments.depth,
        vocab_size=arguments.vocab_size,
        head_dim=HEAD_DIM,
        max_position_embeddings=arguments.sequence_length,
        era=era,
        window_pattern=arguments.window_pattern,
    )


def variants(
    configs: dict[str, NanoChatGPTConfig], ids: torch.Tensor, pattern: str
) -> dict[str, Callable[[], Callable[[], None]]]:
    """Named functions that build a network and return the function that does one step of it."""
    plain = partial(plain_step, ids=ids, pattern=pattern)
    ours, auto = partial(our_step, configs["head"], ids), str(AUTO).removeprefix("torch.")
    builders = {
        "upstream seed, float32, eager": partial(plain, configs["seed"], "seed", torch.float32, compiled=False),
        "upstream head, float32, compiled": partial(plain, configs["head"], "head", torch.float32, compiled=True),
    }
    if devices.native_bfloat16("cpu"):
        builders["upstream head, bfloat16, compiled"] = partial(plain, configs["head"], "head", AUTO, compiled=True)
    builders[f"ours, {auto}, eager"] = partial(ours, compiled=False)
    builders[f"ours, {auto}, compiled"] = partial(ours, compiled=True)
    builders[f"ours, {auto}, compiled, any order"] = partial(ours, compiled=True, exact=False)
    return builders


def plain_step(
    config: NanoChatGPTConfig, era: str, dtype: torch.dtype, *, compiled: bool, ids: torch.Tensor, pattern: str
) -> Callable[[], None]:
    """Upstream's optimizer is compiled in both eras, as here."""
    torch.manual_seed(SEED)
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size)
    model = PlainNanoChat(*shape, config.max_position_embeddings, dtype, era, pattern)
    matrices = list(model.blocks.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    groups = [
        ADAMW_DEFAULTS | {"use_muon": False, "params": others, "lr": 1e-3},
        MUON_DEFAULTS | {"use_muon": True, "params": matrices, "lr": 0.02},
    ]
    optimizer = PlainOptimizer(groups, compiled=True)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        forward(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        model.zero_grad()

    return step


def our_step(config: NanoChatGPTConfig, ids: torch.Tensor, *, compiled: bool, exact: bool = True) -> Callable[[], None]:
    torch.manual_seed(SEED)
    model = NanoChatGPTForCausalLM(config).train()
    model.set_activation_dtype(AUTO)
    groups = build_param_groups(model, era="head", batch_tokens=ids[:, 1:].numel(), weight_decay=0.0)
    optimizer = MuonAdamW(groups, compile=compiled)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with exact_sums(compiled and exact):
            forward(input_ids=ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:]).loss.backward()
            optimizer.step()
        model.zero_grad()

    return step


def show(
    seconds: dict[str, list[float]],
    limits: dict[str, list[float]],
    configs: dict[str, NanoChatGPTConfig],
    arguments: StepArguments,
) -> None:
    tokens = arguments.rows * arguments.sequence_length
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = {name: min(times) for name, times in seconds.items()}
    first = next(iter(seconds))
    print(
        f"depth {arguments.depth}, {configs['head'].hidden_size} wide, {arguments.rows} rows of "
        f"{arguments.sequence_length}, pattern {arguments.window_pattern}, {torch.get_num_threads()} threads"
    )
    for dtype, rates in limits.items():
        if rates:
            print(f"a large {dtype} product: {statistics.median(rates) / 1e9:.0f} GFLOP/s ({len(rates)} times in turn)")
    print(
        f"{'step':36} {'median s':>9} {'tokens/s':>9} {'GFLOP/s':>8} {'of limit':>8} {'speed-up':>8} "
        f"{'fastest s':>10} {'speed-up':>8}"
    )
    for name, median in medians.items():
        config = configs["seed" if "seed" in name else "head"]
        rate = scaling.flops_per_token(config, arguments.sequence_length) * tokens / median
        share = rate / statistics.median(limits[name.split(", ")[1]])
        print(
            f"{name:36} {median:9.3f} {tokens / median:9.0f} {rate / 1e9:8.1f} {share:8.0%} "
            f"{medians[first] / median:7.2f}x {fastest[name]:10.3f} {fastest[first] / fastest[name]:7.2f}x"
        )


if __name__ == "__main__":
    main()
