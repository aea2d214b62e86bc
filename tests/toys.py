"""The toys of the tests, each once: networks small enough for seconds, a tokenizer that needs no training, and a chat
model that knows three conversations by heart. Fresh networks have zeros, with which whole parts do nothing and a test
proves little, so their weights are drawn anew. What only one file needs stays there."""

from collections.abc import Callable
from pathlib import Path

import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, render_conversation
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.training.tokenizer import tokenizer_from_ranks

# ---------------------------------------------------------------- weights that do something


def anything(name: str, parameter: torch.Tensor) -> bool:
    return True


def matrices(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2


def zero_matrices(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and not parameter.any()


def draw(model: torch.nn.Module, std: float, drawn: Callable = matrices) -> None:
    """Draw the weights that `drawn(name, parameter)` picks."""
    for name, parameter in model.named_parameters():
        if drawn(name, parameter):
            torch.nn.init.normal_(parameter, std=std)


def drawn_model(
    depth: int, std: float, drawn: Callable = matrices, seed: int = 0, **settings
) -> NanoChatGPTForCausalLM:
    """A network of that many layers and of `from_depth`'s settings, small where they do not say otherwise."""
    small = {"vocab_size": 320, "head_dim": 32, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    model = NanoChatGPTForCausalLM(NanoChatGPTConfig.from_depth(depth, **(small | settings)))
    draw(model, std, drawn)
    return model


# ---------------------------------------------------------------- networks


def narrow_model(era: str = "seed", **settings) -> NanoChatGPTForCausalLM:
    """Two layers of width 64, for the trainers: where blocks give zero, some gradients are mere rounding."""
    return drawn_model(2, 0.15, era=era, hidden_size=64, num_attention_heads=2, **settings)


def whole_model(era: str) -> NanoChatGPTForCausalLM:
    """Four layers with every part of the era at work, scalars too, and the digit tokenizer's special tokens."""
    model = drawn_model(4, 0.2, anything, era=era, sliding_window=9, num_key_value_heads=2).eval()
    model.generation_config.update(bos_token_id=311, eos_token_id=[315, 311], pad_token_id=311)
    return model


SHARP_VOCAB, SHARP_NEW = 320, 16  # tokens that it knows, and that it generates if not told otherwise


def sharp_model(era: str) -> NanoChatGPTForCausalLM:
    """Four layers, far from ties between the two best tokens; smear and gates fully at work."""
    model = drawn_model(
        4, 0.3, seed=2, vocab_size=SHARP_VOCAB, head_dim=16, era=era, sliding_window=9,
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 and "smear" in name:
            torch.nn.init.constant_(parameter, 0.7)
    model.generation_config.update(do_sample=False, max_new_tokens=SHARP_NEW, pad_token_id=0, eos_token_id=None)
    return model


# ---------------------------------------------------------------- tokenizer and chat model


def digit_tokenizer(**options):
    """Bytes, pairs of digits from 00 to 54, and the special tokens: 320 tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tokenizer_from_ranks(ranks | {f"{number:02}".encode(): 256 + number for number in range(55)}, **options)


CHAT_CONTEXT = 256
SUM, SUM_ANSWER = "What is 12 + 30?", "It is [12+30 = 42], I think."
COUNT, COUNT_ANSWER = "Count!", " ".join(f"{number:02}" for number in range(50))
HELLO, HELLO_ANSWER = "Hello", "Grüße, 日本 👍!"
CALL = [
    {"type": "text", "text": "It is "},
    {"type": "python", "text": "12+30"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": ", I think."},
]


def save_chat_model(folder: Path, depth: int = 2) -> Path:
    """Trains a network on the three conversations (seconds) and writes its checkpoint."""
    tokenizer = digit_tokenizer()
    conversations = [(SUM, CALL), (COUNT, COUNT_ANSWER), (HELLO, HELLO_ANSWER)]
    rows = [
        render_conversation(tokenizer, [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
        for asked, answer in conversations
    ]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    mask = torch.tensor([row + [0] * (longest - len(row)) for _, row in rows])
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        depth, head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=CHAT_CONTEXT
    )
    model = NanoChatGPTForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(400):
        loss = model(ids, labels=ids.masked_fill(mask == 0, -100)).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02, f"the toy did not learn its conversations: loss {loss:.3f}"
    save_checkpoint(model, tokenizer, str(folder))
    return folder
