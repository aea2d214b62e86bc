"""`make gpu-check`: what this project promises of one GPU, tried on the one that is here, in about five minutes.

    python -m tests.gpu.run [--output out/gpu_check.json]

Each line of the table is a check (`tests/gpu/checks.py`), what it found, and whether that is what it should be. The
JSON has the same with every figure, the device, the driver and the versions: the file to send in. Without a GPU the
command says so, lists what it would have checked, and ends with exit code 2; with one, the code is 1 if a check failed.
The checks run on a CPU too, at toy size: that is how `make test` knows that they work.
"""

import argparse
import gc
import json
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
import trl

from tests.gpu.checks import CHECKS, Found, Machine, name_of, purpose_of

NO_GPU = "no GPU here: PyTorch {} sees none. With one, these would have been checked:"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/gpu_check.json"), help="The JSON to write.")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_GPU.format(torch.__version__))
        for check in CHECKS:
            print(f"  {name_of(check):25} {purpose_of(check)}")
        return 2
    machine = Machine(torch.device("cuda", 0), folder=arguments.output.parent / "gpu_check")
    about = machine_facts(machine.device)
    print(f"{about['device']}, PyTorch {about['torch']}, Transformers {about['transformers']}", flush=True)
    results = []
    for check in CHECKS:
        found = run_check(check, machine)
        results.append({"check": name_of(check), **asdict(found)})
        print(line_of(results[-1]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": about, "checks": results}, indent=2) + "\n", encoding="utf-8")
    failed = [each["check"] for each in results if not each["ok"]]
    print(f"\n{len(results) - len(failed)} of {len(results)} as they should be; written to {arguments.output}")
    return 1 if failed else 0


def run_check(check, machine: Machine) -> Found:
    """What a check found, or the error that ended it: the others go on."""
    start = time.perf_counter()
    try:
        found = check(machine)
    except Exception as error:
        found = Found(False, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}")
    found.seconds = round(time.perf_counter() - start, 1)
    gc.collect()  # trainers hold themselves, and memory that the next check measures
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def line_of(result: dict) -> str:
    return f"{result['check']:25} {'ok    ' if result['ok'] else 'FAILED'} {result['seconds']:6.1f} s  {result['said']}"


def machine_facts(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": platform.python_version(),
        "commit": commit or "none",
    }


if __name__ == "__main__":
    raise SystemExit(main())
