"""What a pretraining run of some depth will be: parameters, tokens, FLOPs, memory, time and cost, before paying for it.

    nanochat plan --depth 20 --gpus 8 --device H100
    nanochat plan --table 4 8 12 16 20 24 26 32

Nothing is built and no device is needed: everything follows by formula from the depth (`training/scaling.py`). Time and
cost rest on an assumed utilisation, memory on counts of what a compiled step keeps: good to about a quarter, enough to
choose a depth, a device and a batch.
"""

from dataclasses import asdict, dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.network import HorizonArguments, NetworkArguments
from modeling_nanochat.recipes.stages.numbers import readable_time
from modeling_nanochat.recipes.stages.prices import DOLLARS_PER_HOUR, RENTS
from modeling_nanochat.training import devices, memory, scaling
from modeling_nanochat.training.optimizer.eras import era_of
from modeling_nanochat.training.optimizer.sorting import attention_heads


@dataclass
class PlanArguments(NetworkArguments, HorizonArguments):
    """What to plan."""

    depth: int = field(default=20, metadata={"help": "Number of layers; sets the whole shape."})
    gpus: int = field(default=8, metadata={"help": "Number of devices."})
    device: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(devices.DEVICES)}; by default a line for each of them."}
    )
    vocab_size: int = field(default=32768, metadata={"help": "Tokens of the vocabulary."})
    max_steps: int | None = field(default=None, metadata={"help": "Horizon: a number of optimizer steps."})
    table: list[int] = field(
        default_factory=list,
        metadata={"help": "Depths to compare in a Markdown table of parameters and FLOPs, instead of planning a run."},
    )
    utilisation: float = field(
        default=devices.EXPECTED_UTILISATION["cuda"],
        metadata={"help": "Share of a device's data sheet that training is expected to reach."},
    )


def plan_of(arguments: PlanArguments) -> tuple[PreTrainedConfig, scaling.TrainingPlan]:
    """The network and the run that the arguments describe."""
    arguments.check()
    config = arguments.network(arguments.vocab_size)
    plan = scaling.plan_training(
        config,
        era=era_of(config),
        aspect_ratio=arguments.aspect_ratio,
        batch_tokens=arguments.total_batch_tokens,
        max_steps=arguments.max_steps,
        target_flops=arguments.target_flops,
        tokens_per_parameter=arguments.tokens_per_parameter,
    )
    return config, plan


def describe_plan(config: PreTrainedConfig, plan: scaling.TrainingPlan) -> str:
    """The network and the run, line by line."""
    parameters = asdict(plan.parameters)
    lines = [
        f"depth {config.num_hidden_layers}: {config.hidden_size} wide, {config.num_attention_heads} heads of "
        f"{attention_heads(config)[2]}, vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}",
        "",
        *(f"{name.replace('_', ' '):>20} {count:>16,}" for name, count in parameters.items()),
        f"{'all parameters':>20} {plan.parameters.total:>16,}",
        f"{'scaling parameters':>20} {plan.parameters.scaling:>16,}",
        "",
        f"{'tokens':>20} {plan.tokens:>16,}  ({plan.tokens / plan.parameters.scaling:.1f} a scaling parameter)",
        f"{'optimizer steps':>20} {plan.steps:>16,}  of {plan.batch_tokens:,} tokens",
        f"{'FLOPs':>20} {plan.flops:>16.3e}  ({plan.flops_per_token:.3e} a token)",
        f"{'weight decay':>20} {plan.weight_decay:>16.4f}",
        f"{'learning rates':>20} {scaling.learning_rate_scale(plan.batch_tokens):>16.3f}  times their base values",
    ]
    return "\n".join(lines)


def describe_device(
    name: str, config: PreTrainedConfig, plan: scaling.TrainingPlan, gpus: int, utilisation: float
) -> str:
    """One line of the table of devices: micro-batch, memory, time and cost, or why it does not fit."""
    device, length = devices.DEVICES[name], config.max_position_embeddings
    seconds = plan.flops / (device.bfloat16_flops_per_second * utilisation * gpus)
    dollars = seconds / 3600 * gpus * DOLLARS_PER_HOUR[name]
    try:
        rows = memory.planned_rows(
            config,
            batch_tokens=plan.batch_tokens,
            sequence_length=length,
            world_size=gpus,
            memory_bytes=int(memory.USABLE_MEMORY * device.memory_bytes),
            dtype=torch.bfloat16,
        )
    except ValueError as error:
        return f"{name:>10}  {error}"
    needed = memory.memory_per_device(config, rows, length, gpus, torch.bfloat16)
    steps = scaling.accumulation_steps(plan.batch_tokens, rows, length, gpus)
    parts = ", ".join(f"{use} {size / 1e9:.1f}" for use, size in needed.items() if size)
    return (
        f"{name:>10}  {readable_time(seconds):>12}  {dollars:>9,.0f} $  {rows:>3} rows x {steps:<3} "
        f" {sum(needed.values()) / 1e9:>5.1f} of {device.memory_bytes / 1e9:.0f} GB ({parts})"
    )


def table_of_depths(arguments: PlanArguments) -> str:
    """Parameters and FLOPs of every depth in `arguments.table`, as Markdown; in millions, and GFLOP for one token."""
    columns = ("depth", "hidden", "heads", "token embedding", "value embeddings", "blocks", "head", "total",
               "training GFLOP a token", "of it attention", "tokens", "training FLOP")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + " ---: |" * len(columns)]
    for depth in arguments.table:
        config, plan = plan_of(replace(arguments, depth=depth))
        counts = plan.parameters
        parts = (counts.token_embedding, counts.value_embeddings, counts.matrices, counts.head, counts.total)
        attention = 1 - 6 * scaling.multiplying_parameters(config) / plan.flops_per_token
        cells = [str(depth), str(config.hidden_size), str(config.num_attention_heads)]
        cells += [f"{part / 1e6:,.1f} M" for part in parts]
        cells += [f"{plan.flops_per_token / 1e9:.2f}", f"{attention:.0%}"]
        cells += [f"{plan.tokens / 1e9:.2f} G", f"{plan.flops:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    (arguments,) = parse(PlanArguments)
    if arguments.table:
        print(table_of_depths(arguments))
        return
    if arguments.device is not None and arguments.device not in devices.DEVICES:
        raise ValueError(f"device={arguments.device!r}, expected one of {', '.join(devices.DEVICES)}")
    config, plan = plan_of(arguments)
    print(describe_plan(config, plan))
    print(f"\non {arguments.gpus} devices at {arguments.utilisation:.0%} utilisation ({RENTS}):")
    for name in [arguments.device] if arguments.device else devices.DEVICES:
        print(describe_device(name, config, plan, arguments.gpus, arguments.utilisation))


if __name__ == "__main__":
    run(main)
