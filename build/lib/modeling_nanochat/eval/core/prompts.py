"""From CORE's examples to token sequences: shots, wording, what is scored.

The rules that make a number comparable: the shots of example i are drawn with seed 1234 + i; queries of multiple choice
keep their spaces, contexts of language modelling are trimmed; a choice is scored after the common prefix of all
choices, a schema over the common suffix of its options, a continuation after the prompt that ends before it.

A control asks the same questions in a way that should change the answer: `no_shots` shows no examples, `wrong_shots`
shows them with wrong answers, `shuffled_answers` takes another answer for the right one, which gives what guessing
gives if the measurement is sound.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from modeling_nanochat.eval.core.bundle import OPTIONS, CoreTask, Example
from modeling_nanochat.eval.models import first_tokens
from modeling_nanochat.eval.span_scores import Group, common_length

SHOTS_SEED = 1234  # upstream's
CONTROLS = ("no_shots", "wrong_shots", "shuffled_answers")
CONTROL_SEED = 99  # of what a control makes up; any number


@dataclass(frozen=True)
class Question:
    """An example as token sequences; `gold` is the right one, None for language modelling. `cropped` prompts have lost
    their beginning."""

    group: Group
    gold: int | None
    cropped: bool = False


def draw_shots(index: int, count: int, num_examples: int) -> list[int]:
    """Which other examples are shown before example `index`; fewer than `count` if there are not so many."""
    others = range(num_examples - 1)
    drawn = random.Random(SHOTS_SEED + index).sample(others, min(count, len(others)))
    return [other + (other >= index) for other in drawn]


def render(task: CoreTask, example: Example, shots: Sequence[Example]) -> list[str]:
    """The prompts of an example: one for each choice; for language modelling without and with the continuation."""
    shown = "".join(shot_text(task, shot) + "\n\n" for shot in shots)
    if task.kind == "multiple_choice":
        return [f"{shown}{example['query']}{task.delimiter}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        options = example["context_options"]
        return [f"{shown}{option}{task.delimiter}{example['continuation']}" for option in options]
    context = f"{shown}{example['context'].strip()}{task.delimiter}"
    return [context.strip(), context + example["continuation"]]


def shot_text(task: CoreTask, shot: Example) -> str:
    """An example with its right answer."""
    if task.kind == "multiple_choice":
        return f"{shot['query']}{task.delimiter}{shot['choices'][shot['gold']]}"
    if task.kind == "schema":
        return f"{shot['context_options'][shot['gold']]}{task.delimiter}{shot['continuation']}"
    return f"{shot['context'].strip()}{task.delimiter}{shot['continuation']}"


def prompts_of(task: CoreTask, examples: Sequence[Example], control: str | None = None) -> list[list[str]]:
    """The rendered prompts of every example with its shots."""
    asked = with_other_answers(task, examples, may_be_right=True) if control == "shuffled_answers" else examples
    shown = with_other_answers(task, examples, may_be_right=False) if control == "wrong_shots" else examples
    count = 0 if control == "no_shots" else task.num_fewshot
    return [
        render(task, example, [shown[i] for i in draw_shots(index, count, len(examples))])
        for index, example in enumerate(asked)
    ]


def gold_of(task: CoreTask, examples: Sequence[Example], control: str | None = None) -> list[int | None]:
    """The right choice of every example, None for language modelling."""
    asked = with_other_answers(task, examples, may_be_right=True) if control == "shuffled_answers" else examples
    return [example["gold"] if task.kind in OPTIONS else None for example in asked]


def with_other_answers(task: CoreTask, examples: Sequence[Example], may_be_right: bool) -> list[Example]:
    """The examples with answers drawn at random: among an example's choices, or from another's continuation."""
    rng = random.Random(CONTROL_SEED)
    changed = []
    for index, example in enumerate(examples):
        if task.kind in OPTIONS:
            choices = [i for i in range(len(example[OPTIONS[task.kind]])) if may_be_right or i != example["gold"]]
            changed.append({**example, "gold": rng.choice(choices)})
        else:
            other = (index + rng.randrange(1, len(examples))) % len(examples) if len(examples) > 1 else index
            changed.append({**example, "continuation": examples[other]["continuation"]})
    return changed


def make_questions(
    task: CoreTask,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    control: str | None = None,
) -> list[Question]:
    """Every example with its shots as tokens, BOS in front if the tokenizer has one.

    Args:
        max_length: longer prompts lose their beginning, except BOS; None crops nothing.
    """
    prompts = prompts_of(task, examples, control)
    texts = [text for rendered in prompts for text in rendered]
    tokens = iter(tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    first = first_tokens(tokenizer)
    return [
        make_question(task.kind, [[*first, *next(tokens)] for _ in rendered], gold, max_length, len(first))
        for rendered, gold in zip(prompts, gold_of(task, examples, control))
    ]


def make_question(
    kind: str, sequences: list[list[int]], gold: int | None, max_length: int | None = None, kept: int = 1
) -> Question:
    """Find what is scored of each sequence; `kept` first tokens survive a crop."""
    common = common_length(sequences)
    if kind == "multiple_choice":
        spans = [(min(common, len(sequence) - 1), len(sequence)) for sequence in sequences]  # never empty
    elif kind == "schema":
        suffix = common_length([sequence[::-1] for sequence in sequences])
        spans = [(len(sequence) - suffix, len(sequence)) for sequence in sequences]
    else:
        sequences, spans = sequences[1:], [(min(common, len(sequences[1]) - 1), len(sequences[1]))]
    spans = [(max(1, start), end) for start, end in spans]  # the first token is predicted from nothing
    group = Group(sequences, spans)
    if max_length is None or group.longest <= max_length:
        return Question(group, gold)
    cropped = [crop(sequence, span, max_length, kept) for sequence, span in zip(sequences, spans)]
    return replace(Question(Group(*map(list, zip(*cropped))), gold), cropped=True)


def crop(
    sequence: list[int], span: tuple[int, int], max_length: int, kept: int = 1
) -> tuple[list[int], tuple[int, int]]:
    """The first `kept` tokens and the last ones, `max_length` together, with the span moved along."""
    lost = max(0, len(sequence) - max_length)
    start, end = (max(1, place - lost) for place in span)
    return [*sequence[:kept], *sequence[kept + lost :]], (start, end)
