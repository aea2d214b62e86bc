"""Packaging of nanochat for Transformers (distribution `modeling-nanochat`).

Ranges here are what users may install; `constraints.txt` pins what the tests ran on. `trl` is held to one minor version
because the trainers override hooks that it does not promise to keep.

The folders `training`, `eval` and `recipes` lie beside `modeling_nanochat` but are imported from inside it
(`modeling_nanochat.training`, ...): as names of their own they would collide with other packages and users' folders.
"""

from setuptools import find_packages, setup

FOLDERS = ("training", "eval", "recipes")
PACKAGES = ["modeling_nanochat"] + [
    f"modeling_nanochat.{name}" for top in FOLDERS for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))
]

TOKENIZER = ["rustbpe>=0.1", "tiktoken>=0.7"]
TRAIN = [*TOKENIZER, "accelerate>=1.10", "datasets>=4.0", "pyarrow>=15", "trl>=1.16,<1.17", "pyyaml"]
EVAL = ["datasets>=4.0", "lm-eval>=0.4.9", "pyyaml"]
CHAT = ["fastapi", "uvicorn", "pydantic", "openai", "rich"]

setup(
    name="modeling-nanochat",
    version="0.1.0",
    description="The whole life of a small language model, nanochat's way, in the Hugging Face ecosystem",
    license="MIT",
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={f"modeling_nanochat.{folder}": folder for folder in FOLDERS},
    package_data={
        "modeling_nanochat": ["*.jinja"],
        "modeling_nanochat.recipes": ["configs/**/*.yaml", "accelerate/*.yaml", "*.sh"],
    },
    entry_points={"console_scripts": ["nanochat = modeling_nanochat.recipes.command_line:main"]},
    install_requires=["torch>=2.9", "transformers>=5.20,<6", "tokenizers>=0.22", "safetensors"],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "demo": [*TRAIN, *EVAL, "matplotlib", "reasoning-gym==0.1.25"],
        "gpu": ["flash-attn>=2.6", "kernels"],
        "chat": CHAT,
        "dev": ["pytest>=8", "pytest-xdist", "parameterized", "ruff", "peft", *CHAT],
    },
)
