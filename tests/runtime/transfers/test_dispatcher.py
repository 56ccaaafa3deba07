"""Dispatch and combine as permutations: every row reaches its expert and comes back to its token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import layouts
from hetermoe_cli.runtime.transfers.dispatcher import LayerMap
from hetermoe_cli.spec.layout import Layout

TOKENS, WIDTH = 6, 3


def choices(layout: Layout, seed: int, top_k: int) -> dict[int, torch.Tensor]:
    """Random chosen experts [T, k] of every attending rank, distinct per token."""
    generator = torch.Generator().manual_seed(seed)
    return {
        rank: torch.rand(TOKENS, layout.experts, generator=generator).argsort(dim=1)[:, :top_k]
        for rank in layout.attending
    }


@given(layouts(), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]))
def test_rows_reach_their_expert_and_return_to_their_token(layout: Layout, seed: int, dropped: float) -> None:
    top_k = min(2, layout.experts)
    maps = [LayerMap(layout, 0, rank) for rank in range(layout.world_size)]
    chosen = choices(layout, seed, top_k)
    for experts in chosen.values():
        late = torch.rand(experts.shape, generator=torch.Generator().manual_seed(seed)) < dropped
        experts[late] = layout.experts
    rows = {rank: torch.arange(TOKENS * WIDTH).view(TOKENS, WIDTH) + 1000.0 * rank for rank in chosen}
    routings = {rank: maps[rank].route(experts) for rank, experts in chosen.items()}
    sent = {
        rank: routings[rank].gather(rows[rank])[: sum(routings[rank].sizes)].split(routings[rank].sizes)
        for rank in chosen
    }

    returned: dict[int, list[torch.Tensor]] = {rank: [] for rank in chosen}
    for target in range(layout.world_size):
        arrivals = maps[target].arrivals({source: routings[source].counts[target] for source in chosen})
        incoming = torch.cat([sent[source][target] for source in chosen])
        assert arrivals.sizes == [routings[s].sizes[target] if s in chosen else 0 for s in range(layout.world_size)]
        grouped = arrivals.group(incoming)
        labels = torch.tensor(layout.local_experts(0, target), dtype=torch.int64).repeat_interleave(
            torch.tensor(arrivals.counts, dtype=torch.int64)
        )
        back = arrivals.ungroup(torch.cat([grouped, labels.view(-1, 1).expand(-1, 1).float()], dim=1))
        for source, part in zip(range(layout.world_size), back.split(arrivals.sizes), strict=True):
            if source in chosen:
                returned[source].append(part)

    for rank, experts in chosen.items():
        outputs = routings[rank].to_tokens(torch.cat(returned[rank]))
        kept = experts < layout.experts
        assert torch.equal(outputs[..., :WIDTH], rows[rank].unsqueeze(1) * kept.unsqueeze(-1))
        assert torch.equal(outputs[..., WIDTH].long(), experts * kept)
        counted = experts[kept].bincount(minlength=layout.experts)
        assert routings[rank].by_expert == counted.tolist()
        assert sum(routings[rank].sizes) == int(kept.sum())


@given(layouts(), st.integers(0, 1000))
def test_replicated_experts_never_travel(layout: Layout, seed: int) -> None:
    for rank, experts in choices(layout, seed, 1).items():
        routing = LayerMap(layout, 0, rank).route(experts)
        replicated = torch.isin(experts, torch.tensor(layout.placement[0].replicated, dtype=torch.int64)).sum()
        hosted = sum(int((experts == expert).sum()) for expert in layout.placement[0].experts[rank])
        assert routing.sizes[rank] == int(replicated) + hosted
        assert sum(routing.sizes) == TOKENS


@given(layouts())
def test_rows_travel_with_their_weights(layout: Layout) -> None:
    top_k = min(2, layout.experts)
    for rank, experts in choices(layout, 0, top_k).items():
        routing = LayerMap(layout, 0, rank).route(experts)
        rows, weights = torch.rand(TOKENS, WIDTH), torch.rand(TOKENS, top_k)
        sent = routing.gather_weighted(rows, weights, torch.empty(TOKENS * top_k, WIDTH + 4))
        back = routing.to_tokens(sent)
        assert torch.equal(back[..., :WIDTH], rows[:, None].expand(-1, top_k, -1))
        assert torch.equal(back[..., WIDTH], weights)
