"""CORE by the fast runner against one example at a time, on the same examples in the same run: seconds and decisions.

    python -m benchmarks.core                                   # a small network, a made-up bundle
    python -m benchmarks.core --model out/d12/base --bundle out/eval_bundle --examples 100

Upstream's procedure is the slow one: an example's choices as one padded batch, all logits. Both run every task in turn
on the same shuffled examples; a task's ratio is of seconds for each example, and the total weighs the tasks by the
number of examples that they have, as a whole run would. On a CPU the seconds are those of this process, so that other
work on the machine disturbs little.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.attention_choice import choose_attention
from modeling_nanochat.eval.core.bundle import CoreTask, Example, load_examples, read_tasks
from modeling_nanochat.eval.core.prompts import make_questions
from modeling_nanochat.eval.core.scores import answer
from modeling_nanochat.eval.span_scores import SpanScorer
from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from modeling_nanochat.training.tokenizer import train_tokenizer

WORDS = "red green blue one two three sun moon star tree river stone bird fish king queen salt bread"
KINDS = (  # of the made-up bundle: label, kind, shots, delimiter, examples
    ("letters", "multiple_choice", 10, "\nAnswer: ", 400),
    ("who", "schema", 0, " ", 200),
    ("next", "language_modeling", 10, " ", 800),
)


def slow_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: CoreTask, examples: list[Example], index: int
) -> tuple[list[float], bool]:
    """Scores and verdict of one example as the rules say, without cache, sorting or chosen logits."""
    others = [i for i in range(len(examples)) if i != index]
    shots = [examples[i] for i in random.Random(1234 + index).sample(others, min(task.num_fewshot, len(others)))]
    example, delimiter = examples[index], task.delimiter
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(text: str) -> list[int]:
        return [*first, *encode_text(tokenizer, text)]

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
    scores, certain = slow_scores(model, sequences, spans)
    return scores, certain[0] if task.kind == "language_modeling" else scores.index(min(scores)) == example["gold"]


@torch.no_grad()
def slow_scores(
    model: PreTrainedModel, sequences: list[list[int]], spans: list[tuple[int, int]]
) -> tuple[list[float], list[bool]]:
    """Mean loss of each span, and whether every token of it is the likeliest; the sequences in one padded batch."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences], device=model.device)
    logits = model(ids, use_cache=False).logits.float()  # (choices, T, V)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    likeliest = logits[:, :-1].argmax(dim=-1) == ids[:, 1:]
    scores = [float(losses[row, start - 1 : end - 1].mean()) for row, (start, end) in enumerate(spans)]
    return scores, [bool(likeliest[row, start - 1 : end - 1].all()) for row, (start, end) in enumerate(spans)]


def make_bundle(folder: Path) -> Path:
    """A made-up bundle with a task of each kind."""
    rng, words = random.Random(0), WORDS.split(" ")
    entries, baselines = [], ["Eval Task,Random baseline"]
    for label, kind, shots, delimiter, count in KINDS:
        file = folder / "eval_data" / "made_up" / f"{label}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(make_example(kind, rng, words)) + "\n" for _ in range(count)))
        entries.append(
            f"- label: {label}\n  dataset_uri: made_up/{label}.jsonl\n  num_fewshot: [{shots}]\n"
            f"  icl_task_type: {kind}\n  continuation_delimiter: {json.dumps(delimiter)}\n"
        )
        baselines.append(f"{label},0")
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(entries))
    (folder / "eval_meta_data.csv").write_text("\n".join(baselines) + "\n")
    return folder


def make_example(kind: str, rng: random.Random, words: list[str]) -> Example:
    text = " ".join(rng.choices(words, k=rng.randint(10, 30)))
    if kind == "multiple_choice":
        choices = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(4)]
        return {"query": f"{text}?", "choices": choices, "gold": rng.randrange(4)}
    if kind == "schema":
        options = [f"{text} {last}" for last in rng.sample(words, 2)]
        return {"context_options": options, "continuation": f"{rng.choice(words)} it.", "gold": 0}
    return {"context": text, "continuation": " ".join(rng.choices(words, k=2))}


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace) -> None:
    scorer = SpanScorer(model, arguments.batch_tokens)
    print(f"shared beginnings: {scorer.shares_beginnings}, chosen states: {scorer.chooses_states}")
    print(f"{'task':34}{'examples':>9}{'slow ms':>9}{'fast ms':>9}{'ratio':>7}  decisions equal, largest difference")
    totals = [0.0, 0.0]
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    for task in read_tasks(arguments.bundle, arguments.tasks):
        whole = len(load_examples(task))
        count = min(whole, arguments.examples or whole)
        examples = load_examples(task, count)
        start = clock()
        slow = [slow_answer(model, tokenizer, task, examples, index) for index in range(count)]
        middle = clock()
        fast = answer(scorer, make_questions(task, examples, tokenizer))
        seconds = (middle - start, clock() - middle)
        totals = [total + part / count * whole for total, part in zip(totals, seconds)]
        equal = sum(own.correct == correct for own, (_, correct) in zip(fast, slow))
        error = max(abs(a - b) for own, (scores, _) in zip(fast, slow) for a, b in zip(own.scores, scores))
        ms = [1000 * part / count for part in seconds]
        ratio = seconds[0] / seconds[1]
        print(f"{task.label:34}{count:9}{ms[0]:9.1f}{ms[1]:9.1f}{ratio:7.1f}  {equal} of {count}, {error:.1e}")
    print(f"all examples: {totals[0]:.0f} s one at a time, {totals[1]:.0f} s here, {totals[0] / totals[1]:.1f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or Hub name; a small network with fresh weights if unset")
    parser.add_argument("--bundle", help="folder of an evaluation bundle; a made-up one if unset")
    parser.add_argument("--tasks", nargs="*", help="labels; all by default")
    parser.add_argument("--examples", type=int, help="of each task, at most; all by default")
    parser.add_argument("--batch_tokens", type=int, default=8192)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.bundle = arguments.bundle or str(make_bundle(Path(folder)))
        if arguments.model:
            tokenizer = AutoTokenizer.from_pretrained(arguments.model)
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        else:
            torch.manual_seed(0)
            tokenizer = train_tokenizer([WORDS] * 100, 320)
            config = NanoChatGPTConfig.from_depth(4, vocab_size=8192, max_position_embeddings=2048)
            model = NanoChatGPTForCausalLM(config)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        if isinstance(model, NanoChatGPTForCausalLM):
            print(choose_attention(model))
        compare(model, tokenizer, arguments)


if __name__ == "__main__":
    main()
