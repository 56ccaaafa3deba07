"""The one cost semantics: MILP, simulator and emulator read every second and byte from here."""

from hetermoe_cli.cost.layout import LayoutCost
from hetermoe_cli.cost.load import Load, balanced_load
from hetermoe_cli.cost.model import CostModel

__all__ = ["CostModel", "LayoutCost", "Load", "balanced_load"]
