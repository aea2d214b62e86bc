"""The tiny run that the fault suite harms: its data, the command of every stage, and processes that can be killed.

A command is the recipe's own `main`, in a process forked from one that has imported everything, so that starting costs
tenths of a second and a kill at a random moment meets work rather than imports; as several ranks it gets what torchrun
would give it. The row `as typed` does the same with the real command line.
"""

import atexit
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

WORDS = "the a of king queen castle river mountain says goes sees dark bright garden winter quiet bridge"
RECIPES = ("prepare_data", "train_tokenizer", "pretrain", "sft", "rl", "dpo", "evaluate", "push", "report")
PROCESSES = multiprocessing.get_context("forkserver")
# Starting a process asks all others for their codes, and of two that ask at once one is told 255 (CPython 3.11).
ASKING = threading.Lock()
PROCESSES.set_forkserver_preload([f"modeling_nanochat.recipes.{recipe}" for recipe in RECIPES])
TRAIN = "--use_cpu true --disable_tqdm true --polar_dtype float32 --save_strategy steps --save_steps 3"
PRETRAIN = (
    "--data {at}/shards --tokenizer {at}/tokenizer --depth 2 --head_dim 32 --sequence_length 64 --max_steps 40 "
    f"--total_batch_tokens 512 --validation_tokens 512 --validate_every 20 --logging_steps 1 "
    f"--torch_compile false {TRAIN}"
)
SFT = f"--model {{at}}/pretrain --data {{at}}/data/sft --per_device_train_batch_size 2 --max_steps 12 {TRAIN}"


@dataclass(frozen=True)
class Stage:
    """A recipe with its arguments; `{at}` stands for the folder of the run. `needs` are stages that come before."""

    recipe: str
    arguments: str
    needs: tuple[str, ...] = ()
    ranks: int = 1
    trains: bool = True


STAGES = {
    "data": Stage("prepare_data", "--config {at}/data.yaml", trains=False),
    "tokenizer": Stage("train_tokenizer", "--data {at}/shards --vocab_size 320", trains=False),
    "pretrain": Stage("pretrain", PRETRAIN, ("tokenizer",)),
    "pretrain compiled": Stage("pretrain", PRETRAIN.replace("compile false", "compile true"), ("tokenizer",)),
    "pretrain on 2 ranks": Stage("pretrain", PRETRAIN, ("tokenizer",), ranks=2),
    "pretrain qwen3": Stage("pretrain", f"{PRETRAIN} --architecture qwen3", ("tokenizer",)),
    "sft": Stage("sft", SFT, ("data", "pretrain")),
    "sft on 2 ranks": Stage("sft", SFT.replace("size 2", "size 1"), ("data", "pretrain"), ranks=2),
    "sft lora": Stage("sft", f"{SFT} --lora_rank 2", ("data", "pretrain")),
    "rl": Stage(
        "rl",
        "--model {at}/sft --data {at}/data/rl --num_generations 4 --per_device_train_batch_size 16 --max_steps 8 "
        f"--gradient_accumulation_steps 1 --max_completion_length 8 --validation_problems 4 {TRAIN}",
        ("data", "sft"),
    ),
    "dpo": Stage(
        "dpo",
        f"--model {{at}}/sft --data {{at}}/pairs --per_device_train_batch_size 4 --max_steps 12 {TRAIN}",
        ("sft",),
    ),
    "evaluate": Stage(
        "evaluate",
        "--models {at}/sft --data {at}/data --tasks problems bits_per_byte --text {at}/text.txt --max_problems 4 "
        "--num_samples 2 --max_new_tokens 8 --log_samples true",
        ("data", "sft"),
        trains=False,
    ),
}


def length(completion: str, problem: dict) -> float:
    """A reward that differs between answers that all are wrong."""
    return len(completion)


class Command:
    """A running command, on one rank or several. `step` is the last step that it ended."""

    def __init__(self, recipe: str, arguments: Sequence[str], log: Path, ranks: int = 1):
        self.log, self.steps = log, log.with_suffix(".step")
        self.steps.unlink(missing_ok=True)
        port = free_port()
        self.processes = []
        for rank in range(ranks):
            environment = {"HF_HUB_OFFLINE": "1"}
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own = log if rank == 0 else log.with_suffix(f".{rank}.log")
            self.processes.append(
                PROCESSES.Process(target=be_the_command, args=(recipe, list(arguments), own, self.steps, environment))
            )
        for process in self.processes:
            with ASKING:
                process.start()

    def codes(self) -> list[int | None]:
        """The exit code of each process; None of one that runs."""
        with ASKING:
            return [process.exitcode for process in self.processes]

    @property
    def runs(self) -> bool:
        return None in self.codes()

    @property
    def begun(self) -> bool:
        return self.steps.exists()

    @property
    def step(self) -> int:
        text = self.steps.read_text() if self.steps.exists() else ""
        return int(text or 0)

    def send(self, number: signal.Signals) -> None:
        for process, code in zip(self.processes, self.codes()):
            if code is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.finish()

    def finish(self, seconds: float = 400) -> tuple[int, str]:
        """Exit code and everything printed by the first rank. When one rank fails the others go, as under torchrun."""
        end = time.time() + seconds
        while self.runs and time.time() < end:
            if any(self.codes()):
                end = min(end, time.time() + 10)
            time.sleep(0.02)
        hung = self.runs
        self.send(signal.SIGKILL)
        while self.runs:
            time.sleep(0.02)
        codes = self.codes()
        code = next((each for each in codes if each and each != -signal.SIGKILL), codes[0])
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return code, text + ("\n(hung, and was killed)" if hung and not code else "")


