"""Chooses the attention kernel of a model on its device, by trying it.

What users of GPUs stumble over most is a kernel that imports and then fails at its first call (wrong architecture,
wrong build), or works and ignores windows. So the candidates are tried in order of speed: a small network of the same
class and widths, one layer of each kind, is run forward (and, for training, backward) on a row that is longer than the
windows, and what its attention gives has to agree with SDPA. The model itself is left alone until then: it may be
sharded, compiled, or on another device, and a fresh one adds nothing of its attention to the stream. The choice comes
back as a sentence to print. It costs about a second on a GPU, ten where flex attention is compiled; where there is only
one candidate, as on a CPU, it costs nothing.

Only this project's networks are asked. A network of another class keeps what Transformers gives it, mostly SDPA, which
on a GPU is FlashAttention where there are no windows, as in the stock architectures that pretraining makes; and what a
trial has to know of the layers, it knows of these.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .block_attention import BLOCK_ATTENTION

SHORTEST_TRIAL = 256  # tokens
LARGEST_ERROR = 0.1  # relative to SDPA; bfloat16 alone gives up to 0.02, a window that is ignored 0.5 and more


def attention_candidates(device: torch.device, windowed: bool, training: bool) -> tuple[str, ...]:
    """Names for `attn_implementation`, the fastest first, for a device.

    Where a FlashAttention package is missing, Transformers takes the kernel of that name from the Hub if `kernels` is
    installed (AMD's aiter under `flash_attention_2` on ROCm). Flex attention has real windows but compiles anew for
    lengths that change, so it is for training; where tokens are decoded one by one, a cache holds the window.
    """
    if device.type == "cpu":
        return (BLOCK_ATTENTION,)
    if device.type == "mps":
        return ("kernels-community/metal-flash-sdpa", "sdpa")
    flex = ("flex_attention",) if windowed and training and device.type in ("cuda", "xpu") else ()
    flash = ()
    if device.type in ("xpu", "npu") or (device.type == "cuda" and torch.version.hip):
        flash = ("flash_attention_2",)
    elif device.type == "cuda":
        generation = torch.cuda.get_device_capability(device)[0]
        by_generation = {8: (2,), 9: (3, 4, 2)}  # Ampere and Ada; Hopper, which FlashAttention 3 is written for
        versions = by_generation.get(generation, (4, 2) if generation > 9 else ())
        flash = tuple(f"flash_attention_{version}" for version in versions)
    return (*flash, *flex, "sdpa")


def choose_attention(
    model: PreTrainedModel,
    device: torch.device | None = None,
    *,
    training: bool = False,
    candidates: Sequence[str] | None = None,
) -> str:
    """Sets the first attention implementation that works for `model`, and says which and why.

    Args:
        model: need not be on the device, nor have its weights yet.
        device: where the model is going to run; where it is if None.
        training: a candidate must also get through a backward pass.
        candidates: names to try in order; those of the device if None.

    Returns:
        One sentence for the log.

    Raises:
        ValueError: if none of the candidates works, with what each of them said.
    """
    device = model.device if device is None else device
    windowed = any("sliding" in kind for kind in getattr(model.config, "layer_types", None) or ())
    known = attention_candidates(device, windowed, training) if candidates is None else ()
    trial = None if len(known) == 1 else Trial(model, device, training)
    refused = []
    for name in known or candidates:
        try:
            if trial is not None:
                trial.run(name)
            model.set_attn_implementation(name)
        except Exception as error:  # a kernel may fail in any way: import, build, launch, unsupported window
            said = (str(error).strip().splitlines() or ["no message"])[0]
            refused.append(f"{name} failed ({type(error).__name__}: {said[:200]})")
            continue
        sentence = f"Attention: {name} on {device}"
        if refused:
            sentence += ", because " + ", ".join(refused)
        if name == "sdpa" and windowed and training:
            sentence += ". Its windows are masks that cost as much as full attention: window_pattern L trains faster"
        return sentence + "."
    raise ValueError(f"No attention implementation works, tried {list(known or candidates)}: {'; '.join(refused)}")


class Trial:
    """A network with one layer of each kind that a model has, its widths and windows, and a row of tokens for it.

    Nothing is drawn from anybody's random state.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, training: bool):
        self.training = training
        dtype = getattr(model.base_model, "activation_dtype", None) or model.dtype
        config = copy.deepcopy(model.config)
        kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))
        config.update({"layer_types": kinds, "num_hidden_layers": len(kinds), "vocab_size": 64, "dtype": dtype})
        config.update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
        length = 2 * (getattr(config, "sliding_window", None) or 0)  # at the end of the row, half of it is out of sight
        length = min(max(length, SHORTEST_TRIAL), config.max_position_embeddings)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            network = type(model.base_model)(config)
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
            self.ids = torch.randint(64, (1, length)).to(device)
        self.network = network.to(device, dtype).train(self.training)
        self.expected = self.outcome("sdpa")

    def run(self, name: str) -> None:
        """Raises whatever the kernel raises, and `ValueError` if its outputs or gradients are not SDPA's."""
        for what, ours, expected in zip(("output", "gradient"), self.outcome(name), self.expected):
            for x, y in zip(ours, expected):
                error = float((x - y).norm() / y.norm().clamp(min=1e-12))
                if not error <= LARGEST_ERROR:  # nor a number that is none
                    raise ValueError(f"its {what} is not SDPA's, off by {error:.2g} of it")

    def outcome(self, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What each attention gives for the last half of the row, and in training the gradients of its projections.
        On the CPU, so the kernels have run when this returns."""
        self.network.set_attn_implementation(name)
        attentions = [layer.self_attn for layer in self.network.layers]
        outputs: list[torch.Tensor] = []
        hooks = [each.register_forward_hook(lambda module, args, out: outputs.append(out[0])) for each in attentions]
        try:
            with torch.set_grad_enabled(self.training):
                self.network(input_ids=self.ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        gradients = ()
        if self.training:
            weights = [getattr(each, name).weight for each in attentions for name in ("q_proj", "k_proj", "v_proj")]
            loss = sum(output.float().square().sum() for output in outputs)
            gradients = torch.autograd.grad(loss, weights)
        half = self.ids.shape[1] // 2
        return [x[:, half:].float().cpu().detach() for x in outputs], [x.float().cpu() for x in gradients]
