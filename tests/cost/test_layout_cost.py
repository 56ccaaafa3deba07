"""cost/layout.py and cost/model.py: seconds, traffic and memory of a layout, computed by hand."""

from typing import Literal

import numpy as np
import pytest

from builders import make_cost, make_inputs, make_layout, make_model, make_profile
from hetermoe_cli.cost import memory
from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import RecordedLoad, balanced_load
from hetermoe_cli.cost.model import CostModel
from hetermoe_cli.errors import UserError
from hetermoe_cli.schedule.action import Action, Kind, parse_action
from hetermoe_cli.schedule.lower import training_schedule
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.profile import Precision, Profile

# Builder defaults: 64 tokens a sequence, top-2 of 4 experts, so a sequence gives every expert 32 rows of 128 bytes.
# "new": attention 1 s a sequence, expert 0.01 s a row, head 0.005 s a token; backward is twice as long.
ROWS, ROW_BYTES = 32, 128


def action(text: str) -> Action:
    return parse_action(text)


def test_seconds_of_every_kind(inputs: Inputs, layout: Layout) -> None:
    cost = LayoutCost(CostModel(inputs), layout)
    assert cost.seconds(0, action("1AF1")) == pytest.approx(1.0)
    assert cost.seconds(0, action("1AB1")) == pytest.approx(2.0)
    assert cost.seconds(1, action("0EF0")) == pytest.approx(4 * ROWS * 0.02)
    assert cost.seconds(1, action("0EB0")) == pytest.approx(2 * 4 * ROWS * 0.02)
    assert cost.seconds(0, action("0HF0")) == pytest.approx(64 * 0.005)
    assert cost.seconds(0, action("0HB0")) == pytest.approx(3 * 64 * 0.005)
    assert cost.seconds(0, action("0OB0")) == pytest.approx(1e-6 * inputs.model.dense_parameters)
    assert cost.seconds(1, action("0OB0")) == pytest.approx(1e-6 * 8 * inputs.model.expert_parameters)


def test_recompute_adds_a_forward_to_backward(inputs: Inputs) -> None:
    cost = LayoutCost(CostModel(inputs), make_layout(recompute="all"))
    assert cost.seconds(0, action("1AF0")) == pytest.approx(1.0)
    assert cost.seconds(0, action("1AB0")) == pytest.approx(3.0)
    assert cost.seconds(1, action("1EB0")) == pytest.approx(3 * 4 * ROWS * 0.02)


def test_full_recompute_runs_the_stage_before_again_and_sends_its_rows(inputs: Inputs) -> None:
    """The head the last one, the first stage none; each with the gradients for the experts in one message."""
    plain = LayoutCost(CostModel(inputs), make_layout())
    cost = LayoutCost(CostModel(inputs), make_layout(recompute="full"))
    for name, more in (("0AB0", 0.0), ("1AB0", 1.0), ("0HB0", 1.0), ("0AF0", 0.0), ("0EB0", 4 * ROWS * 0.02)):
        rank = int("E" in name)
        assert cost.seconds(rank, action(name)) == pytest.approx(plain.seconds(rank, action(name)) + more)
    for name, trips in (("0DF0", 1), ("0CF0", 1), ("0CB0", 2), ("0DB0", 1)):
        once = plain.transfer(action(name))
        assert cost.transfer(action(name)) == (pytest.approx(trips * once.seconds), once.ports)


def test_full_recompute_keeps_nothing_of_experts() -> None:
    """Of attention what it reads, and what ran again for the gradients of a window."""
    inputs = saving(saved_bytes=200_000, head_saved_bytes=0, precision="fp32")
    cost = LayoutCost(CostModel(inputs), make_layout(recompute="full"))
    row, rows = 2 * ROW_BYTES, 4 * ROWS
    stage = 64 * (200_000 - row)
    assert cost.memory(0).activations_bytes == 2 * (2 * 64 * row + 64 * row) + (1 + 2) * stage
    assert cost.memory(1).activations_bytes == ROWS * 200_000 + rows * 200_000
    whole = LayoutCost(CostModel(inputs), make_layout(recompute="all"))
    assert cost.memory(1).buffers_bytes - whole.memory(1).buffers_bytes == 2 * rows * row
    assert cost.memory(0).buffers_bytes - whole.memory(0).buffers_bytes == 3 * rows * row


def test_seconds_follow_the_sequences_of_the_rank() -> None:
    cost = make_cost(make_layout((3, 1), (2, 2)), model=make_model())
    assert cost.seconds(0, action("0AF0")) == pytest.approx(3.0)
    assert cost.seconds(1, action("0AF0")) == pytest.approx(1.0)
    assert cost.seconds(0, action("0EF0")) == pytest.approx(2 * 4 * ROWS * 0.01)


