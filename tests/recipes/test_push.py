"""Pushing, through the real client to a stand-in of the Hub: what is there is whole, a stranger can use it as its card
says, and what fails loses nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForCausalLM

from modeling_nanochat.recipes import push as push_recipe
from modeling_nanochat.recipes.evaluation.identity import model_hash
from modeling_nanochat.recipes.pretrain import pretrain
from modeling_nanochat.recipes.publishing.card import write_model_card
from modeling_nanochat.recipes.publishing.clean_process import answer
from modeling_nanochat.recipes.push import PushArguments, push
from modeling_nanochat.recipes.stages.record import read_stage
from modeling_nanochat.training import hub as hub_module
from modeling_nanochat.training.trainers.pretrain import PretrainTrainer
from modeling_nanochat.training.whole_files import damage
from tests.hub_stand_in import TOKEN, StandIn, hub_stand_in
from tests.modeling.test_hub import CODE
from tests.recipes.test_pretrain_recipe import folder, settings  # noqa: F401 (a fixture)
from tests.toys import digit_tokenizer, save_chat_model, whole_model
from tests.training.test_sft import make_trainer

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "README.md"} | CODE  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, and this process's client turned to it."""
    constants = huggingface_hub.constants
    with hub_stand_in() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in knows the older protocol only
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between the client's retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running
        assert running.unknown == []


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("toy") / "chat")


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A model that takes several uploads."""
    whole_model("head").save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    digit_tokenizer().save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def commits(hub: StandIn, name: str) -> dict[str, set[str]]:
    """Files by the title of each commit, without the Hub's own."""
    own = hub.repositories[name].commits[1:]
    return {commit.title: set(commit.files) - {".gitattributes"} for commit in own}


# ---------------------------------------------------------------- --push_to_hub


