"""Faults that come from outside: kills, signals, a second process, a full disk, numbers that are none."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.faults.stages import STAGES, Command, World, checkpoints, difference, free_port, wait_for, what_is_left

DISK = 256 << 20  # bytes of the small disk; preparing data asks for 200 MB
PAGE = 4096


class Outcome(NamedTuple):
    """What came of a fault, the training steps that had to be done again, and whether nothing was lost or hidden."""

    happened: str
    steps_lost: str = "-"
    good: bool = True


def fresh(world: World, name: str) -> Path:
    """An empty folder for a fault."""
    folder = world.folder / "faults" / name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder / "run"


def ended_alike(world: World, name: str, output: Path, code: int, text: str) -> tuple[str, bool]:
    """Whether a stage that was gone on with ended as the undisturbed one, in words and as a truth value."""
    if code or "Traceback" in text:
        return f"then exit code {code}: {last_line(text)}", False
    other = difference(output, world.reference(name))
    return (f"then other {other}", False) if other else ("then the same files and figures", True)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1][:160]


def lost(command: Command, output: Path) -> int:
    """Steps since the last checkpoint; none if the command was killed before it went on."""
    return max(0, command.step - max(checkpoints(output), default=0))


# ---------------------------------------------------------------- kills


def killed(world: World, rng: random.Random, name: str, kills: int) -> Outcome:
    """SIGKILL of all ranks at random moments, then to the end."""
    world.reference(name)
    output, moments = fresh(world, f"killed {name}"), []
    for _ in range(kills):
        command = world.start(name, output)
        time.sleep(rng.uniform(0.1, 0.9) * world.seconds(name))
        command.kill()
        moments.append((command.step, lost(command, output)))
    happened, good = ended_alike(world, name, output, *world.run(name, output))
    if not STAGES[name].trains:
        return Outcome(happened, good=good)
    at, again = zip(*moments)
    return Outcome(f"at step {listed(at)}; {happened}", listed(again), good)


def killed_while_saving(world: World, rng: random.Random, name: str, kills: int) -> Outcome:
    """SIGKILL while the folder of a checkpoint that nobody sees yet is there."""
    world.reference(name)
    output, again, hit = fresh(world, f"killed while saving {name}"), [], 0
    for _ in range(kills):
        command, seen = world.start(name, output), max(checkpoints(output), default=0)
        wait_for(lambda seen=seen: max(checkpoints(output), default=0) > seen, command)
        hit += wait_for(lambda: any(output.glob(".incomplete/checkpoint-*")), command)
        time.sleep(rng.uniform(0, 0.01))
        command.kill()
        again.append(lost(command, output))
    happened, good = ended_alike(world, name, output, *world.run(name, output))
    return Outcome(f"{hit} of {kills} in the middle of a checkpoint; {happened}", listed(again), good and hit > 0)


def killed_then_other_ranks(world: World, rng: random.Random, before: int, after: int) -> Outcome:
    """Killed on so many ranks, gone on with on others: the same steps and rows, losses equal to float noise."""
    folder = fresh(world, f"ranks {before} then {after}")
    settings = {"activation_dtype": "float32", "save_total_limit": "20"}
    world.start("pretrain", folder.with_name("straight"), ranks=before, **settings).finish()
    command = world.start("pretrain", folder, ranks=before, **settings)
    step = rng.randrange(4, 36)
    wait_for(lambda: command.step >= step, command)
    command.kill()
    again = lost(command, folder)
    code, text = world.start("pretrain", folder, ranks=after, **settings).finish()
    if code:
        return Outcome(f"then exit code {code}: {last_line(text)}", str(again), False)
    distance = distance_of_losses(folder, folder.with_name("straight"))
    return Outcome(
        f"at step {command.step}; losses within {distance:.1e} of uninterrupted", str(again), distance < 1e-3
    )


def distance_of_losses(folder: Path, reference: Path) -> float:
    """The largest relative distance of a step's loss; infinite if the steps are others."""
    one, other = (what_is_left(each)["losses"] for each in (folder, reference))
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) / b for a, b in zip(one, other))


