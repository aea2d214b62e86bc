"""How a Trainer here pushes to the Hub: a whole model in one commit, that a stranger can load.

The Trainer's own way uploads the folder that a run works in, as it lies there: without the network's code, with the
training arguments (and the token in them), packed data and locks. Here a push is what `training/hub.py` names, from the
checkpoint itself. `hub_strategy` says when: `end`, or with `every_save` each checkpoint too, with `checkpoint` and
`all_checkpoints` also what resuming takes. Those on the way are sent beside the training; one that fails is a line, and
training goes on.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from modeling_nanochat.training import hub, model_card

LAST_CHECKPOINT = "last-checkpoint"  # as the Trainer calls it on the Hub


class PublishingMixin:
    """Goes before a Trainer class."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make sure of the repository, before the work begins.

        Raises:
            OSError: there is no right to write to it, or the Hub cannot be reached.
        """
        if not self.is_world_process_zero():
            return
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = hub.create_repository(repository_name(self.args), private, token or self.args.hub_token)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | Future | None:
        """Save the model to `output_dir` and upload it in one commit; on the main process.

        Args:
            blocking: wait for the upload; otherwise a future of it is returned.
            card: see `create_model_card`.

        Raises:
            OSError: the upload failed; the folder is complete.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card)
        self._finish_current_push()
        settings = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        job = hf_api().run_as_future(hub.upload, self.args.output_dir, self.hub_model_id, commit_message, **settings)
        return job.result() if blocking else job

    def create_model_card(
        self,
        *,
        model_name: str | None = None,
        license: str | None = None,
        language: str | None = None,
        tags: str | Sequence[str] | None = None,
        dataset: str | Sequence[str] | None = None,
    ) -> None:
        """Write README.md into `output_dir`, unless a person's is there. Recipes write a fuller one."""
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or ())
            fields = {"license": license, "language": language, "tags": tags, "datasets": dataset}
            text = self.card_of(Path(self.args.output_dir), model_name, **fields)
            model_card.write_card(self.args.output_dir, text)

    def card_of(self, folder: Path, name: str | None = None, **fields: Any) -> str:
        """What the trainer itself can say of the model in a folder."""
        repository = self.hub_model_id or str(folder)
        step, last = self.state.global_step, self.state.max_steps
        losses = [line["loss"] for line in self.state.log_history if "loss" in line]
        training = f"Trained by `{type(self).__name__}`, step {step:,} of {last:,}"
        training += f"; training loss {losses[-1]:.4g}." if losses else "."
        facts = "\n".join(f"- {name}: {value}" for name, value in model_card.shape(folder))
        sections = [training, facts, model_card.how_to_use(folder, repository, chat=bool(self.processing_class))]
        return model_card.card_text(name or repository, sections, model_card.card_data(**fields))

    def push_checkpoint(self, folder: Path) -> None:
        """Start to upload a checkpoint, if `hub_strategy` wants those on the way."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.is_pushing() and not self.args.hub_always_push:
            print(f"[hub] {folder} is not pushed: the push before it is still going on", flush=True)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step = self.state.global_step
        subfolders = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: folder.name}
        job = hf_api().run_as_future(
            hub.upload,
            folder,
            self.hub_model_id,
            f"Training in progress, step {step}",
            contents={model_card.NAME: self.card_of(folder).encode()},
            subfolders={subfolders[strategy]: folder} if strategy in subfolders else None,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )
        job.add_done_callback(say_failure)
        self.being_pushed = folder
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if self.is_pushing() else ()), job])

    def is_pushing(self) -> bool:
        pushing = getattr(self, "push_in_progress", None)
        return pushing is not None and not pushing.is_done()


def repository_name(args: Any) -> str:
    """Where a run is pushed to: `hub_model_id`, else what the Trainer calls it, the name of the output folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def say_failure(job: Future) -> None:
    if error := job.exception():
        print(f"[hub] {error}; training goes on", flush=True)
