"""How a checkpoint decodes without being told: with its calculator, in `generate` and in continuous batching.

Both are hooks that the library calls on the model, so pipelines, lm-eval and servers get them too. The price is one
private name of the library (`_get_logits_processor`), which every way of decoding goes through.
"""

import copy

from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from .block_attention import BLOCK_ATTENTION
from .tool_use import CalculatorLogitsProcessor, has_calculator, tokenizer_of_checkpoint


class OwnDecodingMixin:
    """Goes before a causal language model of the library."""

    def calculator(self, tokenizer: PreTrainedTokenizerBase) -> CalculatorLogitsProcessor:
        """For `generate(..., logits_processor=[model.calculator(tokenizer)])` with another tokenizer than the folder's,
        also where only the folder's code is."""
        return CalculatorLogitsProcessor(tokenizer)

    def _uses_calculator(self, generation_config: GenerationConfig | None) -> bool:
        own = getattr(self.generation_config, "use_calculator", False)
        return bool(getattr(generation_config, "use_calculator", own))

    def _get_logits_processor(self, generation_config: GenerationConfig, *args, **kwargs) -> LogitsProcessorList:
        """What every way of decoding asks for. Adds the calculator to it, behind everything that changes scores, where
        the generation settings say `use_calculator` and the caller has not brought one.

        So `generate`, a pipeline, lm-eval and a server compute without being told; `use_calculator=False` in the call
        or in generation_config.json switches it off.
        """
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if self._uses_calculator(generation_config) and not has_calculator(processors):
            tokenizer = tokenizer_of_checkpoint(self.config._name_or_path, getattr(self.config, "_commit_hash", None))
            processors.append(CalculatorLogitsProcessor(tokenizer))
        return processors

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *args,
        **kwargs,
    ):
        """The entry to `generate_batch` and its server; paged attention runs on SDPA or a flash kernel.

        Raises:
            ValueError: for a network with smear, whose last embedding the paged cache has no place for.
        """
        if self.config.smear_channels:
            raise ValueError(
                f"smear_channels is {self.config.smear_channels}, expected 0 for continuous batching: the paged cache "
                "keeps no embedding beside keys and values; use generate() with a left-padded batch"
            )
        if self._uses_calculator(generation_config):
            settings = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
            settings.per_request_processors, settings.use_async_batching = True, False  # see tool_use.py
            continuous_batching_config = settings
        before = self.config._attn_implementation
        if before == BLOCK_ATTENTION:
            self.set_attn_implementation("sdpa")
        manager = super().init_continuous_batching(generation_config, continuous_batching_config, *args, **kwargs)
        if before == BLOCK_ATTENTION:
            manager._original_attn_impl = before  # what the manager restores when it stops
        return manager
