"""The fault suite: every stage killed, stopped, damaged and disturbed on tiny data.

    python -m tests.faults.run [--only NAME ...] [--minutes 8] [--seed 0]        (make fault-test; not in CI)

Each row of the table is a fault that was done, what came of it, and the training steps that had to be done again. A
stage that is gone on with must end in the files and figures of one that nothing disturbed, to the byte; what cannot go
on must say so in one line with exit code 2. The exit code is 1 if a row lost or hid anything, 3 if rows are left.

Results are kept in out/faults/results.json, so the suite can be run in pieces; rows that were run on other code are run
again. Two rows run at a time. The quick half of these faults is in `make test` (docs/reliability.md says where).
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tests.faults import damage, interruptions
from tests.faults.interruptions import Outcome
from tests.faults.stages import STAGES, World

OUT = Path("out/faults")
TRAINED = [name for name, stage in STAGES.items() if stage.trains]
NOT_TRAINED = [name for name, stage in STAGES.items() if not stage.trains]
BEHAVIOUR = ("modeling_nanochat", "training", "recipes", "eval", "tests/faults")  # what a result depends on
PLACES = ("before the first write", "in the first records", "in the weights", "in the optimizer", "in the checksums",
          "in the second checkpoint", "at random", "finished: weights", "finished: record")  # fmt: skip
PLACES_ELSEWHERE = ("before the first write", "in the weights", "at random", "finished: weights", "finished: record")


def table() -> dict[str, Callable[[World, random.Random], Outcome]]:
    """Every fault by its name, in the order of the table."""
    rows: dict[str, Callable] = {}
    for name in STAGES:
        kills = 2 if name == "pretrain compiled" else 4
        rows[f"{name}: {kills} x SIGKILL at random"] = partial(interruptions.killed, name=name, kills=kills)
    for name in ("pretrain", "pretrain on 2 ranks", "sft", "rl", "dpo"):
        rows[f"{name}: 3 x SIGKILL while saving"] = partial(interruptions.killed_while_saving, name=name, kills=3)
    for before, after in ((1, 2), (2, 1)):
        rows[f"pretrain: SIGKILL on {before} ranks, then {after}"] = partial(
            interruptions.killed_then_other_ranks, before=before, after=after
        )
    rows["sft: SIGKILL on 2 ranks, then 1"] = interruptions.killed_then_other_batch
    for number in (signal.SIGTERM, signal.SIGINT):
        for name in TRAINED:
            rows[f"{name}: {number.name}"] = partial(interruptions.stopped, name=name, number=number)
        for name in (*NOT_TRAINED, "sft", "rl"):
            rows[f"{name}: {number.name} at random, three times"] = partial(
                interruptions.stopped_outside_training, name=name, number=number
            )
        for launcher, ranks in (("accelerate launch", 1), ("torchrun, 2 processes", 2)):
            rows[f"{launcher}: {number.name}"] = partial(interruptions.as_typed, number=number, ranks=ranks)
    for name in ("pretrain", "sft", "rl", "dpo"):
        rows[f"{name}: SIGTERM in the last step"] = partial(interruptions.stopped_at_the_end, name=name)
    for name in (*NOT_TRAINED, "pretrain", "sft", "rl", "dpo"):
        rows[f"{name}: a second process"] = partial(interruptions.two_processes, name=name)
    rows["pretrain: another run killed in a finished folder"] = interruptions.other_run_in_the_folder
    rows["pretrain: a checkpoint gone on with, other rate and length"] = interruptions.new_settings
    rows["two processes find the lock of a dead one"] = interruptions.stale_lock
    for name in ("pretrain", "pretrain on 2 ranks", "sft", "rl", "dpo"):
        for where in PLACES if name.startswith("pretrain") else PLACES_ELSEWHERE:
            rows[f"{name}: disk full {where}"] = partial(interruptions.disk_full, name=name, where=where)
    for name in NOT_TRAINED:
        for where in ("before the first write", "in the first records"):
            rows[f"{name}: disk full {where}"] = partial(interruptions.disk_full, name=name, where=where)
    for name in ("pretrain", "sft", "rl", "dpo"):
        rows[f"{name}: a file of the last checkpoint damaged"] = partial(damage.damaged_checkpoint, name=name)
    readers = {"data": {"sft": "sft", "rl": "rl"}, "tokenizer": {"": "pretrain"}, "pretrain": {"": "sft"},
               "sft": {"": "dpo"}}  # fmt: skip
    for name, users in readers.items():
        rows[f"{name}: a file of the finished stage damaged"] = partial(damage.damaged_folder, name=name, users=users)
    for file in ("stage.json", "stage.begun.json", "stage.lock"):
        rows[f"pretrain: {file} cut off"] = partial(damage.damaged_record, file=file)
    for change in damage.CHANGES:
        rows[f"pretrain: a shard {change}"] = partial(damage.changed_shard, change=change, named="folder")
    rows["pretrain: a shard replaced, data named by a glob"] = partial(
        damage.changed_shard, change="replaced", named="glob"
    )
    for named in ("file", "glob"):
        rows[f"data: own conversations changed, named by a {named}"] = partial(
            damage.changed_conversations, named=named
        )
    for name in ("pretrain", "sft", "rl", "dpo"):
        rows[f"{name}: rates of 1e30"] = partial(interruptions.diverges, name=name)
    return rows


def code_hash() -> str:
    """Of all code that a result depends on."""
    digest = hashlib.sha256()
    for file in sorted(path for folder in BEHAVIOUR for path in Path(folder).rglob("*.py")):
        digest.update(file.as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def is_settled(row: dict, code: str, seed: int) -> bool:
    return bool(row.get("good")) and (row["code"], row["seed"]) == (code, seed)


def run_row(name: str, fault: Callable, world: World, seed: int) -> dict:
    started = time.time()
    try:
        outcome = fault(world, random.Random(f"{seed} {name}"))
    except PermissionError as error:
        outcome = Outcome(f"not done: {error}", good=False)
    except Exception as error:
        outcome = Outcome(f"the suite failed: {type(error).__name__} {error}", good=False)
    happened = outcome.happened.replace(str(world.folder), "...")
    print(f"{'ok  ' if outcome.good else 'LOST'} {time.time() - started:4.0f} s  {name}: {happened}", flush=True)
    date = datetime.date.today().isoformat()
    return {"happened": happened, "steps_lost": outcome.steps_lost, "good": outcome.good, "date": date}


def markdown(results: dict[str, dict], names: list[str]) -> str:
    lines = ["| fault | what happened | steps lost |", "|---|---|---|"]
    for name in names:
        row = results[name]
        bad = "" if row["good"] else "**LOST OR HIDDEN** "
        lines.append(f"| {name} | {bad}{row['happened'].replace('|', '/')} | {row['steps_lost']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=600, help="begin no row after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    end = time.time() + 60 * arguments.minutes
    OUT.mkdir(parents=True, exist_ok=True)
    file, code = OUT / "results.json", code_hash()
    results = json.loads(file.read_text()) if file.exists() else {}
    rows = {name: fault for name, fault in table().items() if any(part in name for part in arguments.only)}
    if not (OUT / code).exists():  # what undisturbed stages left is of other code
        shutil.rmtree(OUT / "world", ignore_errors=True)
        (OUT / code).touch()
    world = World((OUT / "world").absolute())
    for name in STAGES:
        world.reference(name)
    writing = threading.Lock()
    waiting = [name for name in rows if not is_settled(results.get(name, {}), code, arguments.seed)]

    def work(name: str) -> None:
        if time.time() < end:
            row = run_row(name, rows[name], world, arguments.seed)
            with writing:
                results[name] = row | {"code": code, "seed": arguments.seed}
                file.write_text(json.dumps(results, indent=1))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, waiting))
    done = [name for name in rows if results.get(name, {}).get("code") == code]
    (OUT / "table.md").write_text(markdown(results, done) + "\n")
    lost = [name for name in done if not results[name]["good"]]
    print(f"\n{len(done)} of {len(rows)} faults done, {len(lost)} lost or hid something; table in {OUT}/table.md")
    raise SystemExit(1 if lost else 3 if len(done) < len(rows) else 0)


if __name__ == "__main__":
    main()
