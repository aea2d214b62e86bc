"""Which words a query may look at in a windowed and in a full layer, and where a trained head looks."""

import matplotlib.pyplot as plt
import torch
from drawing import load, save, with_bos
from matplotlib.colors import ListedColormap

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM

LENGTH = 32
TEXT = "The President of the United States thanked the people of the United States"


def masks() -> dict[str, torch.Tensor]:
    """(T, T) of each kind of layer, 1 where the query in the row sees the key in the column."""
    config = NanoChatGPTConfig.from_depth(4, head_dim=64, max_position_embeddings=LENGTH)
    config._attn_implementation = "eager"
    embeds = torch.zeros(1, LENGTH, config.hidden_size)
    made = NanoChatGPTForCausalLM.create_masks_for_generate(config, embeds, None, None)
    return {kind: (mask[0, 0] == 0).int() for kind, mask in made.items()}


def main() -> None:
    model, tokenizer = load("base")
    model.set_attn_implementation("eager")
    ids = with_bos(tokenizer, TEXT)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions  # (1, H, T, T) each
    # The head that looks back the most at what followed the same token earlier on.
    repeats = [(q, k + 1) for q in range(len(ids[0])) for k in range(q) if ids[0, k] == ids[0, q]]
    scores = {(layer, head): sum(weights[0, head, q, k].item() for q, k in repeats)
              for layer, weights in enumerate(attentions) for head in range(weights.shape[1])}  # fmt: skip
    layer, head = max(scores, key=scores.get)
    print("layer, head, mean weight on what followed:", layer, head, scores[layer, head] / len(repeats))

    figure, panels = plt.subplots(1, 3, figsize=(10, 3.7), width_ratios=(1, 1, 1.25))
    kinds = {"sliding_attention": "S: half the context back", "full_attention": "L: everything before"}
    for axes, (kind, title) in zip(panels, kinds.items()):
        axes.imshow(masks()[kind], cmap=ListedColormap(["#f2f2f2", "#1f5fa8"]))
        axes.set(xlabel="is looked at", ylabel="looks")
        axes.set_title(title)
        axes.grid(False)
    words = [tokenizer.decode([token]).strip() or "␣" for token in ids[0]]
    words[0] = "BOS"
    panels[2].imshow(attentions[layer][0, head], cmap="Blues", vmin=0)
    panels[2].set_xticks(range(len(words)), words, rotation=90, size=7)
    panels[2].set_yticks(range(len(words)), words, size=7)
    panels[2].grid(False)
    panels[2].set_title(f"A head of the demo, layer {layer + 1} of {len(attentions)}")
    save(figure, "windows")


if __name__ == "__main__":
    main()
