"""What causal language models differ in, asked here once: how a text begins, where the context ends, how a chat is
written, and what happens to logits behind the head.

Everything in this folder works through these answers, so it runs any AutoModelForCausalLM: nanochat's own networks,
those with learned positions (GPT-2, OPT), without attention (Mamba), or with logits that are scaled after the head
(Granite, Cohere, Gemma).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.tokenization_nanochat_gpt import SPECIAL_TOKENS, generation_token_ids, render_prompt

OFFSETS = 16  # rows that a table of positions may have beyond the context: OPT has two, BART-like ones a few


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands in front of every text: BOS, or nothing for a tokenizer without one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model was made for, None if its configuration does not say."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def hard_context(model: PreTrainedModel) -> int | None:
    """Tokens beyond which the model cannot read at all, as its positions are a learned table; None without one."""
    length = context_length(model)
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or "wpe" in name)
    ]
    return length if length and any(length <= size <= length + OFFSETS for size in tables) else None


def has_nanochat_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether conversations are written with the nine special tokens, the calculator's among them."""
    return set(SPECIAL_TOKENS) <= set(tokenizer.get_added_vocab())


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of messages, up to where the assistant begins to speak.

    Raises:
        ValueError: the tokenizer has neither the nine special tokens nor a chat template.
    """
    if has_nanochat_tokens(tokenizer):
        return render_prompt(tokenizer, messages)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template, so nothing can be asked of it as in a chat; expected a "
            "chat model, or tasks for base models only (bits_per_byte, core)"
        )
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def decoding_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """BOS, the tokens that end an answer, and padding, as a generation configuration names them."""
    if has_nanochat_tokens(tokenizer):
        return generation_token_ids(tokenizer)
    stop = model.generation_config.eos_token_id if model.generation_config else None
    stop = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop, default=0)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": sorted(stop) or None, "pad_token_id": pad}


def logits_at(
    model: PreTrainedModel, ids: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    """Logits at N places of (B, T) token ids, (N, V): those of the model's own forward pass, and no others are made.

    A hook gives the head the states of these places instead of all. Whatever the model does to logits behind its head
    happens as ever. `rows` and `places` are (N,).
    """

    def choose(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][rows, places].unsqueeze(0), *inputs[1:])  # (B, T, C) -> (1, N, C)

    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        return model(input_ids=ids, **arguments).logits[0]
    finally:
        hook.remove()
