"""What every file of hetermoe shares: strict fields, a kind, a schema version."""

import hashlib
import json
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

SCHEMA_VERSION = 1

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Spec(BaseModel):
    """Immutable data; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ExtendedSpec(Spec):
    """Leaves out the fields in `later` where they have their defaults, so that files and hashes that were written
    before these fields existed stay what they are."""

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        defaults = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in self.later}
        return {name: value for name, value in data.items() if name not in defaults or value != defaults[name]}


def sha256(*specs: Spec) -> str:
    """Hash of the canonical JSON of a spec, or of several in their order, hex."""
    data = [spec.model_dump(mode="json") for spec in specs]
    text = json.dumps(data if len(data) > 1 else data[0], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
