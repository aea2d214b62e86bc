"""Reinforces a fine-tuned network on problems whose answers can be checked, with the calculator in the loop.

    accelerate launch --config_file recipes/accelerate/one_cpu.yaml -m modeling_nanochat.recipes.rl \\
        --config recipes/configs/demo/rl.yaml

A completion earns 1 if the number after its first `#### ` is the reference answer, else 0. Held-out problems are
sampled before and after (and every `eval_steps` in between), with the same random numbers: pass@1 is the share of
samples that are right, pass@8 the chance that one of eight is. The table at the end says whether pass@1 rose by more
than its confidence interval.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers.utils import logging

from modeling_nanochat.eval.intervals import Interval, summarize_passes
from modeling_nanochat.eval.sampling import question_of
from modeling_nanochat.eval.tasks.gsm8k import is_correct
from modeling_nanochat.eval.tasks.rows import read_rows
from modeling_nanochat.recipes.command_line import parse, run
from modeling_nanochat.recipes.stages.folder import checkpoint_to_resume, load_checkpoint, save_checkpoint
from modeling_nanochat.recipes.stages.record import Stage
from modeling_nanochat.training import devices, scaling
from modeling_nanochat.training.trainers.reinforce import ReinforceConfig, ReinforceTrainer

SAMPLES_SHOWN = 5
TRIAL_SAMPLES = 128  # drawn to tell how long the run will take


@dataclass
class RLArguments:
    """What to reinforce, and on what."""

    model: str = field(default="out/demo/sft", metadata={"help": "Folder or Hub name of the fine-tuned model."})
    data: str = field(
        default="out/demo/data/rl", metadata={"help": "Folder with train.jsonl and validation.jsonl of problems."}
    )
    rerun: bool = field(default=False, metadata={"help": "Train again even if it is already done."})
    validation_problems: int = field(
        default=200, metadata={"help": "Held-out problems that pass@k is measured on, at most."}
    )


def main() -> None:
    arguments, config = parse(RLArguments, ReinforceConfig)
    files = [f"{arguments.data}/{split}.jsonl" for split in ("train", "validation")]
    stage = Stage("rl", config.output_dir, [arguments, config], [arguments.model, *files], arguments.rerun)
    if stage.is_done():
        return
    logging.disable_progress_bar()  # of reading and writing weights, which would tear the one of training
    checkpoint = checkpoint_to_resume(stage, config)
    model, tokenizer = load_checkpoint(arguments.model)
    train, validation = map(read_problems, files)
    trainer = ReinforceTrainer(
        model,
        config,
        Dataset.from_list(train),
        Dataset.from_list(validation[: arguments.validation_problems]),
        reward=is_correct,
        summarize=summarize_passes,
        processing_class=tokenizer,
    )
    announce(stage, trainer)
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()
    whole = trainer.whole_model()
    if trainer.is_world_process_zero():
        save_checkpoint(whole, tokenizer, config.output_dir)
    stage.say(comparison(before, after))
    results = {
        "steps": trainer.state.global_step,
        **{f"{name.removeprefix('eval_')}_before": value for name, value in before.items()},
        **{f"{name.removeprefix('eval_')}_after": value for name, value in after.items()},
    }
    stage.finish(results, trainer.state.log_history, show_samples(trainer))


def read_problems(file: str) -> list[dict[str, Any]]:
    """Rows {"prompt": messages up to the question, "answer"} of a JSON lines file."""

    def take(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": question_of(row["messages"]), "answer": row["answer"]}

    return read_rows(file, take, '{"messages": [...], "answer": "..."}')


def announce(stage: Stage, trainer: ReinforceTrainer) -> None:
    """Says what will happen; the time rests on one batch of samples drawn for the purpose."""
    config, network = trainer.args, trainer.model.config
    problems = list(trainer.eval_dataset)[: max(1, TRIAL_SAMPLES // config.num_generations)]
    trial = [row["prompt"] for row in problems for _ in range(config.num_generations)]
    start = time.perf_counter()
    prompts, completions = trainer.sample(trial, 0, 0, len(trial))
    seconds_per_sample = (time.perf_counter() - start) / len(trial) / config.world_size
    tokens_per_sample = sum(map(len, prompts + completions)) / len(trial)

    steps = trainer.planned_steps
    samples = steps * config.generation_batch_size
    evaluations = 2 + (steps // int(config.eval_steps) if config.eval_strategy == "steps" else 0)
    drawn = samples + evaluations * len(trainer.eval_dataset) * config.num_generations_eval
    flops = samples * tokens_per_sample * scaling.flops_per_token(network, int(tokens_per_sample))
    learning = devices.expected_seconds(flops, config.device, trainer.activation_dtype, config.world_size)
    stage.announce(
        parameters=scaling.count_parameters(network).total,
        steps=steps,
        batch=f"{config.generation_batch_size // config.num_generations} problems x {config.num_generations} samples",
        samples=drawn,
        tokens=int(samples * tokens_per_sample),
        flops=flops,
        activations=str(trainer.activation_dtype).removeprefix("torch."),
        seconds=drawn * seconds_per_sample + learning,
    )


def comparison(before: dict[str, Interval], after: dict[str, Interval]) -> str:
    """The table of before and after, and whether pass@1 rose by more than chance."""
    lines = [f"{'held-out':10}{'before':>8}  95% interval  {'after':>8}  95% interval"]
    for name in before:
        cells = [f"{each.mean:8.3f}  {each.low:.3f}-{each.high:.3f} " for each in (before[name], after[name])]
        lines.append(f"{name.removeprefix('eval_'):10}" + "  ".join(cells))
    rose = after["eval_pass@1"].low > before["eval_pass@1"].high
    lines.append(f"pass@1 {'rose beyond' if rose else 'did not rise beyond'} its confidence interval")
    return "\n".join(lines)


def show_samples(trainer: ReinforceTrainer) -> list[dict[str, Any]]:
    """An answer to each of the first held-out problems, for the report."""
    rows = list(trainer.eval_dataset.select(range(min(SAMPLES_SHOWN, len(trainer.eval_dataset)))))
    _, completions = trainer.sample([row["prompt"] for row in rows], 0, 0, len(rows))
    texts = trainer.processing_class.batch_decode(completions)
    return [
        {"question": row["prompt"][-1]["content"], "completion": text, "right": is_correct(text, row["answer"])}
        for row, text in zip(rows, texts)
    ]


if __name__ == "__main__":
    run(main)
