"""CORE's tasks for lm-evaluation-harness: the YAML files beside this one name the 22 tasks, `core` is their group.

    nanochat-eval --model_args pretrained=out/d20/base --tasks core --metadata '{"core_bundle": "out/eval_bundle"}'

Prompts, shots, spans and decisions are the native runner's: a request goes to the model class whole, as an example with
all its choices (`NanoChatLM.span_scores`), since the harness's own likelihoods split texts by characters where CORE
splits them by tokens. The price: these tasks run with `--model nanochat` only, which takes any causal language model.
A `--limit` leaves the pool of shots whole; `core_examples` in the metadata cuts it, as the native runner does.
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble

from modeling_nanochat.eval.core.bundle import load_examples, read_tasks
from modeling_nanochat.eval.core.prompts import gold_of, prompts_of

DEFAULT_BUNDLE = "out/eval_bundle"


class CoreBundleTask(Task):
    """A task of the bundle; `metadata` has its `label`, and may have `core_bundle` and `core_examples`."""

    VERSION = 1
    OUTPUT_TYPE = "span_scores"

    def __init__(self, config: dict[str, Any]):
        metadata = config.get("metadata") or {}
        self._config = TaskConfig(task=config["task"], num_fewshot=0, output_type="multiple_choice", metadata=metadata)
        (self.task,) = read_tasks(metadata.get("core_bundle", DEFAULT_BUNDLE), [metadata["label"]])
        examples = load_examples(self.task, metadata.get("core_examples"))
        prompts, gold = prompts_of(self.task, examples), gold_of(self.task, examples)
        self.docs = [{"prompts": texts, "gold": right} for texts, right in zip(prompts, gold)]
        self._instances: list[Instance] | None = None
        self._filters = [build_filter_ensemble("none", [["take_first", None]])]
        self.fewshot_rnd = None

    def has_training_docs(self) -> bool:
        return False

    has_validation_docs = has_training_docs

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        return self.docs

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return doc["prompts"][-1]

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return str(doc["gold"])

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        return self.doc_to_text(doc)  # the shots are in the prompts already

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        arguments = (ctx, self.task.kind, doc["prompts"], doc["gold"])
        return Instance(self.OUTPUT_TYPE, doc, arguments, 0, metadata=kwargs["metadata"])

    def process_results(self, doc: dict[str, Any], results: list[bool]) -> dict[str, float]:
        (correct,) = results
        baseline = self.task.baseline
        return {"acc": float(correct), "centered": (float(correct) - baseline) / (1 - baseline)}

    def aggregation(self) -> dict[str, Any]:
        return {"acc": mean, "centered": mean}

    def higher_is_better(self) -> dict[str, bool]:
        return {"acc": True, "centered": True}
