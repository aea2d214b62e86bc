"""Reinforcement learning: the samples, the mask, and the loss against obvious twins and GRPOTrainer itself."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trl import GRPOTrainer

from modeling_nanochat import render_conversation, render_prompt
from modeling_nanochat.completions import sample_completions
from modeling_nanochat.eval.tasks import arithmetic
from modeling_nanochat.running_rows import draw
from modeling_nanochat.tokenization_nanochat_gpt import OUTPUT_START
from modeling_nanochat.tool_use import CalculatorLogitsProcessor
from modeling_nanochat.training.tokenizer import train_tokenizer
from modeling_nanochat.training.trainers.reinforce import EVALUATION_STREAM, ReinforceConfig, ReinforceTrainer
from tests.ranks import run_two_ranks
from tests.toys import narrow_model


def problems(count: int) -> list[dict]:
    return list(itertools.islice(arithmetic.generate(0), count))


def make_tokenizer():
    return train_tokenizer([row["messages"][0]["content"] for row in problems(400)], 320)


make_model = partial(narrow_model, max_position_embeddings=128)


def questions(count: int) -> list[dict]:
    return [{"prompt": row["messages"][:1], "answer": row["answer"]} for row in problems(count)]


def settings(folder: Path, **overrides) -> ReinforceConfig:
    return ReinforceConfig(
        str(folder),
        **{
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_generations": 4,
            "max_completion_length": 10,
            "max_steps": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "activation_dtype": "float32",
            "polar_dtype": "float32",
            **overrides,
        },
    )


def length_reward(text: str, problem: dict) -> float:
    """Something that an untrained network gets right now and then."""
    return float(len(text) % 3 == 0)


def count_passes(passes: list[int], samples: int) -> dict[str, float]:
    return {"pass@1": sum(passes) / (len(passes) * samples)}


def make_trainer(folder: Path, rewards: dict | None = None, **overrides) -> ReinforceTrainer:
    return ReinforceTrainer(
        make_model(),
        settings(folder, **overrides),
        questions(8),
        questions(6),
        rewards=rewards or {"length": length_reward},
        summarize=count_passes,
        processing_class=make_tokenizer(),
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# ---------------------------------------------------------------- sampling


class EagerCaller:
    """Makes the network call the calculator with `12+30` at some point, and stop at another."""

    def __init__(self, tokenizer):
        self.calculator = CalculatorLogitsProcessor(tokenizer)
        answer = {"role": "assistant", "content": [{"type": "python", "text": "12+30"}]}
        ids, _ = render_conversation(tokenizer, [{"role": "user", "content": "?"}, answer])
        self.call = ids[ids.index(self.calculator.python_start) : -1]
        self.stop = tokenizer.eos_token_id

    def __call__(self, tokens, scores):
        scores = scores.clone()
        scores[:, self.stop] += 3.0
        for row, ids in zip(scores, tokens.tolist()):
            if ids[-1] % 3 == 0 and self.calculator.python_start not in ids:
                row[self.calculator.python_start] = row.max() + 5.0
            elif self.calculator.python_start in ids:
                written = ids[ids.index(self.calculator.python_start) :]
                if len(written) < len(self.call):
                    row[self.call[len(written)]] = row.max() + 20.0
        return self.calculator(tokens, scores)


def slow_sample(model, prompt, uniforms, stop_token_ids, logits_processor) -> tuple[list[int], list[float]]:
    """One row, no cache, one token after another."""
    ids, log_probabilities = list(prompt), []
    for number in uniforms.tolist():
        scores = logits_processor(torch.tensor([ids]), model(torch.tensor([ids])).logits[:, -1])[0]
        probabilities = scores.double().softmax(-1)
        ids.append(int((probabilities.cumsum(-1) <= number * (1 - 1e-9)).sum()))
        log_probabilities.append(float(probabilities[ids[-1]].log()))
        if ids[-1] in stop_token_ids:
            break
    return ids[len(prompt) :], log_probabilities


@pytest.mark.parametrize("era", ["seed", "head"])
def test_samples_equal_those_drawn_one_row_at_a_time_without_a_cache(tokenizer, era):
    model = make_model(era)
    model.train()
    prompts = [render_prompt(tokenizer, row["messages"][:1]) for row in problems(3) for _ in range(4)]
    uniforms = torch.rand(12, 24, generator=torch.Generator().manual_seed(1))
    stop, processor = [tokenizer.eos_token_id, tokenizer.bos_token_id], EagerCaller(tokenizer)
    batched, log_probabilities = sample_completions(
        model, prompts, uniforms, stop_token_ids=stop, pad_token_id=tokenizer.pad_token_id, logits_processor=processor
    )
    assert model.training
    model.eval()
    with torch.no_grad():
        slow = [slow_sample(model, prompt, row, stop, processor) for prompt, row in zip(prompts, uniforms)]
    assert batched == [ids for ids, _ in slow]
    for found, (_, expected) in zip(log_probabilities, slow):
        assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(map(len, batched))) > 3  # rows left the batch at different times
    assert sum(OUTPUT_START in tokenizer.decode(ids) for ids in batched) >= 3
    assert all("12+30<|python_end|><|output_start|>42<|output_end|>" in text
               for text in map(tokenizer.decode, batched) if OUTPUT_START in text and "output_end" in text)  # fmt: skip


def test_a_sample_depends_on_its_own_numbers_only(tokenizer):
    model = make_model().eval()
    prompts = [render_prompt(tokenizer, row["messages"][:1]) for row in problems(8)]
    uniforms = torch.rand(8, 12, generator=torch.Generator().manual_seed(2))
    options = {"stop_token_ids": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    together, _ = sample_completions(model, prompts, uniforms, **options)
    alone = [sample_completions(model, [prompt], row[None], **options)[0][0] for prompt, row in zip(prompts, uniforms)]
    assert together == alone
    with pytest.raises(ValueError, match="8 prompts, 0 of them empty, and 7 rows"):
        sample_completions(model, prompts, uniforms[:7], **options)


def test_tokens_are_drawn_in_proportion_to_their_probability():
    scores = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf"), 2.0, -float("inf")]]).repeat(20_000, 1)
    uniforms = torch.linspace(0, 1 - 2**-24, 20_000)
    shares = torch.bincount(draw(scores, uniforms), minlength=6) / 20_000
    torch.testing.assert_close(shares, scores[0].softmax(-1), atol=2e-4, rtol=0)


def test_other_seeds_and_other_steps_give_other_samples_and_the_same_ones_the_same(tmp_path):
    def samples(seed: int, step: int) -> list[list[int]]:
        trainer.args.seed = seed
        return trainer.sample(questions(1) * 4, step, range(4), 4).completion_ids

    trainer = make_trainer(tmp_path, max_completion_length=16)
    drawn = [samples(seed, step) for seed in (0, 1, 2**32) for step in (0, 1, EVALUATION_STREAM)]
    assert len(set(map(str, drawn))) == 9
    assert samples(1, 1) == drawn[4]


# ---------------------------------------------------------------- advantages, mask, loss


def scored_samples(trainer: ReinforceTrainer) -> dict[str, torch.Tensor]:
    """What a step samples for two questions, four times each, by a network that likes to call the calculator."""
    caller = EagerCaller(trainer.processing_class)
    caller.forced_token_mask = trainer.calculator.forced_token_mask
    trainer.calculator = caller
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in (0, 0, 0, 0, 5, 5, 5, 5)])


def test_advantages_are_rewards_less_their_mean_and_forced_tokens_carry_no_loss(tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, max_completion_length=24)
    calculator, inputs = trainer.calculator, scored_samples(trainer)

    completions = zip(inputs["completion_ids"], inputs["completion_mask"].bool())
    texts = tokenizer.batch_decode([ids[mask] for ids, mask in completions])
    rewards = torch.tensor([length_reward(text, {}) for text in texts]).view(2, 4)
    torch.testing.assert_close(inputs["advantages"], (rewards - rewards.mean(1, keepdim=True)).flatten())

    output = [calculator.output_start, *tokenizer("42")["input_ids"], calculator.output_end]
    forced = 0
    for ids, sampled in zip(inputs["completion_ids"].tolist(), inputs["tool_mask"].tolist()):
        for start in range(len(ids) - len(output) + 1):
            if ids[start : start + len(output)] == output:
                assert sampled[start : start + len(output)] == [0] * len(output)
                forced += len(output)
    assert forced >= 3 * len(output)
    sampled = inputs["completion_mask"] * inputs["tool_mask"]
    assert inputs["num_items_in_batch"] == sampled.sum() < inputs["completion_mask"].sum()


def gradients(trainer: ReinforceTrainer, compute_loss, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loss = compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


def test_the_gradient_is_grpo_s(tmp_path):
    trainer = make_trainer(tmp_path, max_completion_length=24)
    inputs = scored_samples(trainer)
    assert inputs["tool_mask"].min() == 0
    inputs["advantages"][2] = 0  # a row without advantage
    assert inputs["prompt_mask"].min() == 0 and inputs["completion_mask"].min() == 0  # padding on both sides
    loss, ours = gradients(trainer, ReinforceTrainer._compute_loss, inputs)
    _, theirs = gradients(trainer, GRPOTrainer._compute_loss, inputs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3

    # The loss itself is the formula (GRPO's value is another one: its ratio is 1).
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    log_probabilities = trainer.model(ids, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    chosen = log_probabilities.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, -inputs["completion_ids"].shape[1] :]
    sampled = inputs["completion_mask"] * inputs["tool_mask"]
    expected = -(inputs["advantages"][:, None] * chosen * sampled).sum() / sampled.sum()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-5)


def test_equal_rewards_leave_a_zero_gradient_for_every_parameter(tmp_path):
    trainer = make_trainer(tmp_path, {"same": lambda text, problem: 1.0})
    inputs = scored_samples(trainer)
    loss, found = gradients(trainer, ReinforceTrainer._compute_loss, inputs)
    assert loss == 0 and not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    "name, value",
    [("beta", 0.1), ("num_iterations", 2), ("scale_rewards", "group"), ("loss_type", "grpo"), ("temperature", 0.7),
     ("top_k", 50), ("bf16", True), ("max_grad_norm", 1.0), ("steps_per_generation", 4)],
)  # fmt: skip
def test_settings_that_are_not_plain_reinforce_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}|bf16|`{name}`"):
        settings(tmp_path, **{name: value})


def test_several_rewards_are_weighed_and_one_that_does_not_apply_counts_nothing(tmp_path):
    rewards = {
        "length": length_reward,
        "brevity": lambda text, problem: -len(text) if len(text) % 2 else None,
        "answer": lambda text, problem: len(problem["answer"]),
    }
    trainer = make_trainer(tmp_path, rewards, reward_weights=[1.0, 0.1, 5.0])
    inputs = scored_samples(trainer)
    texts = trainer.drawn.texts
    sums = [length_reward(text, {}) - (0.1 * len(text) if len(text) % 2 else 0) for text in texts]
    sums = torch.tensor(sums).view(2, 4)  # the answer's length is the same for all samples of a question
    torch.testing.assert_close(inputs["advantages"].view(2, 4), sums - sums.mean(1, keepdim=True))
    log = trainer._metrics["train"]
    assert log["rewards/brevity/mean"] and log["accuracy"] == [sum(length_reward(t, {}) for t in texts) / 8]
    with pytest.raises(ValueError, match="the reward length returned 'good', expected a number or None"):
        trainer.rewards["length"] = lambda text, problem: "good"
        trainer.sample(questions(1), 0, range(1), 1)


def test_completions_that_were_cut_off_carry_no_loss_if_so_wanted(tmp_path):
    trainer = make_trainer(tmp_path, max_completion_length=3, mask_truncated_completions=True)
    inputs = scored_samples(trainer)
    whole = torch.tensor([ids[-1] in trainer.eos_token_ids for ids in trainer.drawn.completion_ids])
    assert not whole.all()
    assert torch.equal((inputs["completion_mask"] * inputs["tool_mask"]).any(1), whole)


def test_questions_that_all_samples_answer_alike_are_replaced_if_so_wanted(tmp_path):
    """Even answers earn by chance, odd ones always: the former are what is left to learn from."""

    def reward(text: str, problem: dict) -> float:
        return 1.0 if int(problem["answer"]) % 2 else float(len(text) % 2)

    def mixed(rounds: int) -> tuple[list[str], int]:
        trainer = make_trainer(tmp_path, {"reward": reward}, dynamic_sampling=rounds, max_completion_length=16)
        odd = next(problem for problem in questions(8) if int(problem["answer"]) % 2)
        inputs = trainer._generate_and_score_completions([{"prompt": json.dumps(odd)}] * 8)
        asked = [problem["answer"] for problem in trainer.drawn.problems]
        assert asked[:4] == [asked[0]] * 4 and asked[4:] == [asked[4]] * 4
        prompts = [render_prompt(trainer.processing_class, problem["prompt"]) for problem in trainer.drawn.problems]
        assert prompts == trainer.drawn.prompt_ids  # whatever was replaced was replaced together
        return asked, int((inputs["advantages"] != 0).any())

    assert mixed(0)[1] == 0
    asked, learns = mixed(6)
    assert learns and any(int(answer) % 2 == 0 for answer in asked)
    assert mixed(6)[0] == asked


def test_a_prompt_may_have_several_turns_with_calls_in_them(tmp_path):
    first = problems(1)[0]
    turns = [*first["messages"], {"role": "user", "content": "And twice that?"}]
    mixture = [{"prompt": turns, "answer": "1", "level": 3}, *questions(3)]
    trainer = ReinforceTrainer(
        make_model(), settings(tmp_path, max_steps=1), mixture, rewards={"length": length_reward},
        summarize=count_passes, processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1
    log = trainer.state.log_history[0]
    assert 0 < log["entropy"] < 6 and 0 <= log["call_rate"] <= 1 and "accuracy_given_a_call" in log


def test_the_rates_fall_along_half_a_cosine_if_so_wanted(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, lr_scheduler_type="cosine")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[1] / rates[0] > 0.8  # linear: 0.75
    with pytest.raises(ValueError, match="lr_scheduler_type is 'polynomial', expected linear or cosine"):
        settings(tmp_path, lr_scheduler_type="polynomial")


# ---------------------------------------------------------------- whole runs


def final_weights(folder: Path, **overrides) -> dict[str, torch.Tensor]:
    trainer = make_trainer(folder, num_train_epochs=1, max_steps=3, init_lr_frac=0.3, **overrides)
    trainer.train()
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def assert_same_weights(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    start = dict(make_model().named_parameters())
    for name, weight in ours.items():
        moved = (others[name] - start[name]).norm()
        assert (weight - others[name]).norm() <= 2e-3 * moved + 1e-7, name
    assert sum((others[name] - weight).abs().max() > 1e-4 for name, weight in start.items()) > len(start) / 2


def test_one_batch_of_eight_is_eight_of_one(tmp_path):
    together = final_weights(tmp_path / "a")
    apart = final_weights(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_same_weights(apart, together)


def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path):
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, init_lr_frac=1.0)
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append({name: parameter.detach() for name, parameter in trainer.model.named_parameters()})
    assert any(not torch.equal(tensor, make_model().get_parameter(name)) for name, tensor in weights[0].items())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"lm_head\.weight is not finite at step 0, so it is not saved"):
        trainer.save_checkpoint()
    assert not list(tmp_path.glob("checkpoint-*"))
    message = r"scores are not finite at step 0; lm_head\.weight holds numbers that are not finite\. There is no ch"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def with_replacements(folder: Path, **overrides) -> tuple[dict[str, torch.Tensor], list[tuple], list[float]]:
    """Weights, what this rank drew last (answer of the problem, text), and the share replaced in each round's log."""
    rewards = {"rare": lambda text, problem: float(len(text) % 5 == 0)}  # so that many questions are answered alike
    trainer = make_trainer(folder, rewards, max_steps=3, init_lr_frac=0.3, dynamic_sampling=2, **overrides)
    trainer.train()
    drawn = [(problem["answer"], text) for problem, text in zip(trainer.drawn.problems, trainer.drawn.texts)]
    replaced = [line["questions_replaced"] for line in trainer.state.log_history if "questions_replaced" in line]
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}, drawn, replaced


