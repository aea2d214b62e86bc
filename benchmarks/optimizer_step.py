"""One optimizer step: MuonAdamW against the same rules written the obvious way, and its share of a training step.

    python -m benchmarks.optimizer_step [--depth 4 --rows 8 --sequence_length 512 --vocab_size 8192 --rounds 5]

The plain step is what one would write from the papers, and what upstream runs: for each shape the matrices stacked,
five times three products in float32 or bfloat16, AdamW tensor by tensor in elementary operations; eager, or both
functions compiled. All see the same gradients in turn within each round, so that a machine whose speed drifts slows
them alike; medians and their ratios count. After the first step all must have the same weights, which is checked.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from trl import TrlParser

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.updates import POLAR_EXPRESS_COEFFICIENTS

HEAD_DIM = 64
SEED = 0
DTYPE = torch.bfloat16 if devices.native_bfloat16("cpu") else torch.float32  # of activations and orthogonalisation
APART = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # two steps, of their norm; bfloat16 rounds chaotically


@dataclass
class OptimizerArguments:
    """What to measure."""

    depth: int = field(default=4, metadata={"help": "Number of layers."})
    sequence_length: int = field(default=512, metadata={"help": "Tokens of a row of the training step."})
    rows: int = field(default=8, metadata={"help": "Rows of the training step's batch."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    rounds: int = field(default=5, metadata={"help": "Times each variant is measured, after one warm-up."})
    compile: bool = field(default=True, metadata={"help": "Measure the compiled variants too."})


# ---------------------------------------------------------------- the plain step


def plain_adamw(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, betas: tuple, decay: Tensor
) -> None:
    p.mul_(1 - lr * decay)
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + 1e-10
    p.sub_(lr / (1 - betas[0] ** step) * exp_avg / denominator)


def plain_muon(
    p: Tensor, grad: Tensor, momentum_buffer: Tensor, second_moment: Tensor, lr: Tensor, momentum: Tensor, decay: Tensor
) -> None:
    """All of (K, m, n)."""
    momentum_buffer.lerp_(grad, 1 - momentum)
    x = grad.lerp(momentum_buffer, momentum)
    x = x.to(DTYPE)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    x = x.float()
    mean_square = x.square().mean(-1 if x.size(-2) >= x.size(-1) else -2, keepdim=True)
    second_moment.lerp_(mean_square, 1 - 0.95)
    scaled = x * second_moment.clamp_min(1e-10).rsqrt()
    x = scaled * (x.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    lr = lr * math.sqrt(max(1, x.size(-2) / x.size(-1)))
    p.sub_(lr * x + lr * decay * p * (x * p >= 0))


class PlainOptimizer:
    """The rules of the seed era, shape by shape and tensor by tensor."""

    def __init__(self, groups: list[dict], compiled: bool):
        compile = torch.compile(dynamic=False, fullgraph=True) if compiled else lambda function: function
        self.adamw, self.muon = compile(plain_adamw), compile(plain_muon)
        self.steps, self.adamw_tensors, self.stacks = 0, [], []
        for group in groups:
            if not group["use_muon"]:
                self.adamw_tensors += [(group, p, torch.zeros_like(p), torch.zeros_like(p)) for p in group["params"]]
                continue
            shapes = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for (rows, columns), matrices in shapes.items():
                momentum_buffer = torch.zeros(len(matrices), rows, columns)
                second_moment = torch.zeros(len(matrices), *((rows, 1) if rows >= columns else (1, columns)))
                self.stacks.append((group, matrices, momentum_buffer, second_moment))

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group, parameter, *moments in self.adamw_tensors:
            step, lr, decay = (torch.tensor(float(value)) for value in (self.steps, group["lr"], group["weight_decay"]))
            self.adamw(parameter, parameter.grad, *moments, step, lr, group["betas"], decay)
        for group, matrices, *buffers in self.stacks:
            lr, momentum, decay = (torch.tensor(value) for value in (group["lr"], 0.95, group["weight_decay"]))
            stacked = torch.stack(matrices)
            self.muon(stacked, torch.stack([matrix.grad for matrix in matrices]), *buffers, lr, momentum, decay)
            torch._foreach_copy_(matrices, list(stacked.unbind()))


# ---------------------------------------------------------------- measurement


def build_model(arguments: OptimizerArguments) -> NanoChatGPTForCausalLM:
    torch.manual_seed(SEED)
    config = NanoChatGPTConfig.from_depth(
        arguments.depth,
        vocab_size=arguments.vocab_size,
        head_dim=HEAD_DIM,
        max_position_embeddings=arguments.sequence_length,
    )
    return NanoChatGPTForCausalLM(config).train()


def optimizer_step(arguments: OptimizerArguments, plain: bool, compiled: bool) -> tuple[Callable[[], None], Tensor]:
    """A step on a network of its own, and a matrix to tell its weights by."""
    model = build_model(arguments)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    batch_tokens = arguments.rows * arguments.sequence_length
    decay = scaling.scaled_weight_decay(model.config, batch_tokens)
    groups = build_param_groups(model, batch_tokens=batch_tokens, weight_decay=decay)
    optimizer = PlainOptimizer(groups, compiled) if plain else MuonAdamW(groups, compile=compiled)
    return optimizer.step, model.model.layers[-1].mlp.down_proj.weight


def training_step(arguments: OptimizerArguments) -> Callable[[], None]:
    """Forward and backward of the network, in the dtype the processor is good at."""
    model = build_model(arguments)
    model.set_activation_dtype(DTYPE)
    ids = torch.randint(arguments.vocab_size, (arguments.rows, arguments.sequence_length + 1))

    def step() -> None:
        model(input_ids=ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:]).loss.backward()
        model.zero_grad()

    return step


def main() -> None:
    (arguments,) = TrlParser((OptimizerArguments,)).parse_args_and_config()
    variants, weights = {"forward + backward": training_step(arguments)}, []
    for compiled in (False, True) if arguments.compile else (False,):
        for name in ("plain", "ours"):
            step, weight = optimizer_step(arguments, name == "plain", compiled)
            variants[f"{name}, {'compiled' if compiled else 'eager'}"] = step
            weights.append(weight)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(arguments.rounds + 1):
        for name, step in variants.items():
            start = time.perf_counter()
            step()
            if round_number:  # the first warms up (and compiles)
                seconds[name].append(time.perf_counter() - start)
            elif not name.startswith("forward"):
                print(f"{name}: the first step took {time.perf_counter() - start:.1f} s")
        if not round_number:
            for weight in weights:  # began at zero, so it is the step itself
                apart = ((weight - weights[0]).norm() / weights[0].norm()).item()
                assert apart <= APART[DTYPE], f"steps are {apart:.1e} of their norm apart, expected {APART[DTYPE]}"
    show(seconds, arguments)


def show(seconds: dict[str, list[float]], arguments: OptimizerArguments) -> None:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    training = medians.pop("forward + backward")
    tokens = arguments.rows * arguments.sequence_length
    print(f"depth {arguments.depth}, {torch.get_num_threads()} threads")
    print(f"forward + backward of {tokens} tokens: {training:.3f} s")
    print(f"{'optimizer step':16} {'median s':>9} {'speed-up':>8} {'of the training step':>21}")
    for name, median in medians.items():
        print(f"{name:16} {median:9.3f} {medians['plain, eager'] / median:7.2f}x {median / (median + training):21.1%}")


if __name__ == "__main__":
    main()
