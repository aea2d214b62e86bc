"""Faults of what lies on the disk: files of checkpoints, of prepared data, of records, and shards that change."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.faults.interruptions import Outcome, ended_alike, fresh, last_line
from tests.faults.stages import World, checkpoints, wait_for


def flip(file: Path, rng: random.Random) -> None:
    """One bit anywhere."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


HARMS: dict[str, Callable[[Path, random.Random], object]] = {
    "flipped": flip, "cut": cut, "gone": lambda file, rng: file.unlink(),
}  # fmt: skip


def interrupted(world: World, name: str, output: Path, **settings: str) -> None:
    """A stage killed once it has two checkpoints."""
    command = world.start(name, output, **settings)
    wait_for(lambda: len(checkpoints(output)) > 1, command)
    command.kill()


def damaged_checkpoint(world: World, rng: random.Random, name: str) -> Outcome:
    """Each file of the last checkpoint is harmed, once each: the one before is used, and that is said."""
    world.reference(name)
    start = fresh(world, f"damaged {name}")
    interrupted(world, name, start)
    last = f"checkpoint-{checkpoints(start)[-1]}"
    files = sorted(path.relative_to(start / last) for path in (start / last).rglob("*") if path.is_file())
    harms = list(HARMS)
    for number, file in enumerate(files):
        harm = harms[(number + rng.randrange(3)) % 3]
        output = start.with_name("copy")
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(start, output)
        HARMS[harm](output / last / file, rng)
        code, text = world.run(name, output)
        happened, good = ended_alike(world, name, output, code, text)
        if not good or f"{last} is damaged, so it is passed over" not in text:
            return Outcome(f"{file} {harm}: {happened}; {last_line(text)}", good=False)
    steps = checkpoints(start)
    return Outcome(f"each of {len(files)} files: passed over, said; then the same files", str(steps[-1] - steps[-2]))


def damaged_folder(world: World, rng: random.Random, name: str, users: dict[str, str]) -> Outcome:
    """Each file that a finished stage left is harmed: who reads it refuses, and the stage is done again.

    Args:
        users: the stage that reads a file, by the beginning of the file's name; others are read by nobody.
    """
    from modeling_nanochat.recipes.stages.record import files_of_a_stage

    reference = world.reference(name)
    refused = 0
    for number, file in enumerate(sorted(files_of_a_stage(reference))):
        harm = list(HARMS)[number % 3] if (reference / file).stat().st_size else "gone"
        copy = fresh(world, f"harmed {name}")
        shutil.copytree(reference, copy)
        HARMS[harm](copy / file, rng)
        reader = next((user for start, user in users.items() if file.startswith(start)), None)
        if reader is not None:
            world.reference(reader)
            code, text = world.run(reader, copy.with_name("reader"), **inputs(reader, name, copy))
            if code != 2 or "is not as the stage" not in text or "Traceback" in text:
                return Outcome(f"{file} {harm}: {reader} ended with {code}, {last_line(text)!r}", good=False)
            refused += 1
        code, text = world.run(name, copy)
        happened, good = ended_alike(world, name, copy, code, text)
        if not good or "is not as it was left" not in text:
            return Outcome(f"{file} {harm}: {happened}; {last_line(text)}", good=False)
    return Outcome(f"each of {number + 1} files: refused by who reads it ({refused}), made again, the same")


def inputs(reader: str, name: str, folder: Path) -> dict[str, str]:
    """The settings that let a stage read another stage's folder."""
    if name == "data":
        return {"data": str(folder / ("rl" if reader == "rl" else "sft"))}
    return {"tokenizer": str(folder)} if name == "tokenizer" else {"model": str(folder)}


def damaged_record(world: World, rng: random.Random, file: str) -> Outcome:
    """A record of a stage is cut: it vouches for nothing, and the stage ends alike."""
    reference = world.reference("pretrain")
    output = fresh(world, f"record {file}")
    if file == "stage.begun.json":
        interrupted(world, "pretrain", output)
    else:
        shutil.copytree(reference, output)
    if file == "stage.lock":
        (output / file).write_text('{"host"')
    else:
        cut(output / file, rng)
    code, text = world.run("pretrain", output)
    if file == "stage.begun.json":  # whose checkpoints they are cannot be known
        good = code == 2 and "holds checkpoints of an unfinished run" in text
        happened = f"exit code {code}, {last_line(text)[:70]!r}; "
        code, text = world.run("pretrain", output, resume_from_checkpoint="true")
        then, fine = ended_alike(world, "pretrain", output, code, text)
        return Outcome(happened + then, good=good and fine)
    happened, good = ended_alike(world, "pretrain", output, code, text)
    return Outcome(happened, good=good)


