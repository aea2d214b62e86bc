"""nanochat for Transformers: the network and its conversation format. Importing the package registers the network
with the Auto classes, so that a saved folder loads without `trust_remote_code` where the package is installed."""

import sys

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .attention_choice import choose_attention
from .configuration_nanochat_gpt import NanoChatGPTConfig
from .modeling_nanochat_gpt import NanoChatGPTForCausalLM, NanoChatGPTModel
from .tokenization_nanochat_gpt import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    encode_text,
    message_text,
    render_conversation,
    render_prompt,
    token_bytes,
)

AutoConfig.register(NanoChatGPTConfig.model_type, NanoChatGPTConfig)
AutoModel.register(NanoChatGPTConfig, NanoChatGPTModel)
AutoModelForCausalLM.register(NanoChatGPTConfig, NanoChatGPTForCausalLM)
# Saving copies the code of classes that are marked so.
NanoChatGPTConfig.register_for_auto_class("AutoConfig")
NanoChatGPTModel.register_for_auto_class("AutoModel")
NanoChatGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# `transformers serve` looks a checkpoint's class up by its name in the library. Not by `import transformers`: while
# loading, the library replaces its own module object.
sys.modules["transformers"].NanoChatGPTForCausalLM = NanoChatGPTForCausalLM

__all__ = [
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "NanoChatGPTConfig",
    "NanoChatGPTForCausalLM",
    "NanoChatGPTModel",
    "choose_attention",
    "encode_text",
    "message_text",
    "render_conversation",
    "render_prompt",
    "token_bytes",
]
