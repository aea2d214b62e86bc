"""Common tests of Transformers that do not hold for these networks, each with the reason. Everything else must pass."""

BFLOAT16_ROTARY_TABLES = (
    "compares cosines with float32 ones at 1e-5; the era rounds them to bfloat16 (bfloat16_rotary_tables)"
)
VALUE_EMBEDDINGS = (
    "gives inputs_embeds alone; value embeddings are looked up by token id, so the ids must come beside them "
    "(tests/test_modeling*.py has that case)"
)

EXCLUSIONS: dict[str, dict[str, str]] = {
    "every era": {
        "test_sdpa_can_dispatch_non_composite_models": (
            "expects SDPA by default; the default here is the kernel that block_attention.py chooses for the device"
        ),
    },
    "launch": {"test_model_rope_scaling_frequencies": BFLOAT16_ROTARY_TABLES},
    "seed": {
        "test_model_rope_scaling_frequencies": BFLOAT16_ROTARY_TABLES,
        "test_inputs_embeds": VALUE_EMBEDDINGS,
        "test_inputs_embeds_matches_input_ids": VALUE_EMBEDDINGS,
    },
    "head": {
        "test_inputs_embeds": VALUE_EMBEDDINGS,
        "test_inputs_embeds_matches_input_ids": VALUE_EMBEDDINGS,
    },
}
