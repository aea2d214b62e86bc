"""The checks of `make gpu-check`. Each takes a `Machine`, works on any device, and says what it found.

They fall in three: the numbers are those of the CPU's float32 as far as bfloat16 carries; a step runs as a GPU likes it
(one graph, no waiting, the planned memory, faster than a plain loop); the stages run and resume. Noise is measured, not
assumed: what bfloat16 does on the CPU to the same network is what a GPU may do, twice over.
"""

import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.plain_nanochat import PlainNanoChat
from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.attention_choice import choose_attention
from modeling_nanochat.completions import sample_completions
from modeling_nanochat.configuration_nanochat_gpt import ERAS
from modeling_nanochat.decoder_layer import CastLinear
from modeling_nanochat.tool_use import CalculatorLogitsProcessor
from modeling_nanochat.training import devices, memory, scaling
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.float8 import Float8Linear, multiply_in_float8
from modeling_nanochat.training.optimizer.eras import pretraining_schedules
from modeling_nanochat.training.optimizer.groups import build_param_groups
from modeling_nanochat.training.optimizer.muon_adamw import MuonAdamW
from modeling_nanochat.training.optimizer.schedules import GroupScheduler
from modeling_nanochat.training.trainers.pretrain import PretrainConfig, PretrainTrainer
from tests.gpu.host import no_waiting
from tests.toys import digit_tokenizer, drawn_model

TIMES_NOISE = 2.0  # what a device may be off by, in units of what bfloat16 does on the CPU
MEMORY_TOLERANCE = 0.1
BATCH_TOKENS = 2**19  # of an optimizer step, upstream's


@dataclass(frozen=True)
class Machine:
    """Where the checks run, and the size of those that measure speed: by default upstream's d12."""

    device: torch.device
    folder: Path
    depth: int = 12
    sequence_length: int = 2048
    vocab_size: int = 32768
    head_dim: int = 128
    batch_tokens: int = BATCH_TOKENS
    backend: str = "inductor"

    @property
    def dtype(self) -> torch.dtype:
        return devices.choose_dtype("auto", self.device)

    def network(self) -> NanoChatGPTConfig:
        return NanoChatGPTConfig.from_depth(
            self.depth, vocab_size=self.vocab_size, head_dim=self.head_dim,
            max_position_embeddings=self.sequence_length,
        )  # fmt: skip


@dataclass
class Found:
    """Whether it is as it should be, one line about it, and every figure."""

    ok: bool
    said: str
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


# ---------------------------------------------------------------- numbers


def attention(machine: Machine) -> Found:
    """the attention kernels that work here, chosen by trying them"""
    sentences = {}
    for name, pattern in (("windows", "SSSL"), ("full", "L")):
        model = small_model("seed", window_pattern=pattern)
        model.set_activation_dtype(machine.dtype)
        for use, training in (("training", True), ("decoding", False)):
            sentences[f"{name}, {use}"] = choose_attention(model, machine.device, training=training)
    chosen = [sentence.removeprefix("Attention: ").split()[0] for sentence in sentences.values()]
    return Found(True, ", ".join(f"{use}: {name}" for use, name in zip(sentences, chosen)), sentences)


def eras_equal_the_cpu(machine: Machine) -> Found:
    """loss and gradients of every era in bfloat16, against the CPU's float32"""
    return compare(machine, ERAS, lambda model: model)


def compiled_equals_eager(machine: Machine) -> Found:
    """the same of the newest era, compiled"""
    torch._dynamo.reset()
    options = {"backend": machine.backend, "fullgraph": True, "dynamic": False}
    return compare(machine, ["head"], lambda model: torch.compile(model, **options))


def float8_equals_the_cpu(machine: Machine) -> Found:
    """the same with the blocks' products in float8, and how much faster an MLP of d24 is so"""
    if machine.device.type == "cuda" and not devices.native_float8(machine.device):
        return Found(True, "this GPU multiplies no float8")
    torch._dynamo.reset()
    model = small_model("head")
    exact = outcome(model, model, torch.float32)
    multiply_in_float8(model)
    noise = distance(outcome(model, model, torch.bfloat16), exact)
    model.to(machine.device)
    choose_attention(model, machine.device, training=True)
    compiled = torch.compile(model, backend=machine.backend, fullgraph=True, dynamic=False)
    off = distance(outcome(compiled, model, torch.bfloat16), exact)
    figures = {"off": off, "noise": noise, "ratio": float8_speed(machine) if machine.device.type == "cuda" else None}
    said = f"gradients off by {off:.2%} (float8 alone: {noise:.2%})"
    if figures["ratio"]:
        said += f", an MLP of d24 {figures['ratio']:.2f} times as fast as in bfloat16"
    return Found(off <= TIMES_NOISE * noise, said, figures)


