"""Users' own files of documents: what is wrong with one is said with file and row, and changed ones are known."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_nanochat.training.data.documents import open_documents, stream_documents
from modeling_nanochat.training.data.row_source import RowSource
from modeling_nanochat.training.data.shard_files import changed_documents, find_files
from modeling_nanochat.training.tokenizer import train_tokenizer


def read_all(name) -> list[str]:
    return [text for text, _ in stream_documents(open_documents(str(name)), "validation")]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines("one") + b'{"text": "caf\xe9"}\n', r"a.jsonl:2 is not UTF-8 \(byte 0xe9"),
        ("a.txt", b"one\nLatin-1: \xfc\n", r"a.txt:2 is not UTF-8 \(byte 0xfc"),
        ("a.jsonl", lines("one", "two") + b'{"text": "cut\n', r"a.jsonl:3 is no JSON \(.*got '\{\"text\": \"cut'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1 holds half a surrogate pair"),
        ("a.jsonl", b'{"text": 5}\n{"text": 6}\n', r"row 0 of shard 0 of .*a.jsonl holds 5 in column 'text'"),
        ("a.jsonl", b'{"body": "one"}\n', r"has no text column 'text', only \['body'\]"),
        ("a.jsonl", b"", r"a.jsonl is empty"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path / name)


def test_a_first_row_without_text_is_no_missing_column(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": null}\n' + lines(*map(str, range(200))))
    assert read_all(tmp_path / "a.jsonl")  # every hundredth of a single shard


def test_packed_files_are_read_and_companions_of_macos_are_not(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("one", "two")))
    (tmp_path / "b.jsonl").write_bytes(lines("three"))
    (tmp_path / "._b.jsonl").write_bytes(b"\x00\x05\x16\x07")
    assert [file.name for file in find_files([str(tmp_path)])] == ["a.jsonl.gz", "b.jsonl"]
    assert read_all(tmp_path) == ["three"]


def test_a_link_that_points_nowhere_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"b.jsonl is a link to .*gone.jsonl, which is not there"):
        open_documents(str(tmp_path))


def test_validation_is_not_a_copy_of_what_is_trained_on(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines("one", "two"))
    with pytest.raises(ValueError, match=r"b.jsonl, the last shard .* is the same as .*a.jsonl"):
        open_documents(str(tmp_path))


@pytest.mark.parametrize("change", ["replaced", "removed", "added", "shortened"])
def test_a_run_does_not_go_on_in_other_documents(tmp_path, change):
    def write(number: int, texts: list[str]) -> None:
        pq.write_table(pa.table({"text": texts}), tmp_path / f"shard_{number}.parquet")

    texts = [[f"the king of {number} sees {n * 7919 % 1000} silver rivers" for n in range(40)] for number in range(3)]
    for number, documents in enumerate(texts):
        write(number, documents)
    tokenizer = train_tokenizer([text for documents in texts for text in documents], 320)
    loader = RowSource(open_documents(str(tmp_path)), tokenizer, 16).training(2)
    next(iter(loader))
    (tmp_path / "checkpoint").mkdir()
    loader.save(tmp_path / "checkpoint")
    {
        "replaced": lambda: write(1, [text.upper() for text in texts[1]]),
        "removed": (tmp_path / "shard_0.parquet").unlink,
        "added": lambda: write(3, ["one more"]),
        "shortened": lambda: write(1, texts[1][:20]),
    }[change]()
    resumed = RowSource(open_documents(str(tmp_path)), tokenizer, 16).training(2)
    resumed.load(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"not those that the run began with \((missing|new|changed): shard_"):
        next(iter(resumed))
    assert changed_documents({"a": "1"}, {"a": "1"}) is None
