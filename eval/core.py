"""CORE: DCLM's mean of centred accuracies over 22 tasks, for base models, as upstream computes it, and faster.

The rules that make a number comparable: examples are shuffled with seed 1337 and then cut; the shots of example i are
drawn with seed 1234 + i; a choice is scored by the mean loss of its tokens (multiple choice: after the common prefix of
all choices; schema: over their common suffix) and the lowest wins; a continuation is right if every token is the
likeliest. A task's accuracy is centred so that guessing is 0. Guessing is taken from DCLM's first table (`core`), and
from its later correction of three tasks (`core_v2`).

The speed: the few-shot prompt that an example's choices share is read once, its cache is copied to the choices, logits
are made at the scored positions alone, and prompts of similar length share a batch. On several ranks the batches are
dealt round and the answers gathered. The price: the cache of a batch has to fit in memory beside the model.
"""

import csv
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from modeling_nanochat.inference import eval_mode, pad_left

KINDS = ("multiple_choice", "schema", "language_modeling")
SHUFFLE_SEED, SHOTS_SEED = 1337, 1234  # upstream's
# DCLM's later table: the share of commonsense_qa's commonest answer, and one in four for two tasks of four choices.
CORRECTED_BASELINES = {"commonsense_qa": 0.403, "agi_eval_lsat_ar": 0.25, "bigbench_language_identification": 0.25}
LOGITS_AT_ONCE = 2048  # positions whose logits exist together


@dataclass(frozen=True)
class CoreTask:
    """One row of the benchmark: `baseline` is the accuracy of guessing, from 0 to 1."""

    label: str
    file: Path
    kind: str
    num_fewshot: int
    delimiter: str
    baseline: float


@dataclass(frozen=True)
class Question:
    """An example as token sequences, of which tokens [start, end) are scored.

    Attributes:
        index: its place among the task's examples.
        sequences: one for each choice; a single one for language modelling.
        spans: start and end for each sequence.
        shared: how many tokens all sequences begin with and can be read once, before any that predicts a scored one.
        gold: the right choice; None for language modelling.
    """

    index: int
    sequences: list[list[int]]
    spans: list[tuple[int, int]]
    shared: int
    gold: int | None


@dataclass(frozen=True)
class Answer:
    """What the model made of a question: mean loss of each span in nats, and of how many tokens it was certain."""

    scores: list[float]
    certain: list[int]
    correct: bool


@dataclass(frozen=True)
class TaskResult:
    """A task's answers, in the order of its examples, and facts about its prompts."""

    task: CoreTask
    answers: list[Answer]
    longest_prompt: int
    beyond_context: int
    shots: int

    @property
    def accuracy(self) -> float:
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    def centered(self, baseline: float) -> float:
        return (self.accuracy - baseline) / (1 - baseline)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as of a share of independent examples."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.answers))


# ---------------------------------------------------------------- tasks and their prompts


def read_tasks(bundle: str | Path, labels: Sequence[str] | None = None) -> list[CoreTask]:
    """The tasks of an evaluation bundle (`core.yaml`, `eval_meta_data.csv`, `eval_data/`).

    Args:
        bundle: its folder.
        labels: which tasks; all if None.

    Raises:
        ValueError: the bundle, a task or the data of one is not there; the message names them.
    """
    bundle = Path(bundle)
    if not (bundle / "core.yaml").is_file():
        raise ValueError(f"{bundle} is no evaluation bundle (it has no core.yaml)")
    entries = yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
    with open(bundle / "eval_meta_data.csv", encoding="utf-8") as table:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(table)}
    tasks = [
        CoreTask(
            label=entry["label"],
            file=bundle / "eval_data" / entry["dataset_uri"],
            kind=entry["icl_task_type"],
            num_fewshot=entry["num_fewshot"][0],
            delimiter=entry.get("continuation_delimiter", " "),
            baseline=baselines[entry["label"]],
        )
        for entry in entries
    ]
    unknown = sorted(set(labels or ()) - {task.label for task in tasks})
    if unknown:
        raise ValueError(f"the bundle has no tasks {unknown}, only {[task.label for task in tasks]}")
    tasks = [task for task in tasks if not labels or task.label in labels]
    missing = [task.label for task in tasks if not task.file.is_file()]
    if missing or any(task.kind not in KINDS for task in tasks):
        raise ValueError(f"{bundle} lacks the data of {missing}; name the tasks to do without them, or complete it")
    return tasks