def test_a_run_pushes_whole_models_on_the_way_and_at_the_end(hub, folder, tmp_path, monkeypatch):  # noqa: F811
    wanted = {"push_to_hub": True, "hub_model_id": "tiny", "hub_strategy": "checkpoint", "hub_token": TOKEN,
              "hub_always_push": True}  # fmt: skip
    pretrain(settings(folder, tmp_path / "out", **wanted))
    made = commits(hub, "tester/tiny")
    assert list(made) == ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    for files in made.values():
        assert files >= MODEL and not {"stage.lock", "stage.json", "training_args.bin"} & files
    on_the_way = hub.repositories["tester/tiny"].commits[1].files
    assert "step 2 of 4" in on_the_way["README.md"].decode()
    generation = json.loads(on_the_way["generation_config.json"])
    assert generation["use_calculator"] and generation["do_sample"]
    assert json.loads(on_the_way["config.json"])["use_cache"]
    assert json.loads(on_the_way["tokenizer_config.json"])["model_max_length"] == 32

    checkpoint = Path(snapshot_download("tester/tiny", allow_patterns="last-checkpoint/*"), "last-checkpoint")
    assert damage(checkpoint) is None and (checkpoint / "optimizer_00000_of_00001.pt").is_file()
    assert TOKEN not in (tmp_path / "out" / "stage.json").read_text()

    monkeypatch.setattr(PretrainTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    pretrain(settings(folder, tmp_path / "out", **wanted | {"hub_model_id": "another"}))
    assert list(commits(hub, "tester/another")) == ["End of training"]
    card = ModelCard(hub.repositories["tester/another"].files["README.md"].decode())
    (figure,) = card.data.eval_results
    record = read_stage(tmp_path / "out")
    assert figure.metric_value == round(record["results"]["validation_bits_per_byte"], 4)
    assert card.data.library_name == "transformers" and "1,024 tokens, 4 steps" in card.text
    assert "The capital of France is" in card.text  # no chat model, and not asked as one
    assert hub.repositories["tester/another"].files["curves/pretrain.png"].startswith(b"\x89PNG")


def test_a_push_that_fails_is_one_line_and_costs_no_training(hub, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    wanted = {"push_to_hub": True, "hub_model_id": "tiny", "hub_strategy": "every_save"}
    hub.refuse_commits = True
    with pytest.raises(OSError, match=r"not allowed to write to this repository.*the same command tries again") as said:
        pretrain(settings(folder, tmp_path, **wanted))
    assert "\n" not in str(said.value)
    assert re.search(r"checkpoint-2 was not pushed to tester/tiny: .*; training goes on", capsys.readouterr().out)
    assert read_stage(tmp_path) and AutoModelForCausalLM.from_pretrained(tmp_path)

    hub.refuse_commits = False
    monkeypatch.setattr(PretrainTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    pretrain(settings(folder, tmp_path, **wanted))
    assert list(commits(hub, "tester/tiny")) == ["End of training"]


def test_a_repository_that_may_not_be_written_is_known_before_anything_is_trained(hub, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(PretrainTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(OSError, match=r"somebody/tiny cannot be pushed to: .*no right to create somebody/tiny"):
        pretrain(settings(folder, tmp_path, push_to_hub=True, hub_model_id="somebody/tiny"))


def test_a_trainer_by_itself_pushes_a_whole_model_too(hub, folder, tmp_path):  # noqa: F811
    trainer = make_trainer(tmp_path, hub_model_id="sft")
    trainer.push_to_hub(license="mit", tags="toy")
    (files,) = commits(hub, "tester/sft").values()
    assert files >= MODEL and not any(name.startswith("packed") for name in files)
    card = ModelCard(hub.repositories["tester/sft"].files["README.md"].decode())
    assert card.data.license == "mit" and card.data.tags == ["nanochat", "toy"]


# ---------------------------------------------------------------- uploads


def test_an_upload_that_breaks_off_is_gone_on_with(hub, sharded):
    repository = hub_module.create_repository("tiny")
    shards = len(list(sharded.glob("*.safetensors")))
    assert shards > 2
    hub.breaks_after = 2
    with pytest.raises(OSError, match=r"was not pushed to tester/tiny: Error while uploading 'model-"):
        hub_module.upload(sharded, repository, "first")
    assert commits(hub, repository) == {} and 2 <= len(hub.uploads) < shards
    hub.breaks_after = None
    hub_module.upload(sharded, repository, "second")
    assert list(commits(hub, repository)) == ["second"]
    assert len(hub.uploads) == len(set(hub.uploads)) == shards  # none was sent twice


def test_what_would_be_loaded_instead_goes_with_the_commit(hub, sharded, toy):
    repository = hub_module.create_repository("tiny")
    hub_module.upload(sharded, repository, "shards")
    hub_module.upload(toy, repository, "one file")
    weights = [name for name in hub.repositories[repository].files if "safetensors" in name]
    assert weights == ["model.safetensors"] and len(hub.repositories[repository].commits) == 3


def test_a_card_that_a_person_edited_stays(hub, toy, tmp_path):
    model = shutil.copytree(toy, tmp_path / "model")
    write_model_card(model)
    assert write_model_card(model) is None  # its own it may write over
    repository = hub_module.create_repository("tiny")
    hub_module.upload(model, repository, "first")
    theirs = hub.repositories[repository].files["README.md"] + b"\nMine.\n"
    hub.repositories[repository].files["README.md"] = theirs  # in the Hub's pages
    hub_module.upload(model, repository, "second")
    assert hub.repositories[repository].files["README.md"] == theirs

    (model / "README.md").write_text("My own card.")
    assert "stays: a person has edited it" in write_model_card(model)
    hub_module.upload(model, repository, "third")
    assert hub.repositories[repository].files["README.md"] == b"My own card."


# ---------------------------------------------------------------- nanochat push


# Nothing of this project in reach, and nothing of this machine's caches: a stranger types what stands in the card.
STRANGER = """
import sys
sys.path.append(sys.argv[1])
for name in ("modeling_nanochat", "trl", "accelerate", "datasets"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
exec(sys.argv[2])
"""


@pytest.mark.slow
def test_push_uploads_what_a_stranger_can_use_as_its_card_says(hub, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["push", "--model", str(toy), "--repo", "toy", "--private", "--license", "mit"])
    push_recipe.main()
    said = capsys.readouterr().out
    assert "it answers: 'It is 12+30 = 42, I think.'" in said and "pushed in one commit" in said
    assert list(commits(hub, "tester/toy")) == ["Upload chat"] and hub.repositories["tester/toy"].private
    assert not Path("out/push/tester/toy").exists()

    card = hub.repositories["tester/toy"].files["README.md"].decode()
    typed = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'name = "tester/toy"' in typed
    process = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER, sysconfig.get_path("purelib"), typed],
        env=hub.environment(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "It is 12+30 = 42, I think."


@pytest.mark.slow
def test_a_dry_run_uploads_nothing_and_finds_a_folder_that_does_not_load(hub, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(push_recipe, "answer", lambda _, chat: "Hello.")  # tried above
    shutil.copytree(toy, "model")
    Path("model", "notes.txt").write_text("not for the Hub")
    push(PushArguments(repo="tester/toy", model="model", dry_run=True))
    said = capsys.readouterr().out
    assert "left out: notes.txt" in said and "nothing was uploaded; what would be is in out/push/tester/toy" in said
    assert hub.repositories == {}
    written = {file.name for file in Path("out/push/tester/toy").iterdir()}
    assert written >= MODEL and "notes.txt" not in written
    assert os.path.samefile("model/model.safetensors", "out/push/tester/toy/model.safetensors")  # no copy

    Path("out/push/tester/toy/decoder_layer.py").write_text("import modeling_nanochat.training")
    with pytest.raises(ValueError, match=r"somebody without this package: ModuleNotFoundError: .*modeling_nanochat"):
        answer("out/push/tester/toy", chat=True)


def test_a_model_that_is_not_as_its_stage_left_it_is_not_pushed(folder, tmp_path):  # noqa: F811
    pretrain(settings(folder, tmp_path / "base"))
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not as the stage pretrain left it: model.safetensors has changed"):
        push(PushArguments(repo="tester/base", model=str(tmp_path / "base"), dry_run=True))


@pytest.mark.parametrize("changes, message", [
    ({"repo": "a/b/c"}, "--repo a/b/c is no name for the Hub"),
    ({"model": "nowhere"}, "--model nowhere holds no model"),
])  # fmt: skip
def test_misuse_is_said_before_any_work(changes, message, toy):
    with pytest.raises(ValueError, match=message):
        push(PushArguments(**{"repo": "me/toy", "model": str(toy), "dry_run": True} | changes))


def test_without_a_token_it_says_what_to_do(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"toy cannot be pushed to: .*hf auth login"):
        hub_module.create_repository("toy")


# ---------------------------------------------------------------- the card


def write_record(place: Path, name: str, **record) -> None:
    place.mkdir(parents=True, exist_ok=True)
    empty = {"name": name, "arguments": {}, "inputs": {}, "announced": {}, "results": {}, "seconds": 60.0,
             "log_history": [], "samples": [], "files": {},
             "machine": {"accelerators": ["H100"], "world_size": 8, "cores": 96, "cpu": "AMD"}}  # fmt: skip
    (place / "stage.json").write_text(json.dumps(empty | record))


def test_a_card_tells_what_the_records_of_all_stages_tell(toy, tmp_path, monkeypatch):
    """A run as of the speedrun, by its records alone, looked at from elsewhere."""
    run = tmp_path / "run" / "out"
    shutil.copytree(toy, run / "rl")
    parts = [{"name": "openai/gsm8k:main", "format": "gsm8k"}, {"name": "spelling_bee", "rows": 9}]
    write_record(run / "data", "data", arguments={"sft": parts, "rl_validation": [parts[0]], "pretrain": "none"})
    text = "karpathy/fineweb-edu-100b-shuffle"
    write_record(run / "base", "pretrain", arguments={"data": text}, inputs={text: "by name"},
                 results={"tokens": 8_800_000_000, "steps": 16_000},
                 log_history=[{"step": step, "loss": 9 - step} for step in range(5)])  # fmt: skip
    write_record(run / "sft", "sft", inputs={"out/base": "", "out/data/sft": ""}, results={"conversations": 500})
    (run / "data" / "sft").mkdir()
    write_record(run / "rl", "rl", inputs={"out/sft": ""}, results={"steps": 60})
    interval = {"mean": 0.0456, "low": 0.04, "high": 0.05}
    figures = {"core": interval, "core/boolq": 0.1, "core_missing_tasks": "none", "pass@1": interval}
    weights = {"out/rl": model_hash(str(run / "rl"))}
    write_record(run / "eval", "eval", arguments={"weights": weights, "temperature": 0.0}, results={"rl": figures})
    monkeypatch.chdir(tmp_path)

    write_model_card(run / "rl", "me/d24", license="mit")
    card = ModelCard.load(run / "rl" / "README.md")
    assert card.data.license == "mit"
    assert card.data.datasets == ["karpathy/fineweb-edu-100b-shuffle", "openai/gsm8k"]
    values = {(each.metric_name, each.dataset_name): each.metric_value for each in card.data.eval_results}
    assert values == {("CORE", "CORE (DCLM, 22 tasks)"): 0.0456, ("pass@1", "openai/gsm8k"): 0.0456}
    assert "pretraining then supervised fine-tuning then reinforcement learning" in card.text
    assert "8,800,000,000 tokens, 16,000 steps" in card.text and "8 x H100" in card.text
    assert "rows made by code: spelling_bee" in card.text and "0.046 [0.040, 0.050]" in card.text
    (entry,) = yaml.safe_load((run / "rl" / ".eval_results" / "gsm8k.yaml").read_text())
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 4.56
    assert entry["source"]["url"] == "https://huggingface.co/me/d24" and "greedy" in entry["notes"]

    settings_file = run / "rl" / "generation_config.json"  # other files: the evaluation was not of this model
    settings_file.write_text(settings_file.read_text().replace("0.6", "0.7"))
    write_model_card(run / "rl", "me/d24")
    assert ModelCard.load(run / "rl" / "README.md").data.eval_results is None
    assert not (run / "rl" / ".eval_results" / "gsm8k.yaml").exists()
