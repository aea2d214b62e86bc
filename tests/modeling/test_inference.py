"""Rows padded on the left, and eval mode that ends as it began."""

import pytest
import torch

from modeling_nanochat.inference import eval_mode, pad_left


def test_pad_left():
    ids, mask = pad_left([[5, 6, 7], [8]], pad_token_id=9, device="cpu")
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_is_left_as_it_was_entered(training):
    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).train(training)
    with eval_mode(model):
        assert not model.training and not model[0].training
    assert model.training == model[0].training == training
    with pytest.raises(RuntimeError), eval_mode(model):
        raise RuntimeError
    assert model.training == training
