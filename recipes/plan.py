"""What a pretraining run of some depth will be: parameters, tokens, FLOPs, memory, time and cost, before paying for it.

    nanochat plan --depth 20 --gpus 8 --device H100
    nanochat plan --table 4 8 12 16 20 24 26 32

Nothing is built and no device is needed: everything follows by formula from the depth (`training/scaling.py`). Time is
that of kernels and links on a clock (`training/step_time.py`; within a tenth of upstream's published runs on H100s, an
estimate elsewhere), for a compiled step and training alone; memory is by counts of what such a step keeps. Enough to
choose a depth, a device, how many of them, and a batch.
"""

from dataclasses import asdict, dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.network import HorizonArguments, NetworkArguments
from modeling_nanochat.recipes.stages.numbers import readable_time
from modeling_nanochat.recipes.stages.prices import ORIENTATION, RENTS
from modeling_nanochat.training import devices, memory, scaling, step_time
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
    fp8: bool = field(
        default=False, metadata={"help": "Matrix products in float8, on devices that have it (pretraining's --fp8)."}
    )
    activation_checkpointing: bool = field(
        default=False, metadata={"help": "Blocks that keep only what goes into them, and go forward twice."}
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


def step_on(
    name: str, config: PreTrainedConfig, plan: scaling.TrainingPlan, arguments: PlanArguments
) -> tuple[int, step_time.StepTime]:
    """Rows of a micro-batch on so many devices, and the step's time with them.

    Raises:
        ValueError: it does not fit, or has no float8 though it should; the message says so.
    """
    device, gpus, fp8 = devices.DEVICES[name], arguments.gpus, arguments.fp8
    checkpointed = arguments.activation_checkpointing
    if fp8 and not device.float8:
        able = ", ".join(name for name, device in devices.DEVICES.items() if device.float8)
        raise ValueError(f"{name} multiplies no float8; expected one of {able}, or no --fp8")
    rows = memory.planned_rows(
        config,
        batch_tokens=plan.batch_tokens,
        sequence_length=config.max_position_embeddings,
        world_size=gpus,
        memory_bytes=int(memory.USABLE_MEMORY * device.memory_bytes),
        dtype=torch.bfloat16,
        checkpointed=checkpointed,
    )
    return rows, step_time.step_time(
        config,
        batch_tokens=plan.batch_tokens,
        rows=rows,
        device=device,
        gpus=gpus,
        float8=fp8,
        checkpointed=checkpointed,
    )


def describe_device(
    name: str,
    config: PreTrainedConfig,
    plan: scaling.TrainingPlan,
    arguments: PlanArguments,
    rows: int,
    step: step_time.StepTime,
) -> str:
    """One line of the table of devices: time, cost, micro-batch and memory."""
    device, gpus, length = devices.DEVICES[name], arguments.gpus, config.max_position_embeddings
    seconds = plan.steps * step.seconds
    dollars = seconds / 3600 * gpus * RENTS[name].dollars
    needed = memory.memory_per_device(
        config, rows, length, gpus, torch.bfloat16, checkpointed=arguments.activation_checkpointing
    )
    steps = scaling.accumulation_steps(plan.batch_tokens, rows, length, gpus)
    parts = ", ".join(f"{use} {size / 1e9:.1f}" for use, size in needed.items() if size)
    return (
        f"{name:>10}  {readable_time(seconds):>12}  {dollars:>9,.0f} $  {rows:>3} rows x {steps:<3} "
        f" {sum(needed.values()) / 1e9:>5.1f} of {device.memory_bytes / 1e9:.0f} GB ({parts})"
    )


def describe_step(name: str, plan: scaling.TrainingPlan, gpus: int, step: step_time.StepTime) -> str:
    """One line of the table of parts: a step's time, what it reaches of the data sheet, and where the time goes."""
    peak = devices.DEVICES[name].bfloat16_flops_per_second * gpus
    reached = plan.flops_per_token * plan.batch_tokens / step.seconds / peak
    cells = [f"{1000 * step.seconds:,.1f}", f"{reached:.0%}"]
    cells += [f"{seconds / step.seconds:.1%}" for seconds in step.parts.values()]
    widths = [len(heading) for heading in step_headings(step)]
    return f"{name:>10}  " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))


def step_headings(step: step_time.StepTime) -> list[str]:
    return ["ms a step", "of data sheet", *step.parts]


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
    if arguments.gpus < 1:
        raise ValueError(f"gpus={arguments.gpus}, expected at least 1")
    if arguments.device is not None and arguments.device not in devices.DEVICES:
        raise ValueError(f"device={arguments.device!r}, expected one of {', '.join(devices.DEVICES)}")
    config, plan = plan_of(arguments)
    print(describe_plan(config, plan))
    print(describe_devices(config, plan, arguments))


def describe_devices(config: PreTrainedConfig, plan: scaling.TrainingPlan, arguments: PlanArguments) -> str:
    """Time, cost and memory on each device, or why it does not fit, and where the time of a step goes."""
    names = [arguments.device] if arguments.device else list(devices.DEVICES)
    lines, parts = [f"\non {arguments.gpus} devices, training alone ({ORIENTATION}):"], []
    for name in names:
        try:
            rows, step = step_on(name, config, plan, arguments)
        except ValueError as error:
            lines.append(f"{name:>10}  {error}")
            continue
        lines.append(describe_device(name, config, plan, arguments, rows, step))
        parts.append(describe_step(name, plan, arguments.gpus, step))
    if parts:
        lines += ["\nwhere the time goes:", " " * 12 + "  ".join(step_headings(step)), *parts]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