def test_replicated_experts_run_only_the_ranks_own_rows() -> None:
    cost = make_cost(make_layout((3, 1, 0), (1, 0, 2), replicated=1), model=make_model())
    assert cost.expert_rows(0, 0, 0) == pytest.approx([4 * ROWS, 3 * ROWS])
    assert cost.expert_rows(1, 0, 0) == pytest.approx([ROWS])
    assert cost.expert_rows(2, 0, 0) == pytest.approx([4 * ROWS, 4 * ROWS])


def test_traffic_of_a_split_layout(inputs: Inputs, layout: Layout) -> None:
    cost = LayoutCost(CostModel(inputs), layout)
    size = 4 * ROWS * ROW_BYTES
    for text in ("0DF0", "0CF0", "1CB1", "1DB1"):
        assert cost.transfer(action(text)).seconds == pytest.approx(size / 1e9)
    assert cost.transfer(action("0DF0")).ports == cost.transfer(action("0CB0")).ports == (0, 3)
    assert cost.transfer(action("0CF0")).ports == cost.transfer(action("0DB0")).ports == (1, 2)


def test_ports_follow_from_the_layout_alone() -> None:
    # Rank 0's rows all go to its own expert, but the layout lets it send to rank 1: the order on a port is known
    # before any row is counted.
    counts = np.zeros((2, 2, 2, 4), dtype=np.int64)
    counts[0, ..., 0] = 10
    cost = LayoutCost(CostModel(make_inputs()), make_layout((1, 0), (1, 3)), RecordedLoad(counts, 1.0))
    assert cost.transfer(action("0DF0")) == (0.0, (0, 3))


def test_rows_for_own_experts_do_not_travel() -> None:
    cost = make_cost(make_layout((1, 1), (3, 1)), model=make_model())
    # Rank 0 sends one expert's rows, rank 1 sends three experts' rows.
    assert cost.transfer(action("0DF0")).seconds == pytest.approx(3 * ROWS * ROW_BYTES / 1e9)


def test_replicated_experts_move_nothing() -> None:
    cost = make_cost(make_layout((1, 1), (0, 0), replicated=4), model=make_model())
    assert cost.transfer(action("0DF0")).seconds == 0.0


def test_precision_scales_the_traffic() -> None:
    layout = make_layout()
    half, double = (make_cost(layout, model=make_model(), precision=p) for p in ("bf16", "fp64"))
    assert double.transfer(action("0DF0")).seconds == pytest.approx(4 * half.transfer(action("0DF0")).seconds)


def test_dense_and_replicated_gradients_are_synchronised() -> None:
    model = make_model()
    plain = make_cost(make_layout((1, 1), (2, 2)), model=model)
    embedding, layer = model.hidden_size * model.vocab_size, model.attention_layer_parameters
    segments = [layer + embedding, layer, model.edge_parameters - embedding]
    assert sum(segments) == model.dense_parameters
    found = [plain.collective(Kind.REDUCE, place).seconds for place in range(3)]
    assert found == pytest.approx([2 * segment / 1e9 for segment in segments])  # two bytes
    replicated = make_cost(make_layout((1, 1), (1, 2), replicated=1), model=model)
    more = 2 * model.expert_parameters / 1e9
    assert [replicated.collective(Kind.REDUCE, place).seconds for place in range(2)] == pytest.approx(
        [s + more for s in found[:2]]
    )
    assert replicated.collective(Kind.REDUCE, 2) == plain.collective(Kind.REDUCE, 2)
    assert make_cost(make_layout(), model=model).collective(Kind.REDUCE, 0) == (0.0, ())


def test_gradients_occupy_the_ring_of_attending_ranks() -> None:
    # Two nodes of two: the ring through all four uses the NICs both ways and the interconnects inside.
    cost = make_cost(make_layout((1, 1, 1, 1), (1, 1, 1, 1)), [("new", 2), ("new", 2)], model=make_model())
    network = cost.cost.network
    ring = [(0, 1), (1, 2), (2, 3), (3, 0)]
    ports = {int(p) for s, d in ring for p in (network.out_port[s, d], network.in_port[s, d])}
    assert cost.transfer(action("0RB0")) == cost.collective(Kind.REDUCE, 0)
    assert set(cost.collective(Kind.REDUCE, 0).ports) == ports


