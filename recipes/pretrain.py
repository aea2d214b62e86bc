"""Pretrains a network of a chosen depth on packed documents, from scratch or from where it was interrupted.

    accelerate launch --config_file recipes/accelerate/one_cpu.yaml -m modeling_nanochat.recipes.pretrain \\
        --config recipes/configs/demo/pretrain.yaml

The depth sets the shape, the shape sets the horizon (`training/scaling.py`); a wall-clock budget may cut it short. The
same command goes on from the last complete checkpoint if it was killed, and does nothing if it had finished. Validation
bits per byte, samples and CORE appear on the way. The output folder holds the model with its code, and the tokenizer.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from modeling_nanochat import NanoChatGPTConfig, NanoChatGPTForCausalLM
from modeling_nanochat.eval.bits_per_byte import evaluate_bits_per_byte
from modeling_nanochat.eval.core import CoreTask, evaluate_task, read_tasks, summarize_core
from modeling_nanochat.eval.sampling import generate_batch
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.folder import checkpoint_to_resume, save_checkpoint
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.tokenization_nanochat_gpt import encode_text, generation_token_ids, token_bytes
from modeling_nanochat.training import devices, memory, scaling
from modeling_nanochat.training.data.documents import DocumentSource, open_documents
from modeling_nanochat.training.data.packed_rows import PackedRows
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.trainers.pretrain import Evaluation, PretrainConfig, PretrainTrainer

STEPS_TIMED = 4  # of a throw-away network, to turn minutes into steps; the first is not counted
SHARE_FOR_TRAINING = 0.95  # of a wall-clock budget; the rest is for evaluation and checkpoints
SAMPLE_TOKENS = 48
BITS_PER_BYTE = "validation_bits_per_byte"


@dataclass
class PretrainArguments:
    """What to train, on what, for how long."""

    data: str = field(
        default="out/demo/data/pretrain", metadata={"help": "Documents: a folder, a glob, or a data set on the Hub."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds a document."})
    tokenizer: str = field(default="out/demo/tokenizer", metadata={"help": "Folder or Hub name of the tokenizer."})
    rerun: bool = field(default=False, metadata={"help": "Start over, even if the run has been finished or begun."})
    depth: int = field(default=12, metadata={"help": "Number of layers; sets the whole shape."})
    head_dim: int = field(default=128, metadata={"help": "Width of an attention head."})
    aspect_ratio: int = field(default=64, metadata={"help": "Width for each layer of depth."})
    sequence_length: int = field(default=2048, metadata={"help": "Tokens of a row."})
    window_pattern: str | None = field(
        default=None,
        metadata={"help": "Letters S (windowed) and L (full), tiled over the layers; by default the era's."},
    )
    total_batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of an optimizer step over all devices; by default the era's rule."}
    )
    tokens_per_parameter: float | None = field(
        default=None, metadata={"help": "Horizon: tokens for each scaling parameter; by default the era's."}
    )
    target_flops: float | None = field(default=None, metadata={"help": "Horizon instead: a budget of FLOPs."})
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Shorten the horizon to what this machine does in so many minutes (measured)."},
    )
    validate_every: int = field(default=250, metadata={"help": "Steps between validations; 0: only at the end."})
    validation_tokens: int = field(default=1_000_000, metadata={"help": "Tokens of validation data to measure on."})
    core_bundle: str | None = field(
        default=None, metadata={"help": "Folder of upstream's eval_bundle.zip, unpacked: CORE is measured with it."}
    )
    core_every: int = field(default=2000, metadata={"help": "Steps between measurements of CORE; 0: only at the end."})
    core_examples: int = field(default=500, metadata={"help": "Examples of each of CORE's tasks, at most."})
    sample_every: int = field(default=0, metadata={"help": "Steps between samples of text; 0: only at the end."})
    sample_prompts: list[str] = field(
        default_factory=lambda: [
            "The capital of France is",
            "The President of the United States",
            "If yesterday was Friday, then tomorrow will be",
        ],
        metadata={"help": "What the samples go on from."},
    )


def main() -> None:
    arguments, config = parse(PretrainArguments, PretrainConfig)
    pretrain(arguments, config)


def pretrain(arguments: PretrainArguments, config: PretrainConfig) -> None:
    """Train what the arguments say, unless it is done."""
    inputs = [arguments.data, arguments.tokenizer]
    stage = Stage("pretrain", config.output_dir, [arguments, config], inputs, arguments.rerun)
    if stage.is_done():
        return
    logging.disable_progress_bar()  # of writing checkpoints, which would tear the one of training
    if torch.cuda.device_count() > config.world_size:
        stage.say(
            f"using {config.world_size} of {torch.cuda.device_count()} GPUs; see recipes/accelerate for all of them"
        )
    tasks = core_tasks(arguments.core_bundle, config) if arguments.core_bundle else []
    checkpoint = checkpoint_to_resume(stage, config)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    source = open_documents(arguments.data, arguments.text_column)
    network = network_config(arguments, config.era, tokenizer)
    plan = set_run(arguments, config, network, checkpoint, partial(make_rows, arguments, config, source, tokenizer))
    samples = Samples(tokenizer, arguments.sample_prompts)
    evaluations = [
        Evaluation(Validation(arguments, config, source, tokenizer), arguments.validate_every),
        Evaluation(samples, arguments.sample_every),
    ]
    if tasks:
        evaluations.append(Evaluation(core_of(tokenizer, tasks, arguments.core_examples), arguments.core_every))
    trainer = PretrainTrainer(
        make_model(network, config),
        config,
        make_rows(arguments, config, source, tokenizer),
        evaluations=evaluations,
        processing_class=tokenizer,
    )
    announce(stage, trainer, plan)
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_checkpoint(model, tokenizer, config.output_dir)
    stage.finish(results_of(trainer, plan), trainer.state.log_history, samples.taken)


def network_config(arguments: PretrainArguments, era: str, tokenizer: PreTrainedTokenizerBase) -> NanoChatGPTConfig:
    """The shape that the depth gives, with the tokenizer's vocabulary and special tokens."""
    return NanoChatGPTConfig.from_depth(
        arguments.depth,
        vocab_size=len(tokenizer),
        head_dim=arguments.head_dim,
        aspect_ratio=arguments.aspect_ratio,
        max_position_embeddings=arguments.sequence_length,
        era=era,
        window_pattern=arguments.window_pattern,
        **generation_token_ids(tokenizer),
    )