# ---------------------------------------------------------------- shards that change


def replaced(shards: Path) -> None:
    shutil.copy(shards / "shard_0.parquet", shards / "shard_1.parquet")


def shorter(shards: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(shards / "shard_1.parquet")
    pq.write_table(table.slice(0, 200), shards / "shard_1.parquet", row_group_size=50)


def truncated(shards: Path) -> None:
    content = (shards / "shard_1.parquet").read_bytes()
    (shards / "shard_1.parquet").write_bytes(content[: len(content) // 2])


CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced": replaced,
    "removed": lambda shards: (shards / "shard_0.parquet").unlink(),
    "added": lambda shards: shutil.copy(shards / "shard_0.parquet", shards / "shard_00.parquet"),
    "with fewer rows": shorter,
    "cut off": truncated,
    "a link to nothing": lambda shards: os.symlink("nowhere.parquet", shards / "shard_3.parquet"),
    "a copy as validation": lambda shards: shutil.copy(shards / "shard_0.parquet", shards / "shard_9.parquet"),
}


def changed_shard(world: World, rng: random.Random, change: str, named: str) -> Outcome:
    """A shard changes while a run is interrupted, and again after one is done; the data named as folder or as glob."""
    world.reference("pretrain")
    output = fresh(world, f"shard {change} {named}")
    shards = output.with_name("shards")
    shutil.copytree(world.folder / "shards", shards)
    data = str(shards if named == "folder" else shards / "*.parquet")
    interrupted(world, "pretrain", output, data=data)
    CHANGES[change](shards)
    code, text = world.run("pretrain", output, data=data)
    good = code == 2 and "Traceback" not in text
    told = [f"resuming: {last_line(text)[:75]!r}"]
    code, text = world.run("pretrain", output, data=data, resume_from_checkpoint="true")
    good = good and code == 2 and "Traceback" not in text
    told.append(f"with --resume_from_checkpoint true: {last_line(text).replace(str(shards), '...')[:90]!r}")
    done = output.with_name("done")
    shutil.copytree(world.folder / "shards", shards, dirs_exist_ok=True)
    for extra in set(shards.iterdir()) - {shards / f"shard_{number}.parquet" for number in range(3)}:
        extra.unlink()
    world.run("pretrain", done, data=data)
    CHANGES[change](shards)
    command = world.start("pretrain", done, data=data)
    wait_for(lambda: "changed since the last run" in read(command.log), command)
    command.send(signal.SIGKILL)
    code, text = command.finish()
    good = good and "already done" not in text and (code != 0)
    told.append("after the end: not taken for done")
    return Outcome("; ".join(told), good=good)


def read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def changed_conversations(world: World, rng: random.Random, named: str) -> Outcome:
    """A user's own conversations change after they were prepared: the data are prepared again."""
    import json

    folder = fresh(world, f"own {named}")
    own = folder.with_name("own")
    shutil.copytree(world.folder / "own", own)
    config = json.loads((world.folder / "data.yaml").read_text())
    name = str(own / ("*.jsonl" if named == "glob" else "conversations.jsonl"))
    config |= {"sft": [{"name": name}], "rl": [], "rl_validation": []}
    settings = folder.with_name("data.yaml")
    settings.write_text(json.dumps(config))
    first, _ = world.run("data", folder, config=str(settings))
    line = (own / "conversations.jsonl").read_text().splitlines()[0].replace("1", "2")
    with open(own / "conversations.jsonl", "a") as file:
        file.write(line + "\n")
    code, text = world.run("data", folder, config=str(settings))
    good = first == 0 and code == 0 and "inputs have changed" in text
    return Outcome(last_line("\n".join(line for line in text.splitlines() if "data" in line)), good=good)
