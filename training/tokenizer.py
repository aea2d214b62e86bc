"""Text to tokenizer: byte-level BPE learnt by rustbpe, saved as a plain Hugging Face fast tokenizer.

rustbpe learns the merges (about three times as fast as the `tokenizers` trainer). Its table of byte strings and ranks
becomes an ordinary `tokenizer.json`, so the result loads everywhere without this package or trusted code. The nine
special tokens take the last ids, and the size is a multiple of 64 so that no matrix of the model needs padding.

What `skip_special_tokens` leaves of an answer has to read well, and two numbers side by side do not: `12 + 3042`. So
`<|output_start|>` is an added token that is not special, and survives; the decoder then writes it as ` = `, while the
whole text with all its marks stays as it is. The price: it alone is not split by `split_special_tokens`, so untrusted
text has to go through `encode_text`.

The same table also gives a tiktoken encoding with equal ids, several times as fast as the Hugging Face one: the bulk
encoder of pretraining. The price is a second implementation to trust; the tests hold the two equal on adversarial text.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import modeling_nanochat
from modeling_nanochat.tokenization_nanochat_gpt import (
    ASSISTANT_END,
    BOS,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
)

BYTES = 256  # every byte is a token of its own, so any text can be encoded
VOCABULARY_MULTIPLE = 64  # matrix dimensions that tensor cores take without padding (upstream pads to the same)
MAX_CHARACTERS = 2_000_000_000  # upstream's amounts: more text does not change the merges noticeably,
MAX_DOCUMENT_CHARACTERS = 10_000  # and a few huge documents must not dominate them
# What decoding writes for `<|output_start|>` until it sees whether its neighbours were skipped: Unicode's
# non-characters, which no text holds.
PLACEHOLDER = "\ufdd0=\ufdd1"
ALONE = f"(?<!{re.escape(PYTHON_END)}){PLACEHOLDER}(?![^<]*{re.escape(OUTPUT_END)})"
CHAT_TEMPLATE = Path(modeling_nanochat.__file__).with_name("chat_template.jinja")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_characters: int = MAX_CHARACTERS,
    max_document_characters: int = MAX_DOCUMENT_CHARACTERS,
    model_max_length: int = 2048,
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE tokenizer of `vocab_size` tokens, special tokens included.

    Raises:
        ValueError: `vocab_size` is no multiple of 64 or too small, or the text is too short to give that many merges.
    """
    smallest = -(-(BYTES + len(SPECIAL_TOKENS)) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if vocab_size < smallest or vocab_size % VOCABULARY_MULTIPLE:
        raise ValueError(f"vocab_size must be a multiple of {VOCABULARY_MULTIPLE}, at least {smallest}: {vocab_size}")
    learnt = rustbpe.Tokenizer()
    documents = limit_characters(texts, max_characters, max_document_characters)
    learnt.train_from_iterator(documents, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in learnt.get_mergeable_ranks()}
    if len(ranks) != vocab_size - len(SPECIAL_TOKENS):
        raise ValueError(
            f"the text is too short for {vocab_size} tokens: it gives {len(ranks) + len(SPECIAL_TOKENS)}; "
            "train on more text or ask for a smaller vocab_size"
        )
    return tokenizer_from_ranks(ranks, model_max_length=model_max_length)


def limit_characters(texts: Iterable[str], total: int, per_document: int) -> Iterator[str]:
    """The beginnings of the texts, until `total` characters have been given."""
    for text in texts:
        text = text[: min(per_document, total)]
        total -= len(text)
        yield text
        if total <= 0:
            return


def tokenizer_from_ranks(
    ranks: dict[bytes, int], *, pattern: str = SPLIT_PATTERN, model_max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with exactly the ids that tiktoken gives for `ranks` (token bytes -> id), specials last."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"ranks must number the {len(ranks)} tokens from 0 without gaps")
    letters = bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = merge_of(token, rank, ranks)
            merges.append((spelled[left], spelled[right]))
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    # Listed here too, so that `vocab_size` counts them; no merge leads to them, so no text becomes one.
    vocabulary |= {token: len(ranks) + position for position, token in enumerate(SPECIAL_TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(OUTPUT_START, PLACEHOLDER),
            decoders.ByteLevel(),
            decoders.Replace(Regex(ALONE), " = "),
            decoders.Replace(PLACEHOLDER, OUTPUT_START),
        ]
    )
    special = [token for token in SPECIAL_TOKENS if token != OUTPUT_START]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(OUTPUT_START, special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=ASSISTANT_END,
        pad_token=BOS,
        extra_special_tokens=[token for token in special if token not in (BOS, ASSISTANT_END)],
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )


def merge_of(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made `token`: byte pair encoding of it with only the merges learnt earlier.

    One pair per token is enough for equal ids: merges inside a stretch of text do not depend on what surrounds it, so
    a token always comes about through the same last pair.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
        best = min(range(len(candidates)), key=candidates.__getitem__)
        if candidates[best] >= rank:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    if len(parts) != 2:
        raise ValueError(f"token {token!r} (rank {rank}) is not the merge of two tokens of lower rank, but of {parts}")
    return parts[0], parts[1]


def tiktoken_encoding(tokenizer: PreTrainedTokenizerBase) -> tiktoken.Encoding:
    """A tiktoken encoding with the ids of `tokenizer`, for encoding in bulk (`encode_ordinary_batch`).

    Raises:
        ValueError: the tokenizer is not a byte-level BPE with a pre-split pattern, as `tokenizer_from_ranks` builds.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = (description["pre_tokenizer"] or {}).get("pretokenizers", [])
    patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split" and "Regex" in step["pattern"]]
    if description["model"]["type"] != "BPE" or len(patterns) != 1 or description["normalizer"] is not None:
        raise ValueError(f"no tiktoken equivalent is known for a tokenizer of this form: {type(tokenizer).__name__}")
    special = {token["content"]: token["id"] for token in description["added_tokens"]}
    codes = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = {
        bytes(codes[letter] for letter in token): index
        for token, index in description["model"]["vocab"].items()
        if token not in special
    }
    return tiktoken.Encoding("nanochat_gpt", pat_str=patterns[0], mergeable_ranks=ranks, special_tokens=special)


class BulkEncoder:
    """Documents to int32 ids with BOS in front; equal to `[bos, *encode_text(...)]`, several times as fast.

    A long document is encoded in pieces by several threads: a quarter of a second of one core for a million characters.
    It is cut where `SPLIT_PATTERN` splits whatever stands around: before a blank after something that is none, and
    between a line's end and what begins the next one. So the ids are those of the whole; text of other patterns, or
    with no such place, stays whole.

    tiktoken's regular expression overflows its stack somewhere above half a million blanks in a row, which would end a
    run, so longer runs of blanks are encoded in pieces (the text stays the same; a token at the seam may differ).
    """

    LONGEST_BLANK = 100_000
    LONGEST_PIECE = 1_000_000  # characters, and on to the next seam
    SEAM = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=\S)")

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.encoding = tiktoken_encoding(tokenizer)
        self.bos = tokenizer.bos_token_id

    def __call__(self, text: str) -> np.ndarray:
        pieces = [text] if len(text) <= min(self.LONGEST_BLANK, self.LONGEST_PIECE) else self._pieces(text)
        if len(pieces) == 1:
            ids = [self._encode(text)]
        else:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                ids = list(threads.map(self._encode, pieces))
        return np.concatenate([[self.bos], *ids], dtype=np.int32, casting="unsafe")

    def _encode(self, piece: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(piece, disallowed_special=())

    def _pieces(self, text: str) -> list[str]:
        cuts = set(self._seams(text))
        for blank in re.finditer(rf"\s{{{self.LONGEST_BLANK},}}", text):
            cuts |= set(range(blank.start() + self.LONGEST_BLANK, blank.end(), self.LONGEST_BLANK))
        return [text[start:end] for start, end in itertools.pairwise([0, *sorted(cuts), len(text)])]

    def _seams(self, text: str) -> Iterator[int]:
        if self.encoding._pat_str != SPLIT_PATTERN:
            return
        position = 0
        while (seam := self.SEAM.search(text, position + self.LONGEST_PIECE)) is not None:
            yield (position := seam.start())
