"""Checks of the machine against the plan, before anything starts."""

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.plan import Plan


def check_precision(precision: str) -> None:
    """UserError if the engine does not train in `precision`."""
    if precision not in ("fp32", "fp64"):
        raise UserError(
            f"field train.precision: {precision} is planned and emulated, not trained in yet: "
            "plan with precision fp32 or fp64, or pass --emulate"
        )


def check_devices(plan: Plan) -> None:
    """UserError if a local device is not the one that the plan's profile was measured on."""
    for name, profile in plan.inputs.profiles.items():
        if profile.source == "modelled":
            raise UserError(
                f"profile {name}: modelled, not measured on this machine: run `hetermoe profile` here and plan again, "
                "or pass --emulate"
            )
        found = _product(profile.accelerator)
        if profile.facts.product is not None and found != profile.facts.product:
            raise UserError(
                f"profile {name}: field facts.product: measured on {profile.facts.product!r}, this machine has "
                f"{found!r}: run `hetermoe profile` here and plan again"
            )


def _product(accelerator: str) -> str | None:
    from hetermoe_cli.profiler.nvml import cpu_facts, gpu_facts

    return (cpu_facts() if accelerator == "cpu" else gpu_facts(0)).product
