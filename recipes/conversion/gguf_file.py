"""A checkpoint of a stock architecture as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio).

llama.cpp's own converter refuses a tokenizer that it does not know by the hash of its ids, and a freshly trained one is
never known. Here the file is written with gguf-py: every weight keeps its bits and its dtype (vectors are float32, as
llama.cpp wants them; its `llama-quantize` makes smaller files of this one), and the tokenizer goes in with its merges,
special tokens and chat template.

The price is one difference that no GGUF file can avoid: it can only name a pre-split that llama.cpp has, and none cuts
numbers into pairs of digits. `llama-bpe` is the nearest, the same pattern with groups of three: numbers of three or
more digits become other tokens there, everything else the same. `docs/hub.md` has how much of real text that is.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_nanochat.recipes.conversion.saved_folder import check_vocabulary, describe, model_type, read_safetensors
from modeling_nanochat.recipes.conversion.upstream_tensors import Tensors
from modeling_nanochat.tokenization_nanochat_gpt import ASSISTANT_END, BOS, SPLIT_PATTERN, special_token_ids
from modeling_nanochat.training.architectures import ARCHITECTURES
from modeling_nanochat.training.optimizer.sorting import attention_heads
from modeling_nanochat.training.tokenizer import tiktoken_encoding
from modeling_nanochat.training.whole_files import whole_folder

LLAMA_CPP_NAMES = {name: name for name in ARCHITECTURES} | {"mistral": "llama"}
TURNED = "llama"  # the one of its architectures that turns neighbouring channels, not those of a head's two halves
PRE_SPLIT = "llama-bpe"
FILE = "model.gguf"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def to_gguf(folder: Path, output: Path) -> None:
    """Writes `model.gguf` from a checkpoint of `nanochat pretrain --architecture ...` or what was tuned from it.

    Raises:
        ValueError: llama.cpp does not know the architecture, the tokenizer is of another form, or gguf is missing.
    """
    architecture = model_type(folder, list(ARCHITECTURES), "; llama.cpp runs these (pretrain --architecture)")
    config = AutoConfig.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    check_vocabulary(tokenizer, config)
    weights = read_safetensors(folder)
    with whole_folder(output) as partial:
        write_gguf(partial / FILE, LLAMA_CPP_NAMES[architecture], config, weights, tokenizer, folder.name)
    print(f"{folder}: {architecture}, {describe(config, weights)}")
    print(f"the pre-split is llama.cpp's {PRE_SPLIT}: numbers of three or more digits become other tokens there")
    print(f"try it: llama-cli --model {output / FILE}")


def write_gguf(
    file: Path,
    architecture: str,
    config: PreTrainedConfig,
    weights: Tensors,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
) -> None:
    """One file with everything: `architecture` is llama.cpp's word, `weights` have Transformers' names."""
    try:
        import gguf
    except ImportError:
        raise ValueError("--to_gguf needs the package gguf; expected `pip install -e '.[export]'`") from None
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer)
    kind = next(kind for kind in gguf.MODEL_ARCH_NAMES if gguf.MODEL_ARCH_NAMES[kind] == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for ours, tensor in weights.items():
        theirs = names.get_name(ours, try_suffixes=(".weight",))
        if theirs is None:
            raise ValueError(f"llama.cpp's {architecture} has no place for the weight {ours}")
        if architecture == TURNED:
            tensor = neighbouring_pairs(ours, tensor, config)
        dtype = gguf.GGMLQuantizationType[DTYPES[tensor.dtype] if tensor.ndim > 1 else "F32"]
        writer.add_tensor(theirs, gguf.quants.quantize(tensor.float().numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: Any, config: PreTrainedConfig) -> None:
    heads, key_value_heads, head_dim = attention_heads(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def neighbouring_pairs(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Queries' and keys' rows in the order in which llama.cpp turns them: channel i of a head's first half beside
    channel i of the second."""
    heads = dict(zip(("q_proj", "k_proj"), attention_heads(config)))
    projection = next((each for each in heads if f".{each}." in name), None)
    if projection is None:
        return tensor
    halves = tensor.view(heads[projection], 2, -1, tensor.shape[-1])  # (H, half, D / 2, C)
    return halves.transpose(1, 2).reshape(tensor.shape)


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens, their kinds and merges, as GPT-2's byte letters; the pre-split's name; what begins and ends.

    Raises:
        ValueError: it is no byte-level BPE with this project's pre-split and nine special tokens.
    """
    import gguf

    pattern = tiktoken_encoding(tokenizer)._pat_str
    if pattern != SPLIT_PATTERN:
        raise ValueError(f"the tokenizer's pre-split is {pattern!r}; llama.cpp's nearest name is known for another")
    special = special_token_ids(tokenizer)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # llama.cpp leaves control tokens out of the text that it shows, as `skip_special_tokens` does.
    shown = set(special.values()) - set(tokenizer.all_special_ids)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for index in special.values():
        kinds[index] = gguf.TokenType.USER_DEFINED if index in shown else gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_SPLIT)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(special[BOS])
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(special[ASSISTANT_END])
    writer.add_eot_token_id(special[BOS])  # ends an answer too: a model that runs on begins another text
    writer.add_pad_token_id(special[BOS])
    writer.add_chat_template(tokenizer.chat_template)
