"""The card of a model that recipes made, from the records of its stages: what it is, how to use it, what it learnt from
and under which licences, its curves, its figures, its limits.

It is written when a stage ends, again when the model has been evaluated, and for the Hub. Nothing is said that the
records do not say; what a person has rewritten is left alone (`training/model_card.py`).
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from modeling_nanochat.recipes.publishing.history import Done, Measured, history, measured
from modeling_nanochat.recipes.publishing.metrics import model_index, write_benchmarks
from modeling_nanochat.recipes.stages.record import readable_number, readable_time
from modeling_nanochat.recipes.stages.tables import figure_text, markdown_table
from modeling_nanochat.training import model_card
from modeling_nanochat.training.data.documents import is_local_path

CURVES = "curves"
PROJECT = "nanochat for Transformers"
# Settings of an evaluation that a figure depends on, where they are not the usual ones.
MEASURED_WITH = ("max_questions", "max_problems", "num_samples", "temperature", "max_new_tokens", "validation_bytes",
                 "core_examples", "dtype")  # fmt: skip
CHAT_STAGES = ("sft", "rl", "dpo")
STAGES = {
    "pretrain": "pretraining",
    "sft": "supervised fine-tuning",
    "rl": "reinforcement learning",
    "dpo": "preference optimization (DPO)",
}


def write_model_card(
    folder: str | Path,
    repository: str | None = None,
    license: str | None = None,
    into: Path | None = None,
) -> str | None:
    """Write README.md into a model's folder, with its curves and benchmark results.

    A folder that no stage made, such as a converted one, keeps the card that it came with, under its new name.

    Args:
        folder: of the model, and of its record if it has one.
        repository: its name on the Hub, which the card tells to load; the folder if there is none yet.
        license: of the weights, which is the owner's to choose; not named if None.
        into: where the card is written and the model's files lie, if that is another folder.

    Returns: a sentence if the card was not written.
    """
    folder, into = Path(folder), Path(into or folder)
    stages, found = history(folder), measured(folder)
    curves = draw_all_curves(stages, into)
    write_benchmarks(into, stages, found, f"https://huggingface.co/{repository}" if repository else None)
    name, old = repository or str(folder), folder / model_card.NAME
    if not stages and old.is_file() and model_card.is_own(old.read_text(encoding="utf-8")):
        text = model_card.renamed(old.read_text(encoding="utf-8"), name)
    else:
        text = compose(into, name, stages, found, curves, license)
    return None if model_card.write_card(into, text) else f"{into / model_card.NAME} stays: a person has edited it"


def compose(
    folder: Path, name: str, stages: Sequence[Done], found: Measured | None, curves: Sequence[str], license: str | None
) -> str:
    trained = [stage for stage in stages if stage.name in STAGES]
    title = name if is_local_path(name) else name.split("/")[-1]
    results = model_index(stages, found)
    data = model_card.card_data(
        language="en" if any("embedded" in stage.inputs for stage in stages) else None,
        license=license,
        datasets=hub_data_sets(stages) or None,
        model_name=title if results else None,
        eval_results=results or None,
        tags=["conversational"] if is_chat(stages) else [],
    )
    sections = [
        opening(folder, trained),
        model_card.how_to_use(folder, name, chat=is_chat(stages)),
        "\n".join(["## The network", "", *markdown_table(("", ""), model_card.shape(folder))]),
        training_section(trained, curves),
        data_section(stages),
        results_section(stages, found),
        limits_section(folder, stages, license),
    ]
    return model_card.card_text(title, sections, data)


def is_chat(stages: Sequence[Done]) -> bool:
    """Whether the model was taught to answer; without any record it is taken to be one that was."""
    return not stages or any(stage.name in CHAT_STAGES for stage in stages)


def opening(folder: Path, trained: Sequence[Done]) -> str:
    count = readable_number(model_card.count_parameters(folder)).strip()
    by = " then ".join(STAGES[stage.name] for stage in trained)
    text = f"A language model of {count} parameters, after [nanochat](https://github.com/karpathy/nanochat)"
    return text + (f", made by {PROJECT}: {by}." if by else ".")


# ---------------------------------------------------------------- sections


def training_section(trained: Sequence[Done], curves: Sequence[str]) -> str:
    if not trained:
        return ""
    rows = [(STAGES[stage.name], learnt_from(stage), readable_time(stage.record["seconds"]), machine(stage))
            for stage in trained]  # fmt: skip
    lines = ["## Training", "", *markdown_table(("stage", "on", "time", "machine"), rows)]
    for curve in curves:
        lines += ["", f"![{STAGES[Path(curve).stem]}]({curve})"]
    return "\n".join(lines)


def learnt_from(stage: Done) -> str:
    """How much a stage learnt from, in the unit that says most."""
    results, planned = stage.results, stage.record["announced"]
    counts = {
        "pretrain": (("tokens", results.get("tokens")),),
        "sft": (
            ("conversations", results.get("conversations")),
            ("tokens that carry loss", results.get("trained_tokens")),
        ),
        "rl": (("samples", planned.get("samples")),),
        "dpo": (("pairs", planned.get("pairs")),),
    }[stage.name]
    said = [f"{value:,} {unit}" for unit, value in counts if value]
    return ", ".join([*said, f"{results['steps']:,} steps"] if "steps" in results else said)


def machine(stage: Done) -> str:
    facts = stage.record["machine"]
    accelerators = facts["accelerators"]
    count = max(facts["world_size"], 1)
    return f"{count} x {accelerators[0]}" if accelerators else f"{facts['cores']} cores of {facts['cpu']}"


def data_section(stages: Sequence[Done]) -> str:
    """Every source with its licence, as the data's manifest and the names in the records tell."""
    lines = []
    for stage in stages:
        if stage.name != "data":
            continue
        manifest = model_card.read_settings(stage.folder / "manifest.json")
        lines += [f"- [{source['package']} {source['version']}]({source['homepage']}): {source['contents']}; "
                  f"{source['licence']}" for source in manifest.get("sources", [])]  # fmt: skip
        generated = sorted({part for part in part_names(stage) if "/" not in part and is_generated(part)})
        lines += [f"- rows made by code: {', '.join(generated)}"] if generated else []
        own = sorted({part for part in part_names(stage) if is_local_path(part)})
        lines += [f"- the owner's own files: {', '.join(Path(part).name for part in own)}"] if own else []
    for name in hub_data_sets(stages):
        page = f"https://huggingface.co/datasets/{name}"
        lines.append(f"- [{name}]({page}), under the licence that its page names")
    if not lines:
        return ""
    return "\n".join(["## Data, of training and of evaluation", "", *dict.fromkeys(lines)])


