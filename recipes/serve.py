"""Serves a checkpoint over HTTP with OpenAI's API, through Transformers' own server.

    nanochat serve --model out/demo/rl
    transformers chat out/demo/rl http://localhost:8000      # in another terminal, or any client of OpenAI's API

`transformers serve` looks a checkpoint's class up by name in the library, so that it finds this one only in a process
that has imported `modeling_nanochat`: this module does, and starts the same server. Here the network also has its
calculator: the server hands the tokenizer to every `generate`, which is all the processor needs. An answer shows what
the calculator said, not what it was asked; the cost is one look at every token on its way out.
"""

from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager
from transformers.generation.streamers import BaseStreamer

from modeling_nanochat import NanoChatGPTForCausalLM
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.tokenization_nanochat_gpt import PYTHON_END, PYTHON_START
from modeling_nanochat.tool_use import CalculatorLogitsProcessor


@dataclass
class ServeArguments:
    """What is served, and where."""

    model: str = field(default="out/demo/rl", metadata={"help": "Checkpoint: a folder or a repository on the Hub."})
    host: str = field(default="localhost", metadata={"help": "Address to listen on; 0.0.0.0 for every interface."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    device: str = field(default="auto", metadata={"help": "Where it runs: auto, cpu, cuda:0, ..."})


class CallFilter:
    """Tells which tokens of a generation a reader is to see: not an expression handed to the calculator."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.start, self.end = tokenizer.convert_tokens_to_ids([PYTHON_START, PYTHON_END])
        self.inside = False

    def shows(self, token: int) -> bool:
        was_inside, self.inside = self.inside, token == self.start or (self.inside and token != self.end)
        return not (was_inside or self.inside)


class FilteredStreamer(BaseStreamer):
    """Hands the prompt, and after it the tokens to be seen, to the server's streamer."""

    def __init__(self, streamer: BaseStreamer, calls: CallFilter):
        self.streamer, self.calls = streamer, calls
        self.prompt_is_through = False

    def put(self, value: torch.Tensor) -> None:
        """One row: first the whole prompt, then (1,) tokens."""
        if not self.prompt_is_through or self.calls.shows(value.item()):
            self.streamer.put(value)
        self.prompt_is_through = True

    def end(self) -> None:
        self.streamer.end()


class ServedNanoChatGPT(NanoChatGPTForCausalLM):
    """The network as the server generates with it: one row at a time, the tokenizer always given."""

    def generate(self, input_ids, *, tokenizer, streamer=None, **kwargs) -> torch.Tensor:
        """(1, T) prompt -> (1, T + new) without the calculator's expressions."""
        sequences = super().generate(
            input_ids,
            tokenizer=tokenizer,
            streamer=FilteredStreamer(streamer, CallFilter(tokenizer)) if streamer else None,
            logits_processor=LogitsProcessorList([CalculatorLogitsProcessor(tokenizer)]),
            **kwargs,
        )
        calls = CallFilter(tokenizer)
        prompt, answer = sequences.split([input_ids.shape[1], sequences.shape[1] - input_ids.shape[1]], dim=1)
        return torch.cat([prompt, answer[:, [calls.shows(token) for token in answer[0].tolist()]]], dim=1)


def main() -> None:
    (arguments,) = parse(ServeArguments)
    model_manager.transformers.NanoChatGPTForCausalLM = ServedNanoChatGPT  # where the server looks the class up
    Serve(force_model=arguments.model, host=arguments.host, port=arguments.port, device=arguments.device)


if __name__ == "__main__":
    run(main)
