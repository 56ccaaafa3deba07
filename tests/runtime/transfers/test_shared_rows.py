"""Rows once per device: every rank gets a token once, computes all its choices there, and returns their sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from builders import layouts, make_layout
from hetermoe_cli.runtime.transfers.shared_rows import DeviceMap, DeviceRouting
from hetermoe_cli.runtime.transfers.slots import tail_size
from hetermoe_cli.spec.layout import Layout

TOKENS, WIDTH, DTYPE = 6, 3, torch.float64


def choices(layout: Layout, seed: int, top_k: int, dropped: float = 0.0) -> dict[int, Tensor]:
    """Random chosen experts [T, k] of every attending rank, distinct per token."""
    generator, result = torch.Generator().manual_seed(seed), {}
    for rank in layout.attending:
        result[rank] = torch.rand(TOKENS, layout.experts, generator=generator).argsort(dim=1)[:, :top_k]
        late = torch.rand(TOKENS, top_k, generator=generator) < dropped
        result[rank][late] = layout.experts
    return result


def expert(number: Tensor, rows: Tensor) -> Tensor:
    """What a pretended expert computes."""
    return rows * (number + 1)


@given(layouts(), st.integers(0, 1000), st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0]))
def test_there_and_back(layout: Layout, seed: int, top_k: int, dropped: float) -> None:
    """Weighted sums of outputs forward; of gradients and weights' gradients backward."""
    k = min(top_k, layout.experts)
    maps = [DeviceMap(layout, 0, rank, k) for rank in range(layout.world_size)]
    chosen = choices(layout, seed, k, dropped)
    rows = {rank: torch.rand(TOKENS, WIDTH, dtype=DTYPE) for rank in chosen}
    weights = {rank: torch.rand(TOKENS, k, dtype=DTYPE) for rank in chosen}
    routings = {rank: maps[rank].route(experts) for rank, experts in chosen.items()}
    wide = WIDTH + tail_size(DTYPE, maps[0].tail)
    sent = {
        rank: r.gather_weighted(rows[rank], weights[rank], torch.empty(r.most, wide, dtype=DTYPE)).split(r.sizes)
        for rank, r in routings.items()
    }
    outputs: dict[int, list[Tensor]] = {rank: [] for rank in chosen}
    gradients: dict[int, list[Tensor]] = {rank: [] for rank in chosen}
    for target in range(layout.world_size):
        arrivals = maps[target].arrivals({source: routings[source].told(target) for source in chosen})
        incoming = torch.cat([sent[source][target] for source in chosen])
        assert len(incoming) == arrivals.rows
        grouped, scales = arrivals.group_weighted(incoming, WIDTH)
        local = torch.tensor(layout.local_experts(0, target), dtype=torch.int64)
        numbers = local.repeat_interleave(torch.tensor(arrivals.counts, dtype=torch.int64))[:, None]
        back = arrivals.ungroup(expert(numbers, grouped) * scales[:, None])
        # as if the gradient of an input were the number of its expert, that of a weight a hundred times that
        given = numbers.to(DTYPE).expand(-1, WIDTH)
        wide_back = arrivals.ungroup_weighted(given, 100.0 * numbers[:, 0], torch.zeros(len(back), wide, dtype=DTYPE))
        for source, part, grad in zip(
            range(layout.world_size), back.split(arrivals.sizes), wide_back.split(arrivals.sizes), strict=True
        ):
            if source in chosen:
                outputs[source].append(part)
                gradients[source].append(grad)

    for rank, experts in chosen.items():
        kept = (experts < layout.experts).to(DTYPE)
        every = expert(experts[..., None], rows[rank][:, None]) * (weights[rank] * kept)[..., None]
        torch.testing.assert_close(routings[rank].summed(torch.cat(outputs[rank])), every.sum(dim=1))
        to_rows, to_weights = routings[rank].gradients(torch.cat(gradients[rank]), WIDTH)
        wanted = (experts * kept).sum(dim=1, keepdim=True).expand(-1, WIDTH)
        torch.testing.assert_close(to_rows, wanted)
        torch.testing.assert_close(to_weights, 100.0 * experts * kept)


@given(layouts(), st.integers(0, 1000), st.integers(1, 4))
def test_a_token_goes_once_to_every_rank_that_hosts_some_of_its_experts(layout: Layout, seed: int, top_k: int) -> None:
    k = min(top_k, layout.experts)
    for rank, experts in choices(layout, seed, k).items():
        routing = DeviceMap(layout, 0, rank, k).route(experts)
        hosts = {e: host for host, held in enumerate(layout.placement[0].experts) for e in held}
        wanted = [{hosts.get(e, rank) for e in row} for row in experts.tolist()]
        assert routing.sizes == [sum(host in each for each in wanted) for host in range(layout.world_size)]
        assert routing.by_expert == experts.flatten().bincount(minlength=layout.experts).tolist()
        assert isinstance(routing, DeviceRouting)
        assert sum(sum(counts) for counts in routing.counts) == TOKENS * k
        for target in range(layout.world_size):
            if target != rank:
                assert routing.told_vector(target, torch.device("cpu")).tolist() == routing.told(target)
                assert len(routing.told(target)) == len(layout.placement[0].experts[target]) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [256, 257, 1000])
def test_experts_survive_narrow_rows(dtype: torch.dtype, experts: int) -> None:
    """Their numbers travel in the precision of rows, which in bf16 holds no odd one above 256."""
    schedule = {"micro_batches": 1, "window": 1, "dispatch": "per_device"}
    placement = [{"experts": [[], list(range(experts))]}]
    layout = Layout.model_validate({"schedule": schedule, "sequences_per_rank": [1, 0], "placement": placement})
    sender, host = (DeviceMap(layout, 0, rank, 2) for rank in range(2))
    first = torch.arange(experts)
    routing = sender.route(torch.stack([first, (first + 7) % experts], dim=1))
    weights = torch.stack([first % 4, (first + 7) % experts % 4], dim=1).to(dtype)  # what tells the expert
    out = torch.empty(routing.most, WIDTH + tail_size(dtype, sender.tail), dtype=dtype)
    rows = routing.gather_weighted(torch.zeros(experts, WIDTH, dtype=dtype), weights, out)
    _, grouped = host.arrivals({0: routing.told(1)}).group_weighted(rows, WIDTH)
    assert grouped.tolist() == (first % 4).repeat_interleave(2).tolist()


def test_sizes_are_those_of_rows_whoever_asks_first() -> None:
    """Lanes and the compute thread may ask at once."""
    layout = make_layout((1, 0), (0, 4))
    routing = DeviceMap(layout, 0, 0, 2).route(torch.tensor([[0, 1], [2, 3]]))
    routing._host = None
    assert routing._sizes_of(routing._fetched.wait().tolist()).per_target == [0, 2]
    assert routing._host is None  # nothing is told before all is known
    assert routing.sizes == [0, 2]


def test_rows_for_one_rank_are_those_of_its_tokens() -> None:
    layout = Layout.model_validate(
        {
            "schedule": {"micro_batches": 1, "window": 1, "dispatch": "per_device"},
            "sequences_per_rank": [1, 0],
            "placement": [{"experts": [[], [0, 1, 2]]}],
        }
    )
    routing = DeviceMap(layout, 0, 0, 2).route(torch.tensor([[0, 1], [2, 0], [1, 2]]))
    assert isinstance(routing, DeviceRouting)
    assert routing.sizes == [0, 3]
    assert routing.told(1) == [2, 2, 2, 3]
