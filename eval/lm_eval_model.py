"""Our models, and any causal language model, in lm-evaluation-harness, for the hundreds of tasks it has and for CORE.

    nanochat-eval --model_args pretrained=out/demo/sft --tasks arc_easy,gsm8k --batch_size auto
    nanochat-eval --model_args pretrained=out/d20/base --tasks core --metadata '{"core_bundle": "out/eval_bundle"}'

The arguments are lm-eval's own (`nanochat-eval --help`). A checkpoint also works there as it is, with `--model hf`;
this class differs in four things: BOS in front of every text without being asked for; text likelihoods that see BOS
once (with `hf` it comes twice, which shifts bits per byte by more than many an improvement); the calculator at hand
while it generates; and CORE's scores, mean losses of spans of tokens, which the harness has no request for.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import modeling_nanochat  # noqa: F401 (registers the network with the Auto classes)
from modeling_nanochat.eval.core.prompts import make_question
from modeling_nanochat.eval.core.scores import judge
from modeling_nanochat.eval.models import first_tokens, hard_context, has_nanochat_tokens
from modeling_nanochat.eval.span_scores import SpanScorer
from modeling_nanochat.tokenization_nanochat_gpt import encode_text
from modeling_nanochat.tool_use import CalculatorLogitsProcessor

TASKS = Path(__file__).with_name("lm_eval_tasks")


@register_model("nanochat")
class NanoChatLM(HFLM):
    """lm-eval's Hugging Face model with BOS, calculator and span scores; takes the same arguments."""

    def __init__(self, pretrained: Any, add_bos_token: bool | None = None, **arguments: Any):
        super().__init__(pretrained, **{"backend": "causal", "add_bos_token": add_bos_token, **arguments})
        self.add_bos_token = self.tokenizer.bos_token_id is not None if add_bos_token is None else add_bos_token
        self.tokenizer.add_bos_token = self.add_bos_token  # the parent leaves a tokenizer object as it is
        self.tools = [CalculatorLogitsProcessor(self.tokenizer)] if has_nanochat_tokens(self.tokenizer) else []

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats. The parent puts BOS in front of them, so the tokenizer must not."""
        wanted, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = wanted

    def span_scores(self, requests: list[Instance]) -> list[bool]:
        """CORE's decision of every request: (prompt, kind of task, prompts of all choices, right choice)."""
        first = first_tokens(self.tokenizer)
        limit = hard_context(self.model)
        questions = []
        for request in requests:
            _, kind, prompts, gold = request.args
            sequences = [[*first, *encode_text(self.tokenizer, text)] for text in prompts]
            questions.append(make_question(kind, sequences, gold, limit, len(first)))
        scores = SpanScorer(self.model)([question.group for question in questions], "CORE")
        return [judge(question, found).correct for question, found in zip(questions, scores)]

    def _model_generate(self, context: torch.Tensor, **options: Any) -> torch.Tensor:
        return super()._model_generate(context, logits_processor=self.tools, **options)


def main() -> None:
    """The command `nanochat-eval`: lm-eval's own, with this model class and CORE's tasks unless told otherwise.

    What is wrong with a file or a setting ends in one line and exit code 2, as in every command here.
    """
    if {"--tasks", "-t"} & set(sys.argv):
        sys.argv += [] if {"--model", "-M"} & set(sys.argv) else ["--model", "nanochat"]
        sys.argv += [] if "--include_path" in sys.argv else ["--include_path", str(TASKS)]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
