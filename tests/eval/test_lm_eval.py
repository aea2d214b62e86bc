"""The harness's model class: likelihoods with one BOS, generation with the calculator."""

import json
import math
import sys

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from benchmarks.core import make_bundle
from modeling_nanochat.eval.core.bundle import LABELS, read_tasks
from modeling_nanochat.eval.core.scores import evaluate_task
from modeling_nanochat.eval.lm_eval_model import TASKS, NanoChatLM, main
from modeling_nanochat.eval.span_scores import SpanScorer
from modeling_nanochat.recipes.stages.folder import save_checkpoint
from modeling_nanochat.tokenization_nanochat_gpt import encode_text, special_token_ids
from tests.toys import digit_tokenizer, drawn_model, zero_matrices


@pytest.fixture(scope="module")
def harness():
    tokenizer = digit_tokenizer()
    special = special_token_ids(tokenizer)
    model = drawn_model(
        2, 0.05, zero_matrices, bos_token_id=special["<|bos|>"], pad_token_id=special["<|bos|>"],
        eos_token_id=[special["<|assistant_end|>"], special["<|bos|>"]],
    ).eval()  # fmt: skip
    return NanoChatLM(model, tokenizer=tokenizer, batch_size=2, max_length=64)


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def log_likelihood(harness, ids: list[int], given: int) -> float:
    """Of the tokens from place `given` on, by one forward pass."""
    with torch.no_grad():
        log_probabilities = harness.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[place - 1, ids[place]]) for place in range(given, len(ids)))


def test_it_is_registered():
    assert get_model("nanochat") is NanoChatLM


def test_whole_texts_see_bos_once(harness):
    bos = special_token_ids(harness.tokenizer)["<|bos|>"]
    texts = ["A short text.", "Another one, 1234 long."]
    found = harness.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts])
    for text, value in zip(texts, found):
        assert value == pytest.approx(
            log_likelihood(harness, [bos, *encode_text(harness.tokenizer, text)], 1), abs=1e-3
        )
    assert harness.add_bos_token is True


def test_continuations_follow_a_context_with_bos(harness):
    bos = special_token_ids(harness.tokenizer)["<|bos|>"]
    ((value, greedy),) = harness.loglikelihood([request("loglikelihood", "The answer is", " 42")])
    ids = [bos, *encode_text(harness.tokenizer, "The answer is 42")]
    assert value == pytest.approx(log_likelihood(harness, ids, len(ids) - 2), abs=1e-3)
    assert math.isfinite(value) and isinstance(greedy, bool)


def test_generation_calls_the_calculator(harness):
    contexts = ["Sum: <|python_start|>12 + 30<|python_end|>", "<|python_start|>2 * 4<|python_end|>"]
    requests = [request("generate_until", text, {"until": ["\n\n"], "max_gen_toks": 5}) for text in contexts]
    texts = harness.generate_until(requests, disable_tqdm=True)
    assert texts[0].startswith(" = 42") and texts[1].startswith(" = 8")


def test_the_harness_s_own_class_calls_it_too(harness, tmp_path):
    """`--model hf` on a saved folder: the checkpoint brings its decoding along."""
    save_checkpoint(harness.model, harness.tokenizer, str(tmp_path / "checkpoint"))
    own = get_model("hf")(pretrained=str(tmp_path / "checkpoint"), device="cpu")
    asked = request(
        "generate_until", "Sum: <|python_start|>12 + 30<|python_end|>", {"until": ["\n\n"], "max_gen_toks": 5}
    )
    assert own.generate_until([asked], disable_tqdm=True)[0].startswith(" = 42")


def test_core_in_the_harness_decides_as_the_native_runner(harness, tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "bundle")
    labels = {"letters": "arc_easy", "who": "copa", "next": "jeopardy"}  # three of the 22 stand for the made-up tasks
    for table in ("core.yaml", "eval_meta_data.csv"):
        text = (bundle / table).read_text()
        for made_up, label in labels.items():
            text = text.replace(f"label: {made_up}\n", f"label: {label}\n").replace(f"{made_up},0", f"{label},25")
        (bundle / table).write_text(text)
    harness.model.eval()
    manager = TaskManager(include_path=TASKS, metadata={"core_bundle": str(bundle), "core_examples": 6})
    found = simple_evaluate(
        harness, tasks=["core_arc_easy", "core_copa", "core_jeopardy"], task_manager=manager, bootstrap_iters=0,
        log_samples=True,
    )  # fmt: skip
    for task in read_tasks(bundle):
        native = evaluate_task(SpanScorer(harness.model), harness.tokenizer, task, max_examples=6, quiet=True)
        samples = sorted(found["samples"][f"core_{task.label}"], key=lambda sample: sample["doc_id"])
        assert [sample["acc"] for sample in samples] == [float(answer.correct) for answer in native.answers]
        centered = found["results"][f"core_{task.label}"]["centered,none"]
        assert centered == pytest.approx(native.accuracy().centered)


def test_the_command_says_in_one_line_what_a_bundle_lacks(harness, tmp_path, monkeypatch, capsys):
    save_checkpoint(harness.model, harness.tokenizer, tmp_path / "model")
    metadata = json.dumps({"core_bundle": str(make_bundle(tmp_path / "bundle"))})
    words = ["--model_args", f"pretrained={tmp_path / 'model'}", "--tasks", "core_copa", "--metadata", metadata]
    monkeypatch.setattr(sys, "argv", ["nanochat-eval", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("nanochat-eval: the bundle has no tasks ['copa'], only")


def test_every_core_task_and_their_group_are_there():
    manager = TaskManager(include_path=TASKS)
    assert {f"core_{label}" for label in LABELS} <= set(manager.all_tasks) and "core" in manager.all_groups
    group = yaml.safe_load((TASKS / "core.yaml").read_text())
    assert sorted(group["task"]) == sorted(f"core_{label}" for label in LABELS)
    for label in LABELS:
        assert f"metadata: {{label: {label}}}" in (TASKS / f"core_{label}.yaml").read_text()
