"""What every file of hetermoe shares: strict fields, a kind, a schema version."""

import hashlib
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Spec(BaseModel):
    """Immutable data; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def sha256(spec: Spec) -> str:
    """Hash of a spec's canonical JSON, hex."""
    text = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
