"""Documents and rows from shards: every rank its share, exact resumption, clear errors for damaged or odd sources."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from modeling_nanochat.training.data.documents import open_documents, stream_documents
from modeling_nanochat.training.data.packed_rows import PackedRows
from modeling_nanochat.training.data.packing import pack_with_cropping
from modeling_nanochat.training.tokenizer import train_tokenizer


def write_shards(folder, shards: list[list[str | None]], row_group_size: int = 5, column: str = "text") -> None:
    folder.mkdir(exist_ok=True)
    for number, texts in enumerate(shards):
        table = pa.table({column: pa.array(texts, pa.string()), "other": list(range(len(texts)))})
        pq.write_table(table, folder / f"shard_{number:05d}.parquet", row_group_size=row_group_size)


def shard_texts(shards: int = 3, size: int = 20) -> list[list[str]]:
    return [[f"shard {shard} document {number}" for number in range(size)] for shard in range(shards)]


def one_epoch(source, split="train", **options) -> list[str]:
    documents = stream_documents(source, split, **options)
    return [text for text, _ in itertools.takewhile(lambda item: item[1].epoch == 0, documents)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"shard 1 document 2 of text {__doc__}", open_documents.__doc__ * 3], 320)


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "shards", shard_texts())
    return tmp_path / "shards"


def test_last_shard_is_validation_and_training_repeats(folder):
    source = open_documents(str(folder))
    first, second, third = shard_texts()
    assert one_epoch(source, "validation") == third
    assert one_epoch(source) == first + second
    twice = itertools.islice(stream_documents(source, "train"), 80)
    assert [text for text, _ in twice] == 2 * (first + second)


@pytest.mark.parametrize("num_streams", [2, 3, 8, 13])
def test_streams_share_the_documents(folder, num_streams):
    source = open_documents(str(folder / "*.parquet"))
    shares = [one_epoch(source, stream=stream, num_streams=num_streams) for stream in range(num_streams)]
    assert all(shares)
    assert sorted(itertools.chain(*shares)) == sorted(itertools.chain(*shard_texts()[:2]))
    row_groups = 8
    if num_streams <= row_groups:  # whole row groups
        assert all(len(share) % 5 == 0 for share in shares)


@pytest.mark.parametrize("stream", [0, 1])
def test_any_position_continues_with_the_next_document(folder, stream):
    source = open_documents([str(folder)])
    documents = list(itertools.islice(stream_documents(source, "train", stream=stream, num_streams=2), 60))
    for taken, (_, position) in enumerate(documents, 1):
        rest = stream_documents(source, "train", stream=stream, num_streams=2, position=position)
        assert list(itertools.islice(rest, 60 - taken)) == documents[taken:]


@pytest.mark.parametrize("row_group_size", [1000, 30])
def test_a_single_shard_holds_out_every_hundredth_document(tmp_path, row_group_size):
    texts = [f"document {number}" for number in range(330)]
    write_shards(tmp_path, [texts], row_group_size)
    source = open_documents(str(tmp_path))
    training, validation = one_epoch(source), one_epoch(source, "validation")
    assert 3 <= len(validation) <= 4
    assert sorted(training + validation) == sorted(texts)
    shares = [one_epoch(source, stream=stream, num_streams=20) for stream in range(20)]
    assert sorted(itertools.chain(*shares)) == sorted(training)


def test_json_lines_and_text_stream_like_parquet(tmp_path):
    for number, texts in enumerate(shard_texts()):
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
        (tmp_path / f"part{number}.jsonl").write_text(lines)
    source = open_documents(str(tmp_path / "*.jsonl"), "body")
    first, second, third = shard_texts()
    assert one_epoch(source) == first + second and one_epoch(source, "validation") == third
    documents = list(itertools.islice(stream_documents(source, "train"), 50))
    rest = stream_documents(source, "train", position=documents[29][1])
    assert list(itertools.islice(rest, 20)) == documents[30:]
    with pytest.raises(ValueError, match=r"no text column 'text', only .'body'."):
        open_documents(str(tmp_path))


def test_empty_and_missing_documents_are_passed_over(tmp_path):
    write_shards(tmp_path, [["a", "", None, "b"], ["c"]])
    assert one_epoch(open_documents(str(tmp_path))) == ["a", "b"]
    write_shards(tmp_path / "empty", [["", None], ["c"]])
    with pytest.raises(ValueError, match=r"no document with text"):
        next(stream_documents(open_documents(str(tmp_path / "empty")), "train"))


def test_a_truncated_file_is_named_when_the_source_is_opened(folder):
    file = folder / "shard_00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"shard_00001.parquet is not a complete parquet file"):
        open_documents(str(folder))
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"shard_00001.parquet is not a complete parquet file"):
        open_documents(str(folder))


def test_damaged_data_is_named_when_it_is_read(folder):
    file = folder / "shard_00000.parquet"
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396  # the first pages; the footer stays whole
    file.write_bytes(content)
    source = open_documents(str(folder))
    with pytest.raises(ValueError, match=r"row group 0 of .*shard_00000.parquet is damaged"):
        next(stream_documents(source, "train"))


def test_columns_are_checked(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no column 'content', only .'text', 'other'.; set text_column"):
        open_documents(str(folder), "content")
    with pytest.raises(ValueError, match=r"must hold text, not int64"):
        open_documents(str(folder), "other")
    write_shards(tmp_path / "named", [["a"], ["b"]], column="content")
    assert one_epoch(open_documents(str(tmp_path / "named"), "content")) == ["a"]


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ValueError, match=r"no files with an ending of"):
        open_documents(str(tmp_path))
    with pytest.raises(ValueError, match=r"no files with an ending of"):
        open_documents("missing/*.parquet")
    with pytest.raises(ValueError, match=r"neither a local path nor a data set that could be opened"):
        open_documents("nobody/nothing-of-that-name")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"several formats"):
        open_documents(str(tmp_path))


def test_rows_are_documents_tokenised_and_packed(folder, tokenizer):
    source = open_documents(str(folder))
    documents = [[tokenizer.bos_token_id, *encode_text(tokenizer, text)] for text in one_epoch(source)]
    rows = PackedRows(source, tokenizer, 30, buffer_size=10)
    expected = pack_with_cropping(itertools.cycle(documents), 30, 10)
    for _ in range(40):
        row = next(rows)
        assert row.tolist() == next(expected).tolist() and row[0] == tokenizer.bos_token_id
    assert rows.stats.rows == 40 and rows.stats.utilisation == 1.0 and 0 < rows.stats.cropped_share < 1
    validation = PackedRows(source, tokenizer, 30, split="validation")
    assert len(list(validation)) == validation.stats.rows > 0


@pytest.mark.parametrize("rows_before", [0, 1, 50])
def test_saved_rows_continue_exactly(folder, tokenizer, tmp_path, rows_before):
    def open_rows():
        return PackedRows(open_documents(str(folder)), tokenizer, 25, stream=1, num_streams=3, buffer_size=7)

    rows = open_rows()
    for _ in range(rows_before):
        next(rows)
    torch.save(rows.state_dict(), tmp_path / "rows.pt")
    resumed = open_rows()
    resumed.load_state_dict(torch.load(tmp_path / "rows.pt", weights_only=True))
    for _ in range(60):
        assert next(resumed).tolist() == next(rows).tolist()
    assert resumed.stats == rows.stats


def test_a_document_of_ten_megabytes(tmp_path, tokenizer):
    """A row shows its beginning; its whole length is known, by which the packer chooses, and counted."""
    write_shards(tmp_path, [["a document of text " * 550_000], ["document"]])
    rows = PackedRows(open_documents(str(tmp_path)), tokenizer, 64, buffer_size=1)
    assert tokenizer.decode(next(rows)).startswith("<|bos|>a document of text a document")
    tokens_each = len(rows.encode("a document of text " * 1000)) / 1000
    assert rows.stats.cropped_tokens == pytest.approx(tokens_each * 550_000, rel=1e-3)
    assert rows.state_dict()["packer"]["tokens"].numel() <= 64
