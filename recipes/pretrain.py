"""Pretrains a network of a chosen depth on packed documents, from scratch or from where it was interrupted.

    accelerate launch --config_file recipes/accelerate/one_cpu.yaml -m modeling_nanochat.recipes.pretrain \\
        --config recipes/configs/demo/pretrain.yaml

The depth sets the shape, the shape sets the horizon (`training/scaling.py`); a wall-clock budget may cut it short. The
same command goes on from the last complete checkpoint if it was killed, and does nothing if it had finished. Validation
bits per byte, samples and CORE appear on the way. The output folder holds the model with its code, and the tokenizer.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from modeling_nanochat.eval.bits_per_byte import TextLoss, packed_loss
from modeling_nanochat.eval.sampling import generate_batch
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.evaluation.arguments import OnTheWayArguments
from modeling_nanochat.recipes.evaluation.on_the_way import measured_on_the_way
from modeling_nanochat.recipes.network import HorizonArguments, NetworkArguments
from modeling_nanochat.recipes.publishing.finished import publish
from modeling_nanochat.recipes.stages.folder import checkpoint_to_resume, load_tokenizer, save_checkpoint
from modeling_nanochat.recipes.stages.record import Stage, is_main_process
from modeling_nanochat.tokenization_nanochat_gpt import encode_text, generation_token_ids, token_bytes
from modeling_nanochat.training import devices, memory, scaling
from modeling_nanochat.training.architectures import fresh_network
from modeling_nanochat.training.data.documents import open_documents
from modeling_nanochat.training.data.near_duplicates import find_near_duplicates
from modeling_nanochat.training.data.packing import PackingStats
from modeling_nanochat.training.data.row_loader import RowLoader
from modeling_nanochat.training.data.row_source import RowSource
from modeling_nanochat.training.optimizer.eras import era_of
from modeling_nanochat.training.ranks import gather
from modeling_nanochat.training.trainers.pretrain import Evaluation, PretrainConfig, PretrainTrainer
from modeling_nanochat.training.trainers.settings import check_range
from modeling_nanochat.training.trainers.stopping import Stopped
from modeling_nanochat.training.trainers.time_budget import TimeBudget

STEPS_TIMED = 4  # of a throw-away network, to turn minutes into steps; the first is not counted
SHARE_FOR_TRAINING = 0.95  # of a wall-clock budget; the rest is for evaluation and checkpoints
SAMPLE_TOKENS = 48
SAMPLE_TEMPERATURE = 0.8
FOLLOWS = {"gradient_accumulation_steps": "total_batch_tokens, from which it follows"}
BITS_PER_BYTE = "validation_bits_per_byte"


@dataclass
class PretrainArguments:
    """What to train on, and for how long at most."""

    data: str = field(
        default="out/demo/data/pretrain", metadata={"help": "Documents: a folder, a glob, or a data set on the Hub."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds a document."})
    tokenizer: str = field(default="out/demo/tokenizer", metadata={"help": "Folder or Hub name of the tokenizer."})
    rerun: bool = field(default=False, metadata={"help": "Start over, even if the run has been finished or begun."})
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "Set the horizon to what this machine does in so many minutes, all included (measured)."},
    )

    def check(self) -> None:
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes is {self.max_minutes}, expected a number above 0")


@dataclass
class MeasureArguments:
    """What is measured on the way."""

    validate_every: int = field(default=250, metadata={"help": "Steps between validations; 0: only at the end."})
    validation_tokens: int = field(default=1_000_000, metadata={"help": "Tokens of validation data to measure on."})
    sample_every: int = field(default=0, metadata={"help": "Steps between samples of text; 0: only at the end."})
    sample_prompts: list[str] = field(
        default_factory=lambda: [
            "The capital of France is",
            "The President of the United States",
            "If yesterday was Friday, then tomorrow will be",
        ],
        metadata={"help": "What the samples go on from."},
    )

    def check(self) -> None:
        for name in ("validate_every", "sample_every"):
            check_range(self, name, 0)
        check_range(self, "validation_tokens", 1)


@dataclass
class RunSettings:
    """All settings of a run, in groups of one subject each."""

    arguments: PretrainArguments
    network: NetworkArguments
    horizon: HorizonArguments
    measure: MeasureArguments
    on_the_way: OnTheWayArguments
    config: PretrainConfig

    CLASSES: ClassVar = (
        PretrainArguments, NetworkArguments, HorizonArguments, MeasureArguments, OnTheWayArguments, PretrainConfig,
    )  # fmt: skip

    def __post_init__(self):
        for part in (self.arguments, self.horizon, self.measure):
            part.check()


def main() -> None:
    pretrain(RunSettings(*parse(*RunSettings.CLASSES, refused=FOLLOWS)))


def pretrain(settings: RunSettings) -> None:
    """Train what the settings say, unless it is done."""
    arguments, measure, config = settings.arguments, settings.measure, settings.config
    groups = [arguments, settings.network, settings.horizon, measure, settings.on_the_way, config]
    stage = Stage("pretrain", config.output_dir, groups, [arguments.data, arguments.tokenizer], arguments.rerun)
    if stage.is_done():
        if config.push_to_hub:
            publish(stage, config)
        return
    logging.disable_progress_bar()  # of writing checkpoints, which would tear the one of training
    if torch.cuda.device_count() > config.world_size:
        stage.say(
            f"using {config.world_size} of {torch.cuda.device_count()} GPUs; see recipes/accelerate for all of them"
        )
    checkpoint = checkpoint_to_resume(stage, config)
    tokenizer = load_tokenizer(arguments.tokenizer)
    on_the_way = measured_on_the_way(settings.on_the_way, tokenizer)
    documents = open_documents(arguments.data, arguments.text_column)
    length = settings.network.sequence_length
    source = RowSource(documents, tokenizer, length, config.process_index, config.world_size)
    network = settings.network.network(len(tokenizer), **generation_token_ids(tokenizer))
    config.optimizer_era = config.optimizer_era or era_of(network)
    settled = settle(settings, network, source, checkpoint)
    settled.apply(config)
    samples = Samples(tokenizer, measure.sample_prompts)
    validation = Validation(source.validation(measure.validation_tokens, settled.rows), tokenizer)
    evaluations = [Evaluation(validation, measure.validate_every), Evaluation(samples, measure.sample_every)]
    trainer = PretrainTrainer(
        make_model(network, config),
        config,
        source.training(settled.rows, config.device),
        evaluations=[*evaluations, *on_the_way],
        processing_class=tokenizer,
    )
    if arguments.max_minutes is not None and checkpoint is None:
        deadline = stage.started + 60 * arguments.max_minutes
        trainer.add_callback(TimeBudget(trainer, deadline, settled.most_steps))
    announce(stage, trainer, settled)
    overlap = find_near_duplicates(documents) if is_main_process() else None
    stage.say(str(overlap))
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_checkpoint(model, tokenizer, config.output_dir)
    done = dataclasses.replace(settled.plan, steps=trainer.state.global_step)  # a budget of minutes moves the end
    results = results_of(trainer, done)
    if overlap is not None:
        results["validation_near_duplicates"] = dataclasses.asdict(overlap) | {"share": overlap.share}
    stage.finish(results, trainer.state.log_history, samples.taken)
    publish(stage, config)


def make_model(network: PreTrainedConfig, config: PretrainConfig) -> PreTrainedModel:
    """Fresh weights, the same on every rank and whatever was drawn before."""
    set_seed(config.seed)
    return fresh_network(network)


@dataclass(frozen=True)
class Settled:
    """What a run is going to be, where its settings left something open."""

    plan: scaling.TrainingPlan
    rows: int  # of a micro-batch on each device
    accumulation_steps: int
    seconds: float | None  # that the run was found to take, if it was tried
    most_steps: int  # the horizon, which a budget of minutes may cut

    def apply(self, config: PretrainConfig) -> None:
        """Write it into the Trainer's settings. Once: what is written there is what the run does."""
        config.max_steps = self.plan.steps
        config.per_device_train_batch_size = self.rows
        config.gradient_accumulation_steps = self.accumulation_steps
        config.weight_decay = self.plan.weight_decay if config.weight_decay is None else config.weight_decay


