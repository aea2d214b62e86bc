"""Settings that would do nothing are refused by name, numbers that make no sense too, and `--help` shows what acts."""

import sys

import pytest

from modeling_nanochat.recipes.command_line import parse
from modeling_nanochat.training.trainers.pretrain import PretrainConfig
from modeling_nanochat.training.trainers.reinforce import ReinforceConfig
from modeling_nanochat.training.trainers.settings import unused_settings
from modeling_nanochat.training.trainers.sft import NanoChatSFTConfig

ALL = (PretrainConfig, NanoChatSFTConfig, ReinforceConfig)


@pytest.mark.parametrize("settings_class", ALL)
@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1.0), ("optim", "sgd"), ("adam_beta2", 0.5), ("adam_beta1", 0.5),
     ("label_smoothing_factor", 0.1), ("save_only_model", True), ("data_seed", 7), ("enable_jit_checkpoint", True)],
)  # fmt: skip
def test_a_setting_that_does_nothing_is_refused(tmp_path, settings_class, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* would do nothing here; use "):
        settings_class(str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("settings_class", "name"),
    [
        (PretrainConfig, "num_train_epochs"),
        (NanoChatSFTConfig, "lr_scheduler_type"),
        (ReinforceConfig, "cast_lm_head_to_fp32"),
    ],
)
def test_what_acts_elsewhere_is_refused_where_it_does_not(settings_class, name):
    assert name in unused_settings(settings_class)


@pytest.mark.parametrize(
    ("settings_class", "settings", "message"),
    [
        (NanoChatSFTConfig, {"init_lr_frac": -1.0}, "init_lr_frac is -1.0, expected at least 0"),
        (PretrainConfig, {"warmdown_ratio": 5.0}, "warmdown_ratio is 5.0, expected a number from 0 to 1"),
        (PretrainConfig, {"final_lr_frac": float("nan")}, "final_lr_frac is nan"),
        (PretrainConfig, {"matrix_lr": -0.1}, "matrix_lr is -0.1"),
        (ReinforceConfig, {"max_completion_length": 0}, "max_completion_length is 0"),
        (PretrainConfig, {"activation_dtype": "float16"}, "activation_dtype is 'float16'"),
        (PretrainConfig, {"bf16": True}, "bf16=True"),
        (PretrainConfig, {"max_grad_norm": 1.0}, "max_grad_norm=1.0"),
        (NanoChatSFTConfig, {"report_to": "papyrus"}, "report_to is papyrus, expected none or what is installed"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path, settings_class, settings, message):
    with pytest.raises(ValueError, match=message):
        settings_class(str(tmp_path), **settings)


@pytest.mark.parametrize("settings_class", ALL)
def test_help_shows_what_acts_and_the_command_line_refuses_the_rest(settings_class, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recipe", "--help"])
    with pytest.raises(SystemExit):
        parse(settings_class)
    shown = capsys.readouterr().out
    assert "--optimizer_era" in shown and "--max_steps" in shown
    assert not any(f"--{name} " in shown for name in unused_settings(settings_class))
    monkeypatch.setattr(sys, "argv", ["recipe", "--output_dir", str(tmp_path), "--learning_rate", "5e-5"])
    with pytest.raises(ValueError, match="--learning_rate would do nothing here"):  # though it is the default
        parse(settings_class)
    (tmp_path / "own.yaml").write_text("optim: adamw_torch\n")
    monkeypatch.setattr(sys, "argv", ["recipe", "--output_dir", str(tmp_path), f"--config={tmp_path / 'own.yaml'}"])
    with pytest.raises(ValueError, match="--optim would do nothing here; use nothing: the optimizer is MuonAdamW"):
        parse(settings_class)
