"""Checkpoints that appear whole or not at all, with every rank's share of the optimizer's state.

Everything is written into a folder that no reader looks at, flushed to disk, and renamed when all ranks are done; a
checkpoint on its way out is renamed before it is deleted. So a process may be killed at any moment, also in the middle
of saving, and every folder named `checkpoint-N` is complete. The price is one pass of flushing for each checkpoint.
All ranks must see the same file system.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints

from modeling_nanochat.inference import chat_generation_config
from modeling_nanochat.training.architectures import is_nanochat
from modeling_nanochat.training.trainers.publishing import PublishingMixin
from modeling_nanochat.training.whole_files import (
    STAGING,
    damage,
    remove_staging,
    whole_folder,
    write_checksums,
    write_json,
)

ROWS_OF_A_STEP = "rows_of_a_step.json"
OPTIMIZER_SHARD = "optimizer_{:05d}_of_{:05d}.pt"


@contextmanager
def as_it_answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[None]:
    """In here the settings that are saved with a model are those of one that answers, with its cache and calculator,
    and not those of training."""
    if tokenizer is None or not isinstance(model, PreTrainedModel):  # adapters bring no settings
        yield
        return
    context, use_cache, generation = (
        model.config.max_position_embeddings,
        model.config.use_cache,
        model.generation_config,
    )
    model.config.use_cache = True  # the Trainer turns it off
    tokenizer.model_max_length = context
    model.generation_config = chat_generation_config(tokenizer, context)
    if not is_nanochat(model.config):
        del model.generation_config.use_calculator  # which only nanochat's own `generate` knows
    try:
        yield
    finally:
        model.config.use_cache, model.generation_config = use_cache, generation


class WholeCheckpointsMixin(PublishingMixin):
    """Goes before a Trainer class, whose way of saving it replaces: the Trainer's writes in place, and rank 0's share
    of a sharded optimizer only. FSDP keeps its own files for the optimizer."""

    @property
    def rows_of_a_step(self) -> int:
        """Of all devices."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def save_position(self, folder: Path) -> None:
        """Called on every rank with the folder of a checkpoint. Here the position in the data is the number of steps,
        which means something for steps of so many rows; trainers whose data knows its position save that."""
        if self.is_world_process_zero():
            write_json(folder / ROWS_OF_A_STEP, self.rows_of_a_step)

    def check_position(self, checkpoint: Path) -> None:
        """`ValueError` if the steps of the run that wrote a checkpoint took another number of rows."""
        file = checkpoint / ROWS_OF_A_STEP
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if before not in (None, self.rows_of_a_step):
            raise ValueError(
                f"a step of the run that wrote {checkpoint} took {before} rows, one of this run takes "
                f"{self.rows_of_a_step} (per_device_train_batch_size x gradient_accumulation_steps x processes), so it "
                "would go on at another place in the data; expected the same product"
            )

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """A checkpoint of the step that the run has come to."""
        self.store_flos()
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        is_main, barrier = self.is_world_process_zero(), self.accelerator.wait_for_everyone
        with whole_folder(target, is_main_process=is_main, barrier=barrier, seal=write_checksums) as folder:
            self.save_model(str(folder), _internal_call=True)
            if is_main:  # nothing reads it, and it holds the Hub's token
                (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            self.save_optimizer(folder)
            self._save_rng_state(str(folder))
            self.save_position(folder)
            self.state.stateful_callbacks |= {
                type(each).__name__: each.state()
                for each in (*self.callback_handler.callbacks, self.control)
                if isinstance(each, ExportableState)
            }
            if is_main:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.push_to_hub:
            self.push_checkpoint(target)
        if is_main:
            spared = self.being_pushed if self.is_pushing() else None
            remove_old_checkpoints(self.args.output_dir, self.args.save_total_limit, spared)

    def whole_model(self) -> PreTrainedModel:
        """The network with all its weights, to be saved: the one in training, but under FSDP, where all ranks must
        call this, the main process gets a gathered copy of the class that was sharded (the others one without values).
        """
        if not self.is_fsdp_enabled:
            return self.model
        weights = self.accelerator.get_state_dict(self.model)
        sharded = type(self.accelerator.unwrap_model(self.model))  # FSDP2 makes a class of it and of FSDPModule
        original = next(base for base in sharded.__mro__[1:] if issubclass(base, PreTrainedModel))
        with torch.device("meta"):
            whole = original(self.model.config)
        if self.is_world_process_zero():
            whole.load_state_dict(weights, assign=True)
        return whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model as it answers; with `push_to_hub`, unless this is the Trainer's own call, it is pushed too."""
        if not self.is_fsdp_enabled:
            with as_it_answers(self.model, self.processing_class):
                return super().save_model(output_dir, _internal_call)
        whole = self.whole_model()
        if self.is_world_process_zero():
            with as_it_answers(whole, self.processing_class):
                whole.save_pretrained(output_dir or self.args.output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir or self.args.output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def save_optimizer(self, folder: Path) -> None:
        """This rank's share of the optimizer's state, and the scheduler's."""
        if self.is_fsdp_enabled:
            return self._save_optimizer_and_scheduler(str(folder))
        rank, ranks = self.args.process_index, self.args.world_size
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_SHARD.format(rank, ranks))
        if self.is_world_process_zero():
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and counters come from the checkpoint; rates, betas and decays stay as the settings have them now."""
        if checkpoint is None:
            return
        self.check_position(Path(checkpoint))
        settings = [{name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups]
        if self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            rank, ranks = self.args.process_index, self.args.world_size
            optimizer = self.optimizer.optimizer  # without accelerate's wrapper
            optimizer.load_state_dict(load_optimizer_state(Path(checkpoint), rank, ranks, optimizer.merge_state_dicts))
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)
        scheduler_state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler_state)


def load_optimizer_state(
    checkpoint: Path, rank: int, ranks: int, merge: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """This rank's share of the state; or the whole, merged of all shares, if another number of ranks wrote it.

    Raises:
        ValueError: the checkpoint holds no shards, or not all of them.
    """
    shards = sorted(checkpoint.glob("optimizer_*_of_*.pt"))
    written_by = int(shards[0].stem.rsplit("_", 1)[1]) if shards else 0
    if not shards or len(shards) != written_by:
        raise ValueError(
            f"{checkpoint} holds {len(shards)} shards of the optimizer, expected {written_by or 'at least one'}"
        )
    if written_by == ranks:
        return torch.load(shards[rank], map_location="cpu", weights_only=True)
    return merge([torch.load(shard, map_location="cpu", weights_only=True) for shard in shards])


def latest_checkpoint(output_dir: str | Path, say: Callable[[str], object] | None = None) -> str | None:
    """The checkpoint of the highest step in `output_dir`, or None.

    Args:
        output_dir: folder of a run.
        say: if given, every file is read and held against its checksum; a damaged checkpoint is passed over, and said.
    """
    if not os.path.isdir(output_dir):
        return None
    for checkpoint in reversed(sort_checkpoints(str(output_dir))):
        found = damage(Path(checkpoint)) if say is not None else None
        if found is None:
            return checkpoint
        say(f"{checkpoint} is damaged, so it is passed over: {found}")
    return None


def remove_old_checkpoints(output_dir: str | Path, keep: int | None, spared: Path | None = None) -> None:
    """Delete all but the `keep` checkpoints of the highest steps; None or 0 keeps all. One may be `spared`."""
    for old in sort_checkpoints(str(output_dir))[: -keep if keep else 0]:
        if spared is not None and Path(old) == spared:
            continue
        doomed = Path(output_dir) / STAGING / Path(old).name
        doomed.parent.mkdir(exist_ok=True)
        os.rename(old, doomed)
        remove_staging(doomed)
