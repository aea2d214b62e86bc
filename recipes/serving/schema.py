"""What clients may send, in OpenAI's words: checked strictly, nothing unknown, nothing that would be ignored.

A field of OpenAI's API that means nothing here is accepted with the value that changes nothing (`presence_penalty: 0`)
and refused with any other. Added to OpenAI's: `top_k`, parts of an assistant's message as this project writes them
(`python`, `python_output`), and what `transformers chat` sends (`generation_config`).
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

LARGEST_SEED = 2**63 - 1
MOST_ANSWERS = 128  # OpenAI's bound on n; the batch's rows are a bound too


def whole_characters(text: str) -> str:
    """JSON can spell half a character (`"\\ud800"`), which is in no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!r} is half a character") from None
    return text


Text = Annotated[str, AfterValidator(whole_characters)]
SomeText = Annotated[Text, Field(min_length=1)]


def whole_number(value: Any) -> Any:
    """JSON knows no difference between 2 and 2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def false_only(value: bool) -> bool:
    if value:
        raise ValueError("true is nothing that this server does, expected false")
    return value


def integer(least: int | None = None, most: int | None = None) -> Any:
    return Annotated[int, Field(ge=least, le=most), BeforeValidator(whole_number)]


No = Annotated[bool, AfterValidator(false_only), WithJsonSchema({"type": "boolean", "const": False})]
Zero = Annotated[float, Field(ge=0, le=0)]
StopString = Annotated[Text, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(Strict):
    """A piece of a message."""

    type: Literal["text", "python", "python_output"]
    text: SomeText


class Function(Strict):
    name: Literal["calculator"]
    arguments: Text = Field(description='JSON: {"expression": "12 + 30"}')


class ToolCall(Strict):
    """A use of the calculator, as the server reported it: it has been carried out already."""

    id: str
    type: Literal["function"] = "function"
    function: Function
    output: Text | None = None
    index: integer(0) | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: SomeText | Annotated[list[Part], Field(min_length=1)]
    tool_calls: list[ToolCall] | None = None
    # What OpenAI's client adds to an answer that is sent back.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def rendered(self) -> dict[str, Any]:
        """The message as this project's renderer takes it.

        Raises:
            ValueError: calls that the content does not show.
        """
        content = self.content
        parts = [part.model_dump() for part in content] if isinstance(content, list) else content
        if self.tool_calls and isinstance(content, str):
            parts = with_calls(content, self.tool_calls)
        return {"role": "system" if self.role == "developer" else self.role, "content": parts}


def with_calls(text: str, calls: list[ToolCall]) -> list[dict[str, str]]:
    """An answer's text, in which calls read `[12 + 30 = 42]`, as the parts that the model wrote."""
    parts = []
    for call in calls:
        try:
            expression = json.loads(call.function.arguments)["expression"]
        except (ValueError, TypeError, KeyError, RecursionError):
            expression = None
        if not isinstance(expression, str):
            raise ValueError(f'arguments of a call are {call.function.arguments!r}, expected {{"expression": string}}')
        shown = f"[{expression}]" if call.output is None else f"[{expression} = {call.output}]"
        before, found, text = text.partition(shown)
        if not found:
            raise ValueError(f"the content of an assistant's message does not show its call {shown}")
        parts += [{"type": "text", "text": before}, {"type": "python", "text": expression}]
        parts += [] if call.output is None else [{"type": "python_output", "text": call.output}]
    return [part for part in [*parts, {"type": "text", "text": text}] if part["text"]]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Common(Strict):
    """What both kinds of completions take."""

    model: str | None = Field(default=None, description="The one model served; others are not loaded.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: integer(1, MOST_ANSWERS) | None = None
    max_tokens: integer(1) | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: integer(0, 2**31) | None = Field(default=None, description="Sample among so many tokens; 0 for all.")
    seed: integer(-LARGEST_SEED - 1, LARGEST_SEED) | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    user: str | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatRequest(Common):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: integer(1) | None = None
    logprobs: bool | None = None
    top_logprobs: integer(0, 20) | None = None
    generation_config: str | None = Field(default=None, description="Of `transformers chat`: JSON of settings.")
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: No | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _apply(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.generation_config is not None:
            apply_generation_config(self, self.generation_config)
        return self


# What a generation configuration says without changing how tokens are chosen here.
HARMLESS = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache", "_from_model_config"}


def apply_generation_config(request: ChatRequest, text: str) -> None:
    """Takes over what `transformers chat` puts into `generation_config`; the request's own fields win.

    Raises:
        ValueError: it is no JSON object, a setting has the wrong form, or is one that nothing here obeys.
    """
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError("generation_config must be a JSON object in a string")
    settings = {name: value for name, value in settings.items() if value is not None and name not in HARMLESS}
    allowed = {"temperature", "top_p", "top_k", "max_new_tokens", "do_sample", "stop_strings"}
    if unknown := sorted(settings.keys() - allowed):
        raise ValueError(f"generation_config has {unknown}, which nothing here obeys; expected only {sorted(allowed)}")
    renamed = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}
    if settings.pop("do_sample", True) is False:
        settings["temperature"] = 0.0
    fields = Common.model_validate({renamed.get(name, name): value for name, value in settings.items()})
    for name in fields.model_fields_set:
        if getattr(request, name) is None:
            setattr(request, name, getattr(fields, name))


class CompletionRequest(Common):
    """Body of `/v1/completions`: text that goes on, without a conversation around it."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_ANSWERS)]
    logprobs: integer(0, 20) | None = None
    echo: No | None = None
    best_of: integer(1, 1) | None = None
    suffix: None = None


class LoadRequest(Strict):
    """Body of `/load_model`, which `transformers chat` sends before it begins."""

    model: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is not 200."""

    error: ErrorBody
