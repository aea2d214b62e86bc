"""Talk to a model in the terminal.

    nanochat chat --model out/demo/rl
    nanochat chat --model out/demo/rl --prompt "What is 12 + 30?"

Answers appear while they are made; a use of the calculator is shown as `[12 + 30 = 42]`. The model sees as much of the
conversation as fits its context beside an answer: the oldest exchanges are left out first, and an answer may be shorter
than `max_new_tokens` where little room is left. What you type is always plain text: `<|assistant_start|>` typed by hand
reaches the model as those characters, never as the token. Answers come from the server's engine (`serving/engine.py`).
What is typed at a terminal is kept for the arrow keys of the next session (`kept_history`).
"""

import json
import os
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_nanochat.inference import MAX_NEW_TOKENS, TEMPERATURE, TOP_K
from modeling_nanochat.recipes.command_line import one_line, parse, run
from modeling_nanochat.recipes.serving.answer import Shown, message_parts
from modeling_nanochat.recipes.serving.engine import Engine, Piece, Request
from modeling_nanochat.recipes.serving.sampling import Sampling
from modeling_nanochat.recipes.stages.folder import load_for_inference
from modeling_nanochat.recipes.stages.record import check_as_left
from modeling_nanochat.tokenization_nanochat_gpt import message_text, render_conversation, render_prompt
from modeling_nanochat.training.whole_files import write_json

try:
    import readline
except ImportError:  # then `input` reads lines without editing and history
    readline = None

HELP = """/retry             ask the last question again, for another answer
/reset             forget the conversation and begin a new one
/system TEXT       instruction put in front of the first message; without TEXT, none
/temperature N     0 takes the likeliest token, 1 samples as learnt; without N, shows it
/save FILE         write the conversation to a file
/load FILE         go on with a conversation that was saved
/help              show this list
/quit              leave (so does Ctrl-D, and Ctrl-C twice); Ctrl-C stops an answer
A message that begins with a slash is sent with a space before it."""
HISTORY_LINES = 1000  # typed lines that are kept for the arrow keys of the next session
ROOM_SHARE = 4  # of the context, one part in so many is kept for an answer, if a whole answer does not fit


@dataclass
class ChatArguments:
    """Whom to talk to, and how it answers."""

    model: str = field(default="out/demo/rl", metadata={"help": "Folder or Hub name of a chat model."})
    prompt: str | None = field(default=None, metadata={"help": "Answer this once and leave, instead of a dialogue."})
    system: str | None = field(default=None, metadata={"help": "Instruction put in front of the first message."})
    temperature: float = field(
        default=TEMPERATURE, metadata={"help": "0 takes the likeliest token, 1 samples as learnt."}
    )
    top_k: int = field(default=TOP_K, metadata={"help": "Sample among so many tokens; 0 for all."})
    max_new_tokens: int = field(default=MAX_NEW_TOKENS, metadata={"help": "Length at which an answer is cut off."})
    seed: int = field(default=0, metadata={"help": "The same seed and questions give the same answers."})

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.max_new_tokens < 1 or self.top_k < 0:
            raise ValueError(
                "expected temperature >= 0, top_k >= 0 and max_new_tokens >= 1, got "
                f"{self.temperature}, {self.top_k} and {self.max_new_tokens}"
            )


def main() -> None:
    (arguments,) = parse(ChatArguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused where it was typed
    sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than the model
    check_as_left(arguments.model)
    model, tokenizer = load_for_inference(arguments.model)
    with closing(Engine(model, tokenizer, max_rows=1)) as engine:
        chat = Chat(engine, tokenizer, arguments)
        if arguments.prompt is not None:
            chat.answer(arguments.prompt, write)
            write("\n")
            return
        print(f"{arguments.model}. /help lists the commands.")
        with kept_history():
            for line in typed_lines():
                try:
                    obey(chat, line)
                except (ValueError, OSError) as error:
                    print(f"({one_line(error)})")
                except KeyboardInterrupt:
                    print("(stopped)")


@contextmanager
def kept_history() -> Iterator[None]:
    """The arrow keys reach what was typed in earlier sessions at a terminal: in a file of `$XDG_STATE_HOME/nanochat`
    that nobody else reads. Where that cannot be written, there is no history, and no word of it."""
    if readline is None or not sys.stdin.isatty():
        yield
        return
    file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "nanochat" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)
            file.chmod(0o600)


