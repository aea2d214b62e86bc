"""Rows padded on the left, eval mode that ends as it began, and weights cast once instead of at every token."""

import pytest
import torch

from modeling_nanochat.decoder_layer import CastLinear
from modeling_nanochat.inference import cast_weights, eval_mode, pad_left, weights_cast_once
from tests.toys import drawn_model


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


@pytest.mark.parametrize("era", ["seed", "head"])
def test_weights_cast_once_change_no_bit(era):
    def bfloat16_model():
        model = drawn_model(4, 0.3, seed=1, vocab_size=64, head_dim=16, aspect_ratio=8, era=era).eval()
        model.set_activation_dtype(torch.bfloat16)
        return model

    model = bfloat16_model()
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        with weights_cast_once(model):
            linears = [module for module in model.modules() if isinstance(module, CastLinear)]
            assert all(linear.cast_weight.dtype == torch.bfloat16 for linear in linears)
            assert torch.equal(model(ids).logits, expected)
        assert all(linear.cast_weight is None for linear in linears)
    assert model(ids).logits.requires_grad
    cast = bfloat16_model()
    cast_weights(cast, torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(cast(ids).logits, expected)
    assert cast.lm_head.weight.dtype == torch.bfloat16
