"""The nanochat network: one class for every era of upstream's checkpoints, at home in Transformers.

A GPT without biases, learnt norms or tied embeddings: rotary positions, normalised queries and keys, squared ReLU, a
soft-capped head; from 2026-01 gated value embeddings, learnt residual weights and sliding windows; from 2026-03
smeared embeddings and backout. The configuration says what a network has (`configuration_nanochat_gpt.py`).

Master weights may stay in float32 while activations run in bfloat16: every Linear casts its weight in forward, which
costs one pass over the weight and, unlike autocast, compiles to the same numbers as eager. The loss never leaves its
chunk, so a training step has no logits unless they are asked for.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .block_attention import BLOCK_ATTENTION
from .chunked_cross_entropy import (
    IGNORE_INDEX,
    chunked_cross_entropy,
    chunked_token_losses,
    chunked_weighted_loss,
)
from .configuration_nanochat_gpt import INIT_SCHEMES, NanoChatGPTConfig
from .decode_step import step_for
from .decoder_layer import (
    CastLinear,
    MarkedEmbedding,
    NanoChatGPTAttention,
    NanoChatGPTDecoderLayer,
    NanoChatGPTRMSNorm,
    NanoChatGPTRotaryEmbedding,
    marked_linear,
)
from .growing_cache import grow_in_place
from .own_decoding import OwnDecodingMixin

# Where a saved folder finds its code. Transformers alone would write no AutoModel entry for a network with a head.
AUTO_MAP = {
    "AutoConfig": "configuration_nanochat_gpt.NanoChatGPTConfig",
    "AutoModel": "modeling_nanochat_gpt.NanoChatGPTModel",
    "AutoModelForCausalLM": "modeling_nanochat_gpt.NanoChatGPTForCausalLM",
}


class ResidualScalars(nn.Module):
    """Learnt weights of the residual stream, float32 vectors in a module of their own so that they can be initialised.

    Before block i the stream becomes resid_lambdas[i] * x + x0_lambdas[i] * x0, x0 being the first embedding.
    """

    def __init__(self, config: NanoChatGPTConfig):
        super().__init__()
        self.init_rule = "scalars"
        self.resid_lambdas = nn.Parameter(torch.empty(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.empty(config.num_hidden_layers))
        if config.smear_channels:
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.use_backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))

    def forward(self, name: str) -> torch.Tensor:
        """The vector of that name: by a call, not an attribute, as weights offloaded to disk only come for a call."""
        return getattr(self, name)


class NanoChatGPTPreTrainedModel(PreTrainedModel):
    """Flags that tell Transformers what these networks can do, and how fresh weights are drawn."""

    config_class = NanoChatGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatGPTDecoderLayer"]  # noqa: RUF012 (a field of the parent class)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": NanoChatGPTDecoderLayer,
        "attentions": NanoChatGPTAttention,
    }

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """Without a request: blocks of queries on a machine without CUDA, SDPA (the parent's choice) with it."""
        if attn_implementation is None and not torch.cuda.is_available():
            attn_implementation = BLOCK_ATTENTION
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Upstream's initialisation. Only the owner of a tensor initialises it: Transformers skips the others."""
        rule = getattr(module, "init_rule", None)
        if rule is None:
            return super()._init_weights(module)
        if rule == "scalars":
            return self._init_scalars(module)
        scheme = INIT_SCHEMES[self.config.init_scheme]
        bound = (3 / self.config.hidden_size) ** 0.5  # a uniform distribution of standard deviation hidden ** -0.5
        if rule == "embedding":
            init.normal_(module.weight, std=scheme["embedding_std"])
        elif rule == "head":
            init.normal_(module.weight, std=0.001)
        elif rule == "input":
            init.uniform_(module.weight, -bound, bound)
        elif rule == "up":
            bound *= scheme["up_factor"]
            init.uniform_(module.weight, -bound, bound)
        elif rule == "gate" and scheme["gate_high"]:
            init.uniform_(module.weight, 0.0, scheme["gate_high"])
        else:  # "zero", and gates that start at zero
            init.zeros_(module.weight)

    def _init_scalars(self, scalars: ResidualScalars):
        n = self.config.num_hidden_layers
        depth = torch.arange(n) / max(n - 1, 1)  # 0 for the first layer, 1 for the last
        for name in ("resid_lambdas", "x0_lambdas"):
            first, fall = INIT_SCHEMES[self.config.init_scheme][name]
            init.copy_(getattr(scalars, name), first - fall * depth)
        if self.config.smear_channels:
            init.zeros_(scalars.smear_lambda)
        if self.config.use_backout:
            init.constant_(scalars.backout_lambda, 0.2)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resizes the token embedding, the head, and the value embeddings, which are looked up by the same ids."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        for table in self.base_model.value_embeddings.values():
            self._get_resized_embeddings(table, embeddings.num_embeddings, mean_resizing=mean_resizing)
        return embeddings

    def _get_resized_lm_head(self, old_lm_head: nn.Linear, *args, **kwargs) -> nn.Linear:
        """The parent builds a new Linear, which would not know how it is drawn nor follow the activations' dtype."""
        resized = super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        old_lm_head.weight, old_lm_head.out_features = resized.weight, resized.out_features
        return old_lm_head

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves weights, configuration and code: `trust_remote_code=True` then loads the folder without this package.

        The map is written anew each time, so that a model that came from the Hub does not point back there.
        """
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


class NanoChatGPTModel(NanoChatGPTPreTrainedModel):
    """The network without its head: token ids to hidden states after the last norm."""

    def __init__(self, config: NanoChatGPTConfig):
        super().__init__(config)
        self.activation_dtype: torch.dtype | None = None
        self.embed_tokens = MarkedEmbedding(config.vocab_size, config.hidden_size, "embedding")
        self.layers = nn.ModuleList(NanoChatGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): MarkedEmbedding(config.vocab_size, config.num_key_value_heads * config.head_dim, "input")
                for i in range(config.num_hidden_layers)
                if config.has_value_embedding(i)
            }
        )
        if config.use_residual_scalars:
            self.residual_scalars = ResidualScalars(config)
        if config.smear_channels:
            self.smear_gate = marked_linear(config.smear_channels, 1, "gate")
        self.embed_norm, self.norm = (NanoChatGPTRMSNorm(config.rms_norm_eps) for _ in range(2))
        self.rotary_emb = NanoChatGPTRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """(B, T) token ids -> (B, T, C) hidden states.

        `inputs_embeds` replaces the token embeddings; networks with value embeddings need the token ids beside it.

        Raises:
            ValueError: without token ids or embeddings, or if value embeddings are to be looked up without ids.
        """
        if inputs_embeds is None and input_ids is None:
            raise ValueError("input_ids and inputs_embeds are both None, expected at least one of them")
        if input_ids is None and len(self.value_embeddings):
            raise ValueError(
                "inputs_embeds came without input_ids: this network looks value embeddings up by token id "
                "(use_value_embeddings is True); pass the ids beside the embeddings"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.activation_dtype is not None:
            inputs_embeds = inputs_embeds.to(self.activation_dtype)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            grow_in_place(past_key_values)

        masks = self._attention_masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, past_key_values)
        else:
            kwargs["position_ids"] = position_ids  # flash kernels read packed sequences from them
        hidden_states = self.embed_norm(inputs_embeds)
        if self.config.smear_channels:
            if "attention_instances" in kwargs:
                raise ValueError(
                    f"smear_channels is {self.config.smear_channels}, expected 0 where vLLM does the attention: its "
                    "cache keeps no embedding beside keys and values"
                )
            hidden_states = self._smear(hidden_states, position_ids, past_key_values)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self._run_layers(
            hidden_states, input_ids, position_embeddings, masks, past_key_values, **kwargs
        )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _run_layers(
        self, hidden_states, input_ids, position_embeddings, masks, past_key_values, **kwargs
    ) -> torch.Tensor:
        """The blocks, from the embedding to the stream before the last norm. (B, T, C) -> (B, T, C)"""
        config = self.config
        first_embedding = hidden_states
        residual_weights = [None] * config.num_hidden_layers
        if config.use_residual_scalars:
            vectors = self.residual_scalars("resid_lambdas"), self.residual_scalars("x0_lambdas")
            residual_weights = list(zip(*(vector.unbind() for vector in vectors)))
        for i, layer in enumerate(self.layers):
            value_embedding = None
            if config.has_value_embedding(i):
                value_embedding = self.value_embeddings[str(i)](input_ids).to(hidden_states.dtype)  # (B, T, H_kv * D)
            hidden_states = layer(
                hidden_states,
                first_embedding,
                residual_weights[i],
                value_embedding,
                position_embeddings,
                attention_mask=masks["sliding_attention" if "sliding" in config.layer_types[i] else "full_attention"],
                past_key_values=past_key_values,
                **kwargs,
            )
            if config.use_backout and i == config.num_hidden_layers // 2:
                middle = hidden_states
        if config.use_backout:
            backout_lambda = self.residual_scalars("backout_lambda").to(hidden_states)
            hidden_states = hidden_states - backout_lambda * middle.to(hidden_states.device)
        return hidden_states

    def _smear(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Adds to each embedding a gated share of the one before it; the token at position 0 has none before it.

        With a cache the last embedding (before smearing) is kept as layer 0's convolution state of one position.
        """
        length = hidden_states.shape[1]
        before = F.pad(hidden_states, (0, 0, 1, 0))  # (B, 1 + T, C)
        if past_key_values is not None:
            states = past_key_values.update_conv_state(hidden_states.transpose(1, 2), 0, conv_kernel_size=1)
            before = F.pad(states.transpose(1, 2), (0, 0, 1, 0))
        before = before[:, -length - 1 : -1]  # (B, T, C)
        gate = torch.sigmoid(self.smear_gate(hidden_states[..., : self.config.smear_channels]))  # (B, T, 1)
        gate = gate.to(hidden_states.device)  # a device_map may have put the gate elsewhere
        gate = self.residual_scalars("smear_lambda").to(gate) * gate * (position_ids > 0).unsqueeze(-1)
        return hidden_states + gate * before

    def _positions(self, inputs_embeds, attention_mask, past_key_values) -> torch.Tensor:
        """Positions counted from the first token that a 2-D mask does not hide, else from the cache's length."""
        length = inputs_embeds.shape[1]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(length, device=inputs_embeds.device) + past).unsqueeze(0)

    def _attention_masks(self, inputs_embeds, attention_mask, past_key_values, position_ids) -> dict:
        """One mask for each kind of layer. Only positions the caller gave may split a row into packed sequences."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return self.create_masks_for_generate(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids
        )

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ) -> dict:
        """Masks by kind of layer, also called by `generate`; the library's own gives hybrid layers no window."""
        arguments = (config, inputs_embeds, attention_mask, past_key_values, position_ids)
        masks = {"full_attention": create_causal_mask(*arguments)}
        if any("sliding" in kind for kind in config.layer_types):
            masks["sliding_attention"] = create_sliding_window_causal_mask(*arguments)
        return masks