def be_the_command(recipe: str, arguments: list[str], log: Path, steps: Path, environment: dict[str, str]) -> None:
    """What the forked process does."""
    from transformers.trainer_callback import CallbackHandler

    from modeling_nanochat.recipes.command_line import run

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background would have ignored
    os.environ |= environment
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = [recipe, *arguments]
    plain = CallbackHandler.on_step_end

    def on_step_end(self, args, state, control):
        if state.is_world_process_zero:
            steps.write_text(str(state.global_step))
        return plain(self, args, state, control)

    CallbackHandler.on_step_end = on_step_end
    steps.write_text("0")
    try:
        run(importlib.import_module(f"modeling_nanochat.recipes.{recipe}").main)
    finally:
        atexit._run_exitfuncs()  # which a process of `multiprocessing` leaves out


class World:
    """The tiny run in a folder. Undisturbed stages are made when they are first asked for, and kept."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "data.yaml").exists():
            self.make_data(random.Random(0))

    def make_data(self, rng: random.Random) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name in ("shards", "own", "pairs", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            texts = [" ".join(rng.choices(WORDS.split(), k=60)) for _ in range(300)]
            pq.write_table(pa.table({"text": texts}), self.folder / f"shards/shard_{number}.parquet", row_group_size=50)
        (self.folder / "text.txt").write_text(" ".join(rng.choices(WORDS.split(), k=300)))
        sums = [(a, b) for a in range(1, 30) for b in range(1, 10)]
        rng.shuffle(sums)
        rows = [as_problem(*each) for each in sums]
        pairs = [as_pair(*each) for each in sums]
        for name, chosen in (
            ("own/conversations", rows), ("own/held_out", rows[-10:]), ("pairs/train", pairs[:-8]),
            ("pairs/validation", pairs[-8:]),
        ):  # fmt: skip
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (self.folder / f"{name}.jsonl").write_text(text)
        own = [{"name": f"{self.folder}/own/conversations.jsonl"}]
        held_out = [{"name": f"{self.folder}/own/held_out.jsonl"}]
        config = {"pretrain": "none", "human_eval": "none", "multiple_choice": [], "validation_share": 0.1,
                  "sft": own, "rl": own, "rl_validation": held_out}  # fmt: skip
        (self.folder / "data.yaml").write_text(json.dumps(config))

    def arguments(self, name: str, output: Path, **replaced: str) -> list[str]:
        """What is typed after the stage's command, `replaced` settings in the place of its own."""
        words = STAGES[name].arguments.format(at=self.folder).split()
        for option in {f"--{key}" for key in replaced} & set(words):
            del words[words.index(option) : words.index(option) + 2]
        extra = [word for key, value in replaced.items() for word in (f"--{key}", *str(value).split())]
        return [*words, "--output_dir", str(output), *extra]

    def start(self, name: str, output: Path, ranks: int | None = None, **replaced: str) -> Command:
        stage = STAGES[name]
        log = self.folder / "logs" / f"{output.relative_to(self.folder).as_posix().replace('/', '_')}.log"
        return Command(stage.recipe, self.arguments(name, output, **replaced), log, ranks or stage.ranks)

    def run(self, name: str, output: Path, **settings: str) -> tuple[int, str]:
        return self.start(name, output, **settings).finish()

    def reference(self, name: str) -> Path:
        """The folder of a stage that nothing disturbed, with those that it needs."""
        for needed in STAGES[name].needs:
            self.reference(needed)
        output = self.folder / name.replace(" ", "_")
        if not (output / "stage.json").exists():
            started = time.time()
            code, text = self.run(name, output)
            if code:
                raise SystemExit(f"{name}, undisturbed, ended with exit code {code}:\n{text}")
            (self.folder / "logs" / f"{output.name}.seconds").write_text(str(time.time() - started))
        return output

    def steps(self, name: str) -> int:
        words = STAGES[name].arguments.split()
        return int(words[words.index("--max_steps") + 1])

    def seconds(self, name: str) -> float:
        """How long the undisturbed stage took."""
        return float((self.folder / "logs" / f"{self.reference(name).name}.seconds").read_text())


def as_problem(a: int, b: int) -> dict:
    messages = [{"role": "user", "content": f"{a} + {b}"}, {"role": "assistant", "content": f"#### {a + b}"}]
    return {"messages": messages, "answer": str(a + b)}


def as_pair(a: int, b: int) -> dict:
    def answer(number: int) -> list[dict]:
        return [{"role": "assistant", "content": f"#### {number}"}]

    return {"prompt": as_problem(a, b)["messages"][:1], "chosen": answer(a + b), "rejected": answer(a + b + 1)}


def what_is_left(folder: Path) -> dict:
    """What two runs must have in common: hashes of the files, figures and losses, speeds aside."""
    from modeling_nanochat.recipes.stages.record import files_of_a_stage, read_stage

    record = read_stage(folder)
    if record is None:
        return {"record": "none"}
    speeds = ("tokens_per_second", "mfu", "cropped_share")  # the last as far as the loader has read ahead
    results = {name: value for name, value in record["results"].items() if name not in speeds}
    losses = [line["loss"] for line in record["log_history"] if "loss" in line]
    files = files_of_a_stage(folder)
    if files.pop("manifest.json", None):  # it names its folder
        files["manifest.json"] = json.loads((folder / "manifest.json").read_text())["files"]
    return {"results": results, "losses": losses, **files}


def difference(folder: Path, reference: Path) -> str | None:
    """The names of what differs from the undisturbed stage; None if all is equal."""
    one, other = what_is_left(folder), what_is_left(reference)
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return ", ".join(names) or None


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def wait_for(condition: Callable[[], bool], command: Command, seconds: float = 300) -> bool:
    """Whether the condition came about before the command ended."""
    end = time.time() + seconds
    while time.time() < end:
        if condition():
            return True
        if not command.runs:
            return False
        time.sleep(0.005)
    return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
