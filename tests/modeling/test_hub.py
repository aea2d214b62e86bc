"""A checkpoint as the Hub holds it: it loads with this package and, through its own copied code, without."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from modeling_nanochat import NanoChatGPTForCausalLM, NanoChatGPTModel
from tests.toys import digit_tokenizer, whole_model

CODE = {"configuration_nanochat_gpt.py", "modeling_nanochat_gpt.py"}
AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}

# Run with -I -S: neither the working folder, nor PYTHONPATH, nor an editable install's hook puts the package on the
# path. Setting the names to None makes any import of them fail even if it is installed beside Transformers.
STRANGER = """
import sys
sys.path.append(sys.argv[1])
for name in ("modeling_nanochat", "training", "eval", "recipes"):
    sys.modules[name] = None
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
for folder in map(Path, sys.argv[2:]):
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        raise SystemExit("the folder loaded without its code: the package was not hidden")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None asks at a terminal first
    expected = load_file(folder / "expected" / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(expected["input_ids"]).last_hidden_state
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=0)
    torch.testing.assert_close(hidden, expected["hidden"], rtol=0, atol=0)
    generated = model.generate(expected["input_ids"], max_new_tokens=8, do_sample=False)
    assert generated.equal(expected["generated"]), generated
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        [{"role": "user", "content": "Hi"}], max_new_tokens=4, do_sample=False
    )
    assert answer[0]["generated_text"][-1]["role"] == "assistant", answer
    call = tokenizer("<|python_start|>12+30<|python_end|>", return_tensors="pt").input_ids
    processed = [model.calculator(tokenizer)]
    answer = model.generate(call, attention_mask=torch.ones_like(call), max_new_tokens=3, logits_processor=processed)
    assert tokenizer.decode(answer[0, call.shape[1] :]) == "<|output_start|>42<|output_end|>", answer
    model.save_pretrained(folder / "saved_again")
    print("loaded", folder.name)
"""


@pytest.fixture(scope="module", params=["seed", "head"])
def checkpoint(request, tmp_path_factory):
    """(folder, model): a checkpoint saved in shards, with what the network answers written beside it."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    model = whole_model(request.param)
    model.save_pretrained(folder, max_shard_size="200KB")
    digit_tokenizer(model_max_length=64).save_pretrained(folder)
    return folder, model


def test_a_folder_holds_all_that_loading_takes(checkpoint):
    folder, _ = checkpoint
    assert {file.name for file in folder.glob("*.py")} >= CODE
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == AUTO_CLASSES
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()


def test_it_loads_without_trust_where_the_package_is(checkpoint):
    folder, model = checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is NanoChatGPTForCausalLM is sys.modules["transformers"].NanoChatGPTForCausalLM
    assert type(AutoModel.from_pretrained(folder)) is NanoChatGPTModel
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)) is NanoChatGPTForCausalLM
    for name, parameter in loaded.state_dict().items():
        assert parameter.equal(model.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_push_to_hub_uploads_the_same_folder(checkpoint, monkeypatch):
    folder, model = checkpoint
    uploaded = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

    def upload(self, working_dir, repo_id, *_, **__):
        uploaded[repo_id] = {file.name: file.read_bytes() for file in Path(working_dir).iterdir()}

    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("nanochat"))
    monkeypatch.setattr(NanoChatGPTForCausalLM, "_upload_modified_files", upload)
    model.push_to_hub("someone/nanochat", max_shard_size="200KB")
    files = uploaded["someone/nanochat"]
    assert files.pop("README.md")
    assert files == {name: (folder / name).read_bytes() for name in files} and files.keys() > CODE


def write_expectations(folder, model):
    input_ids = torch.randint(320, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = {
            "input_ids": input_ids,
            "logits": model(input_ids).logits,
            "hidden": model.model(input_ids).last_hidden_state,
            "generated": model.generate(input_ids, max_new_tokens=8, do_sample=False),
        }
    (folder / "expected").mkdir()
    save_file(expected, folder / "expected" / "expected.safetensors")


def test_it_loads_in_a_process_without_this_package(tmp_path):
    folders = []
    for era in ("seed", "head"):
        folders.append(tmp_path / era)
        model = whole_model(era)
        model.save_pretrained(folders[-1], max_shard_size="200KB")
        digit_tokenizer(model_max_length=64).save_pretrained(folders[-1])
        write_expectations(folders[-1], model)
    (tmp_path / "elsewhere").mkdir()
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER, sysconfig.get_path("purelib"), *map(str, folders)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["loaded seed", "loaded head"]
    for folder in folders:
        saved = folder / "saved_again"
        assert {file.name for file in saved.glob("*.py")} == {file.name for file in folder.glob("*.py")}
        assert json.loads((saved / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
