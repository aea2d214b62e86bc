"""Are weights averaged over the end of a run better than its last ones? Judged on a ladder, as a change of recipe is.

    python -m benchmarks.tail_study --config ladder_toy/seed --era head --unembedding_lr 0.064 \\
        --output_dir out/tail_average

Every run of the ladder is trained twice: by the era's schedule, whose rates fall over the last two thirds, and at full
rates to the end, which is what averaging is said to make unnecessary. Each run keeps the means of its weights over
several last shares of its steps; the same batches measure them and the last weights, so that one run judges all of
them. The compute multiplier is against the last weights of the era's schedule. Each run leaves a file, and the same
command goes on; at the end the table is printed. The price: one pass over the weights for each share and step.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainerCallback

from modeling_nanochat.inference import eval_mode
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.ladder import REFUSED, LadderArguments, Rung, all_runs, multipliers, reference_rungs
from modeling_nanochat.recipes.pretrain import BITS_PER_BYTE, FOLLOWS, RunSettings, Validation, make_model, settle
from modeling_nanochat.recipes.stages.folder import load_tokenizer
from modeling_nanochat.recipes.stages.tables import markdown_table
from modeling_nanochat.tokenization_nanochat_gpt import generation_token_ids
from modeling_nanochat.training.data.documents import open_documents
from modeling_nanochat.training.data.row_source import RowSource
from modeling_nanochat.training.trainers.pretrain import PretrainTrainer
from modeling_nanochat.training.whole_files import write_json

SCHEDULES = {"the era's": {}, "full to the end": {"warmdown_ratio": 0.0}}
LAST = "last weights"
UNUSED = FOLLOWS | REFUSED | {"max_hours": "fewer depths or seeds"}


@dataclass
class TailArguments:
    """Over what to average."""

    shares: list[float] = field(
        default_factory=lambda: [0.02, 0.05, 0.1, 0.2, 0.4], metadata={"help": "Last shares of a run's steps."}
    )


class TailAverages(TrainerCallback):
    """Means of all weights over the last shares of a run, kept while it goes on."""

    def __init__(self, shares: Sequence[float]):
        self.means: dict[float, list[torch.Tensor]] = {share: [] for share in shares}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        weights = list(model.parameters())
        for share, means in self.means.items():
            number = state.global_step - state.max_steps + math.ceil(share * state.max_steps)  # 1 is the first
            if number == 1:
                means.extend(weight.detach().clone() for weight in weights)
            elif number > 1:
                torch._foreach_lerp_(means, weights, 1 / number)


def bits_per_byte(settings: RunSettings, shares: Sequence[float]) -> dict[str, float]:
    """Train one run, and measure its last weights and the means."""
    config = settings.config
    tokenizer = load_tokenizer(settings.arguments.tokenizer)
    documents = open_documents(settings.arguments.data, settings.arguments.text_column)
    source = RowSource(documents, tokenizer, settings.network.sequence_length)
    network = settings.network.network(len(tokenizer), **generation_token_ids(tokenizer))
    settled = settle(settings, network, source, None)
    settled.apply(config)
    validation = Validation(source.validation(settings.measure.validation_tokens, settled.rows), tokenizer)
    averages = TailAverages(shares)
    model, rows = make_model(network, config), source.training(settled.rows, config.device)
    PretrainTrainer(model, config, rows, callbacks=[averages]).train()
    found = {}
    averaged = copy.deepcopy(model)
    for name, weights in {LAST: list(model.parameters()), **averages.means}.items():
        with torch.no_grad():
            torch._foreach_copy_(list(averaged.parameters()), weights)
        with eval_mode(averaged):
            found[str(name)] = validation(averaged, config.max_steps)[BITS_PER_BYTE]
    return found


def main() -> None:
    tail, ladder, *groups = parse(TailArguments, LadderArguments, *RunSettings.CLASSES, refused=UNUSED)
    settings = RunSettings(*groups)
    flops_of = reference_rungs(ladder.reference, ladder.depths) if ladder.reference else None
    found: dict[tuple[str, str], list[Rung]] = {}
    for schedule, change in SCHEDULES.items():
        config = dataclasses.replace(settings.config, **change)
        for own, flops in all_runs(dataclasses.replace(settings, config=config), ladder, flops_of):
            depth, seed = own.network.depth, own.config.seed
            file = Path(settings.config.output_dir, f"{schedule}, depth {depth}, seed {seed}.json")
            if not file.is_file():
                write_json(file, bits_per_byte(own, tail.shares))
                print(f"{file.stem}: {file.read_text()}", flush=True)
            for name, value in json.loads(file.read_text()).items():
                found.setdefault((schedule, name), []).append(Rung(depth, seed, flops, 0, 0, value, 0.0))
    print("\n" + table(found))


def table(found: dict[tuple[str, str], list[Rung]]) -> str:
    """Multipliers by depth against the last weights of the era's schedule, x/ the factor of one standard error."""
    reference = found[next(iter(SCHEDULES)), LAST]
    depths = sorted({rung.depth for rung in reference})
    rows = []
    for (schedule, name), rungs in found.items():
        worth = multipliers(rungs, reference)
        cells = [f"{worth[d][0]:.3f} x/ {worth[d][1] or 1:.3f}" if d in worth else "" for d in depths]
        rows.append((schedule, name if name == LAST else f"mean of the last {float(name):.0%}", *cells))
    return "\n".join(markdown_table(("rates", "weights", *(f"depth {d}" for d in depths)), rows))


if __name__ == "__main__":
    run(main)
