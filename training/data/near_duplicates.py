"""How much of the validation text is trained on, word for word: documents that share sequences of words.

A validation set that repeats its training text flatters the run. Documents are compared by their sequences of 13 words,
the length that GPT-3's authors took for the same question (arXiv 2005.14165, appendix C): chance hardly repeats one.
A document of which more than half of them occur in the training text is nearly in it. Only a sample is read, the first
documents of each split: some seconds, which on a large corpus find only the copies that lie there. Words are what
blanks divide, so text that is written without them is not compared, and is counted as such.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from modeling_nanochat.training.data.documents import DocumentSource, stream_documents

WORDS = 13
SHARED = 0.5  # of a document's sequences: above it, the document is nearly in the training text
VALIDATION_DOCUMENTS = 1000
TRAINING_CHARACTERS = 30_000_000  # all of the embedded text; about five seconds of one core
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers of it never vanish: 2^64 over the golden ratio


@dataclass(frozen=True)
class Overlap:
    """What was compared and what was found; `nearly_in_training` counts documents of `compared`."""

    compared: int
    too_short: int
    nearly_in_training: int
    training_characters: int

    @property
    def share(self) -> float:
        return self.nearly_in_training / max(self.compared, 1)

    def __str__(self) -> str:
        short = f"; {self.too_short} of fewer than {WORDS} words were not compared" if self.too_short else ""
        return (
            f"{self.nearly_in_training} of {self.compared} validation documents ({self.share:.1%}) share more than "
            f"half of their sequences of {WORDS} words with the training text, of which the first "
            f"{self.training_characters / 1e6:.3g} M characters were read{short}"
        )


def find_near_duplicates(
    source: DocumentSource,
    validation_documents: int = VALIDATION_DOCUMENTS,
    training_characters: int = TRAINING_CHARACTERS,
) -> Overlap:
    """Compare the first documents of validation with the beginning of the training text."""
    validation = []
    for text in first_documents(source, "validation"):
        validation.append(sequences_of(text))
        if len(validation) == validation_documents:
            break
    compared = [hashes for hashes in validation if len(hashes)]
    wanted = np.unique(np.concatenate(compared)) if compared else np.empty(0, np.uint64)
    may_be = np.zeros(1 << 24, bool)  # by a hash's first 24 bits: spares nearly all sequences the search
    may_be[wanted >> np.uint64(40)] = True
    found, read = np.zeros(len(wanted), bool), 0
    for text in first_documents(source, "train"):
        if read >= training_characters or not compared:
            break
        read += len(text)
        hashes = sequences_of(text)
        hashes = hashes[may_be[hashes >> np.uint64(40)]]
        places = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
        found[places[wanted[places] == hashes]] = True
    shares = [found[np.searchsorted(wanted, hashes)].mean() for hashes in compared]
    nearly = sum(bool(share > SHARED) for share in shares)
    return Overlap(len(compared), len(validation) - len(compared), nearly, read)


def first_documents(source: DocumentSource, split: str) -> Iterator[str]:
    """The documents of a split, once, whatever the number of ranks."""
    return (text for text, _ in takewhile(lambda item: item[1].epoch == 0, stream_documents(source, split)))


def sequences_of(text: str) -> np.ndarray:
    """A 64-bit hash of each sequence of `WORDS` words, in order; none if there are fewer. Equal within a process."""
    words = text.split()
    if len(words) < WORDS:
        return np.empty(0, np.uint64)
    ids = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    hashes = np.zeros(len(words) - WORDS + 1, np.uint64)
    for place in range(WORDS):  # a polynomial in FACTOR, modulo 2^64
        hashes = hashes * FACTOR + ids[place : place + len(hashes)]
    return hashes