def float8_speed(machine: Machine) -> float:
    """Forward and backward of an MLP as wide as upstream's d24 has, over bfloat16's; compiled."""
    width, tokens, seconds = 1536, 2**15, {}
    for kind in (CastLinear, Float8Linear):
        with machine.device:
            layers = [torch.nn.Linear(*sides, bias=False) for sides in ((width, 4 * width), (4 * width, width))]
            x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        for layer in layers:
            layer.__class__ = kind
        mlp = torch.compile(torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]), backend=machine.backend)
        times = []
        for _ in range(8):
            devices.synchronize(machine.device)
            start = time.perf_counter()
            mlp(x).sum().backward()
            devices.synchronize(machine.device)
            times.append(time.perf_counter() - start)
        seconds[kind] = statistics.median(times[3:])
    return seconds[CastLinear] / seconds[Float8Linear]


def compare(machine: Machine, eras, prepare: Callable) -> Found:
    """Distances from the CPU's float32, on the device and on the CPU, both in bfloat16."""
    figures = {}
    for era in eras:
        model = small_model(era)
        exact = outcome(model, model, torch.float32)
        noise = distance(outcome(model, model, torch.bfloat16), exact)
        model.to(machine.device)
        choose_attention(model, machine.device, training=True)
        found = distance(outcome(prepare(model), model, torch.bfloat16), exact)
        figures[era] = {"off": found, "noise": noise}
    worst = max(figures, key=lambda era: figures[era]["off"] / figures[era]["noise"])
    off, noise = figures[worst]["off"], figures[worst]["noise"]
    said = f"gradients off by at most {off:.2%} ({worst}; bfloat16 alone: {noise:.2%})"
    return Found(off <= TIMES_NOISE * noise, said, figures)


def small_model(era: str, **settings) -> NanoChatGPTForCausalLM:
    return drawn_model(
        3, 0.1, era=era, vocab_size=512, head_dim=64, hidden_size=256, num_attention_heads=4,
        max_position_embeddings=256, **settings,
    ).train()  # fmt: skip


def outcome(forward: Callable, model: NanoChatGPTForCausalLM, dtype: torch.dtype) -> torch.Tensor:
    """Loss and all gradients of two rows, as one vector on the CPU."""
    model.set_activation_dtype(dtype)
    model.zero_grad()
    ids = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0)).to(model.device)
    loss = forward(input_ids=ids, shift_labels=ids.roll(-1, 1), use_cache=False).loss
    loss.backward()
    return torch.cat(
        [loss.detach().reshape(1).float().cpu(), *(each.grad.flatten().float().cpu() for each in model.parameters())]
    )


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------- a step


