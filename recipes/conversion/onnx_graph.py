"""A checkpoint as an ONNX graph, by Transformers' own exporter, with a program beside it that answers from it.

One graph does the whole answer: new tokens and the cache of those before go in, logits and the longer cache come out,
for a prompt (an empty cache) as for every token after it, in batches too (the mask and the positions say what is
padding). Weights and arithmetic are float32. Before the folder appears, onnxruntime has continued a text with it, and
its logits were the network's own.

The price is the cache: layers with a window keep what they no longer see, and each token's run copies the cache once.
"""

import copy
import logging
import shutil
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from modeling_nanochat.recipes.conversion import saved_folder
from modeling_nanochat.training.architectures import ARCHITECTURES, NANOCHAT
from modeling_nanochat.training.optimizer.sorting import attention_heads
from modeling_nanochat.training.whole_files import whole_folder

EXPORTED = (NANOCHAT, "nanochat", *ARCHITECTURES)  # ours, Transformers' own class, stock ones
PROGRAM = Path(__file__).with_name("onnx_answer.py")
TRIED_TOKENS = 16  # of the trial: a prompt of so many, then as many one by one
LARGEST_DIFFERENCE = 1e-3  # of logits in float32, nanochat's of -15 to 15; measured 2e-5


def to_onnx(folder: Path, output: Path) -> None:
    """Writes `model.onnx` with its weights beside it, the tokenizer, and `answer.py`.

    Raises:
        ValueError: a package is missing, it is no network that is trained here, or the graph's logits are others.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--to_onnx needs the package {error.name}; expected `pip install -e '.[export]'`") from None
    try:
        from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter  # noqa: F401
    except ImportError:
        raise ValueError(f"--to_onnx needs transformers 5.23 or later, this is {transformers.__version__}") from None
    saved_folder.model_type(folder, EXPORTED)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with whole_folder(output) as partial:
        inputs = sample(model.config)
        settings = OnnxConfig(dynamic=True, dynamic_shapes={name: what_varies(each) for name, each in inputs.items()})
        with warnings.catch_warnings(), redirect_stdout(StringIO()):  # of torch's own exporter
            warnings.simplefilter("ignore")
            exported = OnnxExporter().export(model, inputs | {"use_cache": True}, settings)
        exported.config = None  # which would point at code that is not there
        exported.save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder).save_pretrained(partial)
        shutil.copyfile(PROGRAM, partial / "answer.py")
        difference = largest_difference(model, partial)
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"onnxruntime's logits are off by {difference:.2g}, expected those of the network within "
                f"{LARGEST_DIFFERENCE}"
            )
    print(f"{folder}: {saved_folder.describe(model.config, dict(model.named_parameters()))}")
    print(f"onnxruntime's logits are the network's own within {difference:.1g} ({2 * TRIED_TOKENS} tokens)")
    print(f"try it: python {output / 'answer.py'} 'What is 12 + 30?'")


def sample(config: PreTrainedConfig) -> dict[str, Any]:
    """Inputs that show the exporter which sizes may change: two rows of two new tokens after three in the cache."""
    rows, new, before = 2, 2, 3
    cache = DynamicCache(config=without_windows(config))
    _, key_value_heads, head_dim = attention_heads(config)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, rows, key_value_heads, before, head_dim)
        cache.update(keys, values, layer)
    if getattr(config, "smear_channels", 0):
        cache.update_conv_state(torch.randn(rows, config.hidden_size, 1), 0, conv_kernel_size=1)
    return {
        "input_ids": torch.zeros(rows, new, dtype=torch.int64),
        "attention_mask": torch.ones(rows, before + new, dtype=torch.int64),
        "position_ids": torch.arange(before, before + new).repeat(rows, 1),
        "past_key_values": cache,
    }


def what_varies(value: torch.Tensor | DynamicCache) -> Any:
    """The dimensions that are not fixed in the graph: rows, and tokens; of a cache, for each of its tensors."""
    from transformers.exporters.utils import get_leaf_tensors

    if isinstance(value, DynamicCache):
        return [what_varies(each) for each in get_leaf_tensors(value).values()]
    tokens = {2: (1,), 3: (), 4: (2,)}[value.ndim]  # (B, T); (B, C, 1); (B, H, T, D)
    return dict.fromkeys((0, *tokens), torch.export.Dim.AUTO)


def without_windows(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same network as far as a cache is concerned, every layer of which keeps all keys: a windowed layer's cache
    counts its tokens in Python, and the count would be fixed in the graph."""
    config = copy.deepcopy(config)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = ["hybrid" if "hybrid" in kind else "full_attention" for kind in kinds]
    return config


@torch.no_grad()
def largest_difference(model: PreTrainedModel, folder: Path) -> float:
    """Between the graph's logits, token by token after a prompt, and the network's, which reads all anew each time;
    along the network's own likeliest tokens."""
    from modeling_nanochat.recipes.conversion.onnx_answer import Graph

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (TRIED_TOKENS,), generator=generator).tolist()
    graph, new, largest = Graph(folder), ids, 0.0
    for _ in range(TRIED_TOKENS):
        expected = model(torch.tensor([ids]), use_cache=False).logits[0]  # (T, V)
        found = torch.from_numpy(graph.read(new))
        largest = max(largest, float((found - expected[-len(new) :]).abs().max()))
        new = [int(expected[-1].argmax())]
        ids = ids + new
    return largest
