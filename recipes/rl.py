"""Reinforces a fine-tuned network on problems whose answers can be checked, with the calculator in the loop.

    accelerate launch --config_file recipes/accelerate/one_cpu.yaml -m modeling_nanochat.recipes.rl \\
        --config recipes/configs/demo/rl.yaml

A completion earns 1 if it was not cut off and the checker of its problem says that it is right, else 0: for most
problems, if the number after its first `#### ` is the answer. `--rewards` names other checkers or your own functions,
`--reward_weights` weighs them. Held-out problems are sampled before and after (and every `eval_steps` in between), with
the same random numbers: pass@1 is the share of samples that are right by the first reward, pass@8 the chance that one
of eight is. The tables at the end show some answers of both, and whether pass@1 rose by more than its confidence
interval.
"""

import importlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_nanochat import render_prompt
from modeling_nanochat.eval.intervals import Interval, summarize_passes
from modeling_nanochat.eval.sampling import question_of
from modeling_nanochat.eval.tasks.checkers import CHECKERS, checker_of, is_right
from modeling_nanochat.eval.tasks.rows import read_rows
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.publishing.finished import publish
from modeling_nanochat.recipes.stages.folder import (
    checkpoint_to_resume,
    load_checkpoint,
    remove_unwanted_checkpoints,
    save_checkpoint,
)
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.recipes.stages.tables import with_calls_shown
from modeling_nanochat.tokenization_nanochat_gpt import ASSISTANT_END, BOS, message_text
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.trainers.lora import merged
from modeling_nanochat.training.trainers.reinforce import Problem, ReinforceConfig, ReinforceTrainer, Reward

SAMPLES_SHOWN = 5
TRIAL_SAMPLES = 128  # drawn to tell how long the run will take


@dataclass
class RLArguments:
    """What to reinforce, and on what."""

    model: str = field(default="out/demo/sft", metadata={"help": "Folder or Hub name of the fine-tuned model."})
    data: str = field(
        default="out/demo/data/rl", metadata={"help": "Folder with train.jsonl and validation.jsonl of problems."}
    )
    rewards: list[str] = field(
        default_factory=lambda: ["checker"],
        metadata={
            "help": "checker (of each problem), the name of one for all, or module:function of your own, which takes "
            "the text of a completion and its problem. The first decides what is right: at least 1."
        },
    )
    rerun: bool = field(default=False, metadata={"help": "Train again even if it is already done."})
    validation_problems: int = field(
        default=200, metadata={"help": "Held-out problems that pass@k is measured on, at most."}
    )


def main() -> None:
    arguments, config = parse(RLArguments, ReinforceConfig)
    files = [f"{arguments.data}/{split}.jsonl" for split in ("train", "validation")]
    rewards = {name: find_reward(name) for name in arguments.rewards}
    inputs = [arguments.model, *files, *own_files(rewards)]
    stage = Stage("rl", config.output_dir, [arguments, config], inputs, arguments.rerun)
    if stage.is_done():
        if config.push_to_hub:
            publish(stage, config)
        return
    logging.disable_progress_bar()  # of reading and writing weights, which would tear the one of training
    checkpoint = checkpoint_to_resume(stage, config)
    model, tokenizer = load_checkpoint(arguments.model)
    room = model.config.max_position_embeddings - config.max_completion_length
    train, validation = (read_problems(file, tokenizer, room) for file in files)
    validation = validation[: arguments.validation_problems]
    trainer = ReinforceTrainer(
        model, config, train, validation, rewards=rewards, summarize=summarize_passes, processing_class=tokenizer
    )
    announce(stage, trainer, validation)
    before, samples_before = trainer.evaluate(), show_samples(trainer, validation, "before")
    trainer.keeps_end = True  # what comes after it, such as measuring, may be killed too
    trainer.train(resume_from_checkpoint=checkpoint)
    after, samples_after = trainer.evaluate(), show_samples(trainer, validation, "after")
    whole = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_checkpoint(merged(whole, config.output_dir), tokenizer, config.output_dir)
    stage.say(sample_table(samples_before, samples_after))
    stage.say(comparison(before, after))
    results = {
        "steps": trainer.state.global_step,
        **{f"{name.removeprefix('eval_')}_before": value for name, value in before.items()},
        **{f"{name.removeprefix('eval_')}_after": value for name, value in after.items()},
    }
    stage.finish(results, trainer.state.log_history, samples_before + samples_after)
    remove_unwanted_checkpoints(config)
    publish(stage, config)


def find_reward(name: str) -> Reward:
    """A reward by its name: `checker`, one of the checkers, or a function `module:function` that can be imported.

    Raises:
        ValueError: there is none.
    """
    if name == "checker":
        return if_ended(is_right)
    if name in CHECKERS:
        return if_ended(CHECKERS[name])
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"reward {name!r}: expected checker, {', '.join(CHECKERS)} or module:function")
    try:
        found: Callable | None = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: {module} cannot be imported from here ({error})") from error
    if not callable(found):
        raise ValueError(f"reward {name!r}: {module} has no function {function!r}")
    return found


