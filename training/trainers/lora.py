"""Low-rank adapters (LoRA) through PEFT: settings, the optimizer's one group, and the whole network again at the end.

Every matrix of the blocks gets an adapter; embeddings, head, gates and scalars stay as they are. Adapters are trained
by AdamW, as is usual: Muon would give both factors of a product updates of full rank, and one begins at zero.
What is saved on the way is the adapter alone; what a stage leaves is the network with its adapter merged, a checkpoint
like any other, and the adapter beside it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from modeling_nanochat.training.trainers.settings import check_range

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]  # the last in stock networks
LORA_SETTINGS = frozenset(("lora_rank", "lora_alpha", "lora_lr"))


@dataclass
class LoraArguments:
    """Goes between `MuonArguments` and a library's class of training arguments."""

    lora_rank: int = field(default=0, metadata={"help": "Rank of the adapters that are trained; 0 trains all weights."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters times the rank; twice the rank by default."}
    )
    lora_lr: float = field(default=2e-3, metadata={"help": "AdamW's learning rate for the adapters."})

    def check_lora_ranges(self) -> None:
        check_range(self, "lora_rank", 0)
        check_range(self, "lora_alpha", 0)
        check_range(self, "lora_lr", 0)


def with_adapters(model: PreTrainedModel, settings: LoraArguments) -> nn.Module:
    """The network with fresh adapters, all else frozen; the network itself at rank 0.

    Raises:
        ValueError: PEFT is not installed.
    """
    if not settings.lora_rank:
        return model
    if not is_peft_available():
        raise ValueError(f"lora_rank={settings.lora_rank} needs the package peft; expected `pip install peft`")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        target_modules=ADAPTED,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def lora_param_groups(model: nn.Module, settings: LoraArguments) -> list[dict[str, Any]]:
    """The one group of `MuonAdamW` for adapters; usual betas, no decay."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"name": "adapters", "params": adapters, "lr": settings.lora_lr, "use_muon": False, "betas": (0.9, 0.999),
         "eps": 1e-8, "weight_decay": 0.0}
    ]  # fmt: skip


def merged(model: nn.Module, output_dir: str | Path) -> PreTrainedModel:
    """The whole network, with the adapters added to its weights and saved in `output_dir/adapter`."""
    if not hasattr(model, "merge_and_unload"):  # no adapters
        return model
    model.save_pretrained(str(Path(output_dir, "adapter")))
    return model.merge_and_unload()