def part_names(data: Done) -> list[str]:
    """The parts of the data's mixtures, by their names."""
    mixtures = (data.arguments.get(use, []) for use in ("sft", "rl"))
    return [part["name"] if isinstance(part, dict) else str(part) for parts in mixtures for part in parts]


def is_generated(part: str) -> bool:
    from modeling_nanochat.recipes.data.parts import GENERATED  # here: it brings `datasets`

    return part in GENERATED


def hub_data_sets(stages: Sequence[Done]) -> list[str]:
    """Data sets of the Hub that any stage trained on: `owner/name`."""
    names = []
    for stage in stages:
        if stage.name == "data":
            names += [*part_names(stage), stage.arguments.get("pretrain", "")]
        elif stage.name == "pretrain":
            names.append(stage.arguments.get("data", ""))
    found = (name.split(":")[0] for name in names if name.count("/") == 1 and not is_local_path(name.split(":")[0]))
    return list(dict.fromkeys(found))


def results_section(stages: Sequence[Done], found: Measured | None) -> str:
    if found is not None:
        figures = {name: value for name, value in found.figures.items() if not isinstance(value, (str, list))}
        rows = [(name, figure_text(value)) for name, value in figures.items()]
        settings = {name: found.stage.arguments[name] for name in MEASURED_WITH if name in found.stage.arguments}
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        note = f"Measured by `nanochat evaluate`{f' ({said})' if said else ''}; in brackets the 95% interval."
        return "\n".join(["## Results", "", *markdown_table(("", ""), rows), "", note])
    results = model_index(stages, None)
    if not results:
        return ""
    rows = [(f"{each.metric_name}, {each.dataset_name}", str(each.metric_value)) for each in results]
    return "\n".join(["## Results", "", *markdown_table(("", ""), rows), "", "Measured by the last stage itself."])


def limits_section(folder: Path, stages: Sequence[Done], license: str | None) -> str:
    settings = model_card.read_settings(folder / "config.json")
    tokens = [stage.results["tokens"] for stage in stages if stage.name == "pretrain" and "tokens" in stage.results]
    lines = ["## Limits", ""]
    if tokens:
        lines.append(
            f"- It was pretrained on {readable_number(tokens[0]).strip()} tokens: what is not there it does not know, "
            "and it says things that are not true in the same voice."
        )
    else:
        lines.append("- It says things that are not true in the same voice as things that are.")
    if not is_chat(stages):
        lines.append("- It was not taught to answer: it goes on from a text.")
    lines.append("- Nothing was done to make its answers safe, and nobody has measured whether they are.")
    if context := settings.get("max_position_embeddings"):
        lines.append(f"- It reads and writes {context:,} tokens at most.")
    if license is None:
        lines.append(
            "- Its owner has not named a licence of the weights; the code that comes with them is under MIT's."
        )
    return "\n".join(lines)


# ---------------------------------------------------------------- curves


def draw_all_curves(stages: Sequence[Done], folder: Path) -> list[str]:
    """The pictures of every stage that trained, in the folder; their names. Without matplotlib there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"[card] no curves in {folder}: they are drawn by matplotlib, which is not installed", flush=True)
        return []
    from modeling_nanochat.recipes.stages.curves import draw_curves

    drawn = [
        draw_curves(stage.record, folder / CURVES / f"{stage.name}.png") for stage in stages if stage.name in STAGES
    ]
    return [f"{CURVES}/{file.name}" for file in drawn if file]
