"""One step size does not fit: sizes of gradients by kind of weight, and small runs with four optimizers.

Each optimizer gets the best of four rates on the same rows. The network is a toy (2 layers, 128 wide, 1,024 tokens), so
the figure shows that the kinds of weights differ, not how large the gains are at scale.
"""

import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from drawing import BLUE, GREEN, GREY, RED, YELLOW, batches, documents, save

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.tokenizer import train_tokenizer

STEPS, ROWS, LENGTH, VOCABULARY = 120, 8, 128, 1024
FALL = 0.4  # share of the run over which every rate falls to zero
PLAIN = {"betas": (0.8, 0.95), "weight_decay": 0.0}
Maker = Callable[[NanoChatGPTForCausalLM], torch.optim.Optimizer]


def network() -> NanoChatGPTForCausalLM:
    torch.manual_seed(0)
    return NanoChatGPTForCausalLM(
        NanoChatGPTConfig.from_depth(2, vocab_size=VOCABULARY, head_dim=64, max_position_embeddings=LENGTH)
    )


def train(make: Maker, rows: list[torch.Tensor]) -> list[float]:
    """Losses of a run; from the first one that is not finite on they count as a network that knows nothing."""
    model = network()
    optimizer = make(model)
    starts = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, batch in enumerate(rows):
        loss = model(input_ids=batch[:, :-1], shift_labels=batch[:, 1:]).loss
        if not math.isfinite(loss.item()):
            return losses + [math.log(VOCABULARY)] * (STEPS - step)
        losses.append(loss.item())
        loss.backward()
        for group, start in zip(optimizer.param_groups, starts):
            group["lr"] = start * min(1.0, (STEPS - step) / (FALL * STEPS))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def all_alike(kind: type, **settings: Any) -> Callable[[float], Maker]:
    """One rate for every weight."""
    return lambda rate: lambda model: kind(model.parameters(), lr=rate, **settings)


def muon_adamw(times: float) -> Maker:
    """The groups of pretraining, all rates times a factor."""

    def make(model):
        return MuonAdamW(build_param_groups(model, batch_tokens=ROWS * LENGTH, weight_decay=0.0, init_lr_frac=times))

    return make


def adamw_by_kind(rate: float) -> Maker:
    """AdamW everywhere: the tables and scalars at the rates that they have beside Muon, the matrices at `rate`."""

    def make(model):
        groups = build_param_groups(model, batch_tokens=ROWS * LENGTH, weight_decay=0.0, init_lr_frac=8.0)
        groups = [{"params": group["params"], "lr": rate if group["use_muon"] else group["lr"]} for group in groups]
        return torch.optim.AdamW(groups, **PLAIN)

    return make


def gradient_sizes(batch: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Root mean square of the gradient and of the weights, by kind, after a few steps (o and down begin at zero)."""
    model = network()
    optimizer = muon_adamw(8.0)(model)
    for _ in range(10):
        optimizer.zero_grad()
        model(input_ids=batch[:, :-1], shift_labels=batch[:, 1:]).loss.backward()
        optimizer.step()
    kinds = {"token table": "embed_tokens", "value tables": "value_embeddings", "attention": "self_attn",
             "MLP": "mlp", "head": "lm_head", "scalars": "lambdas"}  # fmt: skip
    sizes = {}
    for kind, pattern in kinds.items():
        chosen = [weight for name, weight in model.named_parameters() if pattern in name]
        gradients = torch.cat([weight.grad.flatten() for weight in chosen])
        sizes[kind] = gradients.square().mean().sqrt().item(), (gradients == 0).float().mean().item()
    return sizes


def main() -> None:
    tokenizer = train_tokenizer(iter(documents("train", 4000)), VOCABULARY)
    rows = batches(tokenizer, ROWS, LENGTH, STEPS)
    sizes = gradient_sizes(rows[0])
    print("gradient size and share of zeros:", sizes)
    sweeps = {
        "plain steps, one rate for all": (all_alike(torch.optim.SGD), (0.5, 2.0, 8.0, 32.0), GREY),
        "AdamW, one rate for all": (all_alike(torch.optim.AdamW, **PLAIN), (2e-3, 6e-3, 2e-2, 6e-2), YELLOW),
        "AdamW, a rate for each kind": (adamw_by_kind, (1e-3, 3e-3, 1e-2, 3e-2), RED),
        "AdamW for tables, Muon for matrices": (muon_adamw, (3.0, 6.0, 12.0, 24.0), BLUE),
    }
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.4))
    bars.barh(list(sizes), [size for size, _ in sizes.values()], color=[GREEN, GREEN, BLUE, BLUE, GREEN, GREY])
    bars.set(xscale="log", xlabel="typical size of a number's gradient")
    bars.invert_yaxis()
    bars.set_title("Gradients by kind of weight")
    bars.grid(axis="y", visible=False)
    for name, (maker, rates, color) in sweeps.items():
        runs = [train(maker(rate), rows) for rate in rates]
        ends = [sum(run[-10:]) / 10 for run in runs]
        best = min(range(len(runs)), key=ends.__getitem__)
        print(f"{name}: {dict(zip(rates, (round(end, 3) for end in ends)))}", flush=True)
        curves.plot(runs[best], color=color, linewidth=1.4, label=f"{name}: {ends[best]:.2f}")
    curves.set(xlabel="step", ylabel="loss, nats per token")
    curves.set_title("The best of four rates each")
    curves.legend(fontsize=8)
    save(figure, "step_sizes")


if __name__ == "__main__":
    main()
