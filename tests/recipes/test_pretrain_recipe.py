"""The pretraining recipe from documents to a folder that loads: done once, resumed, bounded in time."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM
from trl import TrlParser

from modeling_nanochat.recipes import convert, scaling_laws
from modeling_nanochat.recipes.pretrain import RunSettings, pretrain
from modeling_nanochat.recipes.stages.record import read_stage
from modeling_nanochat.training.architectures import ARCHITECTURES
from modeling_nanochat.training.tokenizer import train_tokenizer
from modeling_nanochat.training.trainers.pretrain import PretrainTrainer
from modeling_nanochat.training.trainers.stopping import StopOnSignal, Stopped
from modeling_nanochat.training.trainers.time_budget import TimeBudget

WORDS = ["the", "a", "of", "king", "queen", "castle", "river", "mountain", "says", "goes", "sees", "dark", "bright"]
WORDS += ["garden", "winter", "silver", "quiet", "journey", "bridge", "village"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards of made-up text and a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("pretrain")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(300)]
    for number, part in enumerate((texts[:250], texts[250:])):
        (folder / "shards").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": part}), folder / "shards" / f"shard_{number:05d}.parquet", row_group_size=50)
    train_tokenizer(texts, 320).save_pretrained(folder / "tokenizer")
    return folder


def settings(folder, output, **changes) -> RunSettings:
    """The settings of a tiny run; each of `changes` goes to the group that has the field."""
    wanted = {
        "data": str(folder / "shards"), "tokenizer": str(folder / "tokenizer"), "output_dir": str(output),
        "depth": 2, "head_dim": 32, "sequence_length": 32, "total_batch_tokens": 256, "per_device_train_batch_size": 8,
        "validate_every": 2, "validation_tokens": 640, "sample_prompts": ["the king"],
        "max_steps": 4, "save_steps": 2, "use_cpu": True, "disable_tqdm": True, "polar_dtype": "float32", **changes,
    }  # fmt: skip
    groups = [
        group(**{name: wanted.pop(name) for name in list(wanted) if name in group.__dataclass_fields__})
        for group in RunSettings.CLASSES
    ]
    assert not wanted
    return RunSettings(*groups)


def test_a_tokenizer_that_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match=r"some/where/else holds no tokenizer \(no tokenizer_config"):
        pretrain(settings(folder, tmp_path, tokenizer="some/where/else"))


def test_makes_a_model_that_loads_and_is_not_made_again(folder, tmp_path, capsys, monkeypatch):
    pretrain(settings(folder, tmp_path))
    printed = capsys.readouterr().out
    assert "4 steps" in printed and "batch 8 x 32 tokens x 1 x 1 device(s)" in printed
    record = read_stage(tmp_path)
    assert record["results"]["tokens"] == 4 * 256
    overlap = record["results"]["validation_near_duplicates"]
    assert overlap["compared"] + overlap["too_short"] == 50 and overlap["nearly_in_training"] == 0
    assert f"0 of {overlap['compared']} validation documents (0.0%)" in printed
    assert 0 < record["results"]["validation_bits_per_byte"] < 9
    assert 0 < record["results"]["cropped_share"] < 1
    assert record["samples"][0]["prompt"] == "the king" and record["samples"][0]["step"] == 4
    measured = [line["step"] for line in record["log_history"] if "validation_bits_per_byte" in line]
    assert measured == [2, 4]

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bos, end = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|assistant_end|>"])
    assert model.generation_config.eos_token_id == [end, bos] and model.generation_config.pad_token_id == bos
    assert not (tmp_path / "training_args.bin").exists()

    monkeypatch.setattr(PretrainTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    pretrain(settings(folder, tmp_path))
    assert "already done" in capsys.readouterr().out


def test_core_is_measured_on_the_way(folder, tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    task = "label: next\n  dataset_uri: next.jsonl\n  num_fewshot: [1]\n  icl_task_type: language_modeling"
    (bundle / "core.yaml").write_text(f"icl_tasks:\n- {task}\n")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nnext,0\n")
    with pytest.raises(ValueError, match="next"):  # its data is missing: said before anything is trained
        pretrain(settings(folder, tmp_path / "base", measure_tasks=["core"], core_bundle=str(bundle)))
    (bundle / "eval_data").mkdir()
    rows = [
        {"context": "the king says", "continuation": "the bridge"},
        {"context": "a river", "continuation": "a castle"},
    ]
    (bundle / "eval_data" / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretrain(settings(folder, tmp_path / "base", measure_tasks=["core"], core_bundle=str(bundle), measure_every=3))
    record = read_stage(tmp_path / "base")
    assert [line["step"] for line in record["log_history"] if "core_of_1_tasks" in line] == [3, 4]
    assert record["results"]["core/next"] == record["results"]["core_of_1_tasks"] == 0


def test_a_signal_while_the_pace_is_measured_leaves_nothing(folder, tmp_path, monkeypatch):
    """The throw-away network of the trial was saved as if it were the run, which then refused to begin."""
    plain = StopOnSignal.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", on_step_end)
        with pytest.raises(Stopped, match="stopped by SIGTERM before the first step"):
            pretrain(settings(folder, tmp_path, max_minutes=1.0))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_goes_on_where_it_was_interrupted_and_only_there(folder, tmp_path, monkeypatch):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modeling_nanochat.recipes.pretrain.save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(folder, tmp_path, max_steps=2))
    assert (tmp_path / "checkpoint-2").is_dir() and read_stage(tmp_path) is None

    with pytest.raises(ValueError, match=r"unfinished run with other settings.*checkpoint-2.*--rerun true"):
        pretrain(settings(folder, tmp_path, max_steps=2, matrix_lr=0.5))
    pretrain(settings(folder, tmp_path, max_steps=2))
    steps = [line["step"] for line in read_stage(tmp_path)["log_history"] if "loss" in line]
    assert steps == [1, 2]  # read from the checkpoint: nothing was trained again
    pretrain(settings(folder, tmp_path, max_steps=2, matrix_lr=0.5))  # a finished run gives way
    assert read_stage(tmp_path)["arguments"]["matrix_lr"] == 0.5


def test_minutes_bound_the_run_and_are_what_is_announced(folder, tmp_path, capsys):
    run = settings(folder, tmp_path, max_steps=10**6, max_minutes=0.1, save_strategy="no", validate_every=50)
    pretrain(run)
    record = read_stage(tmp_path)
    assert record["announced"]["seconds"] == pytest.approx(6)
    assert capsys.readouterr().out.count("Attention: ") == 1  # the trial before the run says nothing
    assert 1 <= record["results"]["steps"] < 10**4  # how well the minutes are kept is tested below, on a made-up clock


@pytest.mark.parametrize("pace", [lambda step: 1.0, lambda step: 3.0, lambda step: 0.5, lambda step: 1 + step % 3])
def test_a_budget_is_kept_within_a_tenth_whatever_the_pace(monkeypatch, pace):
    """600 seconds and a first estimate of 540 steps, on a clock that the steps move; evaluations of 10 seconds."""
    clock = [0.0]
    monkeypatch.setattr("modeling_nanochat.training.trainers.time_budget.time.time", lambda: clock[0])
    state, args = SimpleNamespace(global_step=0, max_steps=540), SimpleNamespace(max_steps=540)
    trainer = SimpleNamespace(seconds_of_the_end=10.0, lr_scheduler=SimpleNamespace())
    budget = TimeBudget(trainer, deadline=600.0, most_steps=10**6)
    while state.global_step < state.max_steps:
        budget.on_step_begin(args, state, None)
        clock[0] += pace(state.global_step) + (60 if state.global_step == 0 else 0)  # the first step compiles
        state.global_step += 1
        budget.on_step_end(args, state, None)
        clock[0] += 10 if state.global_step % 50 == 0 else 0
    assert clock[0] + 10 == pytest.approx(600, rel=0.1)
    assert trainer.lr_scheduler.num_training_steps == args.max_steps == state.max_steps


def test_a_budget_longer_than_the_horizon_does_not_lengthen_it(folder, tmp_path):
    pretrain(settings(folder, tmp_path, max_steps=6, max_minutes=60.0))
    assert read_stage(tmp_path)["results"]["steps"] == 6


def test_indivisible_batch_is_explained(folder, tmp_path):
    with pytest.raises(ValueError, match=r"a batch of 250 tokens cannot be made of .* such as 256"):
        pretrain(settings(folder, tmp_path, total_batch_tokens=250))
    assert not (tmp_path / "stage.begun.json").exists()


LOAD_ALONE = """
import json, sys
sys.modules["modeling_nanochat"] = None  # as where it is not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the king sees", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    found[folder] = [type(model).__name__, model.config.max_position_embeddings, text]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_stock_architecture_is_a_plain_checkpoint_of_its_class(folder, tmp_path):
    for architecture in ARCHITECTURES:
        pretrain(settings(folder, tmp_path / architecture, architecture=architecture))
        record = read_stage(tmp_path / architecture)
        losses = [line["loss"] for line in record["log_history"] if "loss" in line]
        assert record["results"]["tokens"] == 4 * 256 and losses[-1] < losses[0]
        assert not list((tmp_path / architecture).glob("*.py"))
    folders = [str(tmp_path / architecture) for architecture in ARCHITECTURES]
    done = subprocess.run([sys.executable, "-c", LOAD_ALONE, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (class_name, context, text) in json.loads(done.stdout.splitlines()[-1]).items():
        assert class_name.lower() == f"{Path(name).name}forcausallm"
        assert context == 32 and text.startswith("the king sees")
    # half of a run again: the rest is the same to the bit
    shutil.copytree(tmp_path / "qwen3" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = {"resume_from_checkpoint": str(tmp_path / "again" / "checkpoint-2")}
    pretrain(settings(folder, tmp_path / "again", architecture="qwen3", **again))
    weights = [load_file(tmp_path / each / "model.safetensors") for each in ("qwen3", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("setting", [{"era": "head"}, {"window_pattern": "SL"}])
def test_what_a_stock_architecture_does_not_have_is_refused(folder, tmp_path, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"--{name} .* would do nothing with --architecture qwen3"):
        pretrain(settings(folder, tmp_path, architecture="qwen3", **setting))


def test_scaling_laws_find_the_bottom_of_parabolas():
    """On made-up results whose best size is 3 * flops^0.5, the fit gives that law back."""
    cells = []
    for flops in (1e12, 1e13, 1e14):
        best = 3 * flops**0.5
        for depth, factor in enumerate((0.25, 0.5, 1.0, 2.0, 4.0), start=2):
            parameters = int(best * factor)
            loss = 2 - 0.05 * (flops / 1e12) ** 0.1 + 0.02 * (scaling_laws.np.log(parameters / best)) ** 2
            cells.append(scaling_laws.Cell(flops, depth, parameters, int(flops / (6 * parameters)), loss))
    optima = [scaling_laws.best_of_budget([cell for cell in cells if cell.flops == f]) for f in (1e12, 1e13, 1e14)]
    exponent, factor = scaling_laws.power_law(optima, "parameters")
    assert (exponent, factor) == (pytest.approx(0.5, abs=1e-3), pytest.approx(3, rel=0.02))
    assert scaling_laws.power_law(optima, "tokens")[0] == pytest.approx(0.5, abs=1e-2)
    still_falling = [scaling_laws.Cell(1e12, 2, size, 1, loss) for size, loss in ((100, 2.0), (200, 1.9), (400, 1.85))]
    assert scaling_laws.best_of_budget(still_falling) is None


def test_budgets_of_the_configs_are_numbers():
    configs = Path(scaling_laws.__file__).parent / "configs"
    for name in ("scaling_laws", "scaling_laws_toy"):
        parser = TrlParser((scaling_laws.SweepArguments, *RunSettings.CLASSES))
        sweep, *_ = parser.parse_args_and_config(["--config", str(configs / f"{name}.yaml")])
        assert all(isinstance(budget, float) for budget in sweep.flops) and len(sweep.flops) >= 3


def test_sweep_runs_plots_and_is_not_repeated(folder, tmp_path, monkeypatch, capsys):
    groups = settings(folder, tmp_path / "sweep", max_steps=-1, save_strategy="no", sample_prompts=[])
    monkeypatch.setattr(
        scaling_laws,
        "parse",
        lambda *_, **__: (sweep, *vars(groups).values()),
    )
    sweep = scaling_laws.SweepArguments(flops=[2.5e9], depths=[1, 2])
    scaling_laws.main()
    results = read_stage(tmp_path / "sweep")["results"]
    assert [cell["depth"] for cell in results["cells"]] == [1, 2]
    assert (tmp_path / "sweep" / "scaling_laws.png").stat().st_size > 1000
    sweep = scaling_laws.SweepArguments(flops=[2.5e9], depths=[1, 2, 3])
    capsys.readouterr()
    scaling_laws.main()  # one cell more: the others are read
    assert capsys.readouterr().out.count("already done") == 2


def test_what_the_compatible_preset_trains_is_transformers_own_class(folder, tmp_path, monkeypatch):
    pretrain(settings(folder, tmp_path / "ours", preset="compatible", matrix_lr=0.5, unembedding_lr=1.0))
    arguments = ["convert", "--to_native", str(tmp_path / "ours"), "--output", str(tmp_path / "native")]
    monkeypatch.setattr(sys, "argv", arguments)
    convert.main()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", trust_remote_code=False).eval()
    assert type(native) is NanoChatForCausalLM
    assert native.config.rms_norm_eps == 1e-5 and native.config.final_logit_softcapping == 15.0  # MLX has no others
    ids = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = ours(ids).logits, native(ids).logits
    assert expected.std() > 0.1  # it has learnt something, and is not the zeros it begins with
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    card = (tmp_path / "native" / "README.md").read_text()
    assert "trust_remote_code=True" not in card and "1,024 tokens, 4 steps" in card
    for wrong in ({"era": "head"}, {"window_pattern": "SL"}):
        with pytest.raises(ValueError, match="expected none beside --preset compatible"):
            pretrain(settings(folder, tmp_path / "wrong", preset="compatible", **wrong))
