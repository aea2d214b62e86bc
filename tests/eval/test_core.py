"""CORE: the fast runner against a slow, obvious twin, on small bundles of all three kinds of tasks."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.core import slow_answer
from modeling_nanochat.eval.bits_per_byte import packed_loss
from modeling_nanochat.eval.core.bundle import LABELS, load_examples, read_tasks
from modeling_nanochat.eval.core.prompts import crop, draw_shots, gold_of, prompts_of, render
from modeling_nanochat.eval.core.scores import TaskResult, core_name, evaluate_task, summarize_core
from modeling_nanochat.eval.span_scores import Group, SpanScorer, make_batches
from modeling_nanochat.training.tokenizer import train_tokenizer
from tests.toys import drawn_model

WORDS = "red green blue one two three sun moon star tree river stone bird fish king queen salt bread".split(" ")  # noqa: SIM905
TASKS = [
    ("letters", "multiple_choice", 3, "\nAnswer: "),
    ("who", "schema", 1, " "),
    ("next", "language_modeling", 2, " "),
]


def make_examples(kind: str, count: int, rng: random.Random) -> list[dict]:
    examples = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(3, 12))
        if kind == "multiple_choice":
            choices = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(rng.randint(2, 5))]
            examples.append({"query": " ".join(words) + "? ", "choices": choices, "gold": rng.randrange(len(choices))})
        elif kind == "schema":
            options = [" ".join([*words, last]) for last in rng.sample(WORDS, 2)]
            examples.append({"context_options": options, "continuation": rng.choice(WORDS) + " it.", "gold": 0})
        else:
            context = " " + " ".join(words) + " "
            examples.append({"context": context, "continuation": " ".join(rng.choices(WORDS, k=2))})
    return examples


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    rng = random.Random(0)
    entries, baselines = [], ["Eval Task,Random baseline"]
    for label, kind, shots, delimiter in TASKS:
        file = folder / "eval_data" / "some" / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in make_examples(kind, 14, rng)))
        entry = (
            f"- label: {label}\n  dataset_uri: some/{label}.jsonl\n  num_fewshot:\n  - {shots}\n  icl_task_type: {kind}"
        )
        entries.append(entry + (f"\n  continuation_delimiter: {json.dumps(delimiter)}" if delimiter != " " else ""))
        baselines.append(f"{label},{25 if kind == 'multiple_choice' else 0}")
    (folder / "core.yaml").write_text("icl_tasks:\n" + "\n".join(entries) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(baselines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(1)
    return train_tokenizer((" ".join(rng.choices(WORDS, k=12)) + "?\nAnswer: it." for _ in range(3000)), 320)


def make_model(era: str) -> torch.nn.Module:
    """A small network with windows shorter than the prompts, and no weight left at zero."""
    torch.manual_seed(0)
    if era == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=256)).eval()
    return drawn_model(
        3, 0.2, lambda name, weight: weight.abs().max() < 0.05, max_position_embeddings=32, era=era, window_pattern="SL"
    ).eval()


@pytest.mark.parametrize("era", ["seed", "head", "gpt2"])
def test_fast_and_slow_agree(bundle, tokenizer, era):
    model = make_model(era)
    for task in read_tasks(bundle):
        examples = load_examples(task, 12)
        expected = [slow_answer(model, tokenizer, task, examples, index) for index in range(12)]
        for batch_tokens in (1, 3000):
            result = evaluate_task(SpanScorer(model, batch_tokens), tokenizer, task, max_examples=12, quiet=True)
            for answer, (scores, correct) in zip(result.answers, expected):
                assert answer.scores == pytest.approx(scores, abs=1e-4)
                assert answer.correct == correct
        assert result.shots == task.num_fewshot
        assert (result.beyond_context > 0) == (era != "gpt2")  # contexts of 32 and 256


def test_shots_are_those_of_a_list_without_the_example():
    for index in range(30):
        others = [i for i in range(30) if i != index]
        assert draw_shots(index, 10, 30) == random.Random(1234 + index).sample(others, 10)
    assert sorted(draw_shots(1, 10, 3)) == [0, 2]


def test_prompts_keep_their_spaces_where_upstream_does(bundle):
    tasks = {task.kind: task for task in read_tasks(bundle)}
    question = {"query": "Q? ", "choices": ["x", "y"], "gold": 1}
    assert render(tasks["multiple_choice"], question, [question]) == [
        "Q? \nAnswer: y\n\nQ? \nAnswer: x", "Q? \nAnswer: y\n\nQ? \nAnswer: y"
    ]  # fmt: skip
    text = {"context": " a b ", "continuation": "c "}
    assert render(tasks["language_modeling"], text, [text]) == ["a b c \n\na b", "a b c \n\na b c "]
    schema = {"context_options": ["A", "B"], "continuation": "c", "gold": 1}
    assert render(tasks["schema"], schema, [schema]) == ["B c\n\nA c", "B c\n\nB c"]


def test_examples_are_shuffled_then_cut(bundle):
    task = read_tasks(bundle, ["letters"])[0]
    rows = [json.loads(line) for line in task.file.read_text().splitlines()]
    random.Random(1337).shuffle(rows)
    assert load_examples(task) == rows and load_examples(task, 5) == rows[:5]


def test_cropping_keeps_bos_and_moves_the_span(bundle, tokenizer):
    assert crop([9, 1, 2, 3, 4, 5], (4, 6), 4) == ([9, 3, 4, 5], (2, 4))
    assert crop([9, 1, 2], (1, 3), 4) == ([9, 1, 2], (1, 3))
    model = make_model("gpt2")
    for task in read_tasks(bundle):
        whole = evaluate_task(SpanScorer(model), tokenizer, task, quiet=True)
        cut = evaluate_task(SpanScorer(model), tokenizer, task, max_length=24, quiet=True)
        assert whole.cropped == 0 < cut.cropped and whole.longest_prompt > 24 >= cut.longest_prompt
        assert all(math.isfinite(score) for answer in cut.answers for score in answer.scores)


def test_batches_keep_the_budget_and_lose_nothing():
    rng = random.Random(0)
    groups = []
    for _ in range(200):
        shared = rng.choice((0, rng.randint(1, 400)))
        beginning = [0] * shared
        rows = [[*beginning, index, *[0] * rng.randint(2, 30)] for index in range(rng.randint(1, 5))]
        groups.append(Group(rows, [(shared + 1, len(row)) for row in rows]))
    batches = make_batches(groups, 4000, 1000)
    assert sorted(index for batch in batches for index in batch.groups) == list(range(200))
    for batch in batches:
        members = [groups[index] for index in batch.groups]
        rows = sum(len(group.sequences) for group in members)
        assert len(members) == 1 or rows * max(group.longest for group in members) <= 4000
        assert batch.shared == min(group.shared for group in members)
        again = sum((group.shared - batch.shared) * len(group.sequences) for group in members)
        assert again <= 0.1 * sum(group.shared for group in members)


def test_missing_data_and_unknown_tasks_are_named(bundle, tmp_path):
    with pytest.raises(ValueError, match=r"no core\.yaml"):
        read_tasks(tmp_path)
    with pytest.raises(ValueError, match="no tasks \\['squad'\\]"):
        read_tasks(bundle, ["squad"])
    with pytest.raises(ValueError, match=r"tables of .* cannot be read"):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "core.yaml").write_text("icl_tasks: [{label: x}]")
        (broken / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n")
        read_tasks(broken)
    copy = tmp_path / "bundle"
    copy.mkdir()
    for name in ("core.yaml", "eval_meta_data.csv"):
        (copy / name).write_text((bundle / name).read_text())
    with pytest.raises(ValueError, match="lacks the data of \\['letters', 'who', 'next'\\]"):
        read_tasks(copy)
    file = read_tasks(bundle, ["who"])[0].file
    there = copy / file.relative_to(bundle)
    there.parent.mkdir(parents=True)
    there.write_text(file.read_text())
    assert [task.label for task in read_tasks(copy)] == ["who"]  # a part of a bundle is used
    with pytest.raises(ValueError, match="lacks the data of \\['letters'\\]"):
        read_tasks(copy, ["who", "letters"])


def result_of(task, correct, **facts) -> TaskResult:
    answers = [type("A", (), {"correct": each})() for each in correct]
    usual = {"longest_prompt": 10, "beyond_context": 0, "cropped": 0, "shots": 3, "complete": True, "control": None}
    return TaskResult(task, answers, seconds=1.0, **{**usual, **facts})


def test_core_is_the_mean_of_centered_accuracies(bundle):
    task = read_tasks(bundle, ["letters"])[0]
    figures = summarize_core([result_of(task, (True, True, True, False))])
    core = figures["core_of_1_tasks"]
    assert figures["core/letters"] == core.mean == pytest.approx((0.75 - 0.25) / 0.75)
    assert core.high - core.low == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 4) / 0.75, rel=1e-4)


def test_only_the_22_tasks_with_all_examples_are_called_core(bundle):
    task = read_tasks(bundle, ["letters"])[0]
    all_tasks = [replace(task, label=label) for label in LABELS]
    whole = [result_of(each, (True, False)) for each in all_tasks]
    assert core_name(whole) == "core"
    assert core_name([result_of(task, (True,))] * 22) == "core_of_22_tasks"
    assert core_name(whole[:18]) == "core_of_18_tasks"
    cut = [result_of(each, (True, False), complete=False) for each in all_tasks]
    assert core_name(cut) == "core_cut_to_2"
    assert core_name([replace(each, control="no_shots") for each in whole]) == "core_no_shots"


def test_controls_change_what_they_say(bundle):
    for task in read_tasks(bundle):
        examples = load_examples(task)
        plain = prompts_of(task, examples)
        assert all("\n\n" not in prompt for prompts in prompts_of(task, examples, "no_shots") for prompt in prompts)
        wrong = prompts_of(task, examples, "wrong_shots")
        assert [prompts[-1].split("\n\n")[-1] for prompts in wrong] == [p[-1].split("\n\n")[-1] for p in plain]
        assert sum(one != other for one, other in zip(wrong, plain)) > len(plain) // 2
        if task.kind == "language_modeling":
            assert prompts_of(task, examples, "shuffled_answers") != plain
        else:
            assert prompts_of(task, examples[:1], "shuffled_answers") == prompts_of(task, examples[:1])
            assert gold_of(task, examples, "wrong_shots") == gold_of(task, examples)
        if task.kind == "multiple_choice":
            assert gold_of(task, examples, "shuffled_answers") != gold_of(task, examples)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2, no index of one of 2"),
        ('{"query": "q", "choices": ["a", "b"]}', "'gold' is missing"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "no list of two or more"),
        ('{"query": 1, "choices": ["a", "b"], "gold": 0}', "a text is no string"),
        ('{"query": "q", ', "no JSON"),
    ],
)
def test_bad_examples_are_named_by_file_line_and_reason(bundle, tmp_path, line, reason):
    task = replace(read_tasks(bundle, ["letters"])[0], file=tmp_path / "letters.jsonl")
    task.file.write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"letters\.jsonl:2: .*" + reason):
        load_examples(task)
    task.file.write_text("\n")
    with pytest.raises(ValueError, match=r"letters\.jsonl is empty"):
        load_examples(task)


SCRIPT = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}]
from transformers import AutoTokenizer
from modeling_nanochat.eval.bits_per_byte import TextLoss, packed_loss
from modeling_nanochat.eval.core.bundle import read_tasks
from modeling_nanochat.recipes.evaluation.arguments import CoreArguments
from modeling_nanochat.recipes.evaluation.core import run_core
from modeling_nanochat.training.ranks import gather
from tests.eval.test_core import make_model
from accelerate import PartialState
PartialState(cpu=True)
import torch.distributed as dist
rank, ranks = dist.get_rank(), dist.get_world_size()
assert ranks == 2
model, tokenizer = make_model("seed"), AutoTokenizer.from_pretrained({tokenizer!r})
results = run_core(model, tokenizer, read_tasks({bundle!r}), CoreArguments(), 600)
rows = torch.arange(6 * 9).view(6, 9) * 7 % 300
batches = [{{"input_ids": rows[i::2][:, :-1], "shift_labels": rows[i::2][:, 1:]}} for i in [rank]]
bits = TextLoss.total(gather(packed_loss(model, batches, [1 + i % 3 for i in range(320)]))).bits_per_byte
if rank == 0:
    torch.save([[[answer.scores for answer in result.answers] for result in results], bits], {output!r})
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(bundle, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script, output = tmp_path / "script.py", tmp_path / "scores.pt"
    root = Path(__file__).parents[2]
    script.write_text(
        SCRIPT.format(
            root=str(root), tokenizer=str(tmp_path / "tokenizer"), bundle=str(bundle),
            output=str(output),
        )
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500)
    scores, bits = torch.load(output, weights_only=True)

    model = make_model("seed")
    for task, found in zip(read_tasks(bundle), scores):
        expected = evaluate_task(SpanScorer(model, 600), tokenizer, task, quiet=True)
        for own, answer in zip(found, expected.answers):
            assert own == pytest.approx(answer.scores, abs=1e-5)
    rows = torch.arange(6 * 9).view(6, 9) * 7 % 300
    batch = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:]}
    assert bits == pytest.approx(packed_loss(model, [batch], [1 + i % 3 for i in range(320)]).bits_per_byte, rel=1e-6)