def load_examples(task: CoreTask, max_examples: int | None = None) -> list[dict[str, Any]]:
    """The examples shuffled, then cut; the cut decides from which examples shots are drawn, too."""
    with open(task.file, encoding="utf-8") as lines:
        examples = [json.loads(line) for line in lines if line.strip()]
    random.Random(SHUFFLE_SEED).shuffle(examples)
    return examples[:max_examples]


def draw_shots(index: int, count: int, num_examples: int) -> list[int]:
    """Which other examples are shown before example `index`; fewer than `count` if there are not so many."""
    others = range(num_examples - 1)
    drawn = random.Random(SHOTS_SEED + index).sample(others, min(count, len(others)))
    return [other + (other >= index) for other in drawn]


def render(task: CoreTask, example: dict[str, Any], shots: Sequence[dict[str, Any]]) -> list[str]:
    """The prompts of an example: one for each choice; for language modelling without and with the continuation."""
    shown = "".join(shot_text(task, shot) + "\n\n" for shot in shots)
    if task.kind == "multiple_choice":
        return [f"{shown}{example['query']}{task.delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        options = example["context_options"]
        return [f"{shown}{option}{task.delimiter}{example['continuation']}" for option in options]
    context = f"{shown}{example['context'].strip()}{task.delimiter}"
    return [context.strip(), context + example["continuation"]]


def shot_text(task: CoreTask, shot: dict[str, Any]) -> str:
    """An example with its right answer."""
    if task.kind == "multiple_choice":
        return f"{shot['query']}{task.delimiter}{shot['choices'][shot['gold']]}"
    if task.kind == "schema":
        return f"{shot['context_options'][shot['gold']]}{task.delimiter}{shot['continuation']}"
    return f"{shot['context'].strip()}{task.delimiter}{shot['continuation']}"


def make_questions(
    task: CoreTask,
    examples: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> list[Question]:
    """Every example with its shots as tokens, BOS in front.

    Args:
        max_length: longer prompts lose their beginning, except BOS; None crops nothing.
    """
    shots = (draw_shots(index, task.num_fewshot, len(examples)) for index in range(len(examples)))
    prompts = [render(task, example, [examples[i] for i in drawn]) for example, drawn in zip(examples, shots)]
    texts = [text for rendered in prompts for text in rendered]
    tokens = iter(tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    questions = []
    for index, (example, rendered) in enumerate(zip(examples, prompts)):
        sequences = [[tokenizer.bos_token_id, *next(tokens)] for _ in rendered]
        questions.append(make_question(index, task.kind, sequences, example.get("gold"), max_length))
    return questions


def make_question(
    index: int, kind: str, sequences: list[list[int]], gold: int | None, max_length: int | None
) -> Question:
    """Find what is scored of each sequence, and what all of them share."""
    common = common_length(sequences)
    if kind == "multiple_choice":
        spans = [(min(common, len(sequence) - 1), len(sequence)) for sequence in sequences]  # never empty
    elif kind == "schema":
        suffix = common_length([sequence[::-1] for sequence in sequences])
        spans = [(len(sequence) - suffix, len(sequence)) for sequence in sequences]
    else:
        sequences, spans, gold = sequences[1:], [(common, len(sequences[1]))], None
    if max_length is not None:
        cropped = [crop(sequence, span, max_length) for sequence, span in zip(sequences, spans)]
        sequences, spans = [sequence for sequence, _ in cropped], [span for _, span in cropped]
    shared = 0
    if len(sequences) > 1:
        shared = max(0, min(common_length(sequences), *(start for start, _ in spans)) - 1)
    return Question(index, sequences, spans, shared, gold)


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    for position, tokens in enumerate(zip(*sequences)):
        if len(set(tokens)) > 1:
            return position
    return min(map(len, sequences))


def crop(sequence: list[int], span: tuple[int, int], max_length: int) -> tuple[list[int], tuple[int, int]]:
    """BOS and the last `max_length - 1` tokens, with the span moved along."""
    lost = max(0, len(sequence) - max_length)
    start, end = (max(1, place - lost) for place in span)
    return [sequence[0], *sequence[1 + lost :]], (start, end)


# ---------------------------------------------------------------- scoring


def make_batches(questions: Iterable[Question], batch_tokens: int) -> list[list[Question]]:
    """Questions of similar length together, longest first, so that their rows with padding stay within the budget.

    What is read without a shared beginning never meets what has one.
    """
    batches: list[list[Question]] = []
    rows = width = 0
    for question in sorted(questions, key=lambda each: (each.shared == 0, -each.shared, -longest(each))):
        more = len(question.sequences)
        wider = max(width, longest(question))
        if batches and (batches[-1][0].shared == 0) == (question.shared == 0) and (rows + more) * wider <= batch_tokens:
            batches[-1].append(question)
            rows, width = rows + more, wider
        else:
            batches.append([question])
            rows, width = more, longest(question)
    return batches


def longest(question: Question) -> int:
    return max(map(len, question.sequences))


@torch.no_grad()
def score_batch(model: PreTrainedModel, questions: Sequence[Question], pad_token_id: int) -> list[Answer]:
    """Answers to the questions of one batch, all of which share a beginning among their choices, or none does."""
    device = model.device
    counts = torch.tensor([len(question.sequences) for question in questions], device=device)
    cache, mask = None, torch.ones((int(counts.sum()), 0), dtype=torch.long, device=device)
    if questions[0].shared:
        prefixes = [question.sequences[0][: question.shared] for question in questions]
        ids, mask = pad_left(prefixes, pad_token_id, device)  # (Q, P)
        cache = DynamicCache(config=model.config)
        places = positions(mask, ids.shape[1])
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        rows = torch.repeat_interleave(torch.arange(len(questions), device=device), counts)  # (R,)
        cache.reorder_cache(rows)
        mask = mask[rows]  # (R, P)
    rest = [sequence[question.shared :] for question in questions for sequence in question.sequences]
    spans = [
        (start - question.shared, end - question.shared) for question in questions for start, end in question.spans
    ]
    ids, own_mask = pad_right(rest, pad_token_id, device)  # (R, T)
    mask = torch.cat([mask, own_mask], dim=1)  # (R, P + T)
    output = model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions(mask, ids.shape[1]),
        past_key_values=cache,
        use_cache=cache is not None,
    )
    losses, likeliest = score_spans(model, output.last_hidden_state, ids, spans)
    answers, place = [], 0
    for question in questions:
        here = range(place, place + len(question.sequences))
        place += len(question.sequences)
        answers.append(judge(question, [losses[row] for row in here], [likeliest[row] for row in here]))
    return answers


def pad_right(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest) int64."""
    ids, mask = pad_left([row[::-1] for row in rows], pad_token_id, device)
    return ids.flip(1), mask.flip(1)


def positions(mask: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of the last `length` tokens, counted from the first that the mask shows. (B, P + T) -> (B, T)"""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def score_spans(
    model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor, spans: Sequence[tuple[int, int]]
) -> tuple[list[float], list[int]]:
    """Mean loss of each row's span in nats, and how many of its tokens were the likeliest.

    Args:
        hidden: (R, T, C) states after the last norm.
        ids: (R, T) the tokens; those of the span are predicted by the state before each.
        spans: start >= 1 and end for each row.
    """
    rows = [row for row, (start, end) in enumerate(spans) for _ in range(start, end)]
    places = [place for start, end in spans for place in range(start, end)]
    rows, places = torch.tensor(rows, device=ids.device), torch.tensor(places, device=ids.device)  # (N,)
    states, targets = hidden[rows, places - 1], ids[rows, places]  # (N, C), (N,)
    head = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    losses, likeliest = [], []
    for some, wanted in zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE)):
        logits = head(some).float()  # (n, V)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        likeliest.append(logits.argmax(dim=-1) == wanted)
    lengths = torch.tensor([end - start for start, end in spans])
    sums = [piece.sum() for piece in torch.cat(losses).cpu().double().split(lengths.tolist())]
    hits = [int(piece.sum()) for piece in torch.cat(likeliest).cpu().split(lengths.tolist())]
    return [float(total) / int(length) for total, length in zip(sums, lengths)], hits


