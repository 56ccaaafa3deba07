"""Read and write specs as YAML: strict reading, one-line errors, atomic writing."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from hetermoe_cli.errors import UserError
from hetermoe_cli.spec.base import SCHEMA_VERSION, Spec

SpecT = TypeVar("SpecT", bound=Spec)

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Refuses a field that is written twice, of which YAML's own would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"field {key.value} is written twice: remove one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_text(path: Path) -> str:
    """The file as UTF-8 text; UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's YAML mapping; UserError names the line of a syntax error."""
    text = read_text(path)
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist, a number of 5,000 digits
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{path}:{where} malformed YAML ({problem})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a YAML mapping with named fields, found {type(data).__name__}")
    return data


def parse(cls: type[SpecT], data: dict[str, Any], source: str) -> SpecT:
    """Validate `data` as `cls`; UserError names the source, the first wrong field and the reason."""
    version = data.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{source}: schema_version is {_shown(version)}, this hetermoe reads version {SCHEMA_VERSION}: "
            "regenerate the file with this version"
        )
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(error)}") from error


def load(cls: type[SpecT], path: Path) -> SpecT:
    """Read `path` as `cls`; UserError if it is missing, malformed or does not validate."""
    return parse(cls, read_yaml(path), str(path))


def dump(spec: Spec, path: Path, header: str = "") -> None:
    """Write `spec` as YAML, atomically; `header` becomes comment lines on top."""
    data = spec.model_dump(mode="json")
    body = yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=None)
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    write_atomic(path, comment + body)


def check_writable(path: Path) -> None:
    """UserError if `path` can be no file that is written; asked before the work that it is for. Writes nothing."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        reason = errno.EISDIR
    elif not folder.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = errno.EACCES
    else:
        return
    raise UserError(f"{path}: cannot be written ({os.strerror(reason)})")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old file or the new one, never half.

    UserError if it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _shown(value: Any) -> str:
    """A short text of something that a file may hold any amount of, even by aliases of aliases."""
    if isinstance(value, int) and abs(value) >= 10**9:
        return "a huge number"
    return repr(value)[:40] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _first_problem(error: ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"]) or "(whole file)"
    if first["type"] == "extra_forbidden":
        message = "unknown field: remove it or check its spelling"
    else:
        message = first["msg"].removeprefix("Value error, ")
    more = f" (+{len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return f"field {field}: {message}{more}"