def test_a_recorded_load_equal_to_the_balanced_one_costs_the_same() -> None:
    layout = make_layout((2, 1, 0), (1, 0, 2), replicated=1)
    inputs = make_inputs((("new", 2), ("old", 1)), global_batch_sequences=6)
    cost = CostModel(inputs)
    counts = np.zeros((3, 2, 2, 4), dtype=np.int64)
    counts[0], counts[1] = 2 * ROWS, ROWS
    balanced, recorded = LayoutCost(cost, layout), LayoutCost(cost, layout, RecordedLoad(counts, 1.0))
    schedule = training_schedule(layout)
    for rank, order in enumerate(schedule.compute):
        for task in order[:-2]:
            assert recorded.seconds(rank, task) == pytest.approx(balanced.seconds(rank, task))
    for transfer in schedule.transfers:
        one, other = recorded.transfer(transfer), balanced.transfer(transfer)
        assert one.seconds == pytest.approx(other.seconds)
        assert one.ports == other.ports


def test_a_recorded_load_differs_by_layer_and_micro_batch() -> None:
    counts = np.zeros((2, 2, 2, 4), dtype=np.int64)
    counts[0, 1, 0] = [10, 0, 20, 0]
    counts[0, 0, 1] = [1, 2, 3, 4]
    layout = make_layout((1, 0), (2, 2))
    cost = LayoutCost(CostModel(make_inputs()), layout, RecordedLoad(counts, 2.0))
    assert cost.expert_rows(1, 1, 0) == [40.0, 0.0]
    assert cost.expert_rows(1, 0, 1) == [6.0, 8.0]
    assert cost.seconds(1, action("1EF0")) == pytest.approx(40 * 0.02)
    assert cost.seconds(1, action("1EF1")) == 0.0
    assert cost.transfer(action("1DF0")).seconds == pytest.approx(40 * ROW_BYTES / 1e9)
    assert cost.transfer(action("1DF1")).seconds == 0.0


def test_a_skewed_load_is_slower_than_its_mean() -> None:
    layout = make_layout((1, 1), (2, 2))
    cost = CostModel(make_inputs((("new", 1), ("new2", 1)), global_batch_sequences=4))
    counts = np.zeros((2, 2, 2, 4), dtype=np.int64)
    counts[..., 0], counts[..., 1:] = 80, 16
    skewed = LayoutCost(cost, layout, RecordedLoad(counts, 1.0))
    hot, cold = (skewed.seconds(rank, action("0EF0")) for rank in (0, 1))
    assert hot == pytest.approx(2 * 96 * 0.01)
    assert cold == pytest.approx(2 * 32 * 0.01)


def test_an_explicit_balanced_load_is_the_default() -> None:
    layout = make_layout()
    cost = CostModel(make_inputs())
    explicit = LayoutCost(cost, layout, balanced_load(cost, layout))
    assert explicit.expert_rows(1, 0, 1) == LayoutCost(cost, layout).expert_rows(1, 0, 1) == [ROWS] * 4


def test_parameters_add_up_to_the_model() -> None:
    model = make_model()
    cost = make_cost(make_layout((1, 0, 0), (1, 1, 2)), model=model)
    assert sum(cost.parameters(rank) for rank in range(3)) == model.parameters


def saving(
    saved_bytes: int = 1000,
    head_saved_bytes: int = 1000,
    precision: Precision = "fp16",
    accelerator: Literal["cpu", "cuda"] = "cuda",
) -> Inputs:
    """Inputs whose kernels save so many bytes a token or row."""
    profiles = {
        name: make_profile(
            name,
            saved_bytes=saved_bytes,
            head_saved_bytes=head_saved_bytes,
            precision=precision,
            memory_bytes=10**10,
            accelerator=accelerator,
        )
        for name in ("new", "old")
    }
    return make_inputs(profiles=profiles, precision=precision)


def test_memory_by_kind(layout: Layout) -> None:
    inputs = saving()
    cost = LayoutCost(CostModel(inputs), layout)
    model = inputs.model
    attending, hosting = cost.memory(0), cost.memory(1)
    assert attending.weights_bytes == attending.gradients_bytes == 2 * model.dense_parameters
    assert attending.optimizer_bytes == 12 * model.dense_parameters
    assert hosting.weights_bytes == 2 * 8 * model.expert_parameters
    # 1000 bytes a token or row: 2 layers x 2 micro-batches, then the gradient of what the head read, and the head: what
    # it saves beside that, its norm and the norm's gradient, logits in 2 and twice in 4 bytes, and 2 + 4 + 4 bytes for
    # each element of its matrix.
    kept = 2 * (2 * 64 * 1000 + 64 * ROW_BYTES)
    head = 64 * (1000 - ROW_BYTES) + 2 * 64 * ROW_BYTES + 64 * 256 * (2 + 2 * 4)
    assert attending.activations_bytes == kept + head + 10 * 64 * 256
    # One expert's task, and the gradients of a layer's: 4 bytes in fp32, 2 when new, two thirds stacked
    working = 4 * (4 + 2 + 2 / 3 * 4) * model.expert_parameters - 4 * ROWS * 1000
    assert hosting.activations_bytes == int(2 * 2 * 4 * ROWS * 1000 + ROWS * 1000 + working)
    # Both directions the own tokens' rows; all experts' rows, and the gradients of both micro-batches.
    assert attending.buffers_bytes == 2 * 64 * 2 * ROW_BYTES
    assert hosting.buffers_bytes == 3 * 4 * ROWS * ROW_BYTES
    assert attending.framework_bytes == 10**6
    assert attending.total_bytes == (
        16 * model.dense_parameters + attending.activations_bytes + attending.buffers_bytes + 10**6
    )


