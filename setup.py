"""Packaging of nanochat for Transformers (distribution `modeling-nanochat`).

Ranges here are what users may install, and `make test-versions` tests both of their ends; `constraints.txt` pins what
the tests ran on. Of the lower bounds, transformers 5.20 lacks a function that the network imports; trl 1.16 itself asks
for accelerate, datasets and pyarrow as given, transformers 5.21 for tokenizers and safetensors. lm-eval 0.4.9 does not
import beside transformers 5, 0.4.10 and 0.4.11 take no path of a folder of tasks, 0.4.12 was not tried. tiktoken 0.9
makes special tokens of ordinary text that looks like them when it encodes to arrays. torch 2.9 crashes under FSDP2 in
the optimizer; 2.13 is the oldest that was tested since. Of the upper bounds, transformers 5.24 hands a model its cache
as `cache` and no longer as `past_key_values`, with which this network generates nonsense without an error; `trl` is
held to one minor version because the trainers replace hooks that it does not promise to keep
(`training/trainers/__init__.py` lists them).

The folders `training`, `eval` and `recipes` lie beside `modeling_nanochat` but are imported from inside it
(`modeling_nanochat.training`, ...): as names of their own they would collide with other packages and users' folders.
"""

from setuptools import find_packages, setup

FOLDERS = ("training", "eval", "recipes")
PACKAGES = ["modeling_nanochat"] + [
    f"modeling_nanochat.{name}" for top in FOLDERS for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))
]

TOKENIZER = ["rustbpe>=0.1", "tiktoken>=0.11"]
TRAIN = [*TOKENIZER, "accelerate>=1.10.1", "datasets>=4.7", "pyarrow>=21", "trl>=1.16,<1.17", "pyyaml>=6"]
EVAL = ["datasets>=4.7", "evaluate>=0.4.6", "lm-eval>=0.4.13", "pyyaml>=6"]
CHAT = ["fastapi>=0.128", "uvicorn>=0.40", "pydantic>=2.12", "openai>=2", "rich>=14"]
EXPORT = ["onnx>=1.20", "onnxscript>=0.7", "onnxruntime>=1.24", "gguf>=0.18"]
TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "parameterized>=0.9", "ruff>=0.17", "peft>=0.18"]

setup(
    name="modeling-nanochat",
    version="0.1.0",
    description="The whole life of a small language model, nanochat's way, in the Hugging Face ecosystem",
    license="MIT",
    python_requires=">=3.10",
    packages=PACKAGES,
    py_modules=["nanochat_command"],
    package_dir={f"modeling_nanochat.{folder}": folder for folder in FOLDERS},
    package_data={
        "modeling_nanochat": ["*.jinja"],
        "modeling_nanochat.eval": ["lm_eval_tasks/*.yaml"],
        "modeling_nanochat.recipes": ["configs/**/*.yaml", "accelerate/*.yaml", "*.sh", "serving/*.html"],
    },
    entry_points={
        "console_scripts": [
            "nanochat = nanochat_command:main",
            "nanochat-eval = modeling_nanochat.eval.lm_eval_model:main",
        ]
    },
    install_requires=["torch>=2.13", "transformers>=5.21,<5.24", "tokenizers>=0.23.1", "safetensors>=0.8"],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "demo": [*TRAIN, *EVAL, "matplotlib>=3.10", "markdown-it-py>=3", "reasoning-gym==0.1.25"],
        "gpu": ["transformers[kernels]"],  # FlashAttention, compiled, from the Hub
        "chat": CHAT,
        "export": EXPORT,
        "dev": [*TEST, *CHAT, *EXPORT],
    },
)
