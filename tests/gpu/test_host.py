"""A training step never waits for its device, without a GPU: on meta tensors, which take a GPU's paths, and in the
Trainer on the CPU. Static shapes, one device and the size of the loss's chunks are seen on the way."""

import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM, chunked_cross_entropy
from modeling_nanochat.chunked_cross_entropy import CHUNK_ELEMENTS
from modeling_nanochat.training.architectures import ARCHITECTURES, fresh_network, is_nanochat, stock_config, whole_rows
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.optimizer.eras import pretraining_schedules
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import GroupScheduler
from modeling_nanochat.training.trainers.pretrain import PretrainConfig, PretrainTrainer, store_tables_in_bfloat16
from tests.gpu.host import FailOnHost, WaitsForHost

META = torch.device("meta")


def on_meta(config, dtype: torch.dtype):
    """A network in train mode and its optimizer and schedule, as pretraining has them on a GPU."""
    with META:
        model = fresh_network(config).train()
    if is_nanochat(config):
        model.set_attn_implementation("sdpa")
        model.set_activation_dtype(dtype)
        store_tables_in_bfloat16(model)
    optimizer = MuonAdamW(build_param_groups(model, batch_tokens=2**19, weight_decay=0.1, polar_dtype="bfloat16"))
    return model, optimizer, GroupScheduler(optimizer, 10, **pretraining_schedules())


def step(model, optimizer, scheduler, ids: torch.Tensor) -> None:
    labels = {} if is_nanochat(model.config) else {"labels": ids}
    with whole_rows(model):  # as the trainers do
        loss = model(input_ids=ids, shift_labels=ids, use_cache=False, **labels).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("era", ["launch", "seed", "head"])
def test_a_step_of_every_era_stays_on_its_device(era):
    """At the size of a real run, as meta tensors weigh nothing. The second and third step are also the same operations
    on the same shapes, and the logits of the whole batch never exist: only a chunk of them does."""
    config = NanoChatGPTConfig.from_depth(12, era=era)
    parts = on_meta(config, torch.bfloat16)
    ids = torch.zeros(32, 2048, dtype=torch.int64, device=META)
    step(*parts, ids)
    runs = []
    for _ in range(2):
        with FailOnHost() as mode:
            step(*parts, ids)
        runs.append(mode.shapes)
    assert runs[0] == runs[1]
    vocabulary = config.vocab_size
    logits = [math.prod(shape) for _, *shapes in mode.shapes for shape in shapes if shape[-1:] == (vocabulary,)]
    assert 0 < max(logits) <= CHUNK_ELEMENTS["cuda"] < ids.numel() * vocabulary / 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_of_a_stock_network_stays_on_its_device(architecture):
    parts = on_meta(stock_config(architecture, 4, vocab_size=512, bos_token_id=0, eos_token_id=1), torch.float32)
    ids = torch.zeros(2, 128, dtype=torch.int64, device=META)
    step(*parts, ids)
    with FailOnHost():
        step(*parts, ids)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0)[x > 0].sum(),
        lambda x: float(x.norm()),
        lambda x: torch.equal(x, x),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_waits_is_found(wrong, device):
    x = torch.zeros(4, 4, device=device)
    with FailOnHost(), pytest.raises(WaitsForHost):
        wrong(x)


@pytest.mark.parametrize("wrong", [lambda x: x.cpu(), lambda x: x + torch.ones(4), lambda x: torch.ones(4).to(x)])
def test_what_crosses_devices_is_found(wrong):
    x = torch.zeros(4, device=META)
    with FailOnHost(), pytest.raises(WaitsForHost):
        wrong(x)
    with FailOnHost():
        _ = x * torch.tensor(2.0)  # a number of the host is an argument of the kernel


def test_chunks_of_the_loss_are_static():
    """Weights of a smaller vocabulary and fewer tokens than a chunk: still no question to the device."""
    model = NanoChatGPTForCausalLM._from_config(NanoChatGPTConfig.from_depth(2, vocab_size=320)).to(META).train()
    ids = torch.zeros(1, 16, dtype=torch.int64, device=META)
    with FailOnHost():
        model(input_ids=ids, shift_labels=ids, num_items_in_batch=torch.zeros((), device=META), use_cache=False)


class Watch(TrainerCallback):
    """Watches the optimizer steps from the third on, from their beginning to their end."""

    def __init__(self):
        self.mode, self.steps = None, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= 2:
            self.mode = FailOnHost()
            self.mode.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode, self.steps = None, self.steps + 1


@pytest.mark.parametrize("architecture", ["nanochat", "llama"])
def test_the_trainer_asks_nothing_in_a_step(architecture, tmp_path, monkeypatch):
    """Accumulation, schedule and the Trainer's own bookkeeping included. What only a CPU does (it counts the targets to
    leave some out) is switched off."""
    monkeypatch.setattr(chunked_cross_entropy, "_drop_ignored", lambda hidden, targets: (hidden, targets))
    watch = Watch()
    trainer_of(architecture, tmp_path, gradient_accumulation_steps=2, callbacks=[watch]).train()
    assert watch.steps == 3


@pytest.mark.parametrize("architecture", ["nanochat", "llama"])
def test_the_compiled_step_has_one_graph(architecture, tmp_path):
    """No graph break, and after the second step nothing is compiled again, whatever the schedules change."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer_of(architecture, tmp_path, callbacks=[Count()], **compiled).train()
    assert graphs[1] > 0 and set(graphs[1:]) == {graphs[1]}
    assert not counters["graph_break"]
    torch._dynamo.reset()


def trainer_of(architecture: str, folder, callbacks, **settings) -> PretrainTrainer:
    """Five steps of a tiny network on rows that are always the same."""
    config = NanoChatGPTConfig.from_depth(2, vocab_size=320, head_dim=32, max_position_embeddings=32)
    if architecture != "nanochat":
        config = stock_config(architecture, 2, vocab_size=320, head_dim=32, bos_token_id=0, eos_token_id=1)
    settings = PretrainConfig(
        output_dir=folder, max_steps=5, save_strategy="no", disable_tqdm=True, use_cpu=True, report_to="none",
        activation_dtype="float32", optimizer_era="seed", **({"torch_compile": False} | settings),
    )  # fmt: skip
    return PretrainTrainer(
        fresh_network(config), settings, RowLoader(lambda *stream: SameRow(32), 2, 32), callbacks=callbacks
    )


class SameRow:
    """An endless stream of one row."""

    def __init__(self, length: int):
        self.row = (np.arange(length + 1) % 300).astype(np.int32)

    def __next__(self) -> np.ndarray:
        return self.row

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...
