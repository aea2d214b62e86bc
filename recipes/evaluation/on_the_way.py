"""What `nanochat evaluate` measures, measured while a network is trained: its figures go to the trainer's log.

All ranks measure together. Under FSDP every rank does all of the work, as sharded weights need the same batches
everywhere (`training/ranks.py`).
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.intervals import Interval
from modeling_nanochat.eval.models import context_length
from modeling_nanochat.recipes.evaluation.arguments import (
    ChatTaskArguments,
    CoreArguments,
    EvaluateArguments,
    OnTheWayArguments,
)
from modeling_nanochat.recipes.evaluation.core import core_tasks
from modeling_nanochat.recipes.evaluation.measures import Subject, check_tasks, measure
from modeling_nanochat.training.trainers.pretrain import Evaluation

ANSWER_TOKENS = 256  # of an answer that is sampled, at most; half the context where that is less


def measured_on_the_way(arguments: OnTheWayArguments, tokenizer: PreTrainedTokenizerBase) -> list[Evaluation]:
    """An evaluation for a trainer, or none; data that is missing is said now, before anything is trained."""
    if not arguments.measure_tasks:
        return []
    check_tasks(arguments.measure_tasks, arguments.measure_data)
    most = arguments.measure_examples
    general = EvaluateArguments(tasks=arguments.measure_tasks, data=arguments.measure_data)
    core = CoreArguments(core_bundle=arguments.core_bundle, core_examples=most)
    tasks = core_tasks(core) if "core" in arguments.measure_tasks else []

    def run(model: PreTrainedModel, step: int) -> dict[str, float]:
        room = min(ANSWER_TOKENS, (context_length(model) or 2 * ANSWER_TOKENS) // 2)
        chat = ChatTaskArguments(max_questions=most, max_problems=most, temperature=0.0, max_new_tokens=room)
        figures = measure(Subject(model, tokenizer, general, chat, core, tasks), f"step {step}").figures
        if "bits_per_byte" in figures:  # the trainers' own is of packed rows
            figures["documents_bits_per_byte"] = figures.pop("bits_per_byte")
        return {name: float(value) for name, value in figures.items() if isinstance(value, (int, float, Interval))}

    return [Evaluation(run, arguments.measure_every)]
