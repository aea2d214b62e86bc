"""Copies of training text that lie in the validation shard are counted, exact ones, edited ones and parts alike."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_nanochat.training.data.documents import open_documents
from modeling_nanochat.training.data.near_duplicates import WORDS, find_near_duplicates, sequences_of

RNG = random.Random(0)


def document(words: int = 200) -> str:
    return " ".join(str(RNG.randrange(10_000)) for _ in range(words))


def edited(text: str, every: int) -> str:
    """The text with each so manieth word replaced."""
    return " ".join("edited" if number % every == every - 1 else word for number, word in enumerate(text.split()))


def twin(documents: list[str], training: list[str]) -> int:
    """The obvious count, with sets of tuples."""

    def sequences(text: str) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)]

    seen = {each for text in training for each in sequences(text)}
    return sum(2 * sum(each in seen for each in sequences(text)) > len(sequences(text)) for text in documents)


@pytest.mark.parametrize("shards", [1, 3])
def test_planted_copies_are_counted(tmp_path, shards):
    training = [document() for _ in range(299)]
    planted = [
        training[3],  # a copy
        training[5] + " and one more sentence at its end",
        edited(training[7], 40),  # 13 of each 40 sequences are spoilt
        " ".join(training[9].split()[:120]) + " " + document(60),  # more than half of it
    ]
    different = [edited(training[11], 20), " ".join(training[13].split()[:60]) + " " + document(120), document()]
    if shards == 1:  # every hundredth document is validation
        training[0], training[100], training[200] = planted[0], planted[2], different[0]
        training += [training[3]]
        planted, different, parts = planted[:1] + planted[2:3], different[:1], [training]
    else:
        parts = [training[:150], training[150:], [*planted, *different, "too short to be compared", ""]]
    for number, texts in enumerate(parts):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"shard_{number}.parquet", row_group_size=1000)
    found = find_near_duplicates(open_documents(str(tmp_path)))
    held_out = (0, 100, 200) if shards == 1 else ()
    read = [text for number, text in enumerate(training) if number not in held_out]
    assert found.nearly_in_training == len(planted) == twin([*planted, *different], read)
    assert found.compared == len(planted) + len(different) and found.too_short == (shards == 3)
    assert f"{len(planted)} of {found.compared} validation documents" in str(found)
    assert find_near_duplicates(open_documents(str(tmp_path)), training_characters=0).nearly_in_training == 0


def test_the_order_of_words_counts():
    words = document(WORDS).split()
    forwards, backwards = sequences_of(" ".join(words)), sequences_of(" ".join(reversed(words)))
    assert len(forwards) == len(backwards) == 1 and forwards != backwards
    assert len(sequences_of(" ".join(words[1:]))) == 0
