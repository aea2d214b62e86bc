"""The settings of a network and of a run's length, shared by pretraining, planning and the sweep."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from modeling_nanochat import NanoChatGPTConfig
from modeling_nanochat.recipes.conversion.native_config import COMPATIBLE
from modeling_nanochat.training.architectures import ARCHITECTURES, stock_config
from modeling_nanochat.training.trainers.settings import check_range


@dataclass
class NetworkArguments:
    """The shape: one dial, and what may be turned besides."""

    depth: int = field(default=12, metadata={"help": "Number of layers; sets the whole shape."})
    preset: str | None = field(
        default=None,
        metadata={"help": "compatible: what Transformers' own nanochat class and MLX load (`convert --to_native`)."},
    )
    architecture: str = field(
        default="nanochat",
        metadata={"help": f"nanochat, or a stock one of the same depth: {', '.join(ARCHITECTURES)}."},
    )
    era: str | None = field(
        default=None,
        metadata={"help": "Network of upstream's 'seed' (2026-02, the default) or 'head' (2026-07); nanochat only."},
    )
    head_dim: int = field(default=128, metadata={"help": "Width of an attention head."})
    aspect_ratio: int = field(default=64, metadata={"help": "Width for each layer of depth."})
    sequence_length: int = field(default=2048, metadata={"help": "Tokens of a row, and of the network's context."})
    window_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Letters S (windowed) and L (full), tiled over the layers; by default the era's; nanochat only."
        },
    )

    def network(self, vocab_size: int, **special_token_ids: Any) -> PreTrainedConfig:
        """The configuration that these settings and a tokenizer's vocabulary give.

        Raises:
            ValueError: a number below 1, an unknown architecture, or a setting that this architecture does not have.
        """
        for name in ("depth", "head_dim", "aspect_ratio", "sequence_length"):
            check_range(self, name, 1)
        shape = {
            "vocab_size": vocab_size,
            "head_dim": self.head_dim,
            "aspect_ratio": self.aspect_ratio,
            "max_position_embeddings": self.sequence_length,
            **special_token_ids,
        }
        if self.architecture != "nanochat":
            for name in ("era", "window_pattern", "preset"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} {getattr(self, name)} would do nothing with --architecture {self.architecture}; "
                        "it is nanochat's own"
                    )
            return stock_config(self.architecture, self.depth, **shape)
        return NanoChatGPTConfig.from_depth(self.depth, **(self.preset_settings() | shape))

    def preset_settings(self) -> dict[str, Any]:
        """Era and windows, or in their place the fields that a preset sets."""
        if self.preset is None:
            return {"era": self.era or "seed", "window_pattern": self.window_pattern}
        if self.preset != "compatible":
            raise ValueError(f"preset is {self.preset!r}, expected compatible, or none")
        for name in ("era", "window_pattern"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected none beside --preset compatible")
        return dict(COMPATIBLE)


@dataclass
class HorizonArguments:
    """How long a run is, and how large its steps are; `max_steps` beats all of these."""

    total_batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of an optimizer step over all devices; by default the era's rule."}
    )
    tokens_per_parameter: float | None = field(
        default=None, metadata={"help": "Horizon: tokens for each scaling parameter; by default the era's."}
    )
    target_flops: float | None = field(default=None, metadata={"help": "Horizon instead: a budget of FLOPs."})

    def check(self) -> None:
        """`ValueError` for what is no length or size."""
        for name in ("total_batch_tokens", "tokens_per_parameter", "target_flops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a number above 0")
