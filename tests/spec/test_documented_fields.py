"""docs/files.md: a table for each file that users write, which names all fields and their defaults."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hetermoe_cli.spec.cluster import NodeGroup
from hetermoe_cli.spec.model import ModelConfig
from hetermoe_cli.spec.train import TrainSpec

PAGE = (Path(__file__).parents[2] / "docs/files.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| ([^|]*?) ?\|", re.MULTILINE)
HEADING = {NodeGroup: "Cluster", TrainSpec: "Training spec", ModelConfig: "Model"}
GIVEN_ABOVE = {"kind", "schema_version"}


def default(field: FieldInfo) -> str:
    """As YAML has it; empty where there is none."""
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value in (None, {}) else str(value)


@pytest.mark.parametrize("spec", HEADING)
def test_every_field_is_documented_with_its_default(spec: type[BaseModel]) -> None:
    section = PAGE.split(f"\n## {HEADING[spec]}\n")[1].split("\n## ")[0]
    told = dict(ROW.findall(section))
    fields = {name: default(field) for name, field in spec.model_fields.items() if name not in GIVEN_ABOVE}
    assert told == fields
