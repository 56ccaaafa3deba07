"""Models whose first layers are dense: the first attention stage takes longer by exactly these, and holds them."""

import pytest

from builders import BACKWARD, make_cost, make_inputs, make_layout, make_model, make_profile
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.measured import MeasuredCost
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.planner.instance.device_rates import device_rates
from hetermoe_cli.planner.plan import embed
from hetermoe_cli.schedule.action import Kind, Pass, parse_action
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout

PLAIN = make_model()
DENSE = make_model(dense_layers=2, dense_ffn_size=96)
SECONDS = 2 * 1.5  # both dense layers on one sequence, forward
TOKENS, ROW_BYTES = 64, 128  # of a sequence; of a token


def pair(layout: Layout) -> tuple[LayoutCost, LayoutCost]:
    """Without and with dense layers."""
    return make_cost(layout, model=PLAIN), make_cost(layout, model=DENSE)


@pytest.mark.parametrize(("recompute", "backward"), [("none", BACKWARD), ("attention", BACKWARD + 1)])
def test_the_first_attention_stage_alone_takes_longer(recompute: str, backward: float) -> None:
    plain, dense = pair(make_layout((2, 1), (2, 2), recompute=recompute))
    for rank, sequences in ((0, 2), (1, 1)):
        for name, more in (("0AF1", 1.0), ("0AB1", backward), ("1AF1", 0), ("1AB1", 0), ("0EF0", 0), ("0HB0", 0)):
            action = parse_action(name)
            expected = plain.seconds(rank, action) + more * sequences * SECONDS
            assert dense.seconds(rank, action) == pytest.approx(expected)
            assert dense.seconds_by_rank(action)[rank] == dense.seconds(rank, action)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_sent_again_the_first_stage_runs_again_behind_it(layers: int) -> None:
    """With the second layer's backward, or the head where there is no second layer."""
    models = [model.model_copy(update={"layers": layers}) for model in (PLAIN, DENSE)]
    layout = make_layout((2, 1), (2, 2), layers=layers, recompute="full")
    plain, dense = (make_cost(layout, model=model) for model in models)
    again = "0HB1" if layers == 1 else "1AB1"
    more = {"0AF1": 1.0, "0AB1": BACKWARD, "1AF1": 0.0, "1AB1": 0.0, "2AB1": 0.0, "0HB1": 0.0} | {again: 1.0}
    for name, factor in more.items():
        action = parse_action(name)
        if action.kind is Kind.HEAD or action.layer < layers:
            expected = plain.seconds(0, action) + factor * 2 * SECONDS
            assert dense.seconds(0, action) == pytest.approx(expected), name
            assert dense.seconds_by_rank(action)[0] == dense.seconds(0, action)
    rates = device_rates(dense.cost, 0, 2, layout.schedule, 3)
    stages = [parse_action(f"{layer}A{way}1") for layer in range(layers) for way in "FB"]
    for action in stages:
        way = int(action.direction is Pass.BACKWARD)
        assert rates.stage(action.layer, way) == pytest.approx(dense.seconds(0, action))
    tasks = [*stages, parse_action("0HB1")]
    assert rates.attending(layers) == pytest.approx(sum(dense.seconds(0, action) for action in tasks))
    assert rates.scaled(2.0).attending(layers) == pytest.approx(rates.attending(layers) / 2)


def test_gradients_go_with_those_of_layer_0() -> None:
    plain, dense = pair(make_layout((1, 1), (2, 2)))
    more = [
        dense.collective(Kind.REDUCE, place).seconds - plain.collective(Kind.REDUCE, place).seconds
        for place in range(3)
    ]
    assert more == pytest.approx([2 * 2 * DENSE.dense_layer_parameters / 1e9, 0, 0])
    segments = [dense.cost.segment_parameters(place) for place in range(3)]
    assert sum(segments) == DENSE.dense_parameters
    assert dense.parameters(0) - plain.parameters(0) == 2 * DENSE.dense_layer_parameters


def test_memory_holds_states_and_what_is_saved() -> None:
    layout = make_layout()
    plain, dense = (make_cost(layout, model=model, precision="fp32").memory(0) for model in (PLAIN, DENSE))
    assert dense.weights_bytes - plain.weights_bytes == 4 * 2 * DENSE.dense_layer_parameters
    assert dense.optimizer_bytes - plain.optimizer_bytes == 8 * 2 * DENSE.dense_layer_parameters
    assert dense.activations_bytes - plain.activations_bytes == 2 * 2 * 100 * TOKENS  # two layers, two micro-batches


def test_gradients_of_the_first_stage_are_wide_at_once() -> None:
    """In fp16: more than the head's working set here."""
    wide = DENSE.model_copy(update={"dense_ffn_size": 3 * DENSE.dense_ffn_size})
    dense = make_cost(make_layout((1, 0), (0, 4)), model=wide).memory(0)
    kept = 2 * ((2 + 2) * 100 * TOKENS + TOKENS * ROW_BYTES)
    assert dense.activations_bytes == kept + 4 * wide.first_stage_parameters


def test_recompute_keeps_nothing_of_dense_layers_until_they_run_again() -> None:
    """In fp32, and saving so much that the first stage, not the head, has the largest working set."""
    found = []
    for model in (PLAIN, DENSE):
        profiles = {
            name: make_profile(name, model=model, saved_bytes=20_000, precision="fp32") for name in ("new", "old")
        }
        inputs = make_inputs(model=model, profiles=profiles, precision="fp32")
        found.append(LayoutCost(CostModel(inputs), make_layout(recompute="attention")).memory(0))
    assert found[1].activations_bytes - found[0].activations_bytes == 2 * 20_000 * TOKENS


def test_a_slow_device_is_slow_at_dense_layers_too() -> None:
    inputs = make_inputs(model=DENSE)
    slow = LayoutCost(MeasuredCost(inputs, None, [2.0, 1.0]), make_layout())
    assert slow.seconds(0, parse_action("0AF0")) == pytest.approx(2 * (1.0 + SECONDS))


def test_a_profile_without_them_is_refused_in_one_line() -> None:
    inputs = make_inputs(model=PLAIN).model_copy(update={"model": DENSE})
    with pytest.raises(UserError) as caught:
        CostModel(inputs)
    text = str(caught.value)
    assert text.startswith("profile new: field tables: nothing for hidden 64, ffn 224, dense ffn 96, heads")
    assert "run `hetermoe profile --model synthetic --precision fp16` on the device" in text


def test_a_plan_embeds_the_points_that_it_reads() -> None:
    lengths = (32, 64, 128, 256)
    profiles = {name: make_profile(name, model=DENSE, sequence_lengths=lengths) for name in ("new", "old")}
    inputs: Inputs = make_inputs(model=DENSE, profiles=profiles, sequence_length=100)
    (table,) = embed(inputs).profiles["new"].tables
    assert {point.sequence_length for point in table.dense} == {64, 128}
    whole, small = CostModel(inputs), CostModel(embed(inputs))
    assert small.attention_cost(small.of(0), 3, 0) == whole.attention_cost(whole.of(0), 3, 0)