def test_logits_of_many_tokens_do_not_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = LayoutCost(CostModel(saving()), make_layout())
    whole = cost.memory(0).activations_bytes
    monkeypatch.setattr(memory, "logit_tokens", lambda vocabulary: 16)
    assert LayoutCost(cost.cost, cost.layout).memory(0).activations_bytes == whole - 48 * 256 * (2 + 2 * 4)


def test_recompute_keeps_only_the_inputs_of_stages() -> None:
    """And a stage as a whole while it is at work: of attention more than the head, of experts more than gradients."""
    inputs = saving(saved_bytes=200_000, head_saved_bytes=0, precision="fp32")
    cost = LayoutCost(CostModel(inputs), make_layout(recompute="all"))
    row = 2 * ROW_BYTES
    stage = 64 * (200_000 - row)
    assert cost.memory(0).activations_bytes == 2 * (2 * 64 * row + 64 * row) + stage
    working = 4 * ROWS * (200_000 - row)
    assert cost.memory(1).activations_bytes == 2 * 2 * 4 * ROWS * row + ROWS * 200_000 + working


def test_gradients_of_wide_weights_need_no_room_but_for_what_is_new() -> None:
    inputs = saving(precision="fp32")
    model, kept = inputs.model, 4 * ROWS * 1000
    memory = LayoutCost(CostModel(inputs), make_layout()).memory(1)
    new = int(2 * 2 * kept + ROWS * 1000 + 4 * 5 / 3 * 4 * model.expert_parameters - kept)
    assert memory.activations_bytes == new


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp16", 2)])
def test_a_cpu_holds_gradients_of_a_layer_once(precision: Precision, width: int) -> None:
    """Narrow ones in fp32, and of one expert's gate_up as it is computed and widened; of every row 3 F more."""
    inputs = saving(precision=precision, accelerator="cpu")
    model, kept, narrow = inputs.model, 4 * ROWS * 1000, width < 4
    memory = LayoutCost(CostModel(inputs), make_layout()).memory(1)
    gradients = narrow * (4 * 4 + 2 / 3 * (2 + 4)) * model.expert_parameters
    assert memory.activations_bytes == int(2 * 2 * kept + 4 * ROWS * 3 * model.ffn_size * width + gradients)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_copies_are_at_work_beside_the_hosted_experts(accelerator: Literal["cpu", "cuda"]) -> None:
    cost = CostModel(saving(precision="bf16", accelerator=accelerator))
    one, two = (LayoutCost(cost, make_layout((1, 0), (1, 3 - n), replicated=n)).memory(0) for n in (1, 2))
    size, kept = cost.model.expert_parameters, ROWS * 1000
    working = 4 * size + (ROWS * 3 * cost.model.ffn_size * 2 if accelerator == "cpu" else (2 + 8 / 3) * size - kept)
    assert two.activations_bytes - one.activations_bytes == pytest.approx(2 * 2 * kept + working, abs=1)


def test_sequential_keeps_one_micro_batch() -> None:
    cost = LayoutCost(CostModel(saving()), make_layout(schedule="sequential"))
    whole = LayoutCost(CostModel(saving()), make_layout())
    kept = 2 * 64 * 1000 + 64 * ROW_BYTES
    assert whole.memory(0).activations_bytes - cost.memory(0).activations_bytes == kept


def test_a_missing_profile_is_named(inputs: Inputs) -> None:
    without = inputs.model_copy(update={"profiles": {"new": inputs.profiles["new"]}})
    with pytest.raises(UserError, match="cluster synthetic: no profile for device type 'old'"):
        CostModel(without)


@pytest.mark.parametrize(
    "other",
    [
        make_profile("old", model=make_model(ffn_size=448)),
        make_profile("old", precision="fp32"),
    ],
)
def test_a_missing_kernel_table_tells_how_to_profile_it(inputs: Inputs, other: Profile) -> None:
    changed = inputs.model_copy(update={"profiles": {**inputs.profiles, "old": other}})
    with pytest.raises(UserError) as caught:
        CostModel(changed)
    assert "profile old: field tables: nothing for hidden 64, ffn 224" in str(caught.value)
    assert "run `hetermoe profile --model synthetic --precision fp16` on the device" in str(caught.value)
