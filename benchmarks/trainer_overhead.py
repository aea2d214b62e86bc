"""What the Trainer adds to a step: PretrainTrainer against a bare loop of the same model, rows, optimizer and schedule.

    python -m benchmarks.trainer_overhead [--depth 4 --sequence_length 256 --rows 8 --steps 12 --rounds 3]

The two take turns, so that a busy machine slows them alike; the median time from one optimizer step to the next counts,
logging every tenth step included. A second, nearly empty network shows the cost in milliseconds, whatever the model.
Aimed at: at most 1.03 times the bare loop.
"""

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import TrainerCallback
from trl import TrlParser

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.optimizer.eras import pretraining_schedules
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import GroupScheduler
from modeling_nanochat.training.scaling import scaled_weight_decay
from modeling_nanochat.training.trainers.pretrain import PretrainConfig, PretrainTrainer

VOCABULARY, HEAD_DIM = 4096, 64


@dataclass
class OverheadArguments:
    """What to measure."""

    depth: int = field(default=4, metadata={"help": "Number of layers."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens of a row."})
    rows: int = field(default=8, metadata={"help": "Rows of a batch."})
    steps: int = field(default=12, metadata={"help": "Steps of each turn; the first two are not counted."})
    rounds: int = field(default=3, metadata={"help": "Turns of each."})


class RandomRows:
    """A row that is always the same: making rows costs nothing here."""

    def __init__(self, length: int):
        self.row = np.random.default_rng(0).integers(VOCABULARY, size=length + 1).astype(np.int32)

    def __next__(self) -> np.ndarray:
        return self.row

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


class StepTimes(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def bare_loop(model: NanoChatGPTForCausalLM, rows: RowLoader, steps: int) -> list[float]:
    """The moments at which optimizer steps end, in the shortest loop that does the same work."""
    batch_tokens = rows.rows * rows.sequence_length
    decay = scaled_weight_decay(model.config, batch_tokens)
    optimizer = MuonAdamW(build_param_groups(model, batch_tokens=batch_tokens, weight_decay=decay))
    scheduler = GroupScheduler(optimizer, steps, **pretraining_schedules())
    times, batches = [], iter(rows)
    for _ in range(steps):
        model(**next(batches)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    batches.close()
    return times


def with_trainer(model: NanoChatGPTForCausalLM, rows: RowLoader, steps: int, folder: str) -> list[float]:
    """The same moments with PretrainTrainer."""
    config = PretrainConfig(
        output_dir=folder, max_steps=steps, save_strategy="no", disable_tqdm=True, torch_compile=False, use_cpu=True
    )
    clock = StepTimes()
    PretrainTrainer(model, config, rows, callbacks=[clock]).train()
    return clock.times


def measure(config: NanoChatGPTConfig, rows: int, steps: int, rounds: int) -> tuple[float, float]:
    """Median seconds a step: bare loop, Trainer."""
    length = config.max_position_embeddings
    bare, trainer = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            torch.manual_seed(0)
            model = NanoChatGPTForCausalLM(config).train()
            loader = RowLoader(lambda stream, streams: RandomRows(length), rows, length)
            for times, moments in ((bare, bare_loop(model, loader, steps)),
                                   (trainer, with_trainer(model, loader, steps, folder))):  # fmt: skip
                times += [later - earlier for earlier, later in itertools.pairwise(moments[1:])]
    return statistics.median(bare), statistics.median(trainer)


def main() -> None:
    (arguments,) = TrlParser((OverheadArguments,)).parse_args_and_config()
    shapes = {
        f"depth {arguments.depth}": (
            NanoChatGPTConfig.from_depth(
                arguments.depth,
                vocab_size=VOCABULARY,
                head_dim=HEAD_DIM,
                max_position_embeddings=arguments.sequence_length,
            ),
            arguments.rows,
        ),
        "12 tiny layers": (
            NanoChatGPTConfig.from_depth(
                12, vocab_size=VOCABULARY, head_dim=16, max_position_embeddings=16, hidden_size=32,
                num_attention_heads=2, value_gate_channels=16,
            ),
            1,
        ),
    }  # fmt: skip
    print(f"{'network':>16} {'bare ms':>9} {'Trainer ms':>11} {'added ms':>9} {'ratio':>6}")
    for name, (config, rows) in shapes.items():
        bare, trainer = measure(config, rows, arguments.steps, arguments.rounds)
        added = 1e3 * (trainer - bare)
        print(f"{name:>16} {1e3 * bare:>9.2f} {1e3 * trainer:>11.2f} {added:>9.2f} {trainer / bare:>6.3f}")


if __name__ == "__main__":
    main()
