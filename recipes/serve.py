"""Serves a chat model over HTTP with OpenAI's API, to many at once, and with a page to chat on.

    nanochat serve --model out/demo/rl
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'

Requests share one running batch (`serving/engine.py`); the calculator works in it. Everything is bounded: prompts by
the context, answers, bodies and the number of requests that wait by the options. It listens on this machine only
unless told otherwise. docs/serving.md has the API.
"""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import uvicorn
from transformers import PreTrainedModel

from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.serving.api import Service, make_app
from modeling_nanochat.recipes.serving.engine import Engine
from modeling_nanochat.recipes.serving.sampling import Sampling
from modeling_nanochat.recipes.stages.folder import load_for_inference
from modeling_nanochat.recipes.stages.record import check_as_left

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SECONDS_TO_FINISH = 5  # that answers get when the server is shut down


@dataclass
class ServeArguments:
    """What is served, where, and within which bounds."""

    model: str = field(default="out/demo/rl", metadata={"help": "Checkpoint: a folder or a repository on the Hub."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 for every interface."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for any that is free."})
    api_key: str | None = field(
        default=None, metadata={"help": "What clients must send as their key; else the variable NANOCHAT_API_KEY."}
    )
    max_rows: int = field(default=64, metadata={"help": "Answers decoded at the same time; others wait."})
    max_waiting: int = field(default=256, metadata={"help": "Requests that may wait; further ones get error 503."})
    max_new_tokens: int = field(default=1024, metadata={"help": "No answer is longer; the context bounds it too."})
    max_body_bytes: int = field(default=1_000_000, metadata={"help": "Largest request that is read."})

    def __post_init__(self) -> None:
        self.api_key = self.api_key or os.environ.get("NANOCHAT_API_KEY") or None
        for name in ("max_rows", "max_waiting", "max_new_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}, expected 0 to 65535")


def main() -> None:
    (arguments,) = parse(ServeArguments)
    serve(arguments, lambda address: print(f"{arguments.model} is served: {address}/v1, page {address}/", flush=True))


def serve(arguments: ServeArguments, on_ready: Callable[[str], None]) -> None:
    """Loads the model and serves it until interrupted; `on_ready` gets the address then.

    Raises:
        ValueError: there is no such model, it is not as its stage left it, or its tokenizer cannot chat.
        OSError: the address is taken, or not this machine's.
    """
    listening = bind(arguments.host, arguments.port)  # first: a taken port is known before the model is loaded
    check_as_left(arguments.model)
    model, tokenizer = load_for_inference(arguments.model)
    engine = Engine(model, tokenizer, arguments.max_rows, arguments.max_waiting)
    service = Service(engine, tokenizer, arguments.model, default_sampling(model), arguments.max_new_tokens)
    app = make_app(service, arguments.api_key, arguments.max_body_bytes)
    listening.listen()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    on_ready(f"http://{host}:{listening.getsockname()[1]}")
    if arguments.host not in LOOPBACK and not arguments.api_key:
        print("Anyone who reaches this address may use the model: no API key is set (NANOCHAT_API_KEY).", flush=True)
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=SECONDS_TO_FINISH)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
    return listening


def default_sampling(model: PreTrainedModel) -> Sampling:
    """What the checkpoint's generation configuration says; where it says nothing, this project's own."""
    config, own = model.generation_config, Sampling()
    if config.do_sample is False:
        return Sampling(temperature=0)
    said = {name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p")}
    return replace(own, **{name: value for name, value in said.items() if config.do_sample and value is not None})


if __name__ == "__main__":
    run(main)
