"""Our networks under Transformers' common tests: the launch era (plain), the seed (value embeddings, windows) and the
head (smear, backout).

Run by `tests/hf/run.py`, which puts the package `transformers_tests` on the path. Not named test_*.py, so that plain
pytest does not collect it.
"""

import unittest

import torch
from transformers import initialization as init
from transformers.models.auto import modeling_auto
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, NanoChatGPTModel
from modeling_nanochat.modeling_nanochat_gpt import NanoChatGPTPreTrainedModel
from tests.hf.exclusions import EXCLUSIONS

# The tests tell by these tables what a class is for.
modeling_auto.MODEL_MAPPING_NAMES["nanochat_gpt"] = "NanoChatGPTModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nanochat_gpt"] = "NanoChatGPTForCausalLM"

OWN_INIT_WEIGHTS = NanoChatGPTPreTrainedModel._init_weights


def init_weights_without_zeros(self, module):
    """Fresh networks have zero output projections, so attention and MLP add nothing: the tests would prove little."""
    OWN_INIT_WEIGHTS(self, module)
    if getattr(module, "init_rule", None) in ("zero", "gate"):
        init.normal_(module.weight, std=self.config.hidden_size**-0.5)


NanoChatGPTPreTrainedModel._init_weights = init_weights_without_zeros


class NanoChatGPTTester:
    """What the common tests ask: a tiny configuration, and inputs for it."""

    causal_lm_class = NanoChatGPTForCausalLM
    batch_size, seq_length, hidden_size, vocab_size = 3, 7, 64, 99
    num_hidden_layers, num_attention_heads = 2, 4
    is_training = True

    def __init__(self, era: str):
        self.era = era

    def get_config(self) -> NanoChatGPTConfig:
        return NanoChatGPTConfig.from_depth(
            self.num_hidden_layers,
            era=self.era,
            vocab_size=self.vocab_size,
            head_dim=self.hidden_size // self.num_attention_heads,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            sliding_window=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[NanoChatGPTConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class CommonTests(ModelTesterMixin, TrainingTesterMixin, GenerationTesterMixin):
    all_model_classes = (NanoChatGPTModel, NanoChatGPTForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # the test is for models that declare no year
    era: str

    def setUp(self):
        self.model_tester = NanoChatGPTTester(self.era)

    def _get_conv_state_shape(self, batch_size: int, config: NanoChatGPTConfig) -> tuple[int, int, int]:
        """What the cache of a layer with smear keeps: one embedding (the tests expect a state-space layer's)."""
        return (batch_size, config.hidden_size, 1)

    def test_config(self):
        ConfigTester(self, config_class=NanoChatGPTConfig, hidden_size=64, num_attention_heads=4).run_common_tests()


def without_exclusions(case: type) -> type:
    for name in EXCLUSIONS["every era"] | EXCLUSIONS.get(case.era, {}):
        assert hasattr(case, name), f"exclusions.py names {name}, which is no common test (any more)"
        setattr(case, name, None)
    if case.era in ("seed", "head"):  # see VALUE_EMBEDDINGS in exclusions.py
        for name in dir(GenerationTesterMixin):
            if name.startswith("test_") and "inputs_embeds" in name:
                setattr(case, name, None)
    return case


@without_exclusions
class LaunchTest(CommonTests, unittest.TestCase):
    era = "launch"


@without_exclusions
class SeedTest(CommonTests, unittest.TestCase):
    era = "seed"


@without_exclusions
class HeadTest(CommonTests, unittest.TestCase):
    era = "head"
