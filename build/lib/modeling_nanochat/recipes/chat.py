"""Talk to a model in the terminal.

    nanochat chat --model out/demo/rl
    nanochat chat --model out/demo/rl --prompt "What is 12 + 30?"

Answers appear while they are made; a use of the calculator is shown as `[12 + 30 = 42]`. The conversation is
remembered until `/reset`; when it outgrows the model's context, its oldest turns are forgotten. What you type is always
plain text: `<|assistant_start|>` typed by hand reaches the model as those characters, never as the token.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from modeling_nanochat.eval.sampling import generation_config, until_stop
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.folder import load_for_inference
from modeling_nanochat.tokenization_nanochat_gpt import (
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    render_prompt,
    special_token_ids,
)
from modeling_nanochat.tool_use import CalculatorLogitsProcessor

HELP = """/reset  forget the conversation and begin a new one
/help   show this list
/quit   leave (so does Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class ChatArguments:
    """Whom to talk to, and how it answers."""

    model: str = field(default="out/demo/rl", metadata={"help": "Folder or Hub name of a chat model."})
    prompt: str | None = field(default=None, metadata={"help": "Answer this once and leave, instead of a dialogue."})
    system: str | None = field(default=None, metadata={"help": "Instruction put in front of the first message."})
    temperature: float = field(default=0.6, metadata={"help": "0 takes the likeliest token, 1 samples as learnt."})
    top_k: int | None = field(default=50, metadata={"help": "Sample among so many tokens; 0 for all."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length at which an answer is cut off."})
    seed: int = field(default=0, metadata={"help": "The same seed and questions give the same answers."})

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_new_tokens < 1 or (self.top_k or 0) < 0:
            raise ValueError(
                "expected temperature >= 0, top_k >= 0 and max_new_tokens >= 1, got "
                f"{self.temperature}, {self.top_k} and {self.max_new_tokens}"
            )


def main() -> None:
    (arguments,) = parse(ChatArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chat = Chat(*load_for_inference(arguments.model), arguments)
    if arguments.prompt is not None:
        chat.answer(arguments.prompt, write)
        return
    print(f"{arguments.model}. Commands: /help /reset /quit")
    while True:
        try:
            line = input("\nYou: ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        if line == "/help":
            print(HELP)
        elif line == "/reset":
            chat.reset()
            print("(a new conversation)")
        elif line:
            write("Assistant: ")
            forgotten = chat.answer(line, write)
            if forgotten:
                print(f"(the context is full: {forgotten} earlier messages were forgotten)")
    print()


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Chat:
    """A conversation with a model, kept as messages."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: ChatArguments):
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        self.config = generation_config(
            model,
            tokenizer,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
        )
        self.messages: list[dict[str, Any]] = []
        torch.manual_seed(arguments.seed)

    def reset(self) -> None:
        self.messages = []

    def answer(self, text: str, show: Callable[[str], None]) -> int:
        """Answer a message, giving pieces of text to `show` as they come; returns how many messages were forgotten.

        Ctrl-C ends the answer where it is; what there is of it is remembered.
        """
        self.messages.append({"role": "user", "content": text})
        forgotten = self._forget()
        prompt = torch.tensor([self._prompt()], device=self.model.device)  # (1, T)
        stream = AnswerStream(self.tokenizer, self.config.eos_token_id, show)
        with suppress(KeyboardInterrupt):
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=self.config,
                logits_processor=[CalculatorLogitsProcessor(self.tokenizer)],
                streamer=stream,
            )
        stream.finish()
        parts = said_parts(split_parts(self.tokenizer, stream.ids))
        if parts:
            self.messages.append({"role": "assistant", "content": parts})
        else:
            self.messages.pop()  # nothing was said: the exchange is forgotten
        return forgotten

    def _prompt(self) -> list[int]:
        system = self.arguments.system
        return render_prompt(
            self.tokenizer, ([{"role": "system", "content": system}] if system else []) + self.messages
        )

    def _forget(self) -> int:
        """Drop the oldest exchanges until prompt and answer fit the context, but never the last message."""
        room = self.model.config.max_position_embeddings - self.arguments.max_new_tokens
        forgotten = 0
        while len(self.messages) > 2 and len(self._prompt()) > room:
            self.messages = self.messages[2:]
            forgotten += 2
        return forgotten


class AnswerStream(BaseStreamer):
    """Receives the tokens of an answer from `generate` and shows what is new after each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int], show: Callable[[str], None]):
        self.tokenizer, self.stop_token_ids, self.show = tokenizer, stop_token_ids, show
        self.ids: list[int] | None = None  # None until the prompt has been passed
        self.shown = 0  # characters

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids = until_stop([*self.ids, *value.tolist()], self.stop_token_ids)
        self._show_new(finished=False)

    def end(self) -> None:
        """`generate` has ended; the last words are said by `finish`, which an interrupted answer reaches too."""

    def finish(self) -> None:
        self.ids = self.ids or []
        self._show_new(finished=True)
        self.show("\n")

    def _show_new(self, finished: bool) -> None:
        text = readable(split_parts(self.tokenizer, self.ids), finished)
        self.show(text[self.shown :])
        self.shown = len(text)


def split_parts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[dict[str, str]]:
    """The tokens of an answer as the parts of a message; the last one may still be growing (and be empty)."""
    special = special_token_ids(tokenizer)
    opening = {special[PYTHON_START]: "python", special[OUTPUT_START]: "python_output"}
    closing = {special[PYTHON_END], special[OUTPUT_END]}
    pieces: list[tuple[str, list[int]]] = [("text", [])]
    for token in ids:
        if token in opening or token in closing:
            pieces.append((opening.get(token, "text"), []))
        else:
            pieces[-1][1].append(token)
    # Between two marks there is no text; only the last piece is kept though empty.
    kept = [piece for piece in pieces[:-1] if piece[0] != "text" or piece[1]] + pieces[-1:]
    return [{"type": kind, "text": tokenizer.decode(tokens)} for kind, tokens in kept]


def said_parts(parts: list[dict[str, str]]) -> list[dict[str, str]]:
    """An answer as content that can be rendered again: nothing empty, and an output that the model made up without a
    call is text."""
    said: list[dict[str, str]] = []
    for part in parts:
        if part["text"]:
            called = said and said[-1]["type"] == "python"
            said.append(part if part["type"] != "python_output" or called else {**part, "type": "text"})
    return said


def readable(parts: list[dict[str, str]], finished: bool) -> str:
    """An answer as it is shown: calls of the calculator as `[12 + 30 = 42]`, or `[1 / 0]` if they have no value.

    While it is not finished, nothing appears that a later token could change.
    """
    text = ""
    for index, part in enumerate(parts):
        growing = index == len(parts) - 1 and not finished
        before = parts[index - 1] if index else None
        after = parts[index + 1] if index + 1 < len(parts) else None
        if part["type"] == "text":
            text += part["text"].rstrip("\ufffd") if growing else part["text"]  # a character may come in two tokens
        elif growing:
            pass
        elif part["type"] == "python_output":
            call = before["text"] if before and before["type"] == "python" else ""
            text += f"[{call} = {part['text']}]"
        elif after is None or after["type"] != "python_output":
            value_may_come = after is not None and after == {"type": "text", "text": ""} and not finished
            text += "" if value_may_come else f"[{part['text']}]"
    return text


if __name__ == "__main__":
    run(main)
