"""Bytes that a compiled step's own kernels read and write: two of the counts in `training/step_time.py`.

    python -m benchmarks.step_traffic [--era head]

Inductor counts the bytes of every kernel it makes, which leaves out matrix products and attention. Networks that differ
in depth, vocabulary and rows give the bytes of one block and of one logit by subtraction. It compiles for this
machine's CPU, whose fusions differ a little from a GPU's; nothing is timed.
"""

import argparse

import torch
from torch._inductor import config as inductor
from torch._inductor.scheduler import Scheduler

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM

WIDTH, LENGTH = 256, 256
FEW, MANY = 2, 4  # rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--era", default="seed")
    era = parser.parse_args().era
    shallow, deep, wide = (of_tokens(era, *shape) for shape in ((2, 1024), (6, 1024), (2, 2048)))
    print(f"{era}: {(deep - shallow) / (4 * WIDTH * 2):.1f} values a token, block and unit of the width")
    print(f"{era}: {(wide - shallow) / 1024:.1f} bytes a logit")


def of_tokens(era: str, depth: int, vocab_size: int) -> float:
    """Bytes of one more token, without those of weights and their gradients."""
    few, many = (traffic(era, depth, vocab_size, rows) for rows in (FEW, MANY))
    return (many - few) / ((MANY - FEW) * LENGTH)


def traffic(era: str, depth: int, vocab_size: int, rows: int) -> int:
    """Bytes of one forward and backward pass in bfloat16."""
    torch._dynamo.reset()
    total, codegen = [], Scheduler.codegen

    def counted(scheduler: Scheduler) -> None:
        total.extend(node.get_read_write_buffers_sizes() for node in scheduler.nodes if not node.is_extern())
        codegen(scheduler)

    config = NanoChatGPTConfig.from_depth(
        depth, era=era, vocab_size=vocab_size, head_dim=64, aspect_ratio=WIDTH // depth, max_position_embeddings=LENGTH
    )
    model = NanoChatGPTForCausalLM(config).train()
    model.set_activation_dtype(torch.bfloat16)
    ids = torch.zeros(rows, LENGTH, dtype=torch.int64)
    Scheduler.codegen = counted
    try:
        with inductor.patch(fx_graph_cache=False):
            torch.compile(model)(input_ids=ids, labels=ids, shift_labels=ids).loss.backward()
    finally:
        Scheduler.codegen = codegen
    return sum(total)


if __name__ == "__main__":
    main()
