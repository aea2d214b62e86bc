"""Serves a checkpoint over HTTP with OpenAI's API, through Transformers' own server.

    nanochat serve --model out/demo/rl
    transformers chat out/demo/rl http://localhost:8000      # in another terminal, or any client of OpenAI's API

`transformers serve` looks a checkpoint's class up by name in the library, so that it finds this one only in a process
that has imported `modeling_nanochat`: this module does, and starts the same server. The calculator comes with the
checkpoint, and an answer reads `12 + 30 = 42`.
"""

from dataclasses import dataclass, field

from transformers.cli.serve import Serve

import modeling_nanochat  # noqa: F401 (where the server looks the class up)
from modeling_nanochat.recipes.command_line import parse, run


@dataclass
class ServeArguments:
    """What is served, and where."""

    model: str = field(default="out/demo/rl", metadata={"help": "Checkpoint: a folder or a repository on the Hub."})
    host: str = field(default="localhost", metadata={"help": "Address to listen on; 0.0.0.0 for every interface."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    device: str = field(default="auto", metadata={"help": "Where it runs: auto, cpu, cuda:0, ..."})


def main() -> None:
    (arguments,) = parse(ServeArguments)
    Serve(force_model=arguments.model, host=arguments.host, port=arguments.port, device=arguments.device)


if __name__ == "__main__":
    run(main)