def judge(question: Question, scores: list[float], certain: list[int]) -> Answer:
    """Whether the gold choice has the lowest loss (the first of equals), or every token was certain."""
    if question.gold is None:
        (start, end), *_ = question.spans
        return Answer(scores, certain, certain[0] == end - start)
    return Answer(scores, certain, scores.index(min(scores)) == question.gold)


# ---------------------------------------------------------------- the benchmark


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: CoreTask,
    *,
    max_examples: int | None = None,
    max_length: int | None = None,
    batch_tokens: int = 32768,
) -> TaskResult:
    """Answer a task's examples, together with the other ranks if there are any.

    Args:
        max_examples: cut the shuffled examples to so many.
        max_length: crop longer prompts on the left; None for models whose positions have no end.
        batch_tokens: rows x longest row of a batch; a longer question is a batch of its own.
    """
    examples = load_examples(task, max_examples)
    questions = make_questions(task, examples, tokenizer, max_length)
    ranked = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
    batches = make_batches(questions, batch_tokens)[rank::ranks]
    answers: dict[int, Answer] = {}
    with eval_mode(model):
        for batch in tqdm(batches, desc=task.label, leave=False, disable=rank > 0):
            scored = score_batch(model, batch, tokenizer.bos_token_id)
            answers |= {question.index: answer for question, answer in zip(batch, scored)}
    if ranked:
        parts: list[dict[int, Answer]] = [{} for _ in range(ranks)]
        dist.all_gather_object(parts, answers)
        answers = {index: answer for part in parts for index, answer in part.items()}
    context = getattr(model.config, "max_position_embeddings", math.inf)
    return TaskResult(
        task,
        [answers[index] for index in range(len(questions))],
        max(map(longest, questions)),
        sum(longest(question) > context for question in questions),
        min(task.num_fewshot, len(examples) - 1),
    )


def summarize_core(results: Sequence[TaskResult]) -> dict[str, float]:
    """Centred accuracies by task, and their mean with its standard error: `core` and, corrected, `core_v2`.

    The mean is CORE only over all 22 tasks; of fewer it is called by their number, as `core_of_18_tasks`.
    """
    name = "core" if len(results) == 22 else f"core_of_{len(results)}_tasks"
    figures = {}
    for result in results:
        baseline = result.task.baseline
        figures[f"core/{result.task.label}"] = result.centered(baseline)
    for version, corrected in ((name, {}), (f"{name}_v2", CORRECTED_BASELINES)):
        baselines = [corrected.get(result.task.label, result.task.baseline) for result in results]
        scores = [result.centered(baseline) for result, baseline in zip(results, baselines)]
        errors = [result.standard_error / (1 - baseline) for result, baseline in zip(results, baselines)]
        figures[version] = sum(scores) / len(scores)
        figures[f"{version}_stderr"] = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return figures
