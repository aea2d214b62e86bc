"""Bits per byte as a metric of the library `evaluate`, from its folder and without a network.

    evaluate.load("eval/metrics/bits_per_byte").compute(predictions=texts, model="out/d20/base")

`predictions` are the texts that the model is measured on; the number is the one of `nanochat evaluate`.
"""

import datasets
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_nanochat  # noqa: F401 (registers the network with the Auto classes)
from modeling_nanochat.eval.bits_per_byte import TextLoss, documents_loss


class BitsPerByte(evaluate.Metric):
    """Summed loss of whole texts in bits, divided by their bytes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: texts; model: folder or Hub name; batch_tokens: tokens read at once",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], model: str, batch_tokens: int = 16384) -> dict[str, float]:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
        loss = TextLoss.total(documents_loss(network, tokenizer, predictions, batch_tokens))
        return {"bits_per_byte": loss.bits_per_byte, "bytes": loss.bytes}