def killed_then_other_batch(world: World, rng: random.Random) -> Outcome:
    """Fine-tuning killed on two ranks: on one it is refused, and goes on if one takes the rows of both."""
    name, settings = "sft on 2 ranks", {"activation_dtype": "float32"}
    world.reference(name)
    output = fresh(world, "sft ranks 2 then 1")
    world.run(name, output.with_name("straight"), **settings)
    command = world.start(name, output, **settings)
    wait_for(lambda: len(checkpoints(output)) > 1, command)
    command.kill()
    again = lost(command, output)
    code, said = world.start(name, output, ranks=1, **settings).finish()
    refused = code == 2 and "expected the same product" in said
    settings |= {"per_device_train_batch_size": "2", "resume_from_checkpoint": "true"}
    code, text = world.start(name, output, ranks=1, **settings).finish()
    if code:
        return Outcome(f"{last_line(said)!r}; then exit code {code}: {last_line(text)}", str(again), False)
    distance = distance_of_losses(output, output.with_name("straight"))
    happened = f"exit code 2, '... expected the same product'; with twice the rows: losses within {distance:.1e}"
    return Outcome(happened if refused else last_line(said), str(again), refused and distance < 1e-3)


# ---------------------------------------------------------------- signals


def stopped(world: World, rng: random.Random, name: str, number: signal.Signals) -> Outcome:
    """A signal to all ranks while training: saved, its exit code, and the same command to the end."""
    world.reference(name)
    output = fresh(world, f"{number.name} {name}")
    command, step = world.start(name, output), rng.randrange(2, world.steps(name) - 2)
    wait_for(lambda: command.step >= step, command)
    command.send(number)
    code, said = command.finish()
    again = lost(command, output)
    happened, good = ended_alike(world, name, output, *world.run(name, output))
    good = good and code == 128 + number and "Traceback" not in said and again == 0
    return Outcome(f"exit code {code}, {last_line(said)!r}; {happened}", str(again), good)


def stopped_outside_training(world: World, rng: random.Random, name: str, number: signal.Signals) -> Outcome:
    """A signal at a random moment to a stage that does not train, or that does not train yet: nothing half is left."""
    world.reference(name)
    output, codes, room = fresh(world, f"{number.name} outside {name}"), [], 0.6 * world.seconds(name)
    while len(codes) < 3:
        command = world.start(name, output)
        wait_for(lambda command=command: command.begun, command)
        time.sleep(rng.uniform(0, room))
        command.send(number)
        code, said = command.finish()
        if code:
            codes.append(code)
            if "Traceback" in said:
                return Outcome(f"exit code {code}, {last_line(said)!r}", good=False)
        else:  # it had ended before; or Python dropped the exception, as it does in callbacks of its own
            shutil.rmtree(output)
            room /= 2
    happened, good = ended_alike(world, name, output, *world.run(name, output))
    allowed = {-number, 128 + number}
    return Outcome(f"exit codes {listed(codes)}; {happened}", good=good and set(codes) <= allowed)


def stopped_at_the_end(world: World, rng: random.Random, name: str) -> Outcome:
    """SIGTERM in the last step or in what is measured after it: the process ends soon, and no step is lost."""
    world.reference(name)
    output = fresh(world, f"stopped at the end {name}")
    command = world.start(name, output, save_strategy="no")
    wait_for(lambda: command.step >= world.steps(name), command)
    time.sleep(rng.uniform(0, 0.05))
    command.send(signal.SIGTERM)
    code, said = command.finish()
    again = lost(command, output) if code else 0
    happened, good = ended_alike(world, name, output, *world.run(name, output, save_strategy="no"))
    if not name.startswith("pretrain") and checkpoints(output):
        happened, good = f"{happened}, and checkpoints {checkpoints(output)}", False
    fine = code in (0, 143, -15) and "Traceback" not in said
    return Outcome(f"exit code {code}, {last_line(said)!r}; {happened}", str(again), good and fine and not again)


