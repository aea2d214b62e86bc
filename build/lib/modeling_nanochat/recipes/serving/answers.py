"""Answers in OpenAI's form: whole, or as a stream of server-sent events, of chats and of plain completions."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from modeling_nanochat.recipes.serving.answer import Call, Vocabulary
from modeling_nanochat.recipes.serving.engine import Piece

Pieces = AsyncIterator[list[Piece]]


class DecodingFailed(Exception):
    """The engine could not finish the answers; why stands in the server's log."""


def event(data: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"


@dataclass
class Growing:
    """One of a request's answers so far."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: str | None = None


class Wording:
    """How pieces are worded for one request.

    Args:
        kind: "chat.completion" or "text_completion".
        prompts: tokens of each prompt; a piece's index counts all answers of the first before those of the second.
        include_usage: a stream ends with the numbers of tokens.
    """

    def __init__(self, kind: str, model: str, vocabulary: Vocabulary, prompts: list[int], include_usage: bool = False):
        self.is_chat = kind == "chat.completion"
        self.vocabulary, self.prompt_tokens, self.include_usage = vocabulary, sum(prompts), include_usage
        self.completion_tokens = 0
        self.head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, pieces: Pieces, count: int) -> dict[str, Any]:
        """The response's body when all answers have ended."""
        answers = [Growing() for _ in range(count)]
        async for new in pieces:
            for piece in new:
                self._grow(answers[piece.index], piece)
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def stream(self, pieces: Pieces, count: int) -> AsyncIterator[str]:
        """The events of a stream; what has come together goes out together."""
        head = {**self.head, "object": "chat.completion.chunk"} if self.is_chat else self.head
        if self.is_chat:
            for index in range(count):
                opening = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield event({**head, "choices": [opening]})
        calls = [0] * count
        try:
            async for new in pieces:
                fresh: dict[int, Growing] = {}
                for piece in new:
                    self._grow(fresh.setdefault(piece.index, Growing()), piece, calls)
                for index, growing in fresh.items():
                    if growing.text or growing.logprobs or growing.end:
                        yield event({**head, "choices": [self._choice(index, growing, streaming=True)]})
        except DecodingFailed as error:
            yield event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
            return
        if self.include_usage:
            yield event({**head, "choices": [], "usage": self._usage()})
        yield event("[DONE]")

    def _grow(self, answer: Growing, piece: Piece, calls_before: list[int] | None = None) -> None:
        if piece.end == "error":
            raise DecodingFailed("the server failed while it decoded; its log says why")
        self.completion_tokens += 1
        for shown in piece.shown:
            answer.text += str(shown)
            if isinstance(shown, Call) and shown.expression:  # else the model made up an output: that is text
                number = len(answer.calls) if calls_before is None else calls_before[piece.index]
                answer.calls.append(tool_call(shown, number, streaming=calls_before is not None))
                if calls_before is not None:
                    calls_before[piece.index] += 1
        if piece.top is not None and piece.token is not None:
            answer.logprobs.append(self._logprob(piece))
        answer.end = piece.end

    def _choice(self, index: int, answer: Growing, streaming: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": answer.end, "logprobs": None}
        if not self.is_chat:
            choice["text"] = answer.text
            choice["logprobs"] = completion_logprobs(answer.logprobs) if answer.logprobs else None
            return choice
        choice["logprobs"] = {"content": answer.logprobs, "refusal": None} if answer.logprobs else None
        message: dict[str, Any] = {"content": answer.text}
        if answer.calls:
            message["tool_calls"] = answer.calls
        choice["delta" if streaming else "message"] = message if streaming else {"role": "assistant", **message}
        return choice

    def _logprob(self, piece: Piece) -> dict[str, Any]:
        """A token with its log-probability and the likeliest ones beside it."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            spelled = self.vocabulary.bytes[token]
            # Minus infinity (beside a forced token) is no JSON; OpenAI writes -9999 for what has no probability.
            return {
                "token": spelled.decode(errors="replace"),
                "logprob": max(logprob, -9999.0),
                "bytes": list(spelled),
            }

        (chosen, *likeliest) = piece.top
        return {**entry(*chosen), "top_logprobs": [entry(*pair) for pair in likeliest]}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def tool_call(call: Call, number: int, streaming: bool) -> dict[str, Any]:
    """A use of the calculator: as a call of a function, with the output beside it, as it has been carried out."""
    described = {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": "calculator", "arguments": json.dumps({"expression": call.expression})},
        "output": call.output,
    }
    return {"index": number, **described} if streaming else described


def completion_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The older form, of `/v1/completions`."""
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
    }
