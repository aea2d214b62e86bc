"""What `nanochat evaluate` measures, measured while training: in SFT's log, and by two ranks with sharded weights."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.core import make_bundle
from modeling_nanochat.eval.tasks import arithmetic
from modeling_nanochat.recipes import sft
from modeling_nanochat.recipes.evaluation.arguments import OnTheWayArguments
from modeling_nanochat.recipes.evaluation.on_the_way import measured_on_the_way
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.recipes.stages.record import read_stage
from modeling_nanochat.tokenization_nanochat_gpt import message_text
from modeling_nanochat.training.ranks import gather, is_sharded, over_ranks
from modeling_nanochat.training.tokenizer import train_tokenizer
from tests.ranks import run_two_ranks
from tests.toys import drawn_model, zero_matrices

TASKS = ["core", "bits_per_byte", "multiple_choice", "problems"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A tiny model, conversations, and what the tasks ask."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("on_the_way")
    problems = list(itertools.islice(arithmetic.generate(0), 600))
    texts = [" ".join(message_text(message["content"]) for message in row["messages"]) for row in problems]
    (folder / "data" / "pretrain").mkdir(parents=True)
    for shard in range(2):
        pq.write_table(pa.table({"text": texts[shard::2]}), folder / "data" / "pretrain" / f"shard_{shard:05d}.parquet")
    questions = [{"question": f"{a}?", "choices": ["odd", "even"], "answer": a % 2, "source": "sums"} for a in range(6)]
    for name, rows in (
        ("rl/validation", problems[:4]),
        ("eval/multiple_choice", questions),
        ("sft/train", problems[:60]),
        ("sft/validation", problems[60:70]),
    ):
        file = folder / "data" / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_bundle(folder / "bundle")
    tokenizer = train_tokenizer(texts, 512)
    model = drawn_model(2, 0.2, zero_matrices, vocab_size=512, max_position_embeddings=128)
    save_checkpoint(model, tokenizer, str(folder / "base"))
    return folder


def arguments_of(folder: Path) -> OnTheWayArguments:
    return OnTheWayArguments(
        measure_tasks=TASKS, measure_data=str(folder / "data"), core_bundle=str(folder / "bundle"), measure_examples=3
    )


def measure_sharded(folder: Path) -> None:
    """What each of two ranks does: shard the model, measure, and leave the figures behind."""
    state = PartialState(cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    (evaluation,) = measured_on_the_way(arguments_of(folder), tokenizer)
    dealt = evaluation.run(model, 1)
    assert over_ranks(lambda rows: [row * 2 for row in rows], list(range(5)), model) == [0, 2, 4, 6, 8]
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert is_sharded(model) and gather(state.process_index) == [0, 1]
    sharded = evaluation.run(model, 1)
    if state.is_main_process:
        (folder / "figures.json").write_text(json.dumps([dealt, sharded]))


@pytest.mark.slow
def test_ranks_with_whole_and_with_sharded_weights_measure_what_one_process_does(prepared):
    run_two_ranks(measure_sharded, prepared)
    model = AutoModelForCausalLM.from_pretrained(prepared / "base", dtype=torch.float32).eval()
    (evaluation,) = measured_on_the_way(arguments_of(prepared), AutoTokenizer.from_pretrained(prepared / "base"))
    expected = evaluation.run(model, 1)
    assert {"core_of_3_tasks_cut_to_3", "documents_bits_per_byte", "sums", "chat_core"} <= set(expected)
    for figures in json.loads((prepared / "figures.json").read_text()):
        del expected["core_examples_per_second"], figures["core_examples_per_second"]
        assert figures == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}
        expected["core_examples_per_second"] = 0.0


def test_fine_tuning_logs_what_is_measured(prepared, tmp_path, monkeypatch):
    command = [
        "sft", "--model", str(prepared / "base"), "--data", str(prepared / "data" / "sft"), "--output_dir",
        str(tmp_path / "sft"), "--measure_tasks", *TASKS, "--measure_every", "1", "--measure_data",
        str(prepared / "data"), "--core_bundle", str(prepared / "bundle"), "--measure_examples", "2",
        "--per_device_train_batch_size", "4", "--max_steps", "2", "--use_cpu", "true", "--max_length", "128",
        "--polar_dtype", "float32",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    sft.main()
    log = read_stage(tmp_path / "sft")["log_history"]
    for name in ("core_of_3_tasks_cut_to_2", "documents_bits_per_byte", "sums", "problems", "chat_core"):
        assert {line["step"] for line in log if f"eval_{name}" in line} == {1, 2}
        assert name in read_stage(tmp_path / "sft")["results"]
    monkeypatch.setattr(sys, "argv", [*command, "--measure_tasks", "nonsense", "--rerun", "true"])
    with pytest.raises(ValueError, match="expected tasks among"):
        sft.main()