def step_is_steady(machine: Machine) -> Found:
    """no graph break, nothing compiled after the second step, the host never waits inside one"""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = small_model("head").to(machine.device)
    model.set_activation_dtype(machine.dtype)
    choose_attention(model, machine.device, training=True)
    compiled = torch.compile(model, backend=machine.backend, dynamic=False)
    optimizer = MuonAdamW(build_param_groups(model, batch_tokens=2**16, weight_decay=0.1))
    scheduler = GroupScheduler(optimizer, 10, **pretraining_schedules())
    ids = torch.zeros(2, 256, dtype=torch.int64, device=machine.device)

    def step(forward: Callable) -> None:
        forward(input_ids=ids, shift_labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    for _ in range(2):
        step(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            step(compiled)
    with no_waiting(machine.device) as mode:  # a mode that sees operations cannot see into compiled code
        step(compiled if mode is None else model)
    breaks = dict(counters["graph_break"])
    said = f"{counters['stats']['unique_graphs']} graphs, {sum(breaks.values())} breaks, no recompilation, no waiting"
    return Found(not breaks, said, {"graph_breaks": breaks})


@cache
def trained(machine: Machine) -> dict[str, Any]:
    """Ten optimizer steps by the Trainer, with the largest micro-batch: tokens per second, MFU, peak bytes."""
    config, length = machine.network(), machine.sequence_length
    on_gpu = machine.device.type == "cuda"
    rows = memory.rows_that_fit(
        config, batch_tokens=machine.batch_tokens, sequence_length=length, world_size=1, device=machine.device,
        dtype=machine.dtype,
    )  # fmt: skip
    settings = PretrainConfig(
        output_dir=str(machine.folder / "speed"), max_steps=10, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=not on_gpu, torch_compile=True, torch_compile_backend=machine.backend,
        gradient_accumulation_steps=scaling.accumulation_steps(machine.batch_tokens, rows, length, 1),
    )  # fmt: skip
    loader = RowLoader(lambda *stream: RandomRows(machine), rows, length, device=machine.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(machine.device)
    trainer = PretrainTrainer(NanoChatGPTForCausalLM(config), settings, loader)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "tokens_per_second" in line][3:]
    return {
        "rows": rows,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "mfu": statistics.median(line["mfu"] for line in lines),
        "peak_bytes": torch.cuda.max_memory_allocated(machine.device) if on_gpu else None,
        "planned_bytes": sum(
            memory.memory_per_device(config, rows, length, 1, machine.dtype, machine.device.type).values()
        ),
    }


def memory_is_as_planned(machine: Machine) -> Found:
    """peak memory of a step with the largest micro-batch, against the plan"""
    figures = trained(machine)
    if figures["peak_bytes"] is None:
        return Found(True, "measured on a GPU only", figures)
    ratio = figures["peak_bytes"] / figures["planned_bytes"]
    said = f"{figures['rows']} rows: {figures['peak_bytes'] / 1e9:.1f} GB, {ratio:.2f} of what was planned"
    return Found(abs(ratio - 1) <= MEMORY_TOLERANCE, said, figures | {"ratio": ratio})


def faster_than_a_plain_loop(machine: Machine) -> Found:
    """tokens per second and MFU of pretraining, against the same network as plain PyTorch, compiled"""
    figures, rows = trained(machine), trained(machine)["rows"]
    plain = None
    while plain is None:
        try:
            plain = plain_tokens_per_second(machine, rows)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            rows //= 2
    ratio = figures["tokens_per_second"] / plain
    said = (
        f"{figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.1%}, {ratio:.2f} times the plain loop "
        f"({plain:,.0f}, {rows} rows)"
    )
    return Found(ratio >= 1, said, figures | {"plain_tokens_per_second": plain, "plain_rows": rows, "ratio": ratio})


def plain_tokens_per_second(machine: Machine, rows: int) -> float:
    """Micro-batches of the obvious network with fused AdamW, as many as an optimizer step of the run has."""
    config, length = machine.network(), machine.sequence_length
    torch.manual_seed(0)
    with machine.device:
        model = PlainNanoChat(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size, length,
            machine.dtype,
        )  # fmt: skip
        ids = torch.randint(config.vocab_size, (rows, length))
    optimizer = torch.optim.AdamW(model.parameters(), fused=machine.device.type == "cuda")
    forward = torch.compile(model, backend=machine.backend)
    accumulation, seconds = machine.batch_tokens // ids.numel(), []
    for _ in range(5):
        devices.synchronize(machine.device)
        start = time.perf_counter()
        for _ in range(accumulation):
            (forward(ids, ids) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        devices.synchronize(machine.device)
        seconds.append(time.perf_counter() - start)
    return machine.batch_tokens / statistics.median(seconds[2:])


class RandomRows:
    """An endless stream of rows that costs nothing to make, and knows its position."""

    def __init__(self, machine: Machine):
        self.length, self.vocab_size, self.made = machine.sequence_length, machine.vocab_size, 0

    def __next__(self) -> np.ndarray:
        self.made += 1
        return np.random.default_rng(self.made).integers(self.vocab_size, size=self.length + 1).astype(np.int32)

    def state_dict(self) -> dict:
        return {"made": self.made}

    def load_state_dict(self, state: dict) -> None:
        self.made = state["made"]


# ---------------------------------------------------------------- stages


def resumes_exactly(machine: Machine) -> Found:
    """six steps at once, and three and three from a checkpoint, bit for bit"""
    small = dataclasses.replace(machine, depth=2, sequence_length=256, vocab_size=512, head_dim=64)

    def run(name: str, resume: bool) -> PretrainTrainer:
        settings = PretrainConfig(
            output_dir=str(machine.folder / name), max_steps=6, save_steps=3, logging_steps=1, report_to="none",
            disable_tqdm=True, use_cpu=machine.device.type == "cpu", torch_compile=False,
        )  # fmt: skip
        torch.manual_seed(0)
        loader = RowLoader(lambda *stream: RandomRows(small), 2, small.sequence_length, device=machine.device)
        trainer = PretrainTrainer(NanoChatGPTForCausalLM(small.network()), settings, loader)
        trainer.train(resume_from_checkpoint=str(machine.folder / name / "checkpoint-3") if resume else None)
        return trainer

    whole = {name: value.clone() for name, value in run("resume", False).model.state_dict().items()}
    resumed = run("resume", True).model.state_dict()
    other = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
    return Found(not other, f"{len(other)} of {len(whole)} tensors differ", {"different": other})


def rollouts(machine: Machine) -> Found:
    """samples with the calculator a second, against `generate` on as many rows"""
    tokenizer = digit_tokenizer()
    config = dataclasses.replace(machine, vocab_size=len(tokenizer)).network()
    torch.manual_seed(0)
    model = NanoChatGPTForCausalLM(config).to(machine.device, machine.dtype).eval()
    choose_attention(model, machine.device)
    questions, samples, length = 8, 16, min(64, config.max_position_embeddings // 2)
    prompts = torch.randint(256, (questions, min(32, length)), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    options = {"pad_token_id": tokenizer.pad_token_id}

    def ours() -> None:
        uniforms = torch.rand(len(prompts), length)
        sample_completions(
            model, prompts, uniforms, stop_token_ids=[tokenizer.eos_token_id],
            logits_processor=CalculatorLogitsProcessor(tokenizer), **options,
        )  # fmt: skip

    def generate() -> None:
        ids = torch.tensor(prompts, device=machine.device)
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=length,
            eos_token_id=tokenizer.eos_token_id, logits_processor=[CalculatorLogitsProcessor(tokenizer)], **options,
        )  # fmt: skip

    rates = {}
    for work in (ours, generate):
        work()  # the first pays for kernels and their compilation
        devices.synchronize(machine.device)
        start = time.perf_counter()
        work()
        devices.synchronize(machine.device)
        rates[work.__name__] = len(prompts) / (time.perf_counter() - start)
    ratio = rates["ours"] / rates["generate"]
    said = f"{rates['ours']:,.0f} completions/s of {length} tokens, {ratio:.1f} times generate"
    return Found(ratio >= 1, said, rates | {"ratio": ratio})


def stages_run(machine: Machine) -> Found:
    """pretraining, SFT and RL on the demo's data, by their commands"""
    seconds = {}
    for name, *arguments in stage_commands(machine.folder):
        start = time.perf_counter()
        command = [sys.executable, "-m", f"modeling_nanochat.recipes.{name}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds[name] = round(time.perf_counter() - start, 1)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            return Found(False, f"{name}: exit code {done.returncode}: {last[:300]}", seconds)
    return Found(True, ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()), seconds)


def stage_commands(folder: Path) -> list[list[str]]:
    """The demo's stages, cut to some steps; data and tokenizer are made once, where `make demo` has them."""
    base, sft, rl = (str(folder / name) for name in ("base", "sft", "rl"))
    short = ["--rerun", "true", "--report_to", "none"]
    return [
        ["prepare_data", "--config", "demo/data"],
        ["train_tokenizer", "--config", "demo/tokenizer"],
        ["pretrain", "--config", "demo/pretrain", "--max_steps", "60", "--output_dir", base, *short],
        ["sft", "--config", "demo/sft", "--model", base, "--max_steps", "30", "--output_dir", sft, *short],
        ["rl", "--config", "demo/rl", "--model", sft, "--max_steps", "4", "--output_dir", rl, *short],
    ]


CHECKS = (
    attention, eras_equal_the_cpu, compiled_equals_eager, float8_equals_the_cpu, step_is_steady, resumes_exactly,
    rollouts, memory_is_as_planned, faster_than_a_plain_loop, stages_run,
)  # fmt: skip


def name_of(check: Callable) -> str:
    return check.__name__.replace("_", " ")


def purpose_of(check: Callable) -> str:
    return check.__doc__