def make_model(network: NanoChatGPTConfig, config: PretrainConfig) -> NanoChatGPTForCausalLM:
    """Fresh weights, the same on every rank and whatever was drawn before."""
    set_seed(config.seed)
    return NanoChatGPTForCausalLM(network)


def make_rows(
    arguments: PretrainArguments,
    config: PretrainConfig,
    source: DocumentSource,
    tokenizer: PreTrainedTokenizerBase,
) -> RowLoader:
    """The training rows of this rank."""
    length = arguments.sequence_length

    def open_stream(stream: int, streams: int) -> PackedRows:
        return PackedRows(source, tokenizer, length + 1, stream=stream, num_streams=streams)

    return RowLoader(
        open_stream,
        config.per_device_train_batch_size,
        length,
        rank=config.process_index,
        ranks=config.world_size,
        device=config.device,
    )


def set_run(
    arguments: PretrainArguments,
    config: PretrainConfig,
    network: NanoChatGPTConfig,
    checkpoint: str | None,
    make_rows: Callable[[], RowLoader],
) -> scaling.TrainingPlan:
    """Settle what the arguments leave open: steps, micro-batch, accumulation and weight decay, all written to `config`.

    A run that is resumed keeps the number of steps it began with, whatever this machine would do in the same minutes.
    """
    make_plan = partial(
        scaling.plan_training,
        network,
        era=config.era,
        aspect_ratio=arguments.aspect_ratio,
        tokens_per_parameter=arguments.tokens_per_parameter,
    )
    plan = make_plan(
        batch_tokens=arguments.total_batch_tokens,
        max_steps=config.max_steps if config.max_steps > 0 else None,
        target_flops=arguments.target_flops,
    )
    if not config.per_device_train_batch_size:
        config.per_device_train_batch_size = memory.rows_that_fit(
            network,
            batch_tokens=plan.batch_tokens,
            sequence_length=arguments.sequence_length,
            world_size=config.world_size,
            device=config.device,
            dtype=devices.choose_dtype(config.activation_dtype, config.device),
        )
    config.gradient_accumulation_steps = scaling.accumulation_steps(
        plan.batch_tokens, config.per_device_train_batch_size, arguments.sequence_length, config.world_size
    )
    steps = plan.steps
    if checkpoint is not None:
        steps = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).max_steps
    elif arguments.max_minutes is not None:
        budget = 60 * arguments.max_minutes * SHARE_FOR_TRAINING
        seconds = seconds_per_micro_batch(network, config, make_rows()) * config.gradient_accumulation_steps
        steps = max(1, min(steps, int(budget / seconds)))
    plan = make_plan(batch_tokens=plan.batch_tokens, max_steps=steps)
    config.max_steps = plan.steps
    if config.weight_decay is None:
        config.weight_decay = plan.weight_decay
    return plan


