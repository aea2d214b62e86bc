"""ChatCORE while a chat model is being trained: lettered questions and problems with a number, answered greedily.

It is the ChatCORE of `nanochat evaluate` over these two tasks, on fewer questions.
"""

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_nanochat.eval.multiple_choice import chat_core
from modeling_nanochat.recipes.evaluation.arguments import ChatTaskArguments, CoreArguments, EvaluateArguments
from modeling_nanochat.recipes.evaluation.measures import Subject, measure_multiple_choice, measure_problems

ANSWER_TOKENS = 256  # of a problem, at most; half the context where that is less


def chat_core_on_the_way(
    tokenizer: PreTrainedTokenizerBase, data: str, questions: int
) -> Callable[[PreTrainedModel, int], dict[str, float]]:
    """An evaluation for a trainer: (model, step) -> `chat_core` and the accuracy of each task.

    Args:
        data: folder of `nanochat prepare_data` with `eval/multiple_choice.jsonl` and `rl/validation.jsonl`.
        questions: of each task, at most.

    Raises:
        ValueError: when called, if a file is not there.
    """

    def run(model: PreTrainedModel, step: int) -> dict[str, float]:
        room = min(ANSWER_TOKENS, model.config.max_position_embeddings // 2)
        chat = ChatTaskArguments(max_questions=questions, max_problems=questions, temperature=0.0, max_new_tokens=room)
        subject = Subject(model, tokenizer, EvaluateArguments(data=data), chat, CoreArguments())
        accuracies = measure_multiple_choice(subject).accuracies | measure_problems(subject).accuracies
        figures = {f"chat_core/{name}": accuracy.accuracy for name, accuracy in accuracies.items()}
        return {"chat_core": chat_core(list(accuracies.values())), **figures}

    return run
