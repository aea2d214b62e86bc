"""What a stage came to, in a sentence for somebody who did not read the settings: printed when it ends, and in the
report. A stage without one here says its figures alone.
"""

import math
from collections.abc import Callable
from typing import Any

from modeling_nanochat.recipes.stages.numbers import readable_number
from modeling_nanochat.recipes.stages.tables import is_interval

Record = dict[str, Any]


def sentence(record: Record) -> str:
    """The sentence of a finished stage's record; empty if there is none, or if its figures are not there."""
    try:
        return SENTENCES[record["name"]](record["results"])
    except KeyError:
        return ""


def of_tokenizer(results: Record) -> str:
    return (
        f"It knows {results['vocabulary']:,} pieces of text; one holds {results['bytes_per_token']:.1f} bytes on "
        "average, so the model reads that many times fewer pieces than bytes."
    )


def of_pretraining(results: Record) -> str:
    bits, tokens = mean(results["validation_bits_per_byte"]), readable_number(results["tokens"]).strip()
    return (
        f"It has read {tokens} tokens and needs {bits:.2f} bits to guess a byte of text that it has not seen: one that "
        "knows nothing needs 8, a large model about 0.7. It goes on with text; it does not answer yet."
    )


def of_sft(results: Record) -> str:
    before, after = (math.exp(-mean(results[name])) for name in ("validation_loss_before", "validation_loss"))
    conversations = readable_number(results["conversations"]).strip()
    return (
        f"It has read {conversations} conversations and answers now: each next piece of a right answer has a chance of "
        f"about {after:.0%}, and had {before:.1%} before."
    )


def of_reinforcement(results: Record) -> str:
    before, after = results["pass@1_before"], results["pass@1_after"]
    change = f"It solved {mean(before):.0%} of problems that it has not seen, and solves {mean(after):.0%} now"
    if not (is_interval(before) and is_interval(after)):
        return f"{change}."
    (low, high), (low_now, high_now) = bounds(before), bounds(after)
    return change + ("; the intervals overlap, so this may be chance." if high >= low_now and high_now >= low else ".")


SENTENCES: dict[str, Callable[[Record], str]] = {
    "tokenizer": of_tokenizer,
    "pretrain": of_pretraining,
    "sft": of_sft,
    "rl": of_reinforcement,
}


def mean(value: Any) -> float:
    """Of a number or an interval, also of one that was read from its file."""
    return value["mean"] if isinstance(value, dict) else float(value)


def bounds(interval: Any) -> tuple[float, float]:
    known = interval if isinstance(interval, dict) else vars(interval)
    return known["low"], known["high"]
