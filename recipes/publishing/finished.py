"""What every stage that trains a model does last: its card, and with `--push_to_hub` the upload in one commit."""

from transformers import TrainingArguments

from modeling_nanochat.recipes.publishing.card import write_model_card
from modeling_nanochat.recipes.stages.record import Stage, is_main_process
from modeling_nanochat.training import hub
from modeling_nanochat.training.trainers.publishing import repository_name


def publish(stage: Stage, config: TrainingArguments) -> None:
    """Of a finished stage, also of one that had been finished before.

    Raises:
        OSError: the push failed; the folder is complete, and the same command tries again.
    """
    if not is_main_process():
        return
    folder = config.output_dir
    repository = None
    if config.push_to_hub:
        private, token = config.hub_private_repo, config.hub_token
        repository = hub.create_repository(repository_name(config), private, token)
    if said := write_model_card(folder, repository):
        stage.say(said)
    if repository is None:
        return
    try:
        commit = hub.upload(folder, repository, "End of training", token=config.hub_token, revision=config.hub_revision)
    except OSError as error:
        raise OSError(f"{error}; the folder is complete, the same command tries again") from error
    stage.say(f"pushed in one commit: {commit.commit_url}")
