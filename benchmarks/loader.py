"""How fast rows are made from the prepared shards, against the obvious way and against the training step they feed.

    python -m benchmarks.loader [--data out/demo/data/pretrain] [--tokenizer out/demo/tokenizer]

The obvious way encodes with the Hugging Face tokenizer, one document at a time, and scans the whole buffer for every
document it places. Both make the same rows (checked here). The step is forward and backward of a depth-4 network, 8
rows of 512; aimed at: at least 20 times the tokens per second that it eats.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from modeling_nanochat.training.data.documents import DocumentSource, open_documents, stream_documents
from modeling_nanochat.training.data.packed_rows import PackedRows
from modeling_nanochat.training.data.packing import BUFFER_SIZE, pack_with_cropping
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.tokenizer import BulkEncoder

CONTEXT, ROWS, DEPTH = 512, 8, 4
ROUNDS = 3  # interleaved, because the machine may be busy; the best of each counts


def obvious_rows(documents: Iterator[list[int]], length: int, buffer_size: int = BUFFER_SIZE) -> Iterator[list[int]]:
    """Best fit with cropping by looking at every buffered document for every one placed."""
    buffer: list[list[int]] = []
    while True:
        row: list[int] = []
        while len(row) < length:
            buffer += itertools.islice(documents, buffer_size - len(buffer))
            room, best = length - len(row), None
            for index, document in enumerate(buffer):
                if len(document) <= room and (best is None or len(document) > len(buffer[best])):
                    best = index
            if best is None:
                best = min(range(len(buffer)), key=lambda index: len(buffer[index]))
            row += buffer.pop(best)[:room]
        yield row


def tokens_per_second(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    tokens = work()
    return tokens / (time.perf_counter() - start)


def texts(source: DocumentSource, count: int) -> list[str]:
    return [text for text, _ in itertools.islice(stream_documents(source, "train"), count)]


def step_rate(vocabulary: int, steps: int = 2) -> float:
    """Tokens per second of forward and backward of the network the loader is to feed."""
    torch.manual_seed(0)
    config = NanoChatGPTConfig.from_depth(
        DEPTH, vocab_size=vocabulary, head_dim=64, max_position_embeddings=CONTEXT, window_pattern="SSSL"
    )
    model = NanoChatGPTForCausalLM(config)
    ids = torch.randint(0, vocabulary, (ROWS, CONTEXT + 1))  # (B, T + 1)

    def work() -> int:
        for _ in range(steps):
            model(input_ids=ids[:, :-1], labels=ids[:, 1:], shift_labels=ids[:, 1:]).loss.backward()
        return steps * ROWS * CONTEXT

    work()
    return tokens_per_second(work)


def measure(source: DocumentSource, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[float]]:
    """Tokens per second of each way of doing each part, in every round."""
    encode, sample = BulkEncoder(tokenizer), texts(source, 2000)
    documents = [[tokenizer.bos_token_id, *encode_text(tokenizer, text)] for text in sample]
    assert all(encode(text).tolist() == document for text, document in zip(sample, documents, strict=True))
    row_length, rows = CONTEXT + 1, 300

    def pack(packing: Callable) -> int:
        return sum(len(row) for row in itertools.islice(packing(itertools.cycle(documents), row_length), rows))

    def obvious_loader() -> int:
        endless = (
            [tokenizer.bos_token_id, *encode_text(tokenizer, text)] for text, _ in stream_documents(source, "train")
        )
        return sum(len(row) for row in itertools.islice(obvious_rows(endless, row_length), rows))

    def loader() -> int:
        open_stream = lambda stream, streams: PackedRows(source, tokenizer, row_length)  # noqa: E731
        batches = iter(RowLoader(open_stream, ROWS, CONTEXT))
        return sum(batch["input_ids"].numel() for batch in itertools.islice(batches, 4 * rows // ROWS))

    ours, obvious = (packing(itertools.cycle(documents), row_length) for packing in (pack_with_cropping, obvious_rows))
    assert all(next(ours).tolist() == next(obvious) for _ in range(50))
    ways: dict[str, Callable[[], int]] = {
        "encoding: Hugging Face": lambda: sum(len(encode_text(tokenizer, text)) for text in sample),
        "encoding: bulk": lambda: sum(len(encode(text)) for text in sample),
        "packing: scan": lambda: pack(obvious_rows),
        "packing: index": lambda: pack(pack_with_cropping),
        "loader: obvious": obvious_loader,
        "loader: ours": loader,
    }
    rates: dict[str, list[float]] = {name: [] for name in [*ways, "depth-4 step"]}
    for _ in range(ROUNDS):
        for name, work in ways.items():
            rates[name].append(tokens_per_second(work))
        rates["depth-4 step"].append(step_rate(len(tokenizer)))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="out/demo/data/pretrain", help="prepared shards, or any other documents")
    parser.add_argument("--tokenizer", default="out/demo/tokenizer", help="folder of the tokenizer")
    arguments = parser.parse_args()
    if not Path(arguments.tokenizer).exists():
        raise ValueError(f"{arguments.tokenizer} does not exist: run `make demo` first, or name a tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    rates = measure(open_documents(arguments.data), tokenizer)
    print(f"{'best of ' + str(ROUNDS):26}{'tokens/s':>14}")
    for name, rounds in rates.items():
        print(f"{name:26}{max(rounds):>14,.0f}")
    best = {name: max(rounds) for name, rounds in rates.items()}
    print(f"loader / obvious loader: {best['loader: ours'] / best['loader: obvious']:.1f}x")
    print(f"loader / depth-4 step: {best['loader: ours'] / best['depth-4 step']:.0f}x (aim: 20x)")


if __name__ == "__main__":
    main()
