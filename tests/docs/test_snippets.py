"""The Python of README and pages runs as it stands there, on small stand-ins for the folders that it names.

Snippets of a page share their names, as a reader would type them one after another. Pushing to the Hub writes to a
folder of that name instead, from which the next snippet loads.
"""

import ast
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.training.tokenizer import train_tokenizer
from tests.docs.pages import NAMES, ROOT, blocks

# What is only compiled, by a word that it contains, and why.
NOT_RUN = {
    "torchao": "needs a library that no extra installs (tests/hf/quantisation.py runs it)",
    "_compile_all_devices": "compiles for ten seconds and more",
    "OpenAI(": "asks a server that runs in another terminal (tests/recipes has its own)",
    "distributed_config": "needs several processes",
}
FOLDERS = ("out/demo/base", "out/demo/sft", "out/demo/rl")


def snippets(name: str) -> list[tuple[str, int]]:
    return [(block.text, block.line) for block in blocks((ROOT / name).read_text()) if block.language == "python"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A folder in which a tiny network with its tokenizer stands where the demo would have put one."""
    folder = tmp_path_factory.mktemp("stand_in")
    tokenizer = train_tokenizer(iter([(ROOT / "README.md").read_text()]), 320, model_max_length=128)
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        2, vocab_size=len(tokenizer), head_dim=16, aspect_ratio=16, max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = NanoChatGPTForCausalLM(config)
    for path in FOLDERS:
        model.save_pretrained(folder / path)
        tokenizer.save_pretrained(folder / path)
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if "essay/" not in name and snippets(name)])
def test_snippets_of_a_page(name, stand_in, monkeypatch):
    monkeypatch.chdir(stand_in)
    for kind in (PreTrainedModel, PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "push_to_hub", lambda self, repository, **_: self.save_pretrained(repository))
    names: dict = {}
    for source, line in snippets(name):
        tree = ast.parse("\n" * (line - 1) + source, filename=str(ROOT / name))
        if not any(word in source for word in NOT_RUN):
            exec(compile(tree, str(ROOT / name), "exec"), names)
