"""The network among its neighbours: configuration errors, resized vocabularies, embeddings, LoRA, export."""

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, NanoChatGPTModel
from modeling_nanochat.configuration_nanochat_gpt import ERAS
from tests.toys import drawn_model


def tiny_model(era="seed", **settings):
    return drawn_model(
        4, 0.3, vocab_size=96, head_dim=16, era=era, hidden_size=64, num_attention_heads=4, **settings
    ).eval()


def token_ids(batch=2, length=40):
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(0))


def test_the_dial():
    """Depth 12 at the default head size, and the windows of each era at a context of 2048."""
    config = NanoChatGPTConfig.from_depth(12)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (768, 6, 3072)
    assert config == NanoChatGPTConfig()
    assert NanoChatGPTConfig.from_depth(5).hidden_size == 384  # 320, up to a multiple of 128
    assert NanoChatGPTConfig.from_depth(5, head_dim=32, aspect_ratio=20).hidden_size == 128  # 100, up to a multiple
    assert [kind[0] for kind in NanoChatGPTConfig.from_depth(6).layer_types] == list("sssfsf")
    windows = {era: NanoChatGPTConfig.from_depth(12, era=era).sliding_window for era in ERAS}
    assert windows == {
        "launch": None, "lambdas": 1025, "seed": 1025, "softcap20": 1025, "autoresearch1": 769, "head": 513,
    }  # fmt: skip
    assert NanoChatGPTConfig.from_depth(4, era="head").layer_types[0] == "hybrid_sliding"
    assert NanoChatGPTConfig.from_depth(4, era="head", window_pattern="L").layer_types[0] == "hybrid"
    assert NanoChatGPTConfig.from_depth(4, era="softcap20").final_logit_softcapping == 20
    assert NanoChatGPTConfig.from_depth(4, era="autoresearch1").rope_parameters["rope_theta"] == 100_000


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: NanoChatGPTConfig.from_depth(4, era="middle"), "'middle', expected one of .*'launch'.*'head'"),
        (lambda: NanoChatGPTConfig.from_depth(4, window_pattern="SXL"), "'SXL', expected a string of the letters"),
        (lambda: NanoChatGPTConfig.from_depth(0), "depth is 0, expected at least 1"),
        (lambda: NanoChatGPTConfig.from_depth(4, head_dim=7), "head_dim is 7, expected an even number"),
        (lambda: NanoChatGPTConfig.from_depth(4, aspect_ratio=0), "aspect_ratio is 0, expected at least 1"),
        (lambda: NanoChatGPTConfig(hidden_size=100), "hidden_size is 100, expected a multiple"),
        (lambda: NanoChatGPTConfig(num_key_value_heads=4), "num_key_value_heads is 4, expected a divisor"),
        (lambda: NanoChatGPTConfig(vocab_size=0), "vocab_size is 0, expected at least 1"),
        (lambda: NanoChatGPTConfig(value_gate_channels=1000), "value_gate_channels is 1000, expected 1 to"),
        (lambda: NanoChatGPTConfig(final_logit_softcapping=0.0), "final_logit_softcapping is 0.0, expected above 0"),
        (lambda: NanoChatGPTConfig(tie_word_embeddings=True), "tie_word_embeddings is True, expected False"),
        (lambda: NanoChatGPTConfig(sliding_window=0), "sliding_window is 0, expected at least 1"),
        (lambda: NanoChatGPTConfig(layer_types=["chunked_attention"] * 12), r"layer_types\[0\] is 'chunked_att"),
        (
            lambda: NanoChatGPTConfig(layer_types=["full_attention"] * 3),
            "layer_types has 3 entries, expected 12",
        ),
        (lambda: NanoChatGPTConfig.from_depth(4, era="launch", use_backout=True), "needs use_residual_scalars=True"),
        (lambda: NanoChatGPTConfig(sliding_windw=5), "sliding_windw=5 is not a field.*expected sliding_window"),
        (lambda: NanoChatGPTConfig(era="head"), "era='head'.*expected from_depth"),
        (lambda: NanoChatGPTConfig(init_scheme="xavier"), "init_scheme is 'xavier', expected 'seed' or 'head'"),
    ],
)
def test_wrong_configurations_say_so(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("era", ERAS)
def test_configurations_survive_saving(era, tmp_path):
    config = NanoChatGPTConfig.from_depth(5, era=era)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    bookkeeping = {"transformers_version": None, "_name_or_path": None}
    assert loaded.to_dict() | bookkeeping == config.to_dict() | bookkeeping


def test_auto_classes_know_the_network(tmp_path):
    model = tiny_model("head")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NanoChatGPTForCausalLM
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(base) is NanoChatGPTModel and base.dtype == torch.bfloat16
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert mapped(token_ids()).logits.equal(model(token_ids()).logits)


@pytest.mark.parametrize("size", [128, 64])
def test_resizing_the_vocabulary(size):
    model = tiny_model()
    ids = token_ids() % min(size, 96)
    before = model(ids).logits.detach()
    model.resize_token_embeddings(size, mean_resizing=False)
    after = model(ids).logits
    assert model.config.vocab_size == size and after.shape[-1] == size
    assert all(table.weight.shape[0] == size for table in model.model.value_embeddings.values())
    kept = min(size, 96)
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    model.set_activation_dtype(torch.bfloat16)  # the new head still casts
    model(torch.full_like(ids, size - 1), labels=ids).loss.backward()


def test_embeddings_need_their_ids():
    model, ids = tiny_model(), token_ids()
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds came without input_ids"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="expected at least one of them"):
        model()
    assert model(ids, inputs_embeds=embeddings).logits.equal(model(ids).logits)
    launch = tiny_model("launch")
    by_embedding = launch(inputs_embeds=launch.get_input_embeddings()(ids)).logits
    assert by_embedding.equal(launch(ids).logits)


def test_packed_rows_by_position():
    """Positions that start again split a row: each part is as if alone, the smeared embedding included."""
    model, ids = tiny_model("head"), token_ids(1)
    positions = torch.cat((torch.arange(25), torch.arange(15))).unsqueeze(0)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat((model(ids[:, :25]).logits, model(ids[:, 25:]).logits), dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_attentions():
    model = tiny_model("head")
    model.set_attn_implementation("eager")
    outputs = model(token_ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 40, 64)] * 5
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 40, 40)] * 4


@pytest.mark.parametrize("era", ["seed", "head"])
def test_lora_trains_and_merges(era):
    model, ids = tiny_model(era), token_ids()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    lora = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(8):
        loss = lora(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = lora.eval()(ids).logits
    merged = lora.merge_and_unload()
    assert type(merged) is NanoChatGPTForCausalLM
    torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("era", ["seed", "head"])
def test_export(era):
    """One exported graph serves other batch sizes and lengths; SDPA's masks are exportable, own operators are not."""
    model = tiny_model(era, sliding_window=9)
    model.set_attn_implementation("sdpa")
    dimensions = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        model,
        (),
        {"input_ids": token_ids(), "use_cache": False},
        dynamic_shapes={"input_ids": dimensions, "use_cache": None},
    )
    ids = token_ids(3, 50)
    logits = exported.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
