"""OpenAI's API over one engine: chats, plain completions, the model's name, health, metrics.

The event loop parses, renders and writes; the engine's thread decodes. A client's pieces come through a queue of its
own, so one that reads slowly holds nobody up, and the queue is no longer than its answers. A client that leaves is
noticed also while it waits; its rows are free a token later. Only the model that was started is served, and text is
never read as special tokens, whatever it spells.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from transformers import PreTrainedTokenizerBase

from modeling_nanochat.recipes.serving.answers import DecodingFailed, Wording, event
from modeling_nanochat.recipes.serving.engine import Busy, Engine, Piece
from modeling_nanochat.recipes.serving.engine import Request as Wanted
from modeling_nanochat.recipes.serving.errors import APIError, Door, use_error_form
from modeling_nanochat.recipes.serving.metrics import metrics_text
from modeling_nanochat.recipes.serving.sampling import Sampling
from modeling_nanochat.recipes.serving.schema import ChatRequest, Common, CompletionRequest, Error, LoadRequest
from modeling_nanochat.tokenization_nanochat_gpt import BOS, content_parts, encode_text, render_prompt

RETRY_AFTER = "2"  # seconds, for a client that finds everything taken
PLAIN_TOKENS = 16  # OpenAI's default length of a plain completion


@dataclass(frozen=True)
class Service:
    """What is served, and within which bounds.

    Attributes:
        name: the one model's, as clients name it.
        sampling: what holds for a request that does not say.
        max_new_tokens: no answer is longer.
        started: seconds since 1970.
        encoding: where text becomes tokens.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    name: str
    sampling: Sampling
    max_new_tokens: int
    started: int = field(default_factory=lambda: int(time.time()))
    encoding: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "encoding"))

    async def tokens(self, encode: Callable[..., list[int]], text: Any) -> list[int]:
        """Token ids by a function of tokenizer and text, beside the event loop; one at a time, as a tokenizer must."""
        return await asyncio.get_running_loop().run_in_executor(self.encoding, encode, self.tokenizer, text)

    def check_model(self, model: str | None) -> None:
        if model not in (None, self.name):
            message = f"the model {model!r} is not served here, expected {self.name!r}"
            raise APIError(404, message, code="model_not_found", param="model")

    def wanted(self, body: Common, prompt: list[int], **settings: Any) -> Wanted:
        """The engine's request for one prompt; who receives it is told later."""
        named = {name: getattr(body, name) for name in ("temperature", "top_k", "top_p")}
        limit = settings.pop("limit", None) or body.max_tokens or self.max_new_tokens
        return Wanted(
            prompt=prompt,
            deliver=lambda pieces: None,
            count=body.n or 1,
            max_new_tokens=min(limit, self.max_new_tokens),
            sampling=replace(self.sampling, **{name: value for name, value in named.items() if value is not None}),
            seed=body.seed,
            stop=body.stop_strings(),
            **settings,
        )


class Exchange:
    """One client's answers while they are made; to be closed when it has them, or has left."""

    def __init__(self, engine: Engine, client: Request, wanted: Sequence[Wanted]):
        self.engine, self.client, self.wanted = engine, client, wanted
        self.count = sum(each.count for each in wanted)
        self.queue: asyncio.Queue[list[Piece] | None] = asyncio.Queue()  # None: the client has left
        self.watcher: asyncio.Task | None = None

    def begin(self) -> None:
        """Hands the requests to the engine.

        Raises:
            APIError: too many wait (503), or what is wanted can never be had (400).
        """
        loop, offset = asyncio.get_running_loop(), 0
        for each in self.wanted:
            each.deliver = self._receiver(loop, offset)
            offset += each.count
            try:
                self.engine.submit(each)
            except Busy as busy:
                self.close()
                raise APIError(503, str(busy), code="overloaded", headers={"Retry-After": RETRY_AFTER}) from None
            except ValueError as error:
                self.close()
                raise APIError(400, str(error), code="invalid_value") from None
        self.watcher = asyncio.create_task(self._watch())

    def _receiver(self, loop: asyncio.AbstractEventLoop, offset: int) -> Callable[[list[Piece]], None]:
        def deliver(pieces: list[Piece]) -> None:  # in the decoding thread
            pieces = [replace(piece, index=piece.index + offset) for piece in pieces] if offset else pieces
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(self.queue.put_nowait, pieces)

        return deliver

    async def _watch(self) -> None:
        while (await self.client.receive())["type"] != "http.disconnect":
            pass
        self.queue.put_nowait(None)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What has come since the last time, until all answers have ended or the client has left."""
        left = self.count
        while left:
            batches = [await self.queue.get()]
            while not self.queue.empty():
                batches.append(self.queue.get_nowait())
            if None in batches:
                return
            new = [piece for batch in batches for piece in batch]
            left -= sum(piece.end is not None for piece in new)
            yield new

    def close(self) -> None:
        for each in self.wanted:
            self.engine.cancel(each)
        if self.watcher is not None:
            self.watcher.cancel()


class EventStream(StreamingResponse):
    """Events until they end or the client leaves; then the exchange is closed, whichever it was."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]):
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.exchange = exchange

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.exchange.close()


