"""Hosts: where the nodes of a run are reached."""

from typing import Literal

from hetermoe_cli.spec.base import NonNegativeInt, Spec


class Hosts(Spec):
    """hosts.yaml of a run folder. `addresses`: of the nodes of its newest start, by their numbers in the cluster
    file."""

    kind: Literal["hosts"] = "hosts"
    schema_version: Literal[1] = 1
    addresses: dict[NonNegativeInt, str]