def planned(settings: RunSettings, network: PreTrainedConfig) -> scaling.TrainingPlan:
    """What the settings and the shape alone say of a run; minutes and the machine are left to `settle`."""
    config, horizon = settings.config, settings.horizon
    return scaling.plan_training(
        network,
        era=config.optimizer_era or era_of(network),
        aspect_ratio=settings.network.aspect_ratio,
        batch_tokens=horizon.total_batch_tokens,
        max_steps=config.max_steps if config.max_steps > 0 else None,
        target_flops=horizon.target_flops,
        tokens_per_parameter=horizon.tokens_per_parameter,
    )


def settle(settings: RunSettings, network: PreTrainedConfig, source: RowSource, checkpoint: str | None) -> Settled:
    """Settle batch, micro-batch, number of steps and decay from the settings, the shape and the machine.

    A run of so many minutes that is resumed keeps the number of steps it had, whatever this machine would do in them.
    """
    config = settings.config
    plan = planned(settings, network)
    rows = config.per_device_train_batch_size or memory.rows_that_fit(
        network,
        batch_tokens=plan.batch_tokens,
        sequence_length=source.sequence_length,
        world_size=config.world_size,
        device=config.device,
        dtype=devices.choose_dtype(config.activation_dtype, config.device),
        checkpointed=memory.is_checkpointed(config),
    )
    accumulation = scaling.accumulation_steps(plan.batch_tokens, rows, source.sequence_length, config.world_size)
    steps, seconds = plan.steps, None
    if checkpoint is not None and settings.arguments.max_minutes is not None:
        steps = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).max_steps
    elif settings.arguments.max_minutes is not None:
        budget = 60 * settings.arguments.max_minutes
        pace = seconds_per_micro_batch(network, config, source.training(rows, config.device)) * accumulation
        possible = max(1, int(budget * SHARE_FOR_TRAINING / pace))
        seconds = budget if possible < steps else steps * pace / SHARE_FOR_TRAINING
        steps = min(steps, possible)
    return Settled(dataclasses.replace(plan, steps=steps), rows, accumulation, seconds, most_steps=plan.steps)


