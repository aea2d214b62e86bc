"""The step's time on GPUs that are not here, against runs that were published: one fitted, the others predicted."""

import pytest
import torch

from modeling_nanochat import NanoChatGPTConfig
from modeling_nanochat.training.devices import DEVICES
from modeling_nanochat.training.optimizer.shards import AdamWTensors, MuonStack
from modeling_nanochat.training.step_time import (
    bytes_exchanged,
    exchange_seconds,
    optimizer_layout,
    optimizer_seconds,
    step_time,
)

# Seconds a step on eight H100 (training alone): upstream's dev/LEADERBOARD.md, dev/LOG.md and pull request 830 of
# github.com/karpathy/nanochat, and reports that others ran and committed. Steps are those of the horizon where none are
# given. (depth, era, vocabulary, batch, rows, float8, seconds of a step)
FITTED = (24, "seed", 32768, 2**19, 16, False, 10949.467 / 16704)  # record 1, 3.04 h, 2026-01-29
PREDICTED = {
    "a report of 2026-03-06, bfloat16": (24, "softcap20", 32768, 2**20, 16, False, 157.64 * 60 / 7308),
    "a report of 2026-03-04, bfloat16": (16, "softcap20", 32768, 2**19, 32, False, 18.51 * 60 / 4704),
    "a report of 2026-01-07, of the launch": (20, "launch", 65536, 2**19, 32, False, 172.26 * 60 / 21400),
    "the log of 2026-02-02, 630K tokens/s": (26, "seed", 32768, 2**19, 16, False, 2**19 / 630e3),
    "the log of 2026-01-12, 41% MFU": (
        12,
        "lambdas",
        32768,
        2**19,
        32,
        False,
        2**19 * 802167552 / (0.41 * 8 * 989.5e12),
    ),
    "the log of 2026-02-02, 740K in float8": (26, "seed", 32768, 2**19, 16, True, 2**19 / 740e3),
    "record 2, 2.91 h, 2026-02-02": (26, "seed", 32768, 2**19, 16, True, 10493 / 14889),
    "record 3, 2.76 h, 2026-02-05": (26, "seed", 32768, 2**20, 16, True, 9922 / 7226),
    "record 4, 2.02 h, 2026-03-04": (24, "softcap20", 32768, 2**20, 16, True, 2.02 * 3600 / 6612),
    "record 5, 1.80 h, 2026-03-09": (24, "autoresearch1", 32768, 2**20, 16, True, 1.80 * 3600 / 6055),
    "record 6, 1.65 h, 2026-03-14": (24, "head", 32768, 2**20, 16, True, 99 * 60 / 5568),
    "reported, 81.8 min, 2026-08-15": (22, "head", 49152, 2**20, 32, True, 81.835 * 60 / 5312),
}


def ratio(depth, era, vocab_size, batch_tokens, rows, float8, seconds):
    config = NanoChatGPTConfig.from_depth(depth, era=era, vocab_size=vocab_size)
    step = step_time(config, batch_tokens=batch_tokens, rows=rows, device=DEVICES["H100"], gpus=8, float8=float8)
    return step.seconds / seconds


def test_the_run_it_was_fitted_to():
    assert ratio(*FITTED) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("run", PREDICTED)
def test_other_published_runs_are_predicted(run):
    assert ratio(*PREDICTED[run]) == pytest.approx(1, abs=0.12)


def test_more_devices_exchange_more():
    config = NanoChatGPTConfig.from_depth(12)

    def step(gpus, device="H100", **settings):
        return step_time(config, batch_tokens=2**19, rows=4, device=DEVICES[device], gpus=gpus, **settings)

    one, eight, many = step(1), step(8), step(64)
    assert one.parts["exchange not hidden"] == 0 < eight.parts["exchange not hidden"]
    assert one.parts["optimizer"] > eight.parts["optimizer"] > many.parts["optimizer"]  # each steps its share
    assert 1 / 8 < eight.seconds / one.seconds < 1 / 7 and 1 / 64 < many.seconds / one.seconds < 1 / 30
    assert step(8, "L40S").parts["exchange not hidden"] > 5 * eight.parts["exchange not hidden"]  # PCI Express
    with pytest.raises(ValueError, match="expected a multiple"):
        step_time(config, batch_tokens=3 * 2**17, rows=32, device=DEVICES["H100"], gpus=8)


def test_float8_pays_from_some_width_on():
    """Scaling costs passes: upstream found depth 12 slower with it and depth 26 faster (dev/LOG.md, 2026-02-02)."""

    def products(depth, float8):
        settings = {"batch_tokens": 2**19, "rows": 16, "device": DEVICES["H100"], "gpus": 8, "float8": float8}
        return step_time(NanoChatGPTConfig.from_depth(depth), **settings).parts["matrix products"]

    assert products(12, True) > products(12, False) and products(26, True) < 0.92 * products(26, False)


def test_checkpointed_blocks_go_forward_twice():
    config = NanoChatGPTConfig.from_depth(24)
    settings = {"batch_tokens": 2**19, "rows": 16, "device": DEVICES["H100"], "gpus": 8}
    once, twice = (step_time(config, **settings, checkpointed=each).parts for each in (False, True))
    again = twice.pop("forward again")
    blocks = once["matrix products"] + once["attention"] + once["elementwise"]
    assert twice == once and 0.28 * blocks < again < blocks / 3


def test_the_exchange_hides_behind_updates():
    """Waiting is what the links take beyond the work that they run beside, and never more than they take."""
    config = NanoChatGPTConfig.from_depth(20)
    for gpus in (8, 64):
        layout = optimizer_layout(config, 2**19, gpus)
        taken = sum(
            exchange_seconds(collective, size, DEVICES["H100"], gpus)
            for part in layout
            for collective, size in bytes_exchanged(part).items()
        )
        work, waiting = optimizer_seconds(layout, DEVICES["H100"], gpus)
        assert taken - work <= waiting < taken


def test_a_stack_that_does_not_divide_is_padded():
    """24 matrices on 64 ranks travel as 64."""
    config = NanoChatGPTConfig.from_depth(24)
    ups = [part for part in optimizer_layout(config, 2**19, 64) if isinstance(part, MuonStack)]
    ups = next(part for part in ups if part.parameters[0].shape == (6144, 1536))
    assert bytes_exchanged(ups)["reduce_scatter"] == 64 * 6144 * 1536 * 4 and len(ups.owned) == 1


def test_tables_travel_in_bfloat16_and_tiny_tensors_are_averaged_whole():
    parts = optimizer_layout(NanoChatGPTConfig.from_depth(4), 2**19, 8)
    tables = [part for part in parts if isinstance(part, AdamWTensors)]
    sizes = [bytes_exchanged(part) for part in tables]
    assert {"reduce_scatter": 32768 * 256 * 2, "all_gather": 32768 * 256 * 2, "all_reduce": 0} in sizes
    assert {"reduce_scatter": 0, "all_gather": 0, "all_reduce": 4 * 4} in sizes
    assert all(parameter.is_meta for part in tables for parameter in [shard.parameter for shard in part.shards])
    assert torch.bfloat16 in {shard.parameter.dtype for part in tables for shard in part.shards}
