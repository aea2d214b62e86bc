"""CORE: the fast runner against a slow, obvious twin, on small bundles of all three kinds of tasks."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.core import (
    Question,
    TaskResult,
    crop,
    draw_shots,
    evaluate_task,
    load_examples,
    make_batches,
    read_tasks,
    render,
    summarize_core,
)
from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from modeling_nanochat.training.tokenizer import train_tokenizer

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
    config = NanoChatGPTConfig.from_depth(
        3, vocab_size=320, head_dim=32, max_position_embeddings=32, era=era, window_pattern="SL"
    )
    model = NanoChatGPTForCausalLM(config)
    for parameter in model.parameters():
        if parameter.abs().max() < 0.05:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# ---------------------------------------------------------------- the slow twin


def slow_scores(model, tokenizer, task, examples, index) -> tuple[list[float], bool]:
    """One example as the rules say, without cache, batches or padding."""
    others = [i for i in range(len(examples)) if i != index]
    shots = [examples[i] for i in random.Random(1234 + index).sample(others, task.num_fewshot)]
    example, delimiter = examples[index], task.delimiter

    def encode(text: str) -> list[int]:
        return [tokenizer.bos_token_id, *encode_text(tokenizer, text)]

    if task.kind == "multiple_choice":
        head = "".join(f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}\n\n" for shot in shots)
        sequences = [encode(f"{head}{example['query']}{delimiter}{choice}") for choice in example["choices"]]
        start = 0
        while len({tuple(sequence[: start + 1]) for sequence in sequences}) == 1:
            start += 1
        spans = [(start, len(sequence)) for sequence in sequences]
    elif task.kind == "schema":
        head = "".join(f"{s['context_options'][s['gold']]}{delimiter}{s['continuation']}\n\n" for s in shots)
        sequences = [
            encode(f"{head}{option}{delimiter}{example['continuation']}") for option in example["context_options"]
        ]
        suffix = 0
        while len({tuple(sequence[len(sequence) - suffix - 1 :]) for sequence in sequences}) == 1:
            suffix += 1
        spans = [(len(sequence) - suffix, len(sequence)) for sequence in sequences]
    else:
        head = "".join(f"{shot['context'].strip()}{delimiter}{shot['continuation']}\n\n" for shot in shots)
        before = f"{head}{example['context'].strip()}{delimiter}"
        sequences = [encode(before + example["continuation"])]
        spans = [(len(encode(before.strip())), len(sequences[0]))]
    scores, certain = [], []
    for sequence, (start, end) in zip(sequences, spans):
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0].float()
        targets = torch.tensor(sequence[start:end])
        scores.append(float(F.cross_entropy(logits[start - 1 : end - 1], targets)))
        certain.append(bool((logits[start - 1 : end - 1].argmax(-1) == targets).all()))
    return scores, certain[0] if task.kind == "language_modeling" else scores.index(min(scores)) == example["gold"]


@pytest.mark.parametrize("era", ["seed", "head", "gpt2"])
def test_fast_and_slow_agree(bundle, tokenizer, era):
    model = make_model(era)
    for task in read_tasks(bundle):
        examples = load_examples(task, 12)
        expected = [slow_scores(model, tokenizer, task, examples, index) for index in range(12)]
        for batch_tokens in (1, 3000):
            result = evaluate_task(model, tokenizer, task, max_examples=12, batch_tokens=batch_tokens)
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
        whole = evaluate_task(model, tokenizer, task, max_length=1000)
        cut = evaluate_task(model, tokenizer, task, max_length=24)
        assert whole.longest_prompt > 24 >= cut.longest_prompt
        assert all(math.isfinite(score) for answer in cut.answers for score in answer.scores)


def test_batches_keep_the_budget_and_lose_nothing():
    rng = random.Random(0)
    questions = []
    for index in range(200):
        shared = rng.choice((0, rng.randint(1, 400)))
        sequences = [[0] * (shared + rng.randint(2, 30)) for _ in range(rng.randint(1, 5))]
        questions.append(Question(index, sequences, [(1, 2)] * len(sequences), shared, 0))
    batches = make_batches(questions, 4000)
    assert sorted(question.index for batch in batches for question in batch) == list(range(200))
    for batch in batches:
        rows = sum(len(question.sequences) for question in batch)
        widest = max(len(sequence) for question in batch for sequence in question.sequences)
        assert len(batch) == 1 or rows * widest <= 4000
        assert len({question.shared == 0 for question in batch}) == 1


def test_missing_data_and_unknown_tasks_are_named(bundle, tmp_path):
    with pytest.raises(ValueError, match=r"no core\.yaml"):
        read_tasks(tmp_path)
    with pytest.raises(ValueError, match="no tasks \\['squad'\\]"):
        read_tasks(bundle, ["squad"])
    copy = tmp_path / "bundle"
    copy.mkdir()
    for name in ("core.yaml", "eval_meta_data.csv"):
        (copy / name).write_text((bundle / name).read_text())
    with pytest.raises(ValueError, match="lacks the data of \\['letters', 'who', 'next'\\]"):
        read_tasks(copy)


def test_core_is_the_mean_of_centred_accuracies(bundle):
    task = read_tasks(bundle, ["letters"])[0]
    answers = [type("A", (), {"correct": correct})() for correct in (True, True, True, False)]
    result = TaskResult(task, answers, 10, 0, 3)
    figures = summarize_core([result])
    assert figures["core/letters"] == figures["core_of_1_tasks"] == pytest.approx((0.75 - 0.25) / 0.75)
    assert figures["core_of_1_tasks_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4) / 0.75)
    assert "core" in summarize_core([result] * 22)


SCRIPT = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{root!r}]
from transformers import AutoTokenizer
from modeling_nanochat.eval.bits_per_byte import evaluate_bits_per_byte
from modeling_nanochat.eval.core import evaluate_task, read_tasks
from tests.eval.test_core import make_model
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
assert ranks == 2
model, tokenizer = make_model("seed"), AutoTokenizer.from_pretrained({tokenizer!r})
results = [evaluate_task(model, tokenizer, task, batch_tokens=600) for task in read_tasks({bundle!r})]
rows = torch.arange(6 * 9).view(6, 9) * 7 % 300
batches = [{{"input_ids": rows[i::2][:, :-1], "shift_labels": rows[i::2][:, 1:]}} for i in [rank]]
bits = evaluate_bits_per_byte(model, batches, [1 + i % 3 for i in range(320)])
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

    from modeling_nanochat.eval.bits_per_byte import evaluate_bits_per_byte

    model = make_model("seed")
    for task, found in zip(read_tasks(bundle), scores):
        expected = evaluate_task(model, tokenizer, task, batch_tokens=600)
        for own, answer in zip(found, expected.answers):
            assert own == pytest.approx(answer.scores, abs=1e-5)
    rows = torch.arange(6 * 9).view(6, 9) * 7 % 300
    batch = {"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:]}
    assert bits == pytest.approx(evaluate_bits_per_byte(model, [batch], [1 + i % 3 for i in range(320)]), rel=1e-6)