class NanoChatGPTForCausalLM(OwnDecodingMixin, NanoChatGPTPreTrainedModel, GenerationMixin):
    """The network with its head: next-token logits, the training loss, and `generate`."""

    create_masks_for_generate = staticmethod(NanoChatGPTModel.create_masks_for_generate)

    def __init__(self, config: NanoChatGPTConfig):
        super().__init__(config)
        self.model = NanoChatGPTModel(config)
        self.lm_head = marked_linear(config.hidden_size, config.vocab_size, "head")
        self.post_init()

    def set_activation_dtype(self, dtype: torch.dtype | None) -> None:
        """Runs the network in `dtype` on top of weights of another one; None follows the weights. Is not saved."""
        self.model.activation_dtype = dtype
        old, new = (CastLinear, nn.Linear) if dtype is None else (nn.Linear, CastLinear)
        for module in self.modules():
            if type(module) is old:
                module.__class__ = new

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, or the loss.

        Args:
            input_ids: (B, T).
            labels: (B, T), the input ids themselves; shifted here, so that T - 1 targets of a row count.
            kwargs: `shift_labels` (B, T), the targets of each position: all T count. Beats `labels`; -100 is ignored in
                both. Not by name in the signature: the Trainer demands every label that a signature names. The rest
                goes to the attention.
            num_items_in_batch: divides the summed loss instead of the number of targets (gradient accumulation).
            logits_to_keep: last positions (or a tensor of indices) whose logits are wanted, 0 for all. If None: all,
                but none with labels in train mode, where the loss is made in chunks that never exist together.

        Returns:
            loss: float32 scalar in nats; logits: (B, kept, V) float32.
        """
        kept = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else None
        others = {"labels": labels, "inputs_embeds": inputs_embeds, "kept": kept, **kwargs}
        step = step_for(self.model, self.lm_head, input_ids, attention_mask, past_key_values, others)
        if step is not None:
            logits = step(input_ids, attention_mask, position_ids, logits_to_keep or 0)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        loss = None if shift_labels is None else self._loss(hidden_states, shift_labels, num_items_in_batch)
        logits = None
        if loss is None or not self.training or logits_to_keep is not None:
            kept = slice_logits_to_keep(hidden_states, 0 if logits_to_keep is None else logits_to_keep)
            logits = self._logits(kept)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, hidden_states, targets, num_items_in_batch) -> torch.Tensor:
        return chunked_cross_entropy(
            hidden_states.flatten(0, 1),
            self._whole_head_weight(),
            targets.flatten().to(hidden_states.device),
            self.config.final_logit_softcapping,
            num_items_in_batch,
        )

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(self.lm_head(hidden_states).float() / cap)

    def _whole_head_weight(self) -> torch.Tensor:
        """(V, C). FSDP2 gathers a weight around its module's own forward, which the chunked loss goes past."""
        weight = self.lm_head.weight
        if hasattr(weight, "full_tensor"):  # a DTensor, whose ranks' gradients FSDP averages
            from torch.distributed.tensor import Partial

            weight = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
        return weight

    @torch.no_grad()
    def token_losses(
        self, input_ids: torch.Tensor, targets: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """-log p(target) at every position, for evaluation.

        Args:
            input_ids: (B, T).
            targets: (B, T), the token after each position, or -100 where none is scored.
            attention_mask: (B, T), 0 where the input is padding.

        Returns:
            (B, T) float32 losses in nats, 0 where the target is -100.
        """
        hidden_states = self.model(input_ids, attention_mask, use_cache=False).last_hidden_state
        cap = self.config.final_logit_softcapping
        losses = chunked_token_losses(hidden_states.flatten(0, 1), self._whole_head_weight(), targets.flatten(), cap)
        return losses.view(targets.shape)

    def weighted_loss(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over all positions of weight * -log p(target), for policy gradients and the like.

        Only what the loss depends on is computed: rows without weight and padding are not read, and the head sees the
        positions of non-zero weight alone. The price is that the sizes are asked of the device, which waits for it.

        Args:
            input_ids: (B, T).
            targets: (B, T), the token after each position.
            weights: (B, T) of any sign; no gradient flows to them.
            attention_mask: (B, T), 0 where the input is padding, on the left or on the right; its weights must be 0.

        Returns:
            float32 scalar in nats. Every parameter gets a gradient, even if all weights are 0.

        Raises:
            ValueError: a weight that is not 0 where the input is padding.
        """
        weights = weights.to(torch.float32)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        elif ((weights != 0) & (attention_mask == 0)).any():
            raise ValueError("weights are not 0 where attention_mask is: expected no loss after padding")
        rows = (weights != 0).any(dim=1)
        rows[0] |= ~rows.any()
        mask = attention_mask[rows]
        order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]  # real tokens first
        input_ids, targets, weights = (x[rows].gather(1, order) for x in (input_ids, targets, weights))
        hidden_states = self.model(input_ids, use_cache=False).last_hidden_state  # (rows, longest, C)
        counted = weights != 0
        cap = self.config.final_logit_softcapping
        return chunked_weighted_loss(
            hidden_states[counted], self._whole_head_weight(), targets[counted], weights[counted], cap
        )
