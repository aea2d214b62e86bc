"""Answers with the `model.onnx` and `tokenizer.json` that lie beside this file, without torch and Transformers:

    pip install onnxruntime tokenizers
    python answer.py "What is 12 + 30?"

The graph takes new tokens and the cache of all before them, and gives logits and the longer cache: the prompt goes in
whole, with an empty cache, then every token alone. Layers with a window keep the keys that they no longer see, which is
memory for nothing; it is what lets one graph do both. Answers are greedy, and the calculator's calls stay calls.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
)  # fmt: skip
MOST_TOKENS = 256  # of an answer
INPUTS = ("input_ids", "attention_mask", "position_ids")  # the graph's others are the cache


class Graph:
    """The network and what it has read so far: (1, T) new tokens -> (T, V) logits."""

    def __init__(self, folder: Path):
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.length = 0
        # Keys and values of no token (1, H, 0, D); a state of fixed size (1, C, 1) begins with zeros.
        shapes = {each.name: each.shape for each in self.session.get_inputs() if each.name not in INPUTS}
        self.cache = {name: np.zeros([1, shape[1], *([0] if len(shape) == 4 else []), shape[-1]], np.float32)
                      for name, shape in shapes.items()}  # fmt: skip

    def read(self, ids: list[int]) -> np.ndarray:
        before, self.length = self.length, self.length + len(ids)
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(before, self.length, dtype=np.int64)[None],
        }
        logits, *cache = self.session.run(None, feed | self.cache)
        self.cache = dict(zip(self.cache, cache))
        return logits[0]


def greedy(graph: Graph, prompt: list[int], stops: set[int], most: int) -> list[int]:
    """The likeliest tokens after a prompt, until one that stops."""
    tokens, new = [], prompt
    while len(tokens) < most:
        token = int(graph.read(new)[-1].argmax())
        if token in stops:
            break
        tokens.append(token)
        new = [token]
    return tokens


def main() -> None:
    folder = Path(__file__).parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = {mark: tokenizer.token_to_id(mark) for mark in (BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END)}
    tokenizer.encode_special_tokens = True  # what is typed stays text
    for question in sys.argv[1:]:
        text = tokenizer.encode(question, add_special_tokens=False).ids
        prompt = [marks[BOS], marks[USER_START], *text, marks[USER_END], marks[ASSISTANT_START]]
        answer = greedy(Graph(folder), prompt, {marks[ASSISTANT_END], marks[BOS]}, MOST_TOKENS)
        print(tokenizer.decode(answer))


if __name__ == "__main__":
    main()