def if_ended(checker: Reward) -> Reward:
    """Of answers that were not cut off. A checker reads the first `#### ` of an answer, so nothing else would pay for
    ending it: in a run of 1,000 steps the network unlearnt to, all its answers right (docs/finetuning.md)."""

    def reward(text: str, problem: Problem) -> bool:
        return text.endswith((ASSISTANT_END, BOS)) and checker(text, problem)

    return reward


def own_files(rewards: Iterable[str]) -> list[str]:
    """Where imported rewards of one's own are written: with another text of them it is another run."""
    modules = {name.partition(":")[0] for name in rewards if ":" in name}
    return sorted(filter(None, (getattr(sys.modules[module], "__file__", None) for module in modules)))


def read_problems(file: str, tokenizer: PreTrainedTokenizerBase, room: int) -> list[Problem]:
    """The rows of a JSON lines file, each with its `prompt`, the messages up to the question.

    Raises:
        ValueError: a row has no question, or one of more than `room` tokens; the message shows which.
    """

    def take(row: dict[str, Any]) -> Problem:
        checker_of(row)
        prompt = question_of(row["messages"])
        length = len(render_prompt(tokenizer, prompt))
        if length > room:
            raise ValueError(
                f"the prompt has {length} tokens, and the model's context room for {room} before a completion of "
                "max_completion_length"
            )
        return {**row, "prompt": prompt}

    return read_rows(file, take, '{"messages": [...], "answer": "..."}')


def announce(stage: Stage, trainer: ReinforceTrainer, validation: Sequence[Problem]) -> None:
    """Says what will happen; the time rests on one batch of samples drawn for the purpose."""
    config, network = trainer.args, trainer.model.config
    problems = validation[: max(1, TRIAL_SAMPLES // config.num_generations)]
    trial = [problem for problem in problems for _ in range(config.num_generations)]
    start = time.perf_counter()
    drawn = trainer.sample(trial, 0, range(len(trial)), len(trial))
    seconds_per_sample = (time.perf_counter() - start) / len(trial) / config.world_size
    tokens_per_sample = sum(map(len, drawn.prompt_ids + drawn.completion_ids)) / len(trial)

    steps = trainer.planned_steps
    samples = steps * config.generation_batch_size
    evaluations = 2 + (steps // int(config.eval_steps) if config.eval_strategy == "steps" else 0)
    samples_drawn = samples + evaluations * len(validation) * config.num_generations_eval
    flops = samples * tokens_per_sample * scaling.flops_per_token(network, int(tokens_per_sample))
    learning = devices.expected_seconds(flops, config.device, trainer.activation_dtype, config.world_size)
    stage.announce(
        parameters=scaling.count_parameters(network).total,
        steps=steps,
        batch=f"{config.generation_batch_size // config.num_generations} problems x {config.num_generations} samples",
        samples=samples_drawn,
        tokens=int(samples * tokens_per_sample),
        flops=flops,
        activations=str(trainer.activation_dtype).removeprefix("torch."),
        seconds=samples_drawn * seconds_per_sample + learning,
    )


def comparison(before: dict[str, SupportsFloat], after: dict[str, SupportsFloat]) -> str:
    """The table of before and after, and whether pass@1 rose by more than chance."""
    lines = [f"{'held-out':10}{'before':>8}  95% interval  {'after':>8}  95% interval"]
    for name, value in before.items():
        if isinstance(value, Interval) and name in after:
            cells = [f"{each.mean:8.3f}  {each.low:.3f}-{each.high:.3f} " for each in (value, after[name])]
            lines.append(f"{name.removeprefix('eval_'):10}" + "  ".join(cells))
    for name in ("call_rate", "accuracy_given_a_call"):
        shown = [f"{each[f'eval_{name}']:.3f}" if f"eval_{name}" in each else "-" for each in (before, after)]
        lines.append(f"{name.replace('_', ' ')} {shown[0]} before, {shown[1]} after")
    rose = after["eval_pass@1"].low > before["eval_pass@1"].high
    lines.append(f"pass@1 {'rose beyond' if rose else 'did not rise beyond'} its confidence interval")
    return "\n".join(lines)


def show_samples(trainer: ReinforceTrainer, validation: Sequence[Problem], when: str) -> list[dict[str, Any]]:
    """An answer to each of the first held-out problems, by the same numbers every time."""
    problems = validation[:SAMPLES_SHOWN]
    drawn = trainer.sample(problems, 0, range(len(problems)), len(problems))
    return [
        {"task": when, "question": message_text(problem["prompt"][-1]["content"]), "completion": text, "right": right}
        for problem, text, right in zip(problems, drawn.texts, drawn.passed)
    ]


def sample_table(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> str:
    """The same questions answered before and after, calls as `[12 + 30 = 42]`, right ones with a tick."""

    def line(sample: dict[str, Any]) -> str:
        return f"{'✓' if sample['right'] else '✗'} {' / '.join(with_calls_shown(sample['completion']).splitlines())}"

    lines = ["some held-out questions, answered before and after"]
    for first, second in zip(before, after):
        lines += [first["question"], f"  before {line(first)}", f"  after  {line(second)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
