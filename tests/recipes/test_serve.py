"""`nanochat serve`, asked over HTTP as any client of OpenAI's API would, and by `transformers chat`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, render_conversation
from modeling_nanochat.inference import chat_generation_config
from modeling_nanochat.training.tokenizer import tokenizer_from_ranks

ROOT = Path(__file__).parents[2]
CHAT = "from transformers.cli.transformers import app; app()"
QUESTION = "What is 12 + 30?"
MESSAGES = [
    {"role": "user", "content": QUESTION},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "It is "},
            {"type": "python", "text": "12+30"},
            {"type": "python_output", "text": "42"},
            {"type": "text", "text": ", I think."},
        ],
    },
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny network that has learnt one conversation by heart, up to the calculator's answer."""
    folder = tmp_path_factory.mktemp("serve") / "checkpoint"
    ranks = {bytes([byte]): byte for byte in range(256)}
    letters = [bytes([a, b]) for a in range(97, 105) for b in range(97, 105)]
    tokenizer = tokenizer_from_ranks(ranks | {pair: 256 + i for i, pair in enumerate(letters[:55])})
    ids, mask = (torch.tensor([row]) for row in render_conversation(tokenizer, MESSAGES))
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(2, head_dim=32, vocab_size=len(tokenizer), max_position_embeddings=256)
    model = NanoChatGPTForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.generation_config = chat_generation_config(tokenizer, config.max_position_embeddings)
    model.generation_config.update(do_sample=False, temperature=None, top_k=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def server(folder: Path):
    """Runs `nanochat serve` until the block ends; gives its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "modeling_nanochat.recipes.serve",
        "--model",
        str(folder),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    log = folder.parent / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while not answers(f"http://localhost:{port}/health"):
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=60).close()
    except OSError:
        return False
    return True


def ask(address: str, **options) -> list[str]:
    """Lines of the answer to QUESTION."""
    body = {"model": options.pop("model"), "messages": MESSAGES[:1], **options}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode().splitlines()


@pytest.mark.slow
def test_an_answer_comes_through_the_calculator(checkpoint):
    model = str(checkpoint)
    with server(checkpoint) as address:
        answer = json.loads(ask(address, model=model)[0])["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == ("It is 12+30 = 42, I think.", "stop")
        events = [line.removeprefix("data: ") for line in ask(address, model=model, stream=True) if line]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events if event != "[DONE]"]
        assert "".join(delta.get("content") or "" for delta in deltas) == "It is 12+30 = 42, I think."
        chat = subprocess.run(  # `transformers chat`, without the look for a newer version that its main begins with
            [sys.executable, "-c", CHAT, "chat", model, address, "do_sample=False"],
            input=f"{QUESTION}\n!exit\n",
            env=os.environ | {"HF_HUB_OFFLINE": "0", "COLUMNS": "200"},  # the client counts localhost as the network
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert "It is 12+30 = 42, I think." in chat.stdout, chat.stdout + chat.stderr