def as_typed(world: World, rng: random.Random, number: signal.Signals, ranks: int) -> Outcome:
    """A signal to a launcher, as typed in a shell: SIGINT to all its processes, SIGTERM to the launcher alone."""
    world.reference("pretrain")
    output = fresh(world, f"as typed {number.name} {ranks}")
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--config_file",
                "recipes/accelerate/one_cpu.yaml"]  # fmt: skip
    if ranks > 1:
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", str(ranks),
                    "--master_port", str(free_port())]  # fmt: skip
    typed = [*launcher, "-m", "modeling_nanochat.recipes.pretrain",
             *world.arguments("pretrain", output, max_steps="4000")]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    end = time.time() + 200
    while not checkpoints(output) and process.poll() is None and time.time() < end:
        time.sleep(0.05)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    try:
        said, _ = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
    saved = max(checkpoints(output), default=0)
    sentence = next((line for line in said.splitlines() if "stopped by" in line), last_line(said))
    good = f"after step {saved} of 4000, which is saved" in sentence
    return Outcome(f"exit code {process.returncode}, {sentence!r}", "0" if good else "?", good)


# ---------------------------------------------------------------- two processes


def two_processes(world: World, rng: random.Random, name: str) -> Outcome:
    """The same stage again while the first is at work (held still meanwhile): refused, and the first unharmed."""
    world.reference(name)
    output = fresh(world, f"two {name}")
    first = world.start(name, output)
    wait_for(lambda: (output / "stage.begun.json").exists(), first)  # written once the lock is taken
    first.send(signal.SIGSTOP)
    second = world.start(name, output, **({"max_steps": "7"} if STAGES[name].trains else {}))
    code, said = second.finish()
    first.send(signal.SIGCONT)
    happened, good = ended_alike(world, name, output, *first.finish())
    good = good and code == 2 and "is at work in" in said and "Traceback" not in said
    return Outcome(f"the second: exit code {code}, {last_line(said)!r}; the first: {happened}", good=good)


def stale_lock(world: World, rng: random.Random) -> Outcome:
    """Two processes at the same moment in a folder whose lock a dead process left: one works, one is refused."""
    world.reference("tokenizer")
    output, refused = fresh(world, "stale lock"), 0
    for _ in range(5):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        (output / "stage.lock").write_text(json.dumps({"host": socket.gethostname(), "process": 1, "started": "x"}))
        pair = [world.start("tokenizer", output), world.start("tokenizer", output)]
        codes = sorted(command.finish()[0] for command in pair)
        refused += codes == [0, 2]
        other = difference(output, world.reference("tokenizer"))
        if other or codes not in ([0, 2], [0, 0]):
            return Outcome(f"exit codes {codes}, other {other}", good=False)
    return Outcome(f"5 times: the same files; {refused} times the other was refused, else it found all done")


