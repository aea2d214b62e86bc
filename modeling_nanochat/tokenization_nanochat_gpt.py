"""Text and conversations as token ids: the nine special tokens, the pre-split pattern, and the renderer.

A conversation is rendered to ids together with a mask that says which of them the assistant is to learn: its own text,
its calls of the calculator (with their two marks) and the end of its turn. What a user typed, and what the calculator
answered, is context and never a target. Text is always encoded as ordinary text: somebody who types
`<|assistant_start|>` gets those characters and never the special token, so nobody can speak in another's name.

`chat_template.jinja` beside this file writes the same format as one string, for `apply_chat_template` and servers: the
same ids, and the same mask, for whatever both take. The one difference is a typed `<|assistant_start|>`, which
no string can keep apart from a real one: the template refuses it. Both refuse what has no single meaning: texts that
are empty, fields they do not know, an output without a call. The price of rendering by parts is that a token never
spans a mark.

Everything here works with any byte-level fast tokenizer that has the nine special tokens; none of it needs torch.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = (
    SPECIAL_TOKENS
) = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# GPT-4's pattern with numbers in groups of one or two digits instead of three, which wastes fewer tokens of a small
# vocabulary (upstream's choice, kept so that its tokenizers convert exactly).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

INSIDE_OUTPUT_START = re.compile(r"(?<=<\|output)(?=_start\|>)")

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": str | list of parts}
PART_MARKS = {"text": (None, None), "python": (PYTHON_START, PYTHON_END), "python_output": (OUTPUT_START, OUTPUT_END)}


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of the nine special tokens by name; `ValueError` if the tokenizer lacks one."""
    vocabulary = tokenizer.get_added_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"the tokenizer lacks the special tokens {missing}; expected all of {list(SPECIAL_TOKENS)}")
    return {token: vocabulary[token] for token in SPECIAL_TOKENS}


def generation_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The ids that decoding goes by, as a configuration names them: what begins a text, what ends the assistant's turn
    (a model that runs on begins another text), what fills up rows."""
    ids = special_token_ids(tokenizer)
    return {"bos_token_id": ids[BOS], "eos_token_id": [ids[ASSISTANT_END], ids[BOS]], "pad_token_id": ids[BOS]}


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ordinary text: no BOS, and special tokens spelled out in it become plain characters.

    `<|output_start|>` is no special token to the tokenizer (`training/tokenizer.py` says why): where it is spelled out,
    the text is cut between two words of the pre-split, which changes no other id.

    Raises:
        ValueError: half a surrogate pair, which JSON can write and which is no character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the text holds half a surrogate pair, which is no character: {text[:80]!r}") from None
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return [index for piece in INSIDE_OUTPUT_START.split(text) for index in tokenizer(piece, **options)["input_ids"]]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Length in bytes of every token id, 0 for special tokens: the denominator of bits per byte.

    A byte-level token is stored with one character per byte, so its length is the number of bytes.
    """
    special = set(tokenizer.all_special_ids) | set(special_token_ids(tokenizer).values())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [0 if index in special else len(token) for index, token in enumerate(tokens)]


def message_text(content: str | Sequence[dict[str, str]]) -> str:
    """The text of a message, its parts joined, the calculator's answer behind an equals sign (`12 + 30 = 42`): what
    decoding its tokens without the special ones gives."""
    return "".join(f" = {text}" if kind == "python_output" else text for kind, text in content_parts(content))


def render_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and a mask of the same length, 1 where the assistant is trained.

    Args:
        tokenizer: a fast tokenizer with the nine special tokens.
        messages: user and assistant in turn, optionally led by one system message, which is merged into the first
            user message with a blank line. An assistant's content is a string or a list of parts
            `{"type": "text" | "python" | "python_output", "text": str}`.

    Raises:
        ValueError: roles out of order, or content of another form; the message shows what was found.
    """
    special = special_token_ids(tokenizer)
    ids, mask = [special[BOS]], [0]

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    for message in merge_system_message(messages):
        if message["role"] == "user":
            add([special[USER_START], *encode_text(tokenizer, message["content"]), special[USER_END]], 0)
            continue
        add([special[ASSISTANT_START]], 0)
        for kind, text in join_texts(content_parts(message["content"])):
            tokens = encode_text(tokenizer, text)
            start, end = PART_MARKS[kind]
            if start is not None:
                tokens = [special[start], *tokens, special[end]]
            add(tokens, int(kind != "python_output"))
        add([special[ASSISTANT_END]], 1)
    return ids, mask


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that waits for the assistant: it ends with `<|assistant_start|>`.

    Raises:
        ValueError: as `render_conversation`, and if the last message is not the user's.
    """
    ids, _ = render_conversation(tokenizer, messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"a prompt ends with a user message, but the last role is {messages[-1]['role']!r}")
    return [*ids, special_token_ids(tokenizer)[ASSISTANT_START]]


def content_parts(content: str | Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """(type, text) of every part of a message's content; a string is one text part.

    Raises:
        ValueError: content of another form, an empty text, or an output that follows no call.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not parts:
        raise ValueError(f"content must be a string or a list of parts, not {content!r}")
    previous = None
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in PART_MARKS or not isinstance(part.get("text"), str):
            raise ValueError(f"a part must be {{'type': one of {list(PART_MARKS)}, 'text': str}}, not {part!r}")
        refuse_unknown_fields(part, ("type", "text"))
        if not part["text"]:
            raise ValueError(f"a text is empty, expected at least one character: {content!r}")
        if part["type"] == "python_output" and previous != "python":
            raise ValueError(f"a python_output must follow a python part, not {previous}: {content!r}")
        previous = part["type"]
    return [(part["type"], part["text"]) for part in parts]


def refuse_unknown_fields(fields: dict[str, Any], known: Sequence[str]) -> None:
    """`ValueError` for a field that would be ignored; one that is None says nothing (tables add such)."""
    unknown = [name for name, value in fields.items() if name not in known and value is not None]
    if unknown:
        raise ValueError(f"expected the fields {list(known)} and no others, got also {unknown} in {fields!r}")


def join_texts(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The parts with neighbouring texts made one: where a text is cut must not change its tokens."""
    joined: list[tuple[str, str]] = []
    for kind, text in parts:
        if joined and kind == joined[-1][0] == "text":
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


def merge_system_message(messages: Sequence[Message]) -> list[Message]:
    """The messages checked, a leading system message merged into the first user message, user content as a string."""
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"a message must be {{'role': ..., 'content': ...}}, not {message!r}")
        refuse_unknown_fields(message, ("role", "content"))
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    system = turns.pop(0) if turns and turns[0]["role"] == "system" else None
    if not turns:
        raise ValueError(f"a conversation needs at least one user message, not {list(messages)!r}")
    for position, turn in enumerate(turns):
        expected = ("user", "assistant")[position % 2]
        if turn["role"] != expected:
            roles = [message["role"] for message in messages]
            raise ValueError(f"roles must go user, assistant, user, ... after an optional system message, not {roles}")
        parts = content_parts(turn["content"])
        if expected == "user":
            turn["content"] = plain_text(parts)
    if system is not None:
        turns[0]["content"] = plain_text(content_parts(system["content"])) + "\n\n" + turns[0]["content"]
    return turns


def plain_text(parts: Sequence[tuple[str, str]]) -> str:
    """The content of a user or system message; `ValueError` for a part that is no text."""
    if any(kind != "text" for kind, _ in parts):
        raise ValueError(f"a user's or system's content can only be text, not {list(parts)!r}")
    return "".join(text for _, text in parts)
