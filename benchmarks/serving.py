"""The server under many clients: throughput and waits of 200 at once against one at a time, and a soak.

    python -m benchmarks.serving [--clients 200] [--requests 1] [--tokens 64] [--depth 4] [--vocab_size 4096]
    python -m benchmarks.serving --soak 600

An untrained network (which does not stop by itself) is served by `nanochat serve` in a process of its own; clients are
bare connections in this one, and ask for streams with prompts of 20 to 120 tokens. The rounds of one client at a time
and of all at once take turns, as the machine may be busy; the ratio counts. Aimed at: none lost, 5 times the tokens a
second. Tokens for each second of the server's processor time stand beside, which other work on the machine disturbs
less.

The soak has clients that take whole answers and streams, leave in the middle or while they wait, and send nonsense;
each minute it prints what the server holds: rows, waiting requests, open files, threads, memory. At the end, when all
have gone, the first four must be what they were at the start, and memory no more than after the first minute by a
tenth.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.training.tokenizer import tokenizer_from_ranks

ROUNDS = 3
ALONE = 12  # requests of the client that is alone, a round
CONTEXT = 512
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass
class Reply:
    """One request's fate, in seconds from its sending."""

    status: int
    first: float = 0.0  # until the first token
    last: float = 0.0
    tokens: int = 0


@dataclass
class Outcome:
    """What became of the soak's requests."""

    answered: int = 0
    left: int = 0
    refused: int = 0  # nonsense, or too many waiting: told so
    lost: int = 0
    kinds_lost: list[str] = field(default_factory=list)


def write_checkpoint(folder: Path, depth: int, vocab_size: int) -> None:
    """A network with every weight drawn and a tokenizer of bytes and pairs of letters."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pairs = [(a + b).encode() for a in ALPHABET for b in ALPHABET]
    missing = vocab_size - 256 - 9
    if not 0 <= missing <= len(pairs):
        raise ValueError(f"vocab_size is {vocab_size}, expected {256 + 9} to {256 + 9 + len(pairs)}")
    tokenizer = tokenizer_from_ranks(ranks | {pair: 256 + i for i, pair in enumerate(pairs[:missing])})
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        depth, vocab_size=len(tokenizer), head_dim=64, max_position_embeddings=CONTEXT
    )
    save_checkpoint(NanoChatGPTForCausalLM(config), tokenizer, str(folder))


@contextmanager
def serving(arguments: argparse.Namespace, *options: str) -> Iterator[tuple[int, int]]:
    """A server; gives its process and port."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), arguments.depth, arguments.vocab_size)
        command = [sys.executable, "-m", "modeling_nanochat.recipes.serve", "--model", folder, "--port", "0", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                line = next((line for line in process.stdout if "is served" in line), "")
                yield process.pid, int(re.search(r":(\d+)/v1", line)[1])
            finally:
                process.terminate()


def body_of(generator: random.Random, tokens: int, **settings) -> bytes:
    text = "".join(generator.choices(ALPHABET + " ", k=generator.randrange(30, 200)))
    question = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 1, "top_k": 0}
    return json.dumps(question | settings).encode()


async def post(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


async def ask(port: int, body: bytes, events: int | None = None) -> Reply:
    """Sends a request and reads the stream to its end, or so many of its events."""
    start = time.perf_counter()
    reader, writer = await post(port, body)
    try:
        status = int((await reader.readline()).split()[1])
        reply = Reply(status)
        while line := await reader.readline():
            if not line.startswith((b"data: ", b"{")):
                continue
            if b'"content": "' in line and b'"role"' not in line and not reply.first:
                reply.first = time.perf_counter() - start
            if found := re.search(rb'"completion_tokens": ?(\d+)', line):
                reply.tokens = int(found[1])
            events = None if events is None else events - 1
            if events == 0 or b"[DONE]" in line or (status == 200 and line.startswith(b"{")):
                break
        else:
            if status == 200:
                raise ConnectionError("the answer broke off")
        reply.last = time.perf_counter() - start
        return reply
    finally:
        await hang_up(writer)


# ---------------------------------------------------------------- throughput


Round = tuple[list[Reply], float, float]  # replies, seconds, seconds of the server's processor time


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in user and in kernel mode


def timed_clients(pid: int, *arguments: int) -> Round:
    start, before = time.perf_counter(), processor_seconds(pid)
    replies = asyncio.run(clients(*arguments))
    return replies, time.perf_counter() - start, processor_seconds(pid) - before


async def clients(port: int, count: int, requests: int, tokens: int, seed: int) -> list[Reply]:
    """Replies to so many clients at once, each asking one question after another."""

    async def client(number: int) -> list[Reply]:
        generator = random.Random(f"{seed} {number}")
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        return [await ask(port, body_of(generator, tokens, **usage)) for _ in range(requests)]

    return [reply for each in await asyncio.gather(*map(client, range(count))) for reply in each]


def describe(name: str, rounds: list[Round]) -> tuple[float, float]:
    """Prints a line; tokens a second and tokens a second of processor time, medians of the rounds."""
    replies = [reply for each, *_ in rounds for reply in each]
    rate, own_rate = (
        statistics.median(sum(reply.tokens for reply in round[0]) / round[which] for round in rounds)
        for which in (1, 2)
    )
    lost = sum(reply.status != 200 or reply.tokens == 0 for reply in replies)
    firsts, lasts = sorted(reply.first for reply in replies), sorted(reply.last for reply in replies)

    def at(values: list[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))]

    print(
        f"{name:22} {len(replies):5} answers, {lost} lost  {rate:7.0f} tokens/s  {own_rate:7.0f} a processor second"
        f"   first token p50 {at(firsts, 0.5):5.2f} s, p95 {at(firsts, 0.95):5.2f} s"
        f"   whole answer p50 {at(lasts, 0.5):5.2f} s, p95 {at(lasts, 0.95):5.2f} s",
        flush=True,
    )
    return rate, own_rate


