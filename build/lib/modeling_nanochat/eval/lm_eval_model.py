"""Our models in lm-evaluation-harness, for the hundreds of tasks it has.

    python -m modeling_nanochat.eval.lm_eval_model --model nanochat --model_args pretrained=out/demo/sft \\
        --tasks arc_easy,gsm8k

The arguments are lm-eval's own (`lm_eval --help`). A checkpoint also works there as it is, with `--model hf`; this
class differs in three things: BOS in front of every text without being asked for; text likelihoods that see BOS once
(with `hf` it comes twice, which shifts bits per byte by more than many an improvement); and the calculator at hand
while it generates. CORE is not among its tasks: `eval/core.py` is the one that agrees with upstream.
"""

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import modeling_nanochat  # noqa: F401 (registers the network with the Auto classes)
from modeling_nanochat.tool_use import CalculatorLogitsProcessor


@register_model("nanochat")
class NanoChatLM(HFLM):
    """lm-eval's Hugging Face model with BOS and calculator; takes the same arguments."""

    def __init__(self, pretrained: Any, add_bos_token: bool = True, **arguments: Any):
        super().__init__(pretrained, add_bos_token=add_bos_token, **arguments)
        self.tokenizer.add_bos_token = add_bos_token  # the parent leaves a tokenizer object as it is
        self.calculator = CalculatorLogitsProcessor(self.tokenizer)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats. The parent puts BOS in front of them, so the tokenizer must not."""
        wanted, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = wanted

    def _model_generate(self, context: torch.Tensor, **options: Any) -> torch.Tensor:
        return super()._model_generate(context, logits_processor=[self.calculator], **options)


if __name__ == "__main__":
    cli_evaluate()
