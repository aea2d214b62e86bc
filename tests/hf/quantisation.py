"""Int8 weights by torchao and by bitsandbytes, on a CPU.

Neither library is part of the installation: Transformers imports both wherever they are, with warnings at every start.
So plain pytest does not collect this file:

    pip install torchao==0.18.0 bitsandbytes==0.50.2
    python -m pytest tests/hf/quantisation.py
"""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.toys import whole_model


@pytest.mark.parametrize("era", ["seed", "head"])
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_int8_weights(library, era, tmp_path):
    model = whole_model(era)
    model.save_pretrained(tmp_path)
    input_ids = torch.randint(320, (2, 21), generator=torch.Generator().manual_seed(1))
    by_torchao = library == "torchao"
    quantisation = TorchAoConfig(Int8WeightOnlyConfig()) if by_torchao else BitsAndBytesConfig(load_in_8bit=True)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, device_map="cpu")
    weight = quantised.model.layers[0].mlp.up_proj.weight
    assert (weight.qdata if by_torchao else weight).dtype == torch.int8
    with torch.no_grad():
        logits, expected = quantised(input_ids).logits, model(input_ids).logits
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1] > 0.998
    assert quantised.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=4).shape[0] == 2