async def respond(
    service: Service, client: Request, body: Common, kind: str, wanted: list[Wanted]
) -> dict[str, Any] | EventStream:
    """The whole answers, or a stream of them."""
    exchange = Exchange(service.engine, client, wanted)
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    prompts = [len(each.prompt) for each in wanted]
    wording = Wording(kind, service.name, service.engine.vocabulary, prompts, include_usage)
    exchange.begin()
    if body.stream:
        return EventStream(exchange, wording.stream(exchange.pieces(), exchange.count))
    try:
        return await wording.whole(exchange.pieces(), exchange.count)
    except DecodingFailed as error:
        raise APIError(500, str(error), code="decoding_failed") from None
    finally:
        exchange.close()


def within_context(service: Service, ids: list[int], param: str) -> list[int]:
    if len(ids) >= service.engine.context:
        raise too_long(service, f"{len(ids)} tokens", param)
    return ids


def too_long(service: Service, found: str, param: str) -> APIError:
    longest = service.engine.context - 1
    message = f"the prompt has {found}, expected at most {longest} tokens: the context also holds the answer"
    return APIError(400, message, code="context_length_exceeded", param=param)


def check_size(service: Service, texts: Sequence[str], param: str) -> None:
    """Refuses what cannot fit before any time is spent on its tokens: a token has at most so many bytes, and every
    text comes with a mark."""
    context, size = service.engine.context, sum(map(len, texts))  # in characters, which are no more than bytes
    if size > context * service.engine.vocabulary.longest or len(texts) > context:
        raise too_long(service, f"{len(texts)} texts of {size} characters", param)


router = APIRouter()
ERRORS = {"4XX": {"model": Error, "description": "The request is at fault."},
          "5XX": {"model": Error, "description": "The server is, or is busy (503 with Retry-After)."}}  # fmt: skip
STREAMS = {200: {"description": "An answer, or a stream of its parts.", "content": {"text/event-stream": {}}}}


def service_of(request: Request) -> Service:
    return request.app.state.service


@router.post("/v1/chat/completions", response_model=None, responses={**ERRORS, **STREAMS})
async def chat_completions(body: ChatRequest, request: Request) -> dict[str, Any] | EventStream:
    """The assistant's next message in a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    try:
        messages = [message.rendered() for message in body.messages]
        texts = [text for message in messages for _, text in content_parts(message["content"])]
        check_size(service, texts, "messages")
        ids = await service.tokens(render_prompt, messages)
    except ValueError as error:
        raise APIError(400, str(error), code="invalid_value", param="messages") from None
    wanted = service.wanted(
        body,
        within_context(service, ids, "messages"),
        limit=body.max_completion_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return await respond(service, request, body, "chat.completion", [wanted])


@router.post("/v1/completions", response_model=None, responses={**ERRORS, **STREAMS})
async def completions(body: CompletionRequest, request: Request) -> dict[str, Any] | EventStream:
    """How a text goes on, for base models; the mark of a text's beginning is put before it."""
    service = service_of(request)
    service.check_model(body.model)
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    check_size(service, texts, "prompt")
    bos = service.engine.vocabulary.special[BOS]
    wanted = []
    for text in texts:
        ids = [bos, *await service.tokens(encode_text, text)]
        limit = body.max_tokens or PLAIN_TOKENS
        wanted.append(
            service.wanted(body, within_context(service, ids, "prompt"), limit=limit, top_logprobs=body.logprobs)
        )
    return await respond(service, request, body, "text_completion", wanted)


def model_entry(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.started, "owned_by": "nanochat",
            "max_model_len": service.engine.context}  # fmt: skip


@router.get("/v1/models", responses=ERRORS)
async def models(request: Request) -> dict[str, Any]:
    """The one model served."""
    return {"object": "list", "data": [model_entry(service_of(request))]}


@router.get("/v1/models/{model:path}", responses=ERRORS)
async def model(model: str, request: Request) -> dict[str, Any]:
    """The model of that name."""
    service_of(request).check_model(model)
    return model_entry(service_of(request))


@router.post("/load_model", response_model=None, responses={**ERRORS, **STREAMS})
async def load_model(body: LoadRequest, request: Request) -> StreamingResponse:
    """What `transformers chat` asks first: whether the model is there. Nothing is ever loaded."""
    service_of(request).check_model(body.model)
    ready = {"status": "ready", "model": body.model, "cached": True}
    return StreamingResponse(iter([event(ready)]), media_type="text/event-stream")


@router.get("/health")
async def health() -> dict[str, str]:
    """The server lives; needs no key."""
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
async def metrics(request: Request) -> str:
    """Counts and gauges in Prometheus' text format."""
    return metrics_text(service_of(request).engine, request.app.state.responses)


def make_app(service: Service, api_key: str | None = None, max_body_bytes: int = 1_000_000) -> FastAPI:
    """The application; it closes the engine when it is shut down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)
        service.encoding.shutdown()

    app = FastAPI(
        title="nanochat",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if api_key else [],  # told to clients; the door checks it
    )
    app.state.service, app.state.responses = service, {}
    app.include_router(router)
    use_error_form(app)
    app.add_middleware(Door, api_key=api_key, max_body_bytes=max_body_bytes, responses=app.state.responses)
    return app