# ---------------------------------------------------------------- a full disk


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of `DISK` bytes.

    Raises:
        PermissionError: this user may not mount one.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError("this user may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def leave(disk: Path, free: int) -> None:
    """Fill a disk until so many bytes are free."""
    ballast, there = disk / "ballast", shutil.disk_usage(disk).free
    with open(ballast, "wb") as file:
        for start in range(0, there - free, 1 << 20):
            file.write(b"\0" * min(1 << 20, there - free - start))


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of the weights, of the optimizer, and of a whole checkpoint, in whole pages."""
    last = folder / f"checkpoint-{checkpoints(folder)[-1]}"
    files = {path: -(-path.stat().st_size // PAGE) * PAGE for path in last.rglob("*") if path.is_file()}
    of = {name: sum(size for path, size in files.items() if path.name.startswith(name)) for name in
          ("model", "adapter_model", "optimizer")}  # fmt: skip
    return {"weights": of["model"] + of["adapter_model"], "optimizer": of["optimizer"], "all": sum(files.values())}


def disk_full(world: World, rng: random.Random, name: str, where: str) -> Outcome:
    """So much is free that the disk fills at one place; then it is freed, and the same command ends alike."""
    reference = world.reference(name)
    settings = {"save_strategy": "no"} if where.startswith("finished") else {}
    size = sizes_of(reference) if STAGES[name].trains else {"all": 0}
    free = {
        "before the first write": lambda: 0,
        "in the first records": lambda: 2 * PAGE,
        "in the weights": lambda: size["weights"] // 2,
        "in the optimizer": lambda: size["all"] - size["optimizer"] // 2,
        "in the checksums": lambda: size["all"] + PAGE,
        "in the second checkpoint": lambda: size["all"] + size["weights"] // 2,
        "at random": lambda: rng.randrange(0, 3 * size["all"]),
        "finished: weights": lambda: size["weights"] // 2,
        "finished: record": lambda: room_of(reference) - PAGE,
    }[where]()
    disk = world.folder / "faults" / f"disk_{name}_{where}".replace(" ", "_").replace(":", "")
    with small_disk(disk):
        output = disk / "run"
        leave(disk, free)
        first = world.start(name, output, **settings)
        code, said = first.finish()
        kept = checkpoints(output)
        again = str(lost(first, output)) if code and STAGES[name].trains else "-"
        (disk / "ballast").unlink()
        happened, good = ended_alike(world, name, output, *world.run(name, output, **settings))
    if code == 0:
        return Outcome(f"{free >> 10} KB were enough; {happened}", good=good)
    full = "disk is full" in said or "are free" in said
    one_line = code == 2 and full and "Traceback" not in said
    kept_ones = f", {len(kept)} checkpoints kept" if STAGES[name].trains else ""
    said_short = shortened(last_line(said), str(disk))
    return Outcome(
        f"{free >> 10} KB: exit code {code}, {said_short!r}{kept_ones}; {happened}", again, good and one_line
    )


def room_of(folder: Path) -> int:
    """Bytes that a finished stage takes without its checkpoints, in whole pages."""
    files = (path for path in folder.rglob("*") if path.is_file() and "checkpoint-" not in str(path))
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def shortened(sentence: str, folder: str) -> str:
    return sentence.replace(folder, "...")[:110]


# ---------------------------------------------------------------- numbers that are none


def diverges(world: World, rng: random.Random, name: str) -> Outcome:
    """Rates far too high: the run stops with step and tensor, and no spoilt checkpoint is left."""
    world.reference(name)
    output = fresh(world, f"diverges {name}")
    setting = "matrix_lr" if name.startswith("pretrain") else "init_lr_frac"
    always_graded = {"rewards": "tests.faults.stages:length"} if name == "rl" else {}  # else nothing is learnt at all
    code, said = world.run(name, output, **{setting: "1e30"}, **always_graded)
    from safetensors.torch import load_file

    spoilt = [step for step in checkpoints(output)
              if any(not tensor.isfinite().all()
                     for tensor in load_file(output / f"checkpoint-{step}/model.safetensors").values())]  # fmt: skip
    good = code == 2 and " at step " in said and not spoilt and not (output / "stage.json").exists()
    return Outcome(f"exit code {code}, {last_line(said)!r}, {len(spoilt)} spoilt checkpoints", good=good)


def other_run_in_the_folder(world: World, rng: random.Random) -> Outcome:
    """Run A is done, run B with other settings is killed in its folder, A is asked for again: never taken for done."""
    reference = world.reference("pretrain")
    output = fresh(world, "other run")
    shutil.copytree(reference, output)
    first = set(checkpoints(output))
    command = world.start("pretrain", output, matrix_lr="0.01")
    wait_for(lambda: bool(set(checkpoints(output)) - first) or command.step > 6, command)
    command.kill()
    code, said = world.run("pretrain", output)
    refused = code == 2 and "unfinished run with other settings" in said and "already done" not in said
    happened, good = ended_alike(world, "pretrain", output, *world.run("pretrain", output, rerun="true"))
    return Outcome(f"exit code {code}, {last_line(said)[:90]!r}; with --rerun true {happened}", good=refused and good)


def new_settings(world: World, rng: random.Random) -> Outcome:
    """A checkpoint gone on with by name, with other rates and length: they act."""
    from modeling_nanochat.recipes.stages.record import read_stage

    world.reference("pretrain")
    output = fresh(world, "new settings")
    shutil.copytree(world.reference("pretrain"), output)
    checkpoint = output / f"checkpoint-{checkpoints(output)[0]}"
    settings = {"resume_from_checkpoint": str(checkpoint), "matrix_lr": "0.5", "max_steps": "50"}
    code, said = world.run("pretrain", output, **settings)
    if code:
        return Outcome(f"exit code {code}, {last_line(said)!r}", good=False)
    steps, other = read_stage(output)["results"]["steps"], difference(output, world.reference("pretrain"))
    return Outcome(f"{steps} steps, other weights", good=steps == 50 and "model.safetensors" in (other or ""))


def listed(values) -> str:
    return ", ".join(map(str, values))