def seconds_per_micro_batch(network: NanoChatGPTConfig, config: PretrainConfig, rows: RowLoader) -> float:
    """Time of a step of one micro-batch, measured on a throw-away network; every rank gets rank 0's figure."""
    trial = dataclasses.replace(
        config,
        max_steps=STEPS_TIMED,
        gradient_accumulation_steps=1,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = PretrainTrainer(make_model(network, trial), trial, rows)
    trainer.train()
    rates = [line["tokens_per_second"] for line in trainer.state.log_history if "tokens_per_second" in line]
    seconds = [trainer.batch_tokens / statistics.median(rates[1:])]
    return broadcast_object_list(seconds)[0]


# ---------------------------------------------------------------- what is measured on the way and what is left behind


class Validation:
    """Bits per byte on the validation documents, packed as in training; the rows are made once."""

    def __init__(
        self,
        arguments: PretrainArguments,
        config: PretrainConfig,
        source: DocumentSource,
        tokenizer: PreTrainedTokenizerBase,
    ):
        rank, ranks = config.process_index, config.world_size
        length, size = arguments.sequence_length, config.per_device_train_batch_size
        packed = PackedRows(source, tokenizer, length + 1, split="validation", stream=rank, num_streams=ranks)
        rows = [
            torch.from_numpy(row) for row in islice(packed, max(1, arguments.validation_tokens // (length * ranks)))
        ]
        self.batches = [
            {"input_ids": batch[:, :-1].long(), "shift_labels": batch[:, 1:].long()}  # (B, T) each
            for batch in (torch.stack(rows[start : start + size]) for start in range(0, len(rows), size))
        ]
        self.token_bytes = token_bytes(tokenizer)

    def __call__(self, model: NanoChatGPTForCausalLM, step: int) -> dict[str, float]:
        return {BITS_PER_BYTE: evaluate_bits_per_byte(model, self.batches, self.token_bytes)}


class Samples:
    """What the network goes on with after each prompt, by its likeliest tokens. `taken` collects them all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]):
        self.tokenizer, self.prompts = tokenizer, list(prompts)
        self.taken: list[dict[str, Any]] = []

    def __call__(self, model: NanoChatGPTForCausalLM, step: int) -> dict[str, float]:
        bos = self.tokenizer.bos_token_id
        ids = [[bos, *encode_text(self.tokenizer, prompt)] for prompt in self.prompts]
        # On all ranks, which would wait anyway: sharded weights need them all.
        completions = generate_batch(model, self.tokenizer, ids, max_new_tokens=SAMPLE_TOKENS, temperature=0)
        for prompt, (completion,) in zip(self.prompts, completions):
            self.taken.append({"step": step, "prompt": prompt, "completion": self.tokenizer.decode(completion)})
        return {}


def core_tasks(bundle: str, config: PretrainConfig) -> list[CoreTask]:
    """The tasks of the bundle; `ValueError` if they are not there, or under FSDP, where no rank can answer alone."""
    if config.fsdp:
        raise ValueError(
            f"core_bundle={bundle} under FSDP, whose ranks must all run the same batches; expected no core_bundle, and "
            "`nanochat evaluate --tasks core` on the finished model"
        )
    return read_tasks(bundle)


def core_of(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[CoreTask], examples: int
) -> Callable[[NanoChatGPTForCausalLM, int], dict[str, float]]:
    """An evaluation that gives CORE: the mean over the tasks, and each by itself."""

    def run(model: NanoChatGPTForCausalLM, step: int) -> dict[str, float]:
        return summarize_core([evaluate_task(model, tokenizer, task, max_examples=examples) for task in tasks])

    return run


def results_of(trainer: PretrainTrainer, plan: scaling.TrainingPlan) -> dict[str, Any]:
    """The figures of the run for its record."""
    log = trainer.state.log_history
    speeds = [line["tokens_per_second"] for line in log if "tokens_per_second" in line][1:]
    core = {name: value for line in log for name, value in line.items() if name.startswith("core")}  # the last ones
    results = {
        "validation_bits_per_byte": [line[BITS_PER_BYTE] for line in log if BITS_PER_BYTE in line][-1],
        "train_loss": [line["loss"] for line in log if "loss" in line][-1],
        "parameters": plan.parameters.total,
        "scaling_parameters": plan.parameters.scaling,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": float(plan.flops),
    }
    results |= core
    if speeds:
        results["tokens_per_second"] = statistics.median(speeds)
        results["mfu"] = results["tokens_per_second"] * plan.flops_per_token / trainer.peak_flops_per_second
    stats = [stream.stats for stream in trainer.rows.open_streams.values()]
    if stats:
        cropped, kept = sum(each.cropped_tokens for each in stats), sum(each.tokens for each in stats)
        results["cropped_share"] = cropped / max(cropped + kept, 1)
    return results


def announce(stage: Stage, trainer: PretrainTrainer, plan: scaling.TrainingPlan) -> None:
    config, network = trainer.args, trainer.model.config
    needed = memory.memory_per_device(
        network,
        config.per_device_train_batch_size,
        trainer.rows.sequence_length,
        config.world_size,
        trainer.activation_dtype,
        config.device.type,
    )
    stage.announce(
        parameters=plan.parameters.total,
        tokens=plan.tokens,
        steps=plan.steps,
        batch=f"{config.per_device_train_batch_size} x {trainer.rows.sequence_length} tokens x "
        f"{config.gradient_accumulation_steps} x {config.world_size} device(s)",
        flops=plan.flops,
        activations=str(trainer.activation_dtype).removeprefix("torch."),
        compiled=bool(config.torch_compile),
        bytes=sum(needed.values()),
        seconds=plan.flops / (trainer.peak_flops_per_second * devices.EXPECTED_UTILISATION[config.device.type]),
    )


if __name__ == "__main__":
    run(main)
