"""Checks of the machine against the plan, before anything starts."""

from functools import cache

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.plan import Plan
from hetermoe_cli.spec.profile import Profile


def check_devices(plan: Plan) -> None:
    """UserError if this machine does not have the device of every rank, as its profile was measured.

    A machine's CPU and its GPUs may be two nodes of a cluster.
    """
    devices, kinds = plan.inputs.devices(), plan.inputs.accelerators()
    for kind in sorted(set(kinds)):
        nodes = {device.node for device, found in zip(devices, kinds, strict=True) if found == kind}
        if len(nodes) > 1:
            raise UserError(
                f"cluster {plan.inputs.cluster.name}: field nodes: {len(nodes)} nodes; workers start on one "
                "machine only: plan for one node, give the node groups one `machine`, or pass --emulate"
            )
    for device in devices:
        _check_device(plan.inputs.profiles[device.type], plan.inputs.device_index(device.rank))


def _check_device(profile: Profile, index: int) -> None:
    if profile.source == "modelled":
        raise UserError(
            f"profile {profile.device}: modelled, not measured on this machine: run `hetermoe profile` here and plan "
            "again, or pass --emulate"
        )
    found = _product(profile.accelerator, index)
    if profile.facts.product is not None and found != profile.facts.product:
        raise UserError(
            f"profile {profile.device}: field facts.product: measured on {profile.facts.product!r}, this machine's "
            f"device {index} is {found!r}: run `hetermoe profile` here and plan again"
        )


@cache
def _product(accelerator: str, index: int) -> str | None:
    from hetermoe_cli.profiler.nvml import cpu_facts, gpu_facts

    return (cpu_facts() if accelerator == "cpu" else gpu_facts(index)).product
