"""What each part of the network is missed for: the demo's network trained without it, for as many steps.

    python -m benchmarks.parts_study            # three quarters of an hour on one core; goes on where it was stopped

A part is taken out (or, for two that came later, put in) and everything else stays: text, order, number of steps, the
demo's rates. What counts is the loss on held-out text beside that of the whole network from the same seed, which says
where the weights begin and which share of the text is read. Each run leaves a file; when all are there, the table is
printed and written to docs/figures/missing_parts.json, from which docs/figures/missing_parts.py draws.

The price of equal settings: the rates were found with all parts in place, so a part whose absence wants other rates
looks dearer than it is.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, set_seed

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.inference import eval_mode
from modeling_nanochat.recipes.command_line import CONFIGS, parse, run
from modeling_nanochat.training.data.documents import open_documents
from modeling_nanochat.training.data.packed_rows import PackedRows
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.data.row_source import RowSource
from modeling_nanochat.training.trainers.pretrain import PretrainConfig, PretrainTrainer
from modeling_nanochat.training.whole_files import write_json

TABLE = Path("docs/figures/missing_parts.json")
DEMO = yaml.safe_load((CONFIGS / "demo/pretrain.yaml").read_text(encoding="utf-8"))
DEPTH, HEAD_DIM, LENGTH = DEMO["depth"], DEMO["head_dim"], DEMO["sequence_length"]
ROWS = DEMO["total_batch_tokens"] // LENGTH
RATES = {name: DEMO[name] for name in ("matrix_lr", "embedding_lr", "unembedding_lr")}
SHARES = 4  # of the text; a seed reads one of them
WHOLE, CONTROL = "nothing", "nothing, other dice"


@dataclass
class StudyArguments:
    """Where, and how much."""

    data: str = field(default="out/figures/data/pretrain", metadata={"help": "Documents (`make figures`)."})
    tokenizer: str = field(default="out/figures/tokenizer", metadata={"help": "Their tokenizer."})
    output_dir: str = field(default="out/figures/parts", metadata={"help": "Folder of a file for each run."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Runs of each part."})
    parts: list[str] = field(
        default_factory=lambda: [name for name in PARTS if name not in (WHOLE, CONTROL)],
        metadata={"help": "What to take out."},
    )
    steps: int = field(default=128, metadata={"help": "Optimizer steps of each run."})
    validation_tokens: int = field(default=60_000, metadata={"help": "Tokens of held-out text."})


# ---------------------------------------------------------------- how a part is taken out


class Nothing(nn.Module):
    """In the place of a half of a layer: adds nothing to the stream."""

    def forward(self, x: torch.Tensor, *args, **kwargs):
        return torch.zeros_like(x)


class NoAttention(Nothing):
    def forward(self, x: torch.Tensor, *args, **kwargs):
        return super().forward(x), None


def in_every_layer(change: Callable[[nn.Module], None]) -> Callable[[NanoChatGPTForCausalLM], None]:
    def change_all(model: NanoChatGPTForCausalLM) -> None:
        for layer in model.model.layers:
            change(layer)

    return change_all


def with_activation(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[NanoChatGPTForCausalLM], None]:
    """The MLP with another function between its two matrices."""

    def change(layer: nn.Module) -> None:
        mlp = layer.mlp
        mlp.forward = lambda x: mlp.down_proj(activation(mlp.up_proj(x)))

    return in_every_layer(change)


def without_attention(layer: nn.Module) -> None:
    layer.self_attn = NoAttention()


def without_mlp(layer: nn.Module) -> None:
    layer.mlp = Nothing()


def without_norms(layer: nn.Module) -> None:
    layer.input_layernorm, layer.post_attention_layernorm = nn.Identity(), nn.Identity()


def without_query_key_norms(layer: nn.Module) -> None:
    layer.self_attn.q_norm, layer.self_attn.k_norm = nn.Identity(), nn.Identity()


def without_positions(model: NanoChatGPTForCausalLM) -> None:
    model.model.rotary_emb.inv_freq.zero_()  # no hand of any clock turns


def without_cap(model: NanoChatGPTForCausalLM) -> None:
    model.config.final_logit_softcapping = 1e4  # far above any score that these runs reach


@dataclass(frozen=True)
class Part:
    """Fields of the configuration, a change of the fresh network, and what to add to the seed that draws it."""

    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[NanoChatGPTForCausalLM], None] | None = None
    dice: int = 0


PARTS = {
    WHOLE: Part(),
    CONTROL: Part(dice=1000),  # what two random starts differ by
    # Value embeddings lie inside of attention and go with it.
    "attention": Part({"use_value_embeddings": False}, in_every_layer(without_attention)),
    "MLPs": Part(change=in_every_layer(without_mlp)),
    "positions": Part(change=without_positions),
    "value embeddings": Part({"use_value_embeddings": False}),
    "residual weights": Part({"use_residual_scalars": False}),
    "the square in the MLP": Part(change=with_activation(F.relu)),
    "normalization of queries and keys": Part(change=in_every_layer(without_query_key_norms)),
    "normalization of the stream": Part(change=in_every_layer(without_norms)),
    "the soft cap": Part(change=without_cap),
    "windows": Part({"window_pattern": "L"}),
    "the zero in the MLP": Part(change=with_activation(lambda x: x)),
    "with smear": Part({"smear_channels": 24}),
    "with backout": Part({"use_backout": True}),
}


def network(name: str, vocabulary: int, seed: int) -> NanoChatGPTForCausalLM:
    """The fresh network without a part."""
    part = PARTS[name]
    set_seed(seed + part.dice)
    config = NanoChatGPTConfig.from_depth(
        DEPTH, vocab_size=vocabulary, head_dim=HEAD_DIM, max_position_embeddings=LENGTH, **part.settings
    )
    model = NanoChatGPTForCausalLM(config)
    if part.change is not None:
        with torch.no_grad():
            part.change(model)
    return model


# ---------------------------------------------------------------- the runs


class Study:
    def __init__(self, arguments: StudyArguments):
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        self.documents = open_documents(arguments.data, "text")
        source = RowSource(self.documents, self.tokenizer, LENGTH)
        self.validation = source.validation(arguments.validation_tokens, ROWS)

    def loss(self, name: str, seed: int) -> float:
        """Nats a token on held-out text after a run."""

        def share_of_text(stream: int, streams: int) -> PackedRows:
            return PackedRows(self.documents, self.tokenizer, LENGTH + 1, stream=seed % SHARES, num_streams=SHARES)

        model = network(name, len(self.tokenizer), seed)
        with tempfile.TemporaryDirectory() as folder:
            config = PretrainConfig(
                folder, use_cpu=True, max_steps=self.arguments.steps, seed=seed, save_strategy="no", disable_tqdm=True,
                torch_compile=False, logging_strategy="no", report_to="none", warmdown_ratio=DEMO["warmdown_ratio"],
                **RATES,
            )  # fmt: skip
            PretrainTrainer(model, config, RowLoader(share_of_text, ROWS, LENGTH)).train()
        with eval_mode(model):
            losses = [model.token_losses(batch["input_ids"], batch["shift_labels"]) for batch in self.validation]
        return torch.cat(losses).double().mean().item()


def main() -> None:
    (arguments,) = parse(StudyArguments)
    study, folder = Study(arguments), Path(arguments.output_dir, f"{arguments.steps}_steps")
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        raise ValueError(f"parts {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    names = [WHOLE, CONTROL, *arguments.parts]
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in arguments.seeds:
        for name in names:
            file = folder / f"{name} {seed}.json"
            if not file.is_file():
                write_json(file, study.loss(name, seed))
                print(f"seed {seed}, without {name}: {json.loads(file.read_text())}", flush=True)
            found[name].append(json.loads(file.read_text()))
    whole = found.pop(WHOLE)
    rises = {name: [loss - other for loss, other in zip(losses, whole)] for name, losses in found.items()}
    print("\n" + table(whole, rises))
    write_json(
        TABLE,
        {"steps": arguments.steps, "seeds": arguments.seeds, "control": CONTROL, "whole": whole, "rises": rises},
    )


def table(whole: list[float], rises: dict[str, list[float]]) -> str:
    """A row for each part, the dearest first."""
    lines = [f"whole network: {', '.join(f'{loss:.3f}' for loss in whole)} nats a token on held-out text"]
    for name, each in sorted(rises.items(), key=lambda row: -statistics.mean(row[1])):
        lines.append(f"{name:34} {statistics.mean(each):+7.3f}   {', '.join(f'{rise:+.3f}' for rise in each)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
