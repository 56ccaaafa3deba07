"""Checks of the machine against the plan, before anything starts."""

from functools import cache

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import Profile


def check_nodes(plan: Plan) -> None:
    """UserError if the ranks of a node are not numbered in one go, as torch's launcher numbers them."""
    for node, ranks in enumerate(plan.inputs.nodes):
        if ranks != list(range(ranks[0], ranks[-1] + 1)):
            cluster = plan.inputs.cluster
            raise UserError(
                f"cluster {cluster.name}: field nodes: node groups of machine {cluster.node_names[node]} have others "
                "between them: write them one after the other and plan again"
            )


def check_one_node(plan: Plan, what: str) -> None:
    """UserError if `what` cannot run the plan because it has several nodes."""
    if len(plan.inputs.nodes) > 1:
        raise UserError(
            f"cluster {plan.inputs.cluster.name}: field nodes: {len(plan.inputs.nodes)} nodes; {what} starts workers "
            "on one machine only: plan for one node, give the node groups one `machine`, or pass --emulate"
        )


def check_measured(plan: Plan) -> None:
    """UserError if a profile was not measured."""
    for device in plan.inputs.devices():
        if plan.inputs.profiles[device.type].source == "modelled":
            raise UserError(
                f"profile {device.type}: modelled, not measured on this machine: run `hetermoe profile` here and plan "
                "again, or pass --emulate"
            )


def check_devices(plan: Plan, node: int = 0) -> None:
    """UserError if this machine does not have the device of every rank of `node`, as its profile was measured."""
    devices = plan.inputs.devices()
    for rank in plan.inputs.nodes[node]:
        _check_device(plan.inputs.profiles[devices[rank].type], plan.inputs.device_index(rank))


def _check_device(profile: Profile, index: int) -> None:
    found = _product(profile.accelerator, index)
    if profile.facts.product is not None and found != profile.facts.product:
        raise UserError(
            f"profile {profile.device}: field facts.product: measured on {profile.facts.product!r}, this machine's "
            f"device {index} is {found!r}: run `hetermoe profile` here and plan again"
        )


@cache
def _product(accelerator: str, index: int) -> str | None:
    """As `profile` names it: of the devices that CUDA shows, in its order, as workers count them. None: not there.
    UserError if torch cannot use it."""
    if accelerator == "cpu":
        from hetermoe_cli.profiler.nvml import cpu_facts

        return cpu_facts().product
    import torch

    from hetermoe_cli.profiler.profile import device_facts, require_kernels

    if index >= torch.cuda.device_count():
        return None
    require_kernels(index)
    return device_facts(torch.device("cuda", index)).product