def typed_lines() -> Iterator[str]:
    """What is typed, line by line, until the end of the input, /quit, or Ctrl-C twice in a row."""
    interrupted = False
    while True:
        try:
            print()
            line = input("You: ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if interrupted:
                print()
                return
            interrupted = True
            print("\n(Ctrl-C again leaves, and so does /quit)")
            continue
        interrupted = False
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line.rstrip()


def obey(chat: "Chat", line: str) -> None:
    """Carries out a command, or answers a message.

    Raises:
        ValueError: no such command, or something wrong with what it was given; the message says what.
        OSError: a file cannot be read or written.
    """
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    match command:
        case "/help":
            print(HELP)
        case "/reset":
            chat.reset()
            print("(a new conversation)")
        case "/retry":
            say(chat.retry)
        case "/system":
            chat.system = argument or None
            print("(no system message)" if chat.system is None else "(the conversation now begins with it)")
        case "/temperature":
            if argument:
                chat.set_temperature(argument)
            print(f"(temperature {chat.temperature:g})")
        case "/save":
            print(f"({chat.save(argument)} messages written to {argument})")
        case "/load":
            print(f"({chat.load(argument)} messages from {argument})")
        case _ if command.startswith("/"):
            raise ValueError(
                f"there is no command {command}, and nothing was sent; /help lists the commands, "
                "and a space in front sends the line as a message"
            )
        case _:
            say(lambda show: chat.answer(line.strip(), show))


def say(answering: Callable[[Callable[[str], None]], str | None]) -> None:
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        write(text if begun else f"Assistant: {text}")
        begun = True

    note = answering(show)
    write("\n" if begun else "Assistant: (nothing)\n")
    if note:
        print(f"({note})")


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Chat:
    """A conversation with a model, kept whole as messages."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, arguments: ChatArguments):
        self.engine, self.tokenizer, self.arguments = engine, tokenizer, arguments
        self.temperature, self.system = arguments.temperature, arguments.system
        self.messages: list[dict[str, Any]] = []
        self.forgotten = 0  # of the messages, the first so many are not shown to the model any more
        self.answers = 0  # each has a seed of its own
        self.own_files: set[Path] = set()  # saved or loaded here: these may be written again

    def reset(self) -> None:
        self.messages, self.forgotten = [], 0

    def set_temperature(self, text: str) -> None:
        try:
            temperature = float(text)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"the temperature is a number of 0 or more, not {text!r}")
        self.temperature = temperature

    def retry(self, show: Callable[[str], None]) -> str | None:
        """Another answer to the last question."""
        if not self.messages:
            raise ValueError("nothing has been asked yet")
        before, kept = len(self.messages), self.messages[-2:]
        del self.messages[-2:]
        try:
            return self.answer(message_text(kept[0]["content"]), show)
        finally:
            if len(self.messages) < before:  # no other answer came
                self.messages += kept

    def answer(self, text: str, show: Callable[[str], None]) -> str | None:
        """Answer a message, giving pieces of text to `show` as they come; a note on what was left out, if anything.

        Ctrl-C ends the answer where it is; what there is of it is remembered. A question to which nothing was said is
        not.

        Raises:
            ValueError: the message is no text, or too long for the model.
        """
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("that is not UTF-8 text, and was not sent; is the terminal's encoding another?")
        self.messages.append({"role": "user", "content": text})
        shown: list[Shown] = []
        before = self.forgotten
        try:
            end = self._decode(self._fitting_prompt(), shown, show)
        finally:
            if parts := message_parts(shown):
                self.messages.append({"role": "assistant", "content": parts})
            else:
                self.messages.pop()
        notes = [end] if end else []
        if self.forgotten > before:
            notes.insert(0, f"the model's memory is full: it no longer sees the first {self.forgotten} messages")
        return "; ".join(notes) or None

    def _decode(self, prompt: list[int], shown: list[Shown], show: Callable[[str], None]) -> str | None:
        """Shows an answer while it is made, and collects it; why it ended, if not by itself."""
        pieces: queue.SimpleQueue[list[Piece]] = queue.SimpleQueue()
        sampling = Sampling(self.temperature, self.arguments.top_k)
        seed = self.arguments.seed + self.answers
        request = Request(prompt, pieces.put, 1, self.arguments.max_new_tokens, sampling, seed)
        self.answers += 1
        end = None
        try:
            self.engine.submit(request)
            while end is None:
                for piece in pieces.get():
                    for new in piece.shown:
                        shown.append(new)
                        show(str(new))
                    end = piece.end
        except KeyboardInterrupt:
            self.engine.cancel(request)
            return "stopped"
        room = self.engine.context - len(prompt)
        cut = f"cut off after {request.max_new_tokens} tokens"
        if end == "length" and request.max_new_tokens == room:
            cut += ", where the model's memory ends; /reset begins anew"
        return {"stop": None, "length": cut, "error": "the model failed, see above"}[end]

    def _fitting_prompt(self) -> list[int]:
        """The conversation, without the oldest exchanges as far as an answer needs the room.

        Raises:
            ValueError: the last message alone is too long.
        """
        context = self.engine.context
        room = min(self.arguments.max_new_tokens, context // ROOM_SHARE)
        while len(prompt := self._prompt()) > context - room and self.forgotten < len(self.messages) - 1:
            self.forgotten += 2
        if len(prompt) >= context:
            raise ValueError(
                f"your message is too long: with it the prompt has {len(prompt)} tokens, and the model's context holds "
                f"{context}, its answer included"
            )
        return prompt

    def _prompt(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return render_prompt(self.tokenizer, system + self.messages[self.forgotten :])

    def save(self, name: str) -> int:
        """Write the conversation as JSON; the number of messages."""
        file = Path(name).expanduser()
        if not name or (file.exists() and file.resolve() not in self.own_files):
            raise ValueError(f"{name} exists already, and was not saved here" if name else "expected /save FILE")
        saved = {"model": self.arguments.model, "system": self.system, "messages": self.messages}
        write_json(file, saved)
        self.own_files.add(file.resolve())
        return len(self.messages)

    def load(self, name: str) -> int:
        """Go on with a saved conversation; the number of messages. If it cannot be read, nothing changes."""
        if not name:
            raise ValueError("expected /load FILE")
        file = Path(name).expanduser()
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            system, messages = saved["system"], saved["messages"]
            if not isinstance(messages, list) or not isinstance(system, str | None):
                raise TypeError
            if messages:
                render_conversation(self.tokenizer, messages)
                if messages[-1]["role"] != "assistant":
                    raise ValueError("the last message has no answer")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{name} is no saved conversation ({one_line(error)})") from None
        self.system, self.messages, self.forgotten = system, messages, 0
        self.own_files.add(file.resolve())
        return len(messages)


if __name__ == "__main__":
    run(main)
