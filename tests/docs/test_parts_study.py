"""The study of chapter 3 takes out what it says, and the chapter quotes what it found."""

import json
import re
import statistics

import pytest
import torch

from benchmarks import parts_study
from tests.docs.pages import ROOT

CHAPTER = (ROOT / "docs/essay/03-the-network.md").read_text(encoding="utf-8")
VOCABULARY = 64


def logits_of(name: str, ids: torch.Tensor) -> torch.Tensor:
    """Of a network without a part whose weights are the same random ones by name, none of them zero."""
    model = parts_study.network(name, VOCABULARY, seed=0).eval()
    for parameter_name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(parameter_name.encode()))
        parameter.data.normal_(std=0.3, generator=generator)
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, parts_study.LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(ids) -> torch.Tensor:
    return logits_of(parts_study.WHOLE, ids)


@pytest.mark.parametrize(
    "name", [name for name in parts_study.PARTS if name not in (parts_study.WHOLE, parts_study.CONTROL)]
)
def test_a_part_that_is_taken_out_makes_a_difference(name, ids, whole):
    logits = logits_of(name, ids)
    assert logits.isfinite().all()
    assert not torch.allclose(logits, whole, rtol=1e-3, atol=1e-3)


def test_without_attention_a_place_knows_its_own_token_only(ids):
    other = ids.clone()
    other[0, :-1] = (other[0, :-1] + 1) % VOCABULARY
    assert torch.equal(logits_of("attention", ids)[0, -1], logits_of("attention", other)[0, -1])


def test_the_chapter_quotes_the_study():
    record = json.loads((ROOT / parts_study.TABLE).read_text(encoding="utf-8"))
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+) \|", CHAPTER, flags=re.MULTILINE))
    for name, rises in record["rises"].items():
        assert rows[name] == f"{statistics.mean(rises):+.3f}", name
