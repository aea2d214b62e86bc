"""Settings every test shares: no network, no telemetry, one thread per process so that two workers share two cores."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRACKIO_MODE="disabled", WANDB_MODE="disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)