def seconds_per_micro_batch(network: PreTrainedConfig, config: PretrainConfig, rows: RowLoader) -> float:
    """Time of a step of one micro-batch, measured on a throw-away network; every rank gets rank 0's figure."""
    trial = dataclasses.replace(
        config,
        max_steps=STEPS_TIMED,
        gradient_accumulation_steps=1,
        logging_steps=1,
        save_strategy="no",
        push_to_hub=False,
        disable_tqdm=True,
        report_to="none",
    )
    with redirect_stdout(StringIO()):  # which attention was chosen is said when the run begins
        trainer = PretrainTrainer(make_model(network, trial), trial, rows)
    trainer.save_checkpoint = lambda: None  # of a signal that comes now
    try:
        trainer.train()
    except Stopped as stopped:
        raise Stopped(stopped.number, 0, config.max_steps) from None
    rates = [line["tokens_per_second"] for line in trainer.state.log_history if "tokens_per_second" in line]
    seconds = [trainer.batch_tokens / statistics.median(rates[1:])]
    return broadcast_object_list(seconds)[0]


# ---------------------------------------------------------------- what is measured on the way and what is left behind


class Validation:
    """Bits per byte of the network on validation batches."""

    def __init__(self, batches: list[dict[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase):
        self.batches, self.token_bytes = batches, token_bytes(tokenizer)

    def __call__(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        losses = gather(packed_loss(model, self.batches, self.token_bytes))
        return {BITS_PER_BYTE: TextLoss.total(losses).bits_per_byte}


class Samples:
    """What the network goes on with after each prompt, drawn: its likeliest tokens soon repeat themselves and tell
    nothing. `taken` collects them all, once for each step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]):
        self.tokenizer, self.prompts = tokenizer, list(prompts)
        self.taken: list[dict[str, Any]] = []

    def __call__(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        bos = self.tokenizer.bos_token_id
        ids = [[bos, *encode_text(self.tokenizer, prompt)] for prompt in self.prompts]
        # On all ranks, which would wait anyway: sharded weights need them all.
        completions = generate_batch(
            model, self.tokenizer, ids, max_new_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, seed=step
        )
        self.taken = [sample for sample in self.taken if sample["step"] != step]  # the last step is measured twice
        for prompt, (completion,) in zip(self.prompts, completions):
            self.taken.append({"step": step, "prompt": prompt, "completion": self.tokenizer.decode(completion)})
        return {}


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
    return results | what_became_of_documents(trainer)


def what_became_of_documents(trainer: PretrainTrainer) -> dict[str, Any]:
    """Of all ranks' streams: the share of tokens that no row holds. All ranks call this together."""
    own = {number: stream.stats for number, stream in trainer.rows.open_streams.items()}
    if not own:  # nothing was left to train on: as the checkpoint has it
        states = trainer.rows.position["states"]
        own = {number: PackingStats.of(state["packer"]) for number, state in states.items()}
    streams: dict[int, PackingStats] = {}
    for each in gather(own):
        streams |= each  # one stream may be read by several ranks
    cropped, kept = (sum(getattr(each, name) for each in streams.values()) for name in ("cropped_tokens", "tokens"))
    return {"cropped_share": cropped / max(cropped + kept, 1)}


def announce(stage: Stage, trainer: PretrainTrainer, settled: Settled) -> None:
    config, network, plan = trainer.args, trainer.model.config, settled.plan
    expected = devices.expected_seconds(
        plan.flops, config.device, trainer.activation_dtype, config.world_size, trainer.peak_flops_per_second
    )
    needed = memory.memory_per_device(
        network,
        config.per_device_train_batch_size,
        trainer.rows.sequence_length,
        config.world_size,
        trainer.activation_dtype,
        config.device.type,
        memory.is_checkpointed(config),
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
        seconds=settled.seconds or expected,
    )


if __name__ == "__main__":
    run(main)
