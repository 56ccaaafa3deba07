"""Packed documents: attention is priced by documents of a stated length, all else by tokens."""

import pytest

from builders import make_inputs, make_layout, make_model, make_profile
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.plan import embed
from hetermoe_cli.planner.reasons.explain import sources
from hetermoe_cli.simulator import simulate
from hetermoe_cli.spec.files import parse
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.profile import Profile
from hetermoe_cli.spec.train import TrainSpec

SPEC = {"sequence_length": 64, "global_batch_sequences": 2, "precision": "fp16"}


def quadratic(name: str) -> Profile:
    """Lengths 16, 32 and 64, whose forward takes 0.01 n + 0.001 n^2 seconds a sequence."""
    tables = [
        make_profile(
            name, model=make_model(), sequence_lengths=(n,), attention_seconds=0.01 * n + 0.001 * n * n
        ).tables[0]
        for n in (16, 32, 64)
    ]
    points = [point for table in tables for point in table.attention]
    profile = make_profile(name)
    return profile.model_copy(update={"tables": [tables[0].model_copy(update={"attention": points})]})


def inputs(**train: object) -> Inputs:
    found = make_inputs((("new", 2),), profiles={"new": quadratic("new")})
    return found.model_copy(update={"train": parse(TrainSpec, {**SPEC, **train}, "train.yaml")})


def forward(**train: object) -> float:
    return CostModel(inputs(**train)).types["new"].attention(1).forward


def test_attention_takes_the_time_of_its_documents() -> None:
    assert forward() == forward(documents="masked") == pytest.approx(0.64 + 4.096)
    for tokens in (16, 24, 32, 64):
        expected = 64 * (0.01 + 0.001 * tokens)
        assert forward(documents="masked", document_tokens=tokens) == pytest.approx(expected)


def test_a_document_is_no_longer_than_its_sequence() -> None:
    assert forward(documents="masked", document_tokens=1000) == forward()


def test_all_else_goes_by_tokens_and_iterations_get_shorter() -> None:
    layout = make_layout((1, 1), (2, 2))
    whole = LayoutCost(CostModel(inputs()), layout)
    cut = LayoutCost(CostModel(inputs(documents="masked", document_tokens=16)), layout)
    assert cut.memory(0) == whole.memory(0)
    for rank in range(2):
        assert cut.expert_rows(rank, 0, 0) == whole.expert_rows(rank, 0, 0)
    saved = 3 * 64 * 0.001 * (64 - 16) * layout.layers * layout.micro_batches  # forward and backward
    assert simulate(whole).seconds - simulate(cut).seconds == pytest.approx(saved)


def test_a_plan_keeps_the_points_of_its_documents() -> None:
    kept = embed(inputs(documents="masked", document_tokens=20))
    assert {point.sequence_length for point in kept.profiles["new"].tables[0].attention} == {16, 32}
    CostModel(kept)


def test_a_length_that_the_profile_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"profile new: .* outside the profiled 16..64: .* --sequence-lengths 8"):
        CostModel(inputs(documents="masked", document_tokens=8))


def test_the_plan_says_what_it_assumes() -> None:
    def told(**train: object) -> str:
        return "; ".join(sources(CostModel(inputs(**train))))

    assert "attention is timed for documents of 32 tokens" in told(documents="masked", document_tokens=32)
    assert "documents of 64 tokens: one a sequence" in told(documents="masked")
    assert "documents" not in told()


def test_joined_documents_have_no_length() -> None:
    with pytest.raises(UserError, match=r"train.yaml: .*document_tokens: joined documents attend to each other"):
        inputs(document_tokens=16)


def test_files_without_the_field_stay_what_they_are() -> None:
    assert "document_tokens" not in inputs(documents="masked").train.model_dump(mode="json")
    assert inputs(documents="masked", document_tokens=16).train.model_dump(mode="json")["document_tokens"] == 16