def throughput(arguments: argparse.Namespace) -> None:
    alone, together = [], []
    with serving(arguments, "--max_waiting", str(max(256, arguments.clients))) as (pid, port):
        asyncio.run(clients(port, 8, 1, arguments.tokens, -1))  # warm-up
        for seed in range(ROUNDS):
            alone.append(timed_clients(pid, port, 1, ALONE, arguments.tokens, seed))
            together.append(timed_clients(pid, port, arguments.clients, arguments.requests, arguments.tokens, seed))
    print(f"depth {arguments.depth}, vocabulary {arguments.vocab_size}, {arguments.tokens} tokens an answer, "
          f"{torch.get_num_threads()} threads, median of {ROUNDS} rounds")  # fmt: skip
    single = describe("one at a time", alone)
    many = describe(f"{arguments.clients} clients at once", together)
    print(f"{many[0] / single[0]:.1f} times the tokens a second, {many[1] / single[1]:.1f} times a processor second")


# ---------------------------------------------------------------- soak


async def misbehave(port: int, generator: random.Random, outcome: Outcome) -> None:
    """One request of a random kind."""
    kind = generator.choice(["whole", "stream", "leave", "leave", "leave at once", "nonsense", "several"])
    tokens = generator.randrange(1, 80)
    try:
        if kind == "leave at once":
            _, writer = await post(port, body_of(generator, tokens, n=generator.randrange(1, 5)))
            await asyncio.sleep(generator.random() * 0.2)
            await hang_up(writer)
            outcome.left += 1
        elif kind == "leave":
            await ask(port, body_of(generator, 80, stream=True, n=2), events=generator.randrange(1, 20))
            outcome.left += 1
        else:
            settings = {"whole": {}, "stream": {"stream": True}, "several": {"n": 3}, "nonsense": {"n": "x"}}[kind]
            status = (await ask(port, body_of(generator, tokens, **settings))).status
            outcome.answered += status == 200
            outcome.refused += status in (422, 503)
            if status not in (200, 422, 503):
                raise ConnectionError(f"status {status}")
            if status == 503:
                await asyncio.sleep(0.5)
    except (OSError, IndexError) as error:  # IndexError: hung up on before a status came
        outcome.lost += 1
        outcome.kinds_lost.append(f"{kind}: {error!r}")


def soak(port: int, seconds: float, clients: int, generator: random.Random) -> Outcome:
    """Lets clients of every kind at the server for some time."""
    outcome = Outcome()

    async def client(own: random.Random, end: float) -> None:
        while time.monotonic() < end:
            await misbehave(port, own, outcome)

    async def all_clients() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(random.Random(generator.random()), end) for _ in range(clients)))

    asyncio.run(all_clients())
    return outcome


def holds(pid: int, port: int) -> dict[str, float]:
    """What the server has: open files, threads, megabytes, and by its own account rows and waiting requests."""

    async def metrics() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        await hang_up(writer)
        return text

    text = asyncio.run(metrics())
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "rows": float(re.search(r"^nanochat_rows_running (.*)$", text, re.M)[1]),
        "waiting": float(re.search(r"^nanochat_requests_waiting (.*)$", text, re.M)[1]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": float(re.search(r"^Threads:\s*(\d+)", status, re.M)[1]),
        "MB": int(re.search(r"^VmRSS:\s*(\d+)", status, re.M)[1]) // 1024,
    }


def long_soak(arguments: argparse.Namespace) -> None:
    generator, total = random.Random(0), Outcome()
    with serving(arguments, "--max_rows", "32", "--max_waiting", "48") as (pid, port):
        asyncio.run(clients(port, 40, 1, 20, 0))  # threads and connections that stay have been made
        time.sleep(6)  # longer than connections are kept open
        before, end, warm = holds(pid, port), time.monotonic() + arguments.soak, 0.0
        print(f"before: {before}", flush=True)
        while (left := end - time.monotonic()) > 0:
            outcome = soak(port, min(60, left), arguments.soakers, generator)
            for name, value in vars(outcome).items():
                setattr(total, name, getattr(total, name) + value)
            now = holds(pid, port)
            warm = warm or now["MB"]
            print(f"{total}  {now}", flush=True)
        time.sleep(6)
        after = holds(pid, port)
    print(f"after: {after}")
    kept = {name for name in ("rows", "waiting", "files", "threads") if after[name] != before[name]}
    if kept or after["MB"] > 1.1 * warm or total.lost:
        raise SystemExit(f"something was left behind or lost: {sorted(kept)}, {after['MB']} MB after {warm}, {total}")
    print("nothing was left behind, nothing lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of the soak instead")
    parser.add_argument("--soakers", type=int, default=80)
    arguments = parser.parse_args()
    if arguments.soak:
        long_soak(arguments)
    else:
        throughput(arguments)


if __name__ == "__main__":
    main()
