"""Fixtures for all tests. The builders behind them are in builders.py: import them directly to vary anything."""

import pytest
from hypothesis import settings

from builders import make_inputs, make_layout, make_plan
from hetermoe_cli.spec.inputs import Inputs
from hetermoe_cli.spec.layout import Layout
from hetermoe_cli.spec.plan import Plan

settings.register_profile("hetermoe", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("hetermoe")


@pytest.fixture
def inputs() -> Inputs:
    """One "new" and one "old" device, a node each; 2 layers of 4 experts; a batch of 2 sequences."""
    return make_inputs()


@pytest.fixture
def layout() -> Layout:
    """Zebra on `inputs`: rank 0 attends, rank 1 hosts all experts, R = 2."""
    return make_layout()


@pytest.fixture
def plan(inputs: Inputs, layout: Layout) -> Plan:
    """A plan of `layout` on `inputs`."""
    return make_plan(inputs, layout)