def train_and_save(folder: Path) -> None:
    weights = final_weights(folder / "ranks", per_device_train_batch_size=4)
    replacing, *told = with_replacements(folder / "replacing", per_device_train_batch_size=4)
    rank = torch.distributed.get_rank()
    (folder / f"told_{rank}.json").write_text(json.dumps(told))
    if rank == 0:
        save_file(weights, folder / "weights.safetensors")
        save_file(replacing, folder / "replacing.safetensors")


def test_two_ranks_draw_the_same_samples_and_end_with_the_same_weights(tmp_path):
    """Also where questions are replaced, which is decided on each rank and drawn from what all of them know."""
    run_two_ranks(train_and_save, tmp_path)
    assert_same_weights(load_file(tmp_path / "weights.safetensors"), final_weights(tmp_path / "alone"))
    weights, drawn, replaced = with_replacements(tmp_path / "alone")
    assert_same_weights(load_file(tmp_path / "replacing.safetensors"), weights)
    told = [json.loads((tmp_path / f"told_{rank}.json").read_text()) for rank in (0, 1)]
    assert [tuple(sample) for samples, _ in told for sample in samples] == drawn
    assert told[0][1] == told[1][1] == pytest.approx(replaced) and 0 < sum(replaced) < len(replaced)


def test_evaluation_counts_passes_alike_for_any_batch_and_learning_raises_them(tmp_path):
    """The reward is a letter to begin with: simple to learn; and the samples are the same each time."""
    rewards = {"letter": lambda text, problem: text[:1].isalpha()}
    trainer = make_trainer(tmp_path, rewards, max_steps=16, init_lr_frac=1.0, per_device_train_batch_size=32)
    before = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 8
    assert trainer.evaluate() == before
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_pass@1"] < 0.4 and after["eval_pass@1"] > 0.6
    assert trainer.state.log_history[-1]["eval_pass@1"] == after["eval_pass@1"]
