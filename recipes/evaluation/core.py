"""CORE of a model, on all ranks together."""

from collections.abc import Sequence
from functools import partial

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.core.bundle import CoreTask, read_tasks
from modeling_nanochat.eval.core.scores import TaskResult, evaluate_task
from modeling_nanochat.eval.span_scores import SpanScorer
from modeling_nanochat.recipes.data.core_bundle import provide_bundle
from modeling_nanochat.recipes.evaluation.arguments import CoreArguments
from modeling_nanochat.training.ranks import over_ranks


def core_tasks(arguments: CoreArguments) -> list[CoreTask]:
    """The tasks that the arguments name; their bundle is fetched if it is not there."""
    return read_tasks(provide_bundle(arguments.core_bundle, arguments.core_bundle_url), arguments.core_tasks)


def run_core(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[CoreTask],
    arguments: CoreArguments,
    batch_tokens: int = 16384,
) -> list[TaskResult]:
    """The answers of every task; says which prompts were beyond the model's context."""
    scorer = SpanScorer(model, batch_tokens)
    deal = partial(over_ranks, model=model)
    quiet = not PartialState().is_main_process
    results = []
    for task in tasks:
        result = evaluate_task(
            scorer, tokenizer, task, deal=deal, quiet=quiet,
            max_examples=arguments.core_examples, max_length=arguments.core_max_length, control=arguments.core_control,
        )  # fmt: skip
        few = result.shots < task.num_fewshot and arguments.core_control != "no_shots"
        if (result.beyond_context or few) and not quiet:
            tqdm.write(
                f"{task.label}: {result.beyond_context} of {len(result.answers)} prompts are beyond the context, "
                f"{result.cropped} were cropped (the longest has {result.longest_prompt} tokens), {result.shots} of "
                f"{task.num_fewshot} shots were there"
            )
        results.append(result)
    return results
