"""Chooses the attention kernel of a model on its device, by trying it.

What users of GPUs stumble over most is a kernel that imports and then fails at its first call (wrong architecture,
wrong build, no windows). So the candidates are tried in order of speed, each with a real forward and backward pass of
the model itself on a few tokens, and the choice comes back as a sentence to print. It costs one small step per
candidate that fails.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .block_attention import BLOCK_ATTENTION

PROBE_TOKENS = 16


def attention_candidates(device: torch.device, windowed: bool) -> tuple[str, ...]:
    """Names for `attn_implementation`, the fastest first, for a device."""
    if device.type != "cuda":
        return (BLOCK_ATTENTION if device.type == "cpu" else "sdpa",)
    hopper = torch.cuda.get_device_capability(device)[0] == 9  # what FlashAttention 3 is written for
    flash = ("flash_attention_3", "flash_attention_2") if hopper else ("flash_attention_2",)
    return (*flash, "flex_attention", "sdpa") if windowed else (*flash, "sdpa")


def choose_attention(model: PreTrainedModel, candidates: Sequence[str] | None = None) -> str:
    """Sets the first attention implementation that works for `model` where it is, and says which and why.

    Args:
        model: with its weights on the device and in the dtypes it is to run in.
        candidates: names to try in order; those of the device if None.

    Returns:
        One sentence for the log.

    Raises:
        ValueError: if none of the candidates works, with what each of them said.
    """
    windowed = any("sliding" in kind for kind in model.config.layer_types)
    if candidates is None:
        candidates = attention_candidates(model.device, windowed)
    refused = []
    for name in candidates:
        try:
            _probe(model, name)
        except Exception as error:  # a kernel may fail in any way: import, build, launch, unsupported window
            refused.append(f"{name} failed ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})")
            continue
        sentence = f"Attention: {name} on {model.device}"
        if refused:
            sentence += ", because " + ", ".join(refused)
        if name == "sdpa" and windowed:
            sentence += ". Its windows are masks that cost as much as full attention: window_pattern L trains faster"
        return sentence + "."
    raise ValueError(f"No attention implementation works, tried {list(candidates)}: {'; '.join(refused)}")


def _probe(model: PreTrainedModel, name: str) -> None:
    """A forward and a backward pass with the kernel, waited for. Leaves no gradient behind."""
    model.set_attn_implementation(name)
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device)
    with torch.enable_grad():
        hidden_states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        parameters = [parameter for parameter in model.base_model.parameters() if parameter.requires_grad]
        if parameters:
            torch.autograd.grad(hidden_states.float().sum(), parameters, allow_unused=True)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
