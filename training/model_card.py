"""The model card, README.md of a model's folder: what it is, how to load it, and what whoever made it adds.

A card ends in a line with the hash of what stands before it. So a card that a person has edited is known, and nothing
here writes over it; to have it written again, remove the file.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from modeling_nanochat.training.whole_files import write_whole_file

NAME = "README.md"
MARK = "<!-- written by nanochat, {}; edit this page and it will not be written over -->"
LIBRARY = "transformers"
QUESTION = "What is 12 + 30?"
BEGINNING = "The capital of France is"

CHAT = """
messages = [{{"role": "user", "content": {question}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
"""
CONTINUE = """
inputs = tokenizer({question}, return_tensors="pt")
"""
SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(name{trust})
{prompt}
output = model.generate(**inputs, max_new_tokens={tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def snippet(folder: Path, name: str, *, chat: bool) -> str:
    """Python that loads the model from `name` and answers a question, or goes on from some words."""
    settings = read_settings(folder / "config.json")
    generation = read_settings(folder / "generation_config.json")
    return SNIPPET.format(
        name=json.dumps(name),
        trust=", trust_remote_code=True" if "auto_map" in settings else "",
        prompt=(CHAT if chat else CONTINUE).format(question=json.dumps(QUESTION if chat else BEGINNING)).strip(),
        tokens=min(64, generation.get("max_new_tokens") or 64),
    )


def read_settings(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def how_to_use(folder: Path, name: str, *, chat: bool) -> str:
    """The section on loading: the snippet, and what the code that comes along means."""
    lines = ["## How to use", "", "```python", snippet(folder, name, chat=chat), "```", ""]
    if "auto_map" in read_settings(folder / "config.json"):
        lines += [
            "`trust_remote_code=True` runs the network's code that lies in this repository: read it, or pin a "
            "`revision=`. The tokenizer needs no trust."
        ]
        if chat and read_settings(folder / "generation_config.json").get("use_calculator"):
            lines[-1] += (
                " `generate` runs a calculator in the middle of an answer where the model asks for it "
                "(`use_calculator=False` goes without)."
            )
    return "\n".join(lines)


def shape(folder: Path) -> list[tuple[str, str]]:
    """What there is to say of a network, from its configuration and weights: rows of a table."""
    settings = read_settings(folder / "config.json")
    facts = {
        "architecture": ", ".join(settings.get("architectures") or []),
        "parameters": count_parameters(folder),
        "layers": settings.get("num_hidden_layers"),
        "width": settings.get("hidden_size"),
        "attention heads": settings.get("num_attention_heads"),
        "key and value heads": settings.get("num_key_value_heads"),
        "vocabulary": settings.get("vocab_size"),
        "context": settings.get("max_position_embeddings"),
        "dtype of the weights": settings.get("dtype"),
    }
    return [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in facts.items() if value]


def count_parameters(folder: Path) -> int:
    """From the heads of the safetensors files, which name the shape of every tensor; nothing else is read."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            head = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, tensor in head.items():
            if name != "__metadata__":
                size = 1
                for axis in tensor["shape"]:
                    size *= axis
                count += size
    return count


def card_text(title: str, sections: Sequence[str], data: ModelCardData | None = None) -> str:
    """A whole card: head, title, sections, and the mark at its end."""
    data = data or card_data()
    text = f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n" + "\n\n".join(filter(None, sections)) + "\n\n"
    return text + MARK.format(digest(text)) + "\n"


def card_data(**fields: Any) -> ModelCardData:
    """The head of a card, with what holds for every model here."""
    tags = list(dict.fromkeys(["nanochat", *fields.pop("tags", [])]))
    return ModelCardData(library_name=LIBRARY, pipeline_tag="text-generation", tags=tags, **fields)


def renamed(card: str, name: str) -> str:
    """A card written here, for a model that is loaded from another place."""
    old = re.search(r'^name = "(.*)"$', card, re.MULTILINE)
    text = card.rpartition("<!--")[0]
    text = text.replace(old[1], name) if old else text
    return text + MARK.format(digest(text)) + "\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_own(card: str) -> bool:
    """Whether a card is as it was written here. One that was edited is a person's."""
    text, _, last = card.rstrip("\n").rpartition("\n")
    return last == MARK.format(digest(text + "\n"))


def write_card(folder: str | Path, text: str) -> bool:
    """Write README.md unless a person's is there; whether it was written."""
    file = Path(folder, NAME)
    if file.is_file() and not is_own(file.read_text(encoding="utf-8")):
        return False
    write_whole_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    return True
