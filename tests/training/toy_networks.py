"""Tiny networks of many architectures, and what their fused tensors consist of, worked out the slow and obvious way."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

HIDDEN, HEADS, WIDTH, KV_HEADS, INNER, EXPERTS, VOCABULARY, CONTEXT = 32, 4, 8, 2, 40, 4, 96, 16
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
         "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT, "pad_token_id": 0}  # fmt: skip
GROUPED = {"num_key_value_heads": KV_HEADS}
MIXTURE = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
NETWORKS: dict[str, tuple[type, type, dict]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, SHAPE | GROUPED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, SHAPE | GROUPED | {"head_dim": WIDTH}),
    "gemma": (GemmaConfig, GemmaForCausalLM, SHAPE | GROUPED | {"head_dim": WIDTH}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS,
                                           "n_positions": CONTEXT, "pad_token_id": 0}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, SHAPE),
    "mistral": (MistralConfig, MistralForCausalLM, SHAPE | GROUPED),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, SHAPE | GROUPED),
    "phi3": (Phi3Config, Phi3ForCausalLM, SHAPE | GROUPED),
    "mixtral": (MixtralConfig, MixtralForCausalLM, SHAPE | GROUPED | MIXTURE),
    "bert": (BertConfig, BertForMaskedLM, SHAPE),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, SHAPE | GROUPED | MIXTURE | {"head_dim": WIDTH}),
    "falcon": (FalconConfig, FalconForCausalLM, {"vocab_size": VOCABULARY, "hidden_size": HIDDEN,
                                                 "num_hidden_layers": 2, "num_attention_heads": HEADS,
                                                 "num_kv_heads": KV_HEADS, "new_decoder_architecture": True}),
    "mamba": (MambaConfig, MambaForCausalLM, {"vocab_size": VOCABULARY, "hidden_size": HIDDEN,
                                              "num_hidden_layers": 2, "pad_token_id": 0}),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """A network of that architecture, the same at each call; dropout off, weights float32."""
    config_class, model_class, settings = NETWORKS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**settings))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.float()


def obvious_matrices(network: str, name: str, shape: torch.Size) -> list[torch.Tensor]:
    """The matrices (outputs, inputs) of a Muon parameter, as the places of their entries in the flat tensor."""
    places = torch.arange(shape.numel()).view(shape)
    if network == "gpt2":
        columns = [places[:, i * HIDDEN : (i + 1) * HIDDEN] for i in range(3)] if "c_attn" in name else [places]
        return [each.T for each in columns]
    if network == "gpt_neox" and "query_key_value" in name:
        rows = torch.arange(3 * HIDDEN)
        return [places[rows % (3 * WIDTH) // WIDTH == part] for part in range(3)]
    if network == "falcon" and "query_key_value" in name:  # two groups of two queries, a key and a value
        kinds = torch.tensor([0, 0, 1, 2] * KV_HEADS).repeat_interleave(WIDTH)
        return [places[kinds == kind] for kind in range(3)]
    if network == "phi3" and "qkv_proj" in name:
        return [places[:32], places[32:48], places[48:]]
    if network == "phi3" and "gate_up_proj" in name:
        return [places[:INNER], places[INNER:]]
    if network == "mixtral" and "gate_up_proj" in name:
        return [half for expert in places for half in (expert[:INNER], expert[INNER:])]
    if network == "gpt_oss" and name.endswith("gate_up_proj"):
        return [part for expert in places for part in (expert[:, ::2].T, expert[:, 1::2].T)]
    if network == "gpt_oss" and "experts" in name:
        return [expert.T for expert in places]
    return list(places) if len(shape) == 3 else [places]
