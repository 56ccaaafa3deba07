"""World: who holds what where several layouts run side by side."""

from builders import make_layout
from hetermoe_cli.spec.world import Share, World

PAIR = make_layout((2, 0), (1, 2), replicated=1, micro_batches=3)  # rank 0 attends and copies expert 3
ALONE = make_layout((1,), (4,), micro_batches=2)


def test_a_layout_alone_shares_what_its_attending_ranks_copy() -> None:
    world = World.of(make_layout((1, 1, 0), (0, 1, 2), replicated=1))
    assert World.of(world) is world
    assert (world.size, world.sequences, world.attending) == (3, 4, (0, 1))
    assert world.shares(0) == [Share((0, 1), True, (3,))]  # hosted experts exist once
    assert world.shares(2) == [Share((0, 1), True, ())]
    assert world.communicators() == [(0, 1)]


def test_layouts_side_by_side_share_everything() -> None:
    world = World.side_by_side([(PAIR, [1, 2]), (ALONE, [0])])
    assert (world.size, world.sequences, world.attending) == (3, 8, (0, 1))
    assert [replica.first for replica in world.replicas] == [0, 6]
    assert [world.seat(process) for process in range(3)] == [(1, 0), (0, 0), (0, 1)]
    # expert 0 lies where attention does, as the copied one does; 1 and 2 are with the host
    assert world.shares(1) == [Share((0, 1), True, (0, 3)), Share((0, 2), False, (1, 2))]
    assert world.shares(2) == [Share((0, 1), True, ())]
    assert world.communicators() == [(0, 1), (0, 2)]
