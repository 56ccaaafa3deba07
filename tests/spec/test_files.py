"""spec/files.py: strict reading, one-line errors, atomic writing."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from hetermoe_cli.errors import ExitCode, UserError
from hetermoe_cli.spec.files import check_writable, dump, load, read_text, read_yaml, write_atomic
from hetermoe_cli.spec.train import TrainSpec

GOOD = "kind: train\nschema_version: 1\nsequence_length: 64\nglobal_batch_sequences: 8\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "train.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(TrainSpec, path)
    assert caught.value.code is ExitCode.BAD_INPUT
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    return message.removeprefix(f"{path}:").strip()


def test_dump_and_load_return_an_equal_spec(tmp_path: Path) -> None:
    spec = TrainSpec(sequence_length=64, global_batch_sequences=8, learning_rate=1.23456789e-7, precision="bf16")
    path = tmp_path / "train.yaml"
    dump(spec, path, header="written by a test\nsecond line")
    assert load(TrainSpec, path) == spec
    assert path.read_text().startswith("# written by a test\n# second line\n")


def test_fields_of_later_versions_are_in_files_only_where_they_are_set() -> None:
    sizes = {"sequence_length": 64, "global_batch_sequences": 8}
    later = {"documents": "masked", "document_separator": "<|end|>"}
    assert not later.keys() & TrainSpec.model_validate(sizes).model_dump().keys()
    data = TrainSpec.model_validate(sizes | later).model_dump()
    assert data.items() >= later.items()
    assert TrainSpec.model_validate(data) == TrainSpec.model_validate(sizes | later)


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    text = "sequence_length: 64\nglobal_batch_sequences: 8\n"
    assert error_of(write(tmp_path, text + "documents: packed\n")).startswith("field documents: Input should be")
    assert error_of(write(tmp_path, text + "document_separator: ''\n")).startswith("field document_separator: String")


def test_missing_file_names_the_path_and_the_reason(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.yaml") == "cannot be read (No such file or directory)"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert error_of(tmp_path) == "cannot be read (Is a directory)"


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_bytes(b"kind: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read \\(not UTF-8 text\\)"):
        read_text(path)


def test_malformed_yaml_names_the_line(tmp_path: Path) -> None:
    assert error_of(write(tmp_path, GOOD + "steps: [1, 2\n")).startswith("line 6: malformed YAML (")


def test_a_date_that_does_not_exist_is_malformed_yaml(tmp_path: Path) -> None:
    assert "malformed YAML (month must be in 1..12" in error_of(write(tmp_path, GOOD + "date: 2026-13-01\n"))


@pytest.mark.parametrize(("text", "found"), [("- 1\n", "list"), ("hello\n", "str"), ("", "NoneType")])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, found: str) -> None:
    assert error_of(write(tmp_path, text)) == f"expected a YAML mapping with named fields, found {found}"


def test_python_tags_are_not_executed(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match="malformed YAML"):
        read_yaml(path)


def test_unknown_field_is_refused(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, GOOD + "learning_rates: 0.1\n"))
    assert message == "field learning_rates: unknown field: remove it or check its spelling"


def test_missing_field_is_named(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, GOOD.replace("sequence_length: 64\n", "")))
    assert message == "field sequence_length: Field required"


def test_further_problems_are_counted(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, GOOD + "steps: 0\nseed: -1\n"))
    assert message == "field steps: Input should be greater than 0 (+1 more problems)"


def test_a_validators_reason_is_shown_without_pydantic_noise(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, GOOD + "steps: 3\nwarmup_steps: 4\n"))
    assert message == "field (whole file): warmup_steps 4 is larger than steps 3"


@pytest.mark.parametrize("version", ["2", "0", "'1'", "null"])
def test_another_schema_version_is_refused(tmp_path: Path, version: str) -> None:
    text = GOOD.replace("schema_version: 1", f"schema_version: {version}")
    assert "this hetermoe reads version 1: regenerate the file" in error_of(write(tmp_path, text))


@pytest.mark.parametrize("version", ["0x" + 9000 * "f", "*j"])
def test_a_schema_version_of_any_size_is_refused_in_a_short_line(tmp_path: Path, version: str) -> None:
    names = "abcdefghij"
    bomb = "".join(f"{new}: &{new} [{9 * f'*{old}, '}]\n" for old, new in itertools.pairwise(names))  # 9^9 elements
    text = GOOD.replace("schema_version: 1", f"a: &a []\n{bomb}schema_version: {version}")
    assert len(error_of(write(tmp_path, text))) < 150


def test_a_field_that_is_written_twice_is_refused(tmp_path: Path) -> None:
    found = error_of(write(tmp_path, GOOD + "sequence_length: 32\n"))
    assert found == "line 5: malformed YAML (field sequence_length is written twice: remove one)"


def test_a_merged_field_may_be_written_again(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n"))["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("field", ["recompute", "dense_state"])
def test_every_choice_is_told(tmp_path: Path, field: str) -> None:
    found = error_of(write(tmp_path, GOOD + f"{field}: some\n"))
    assert found.startswith(f"field {field}: Input should be ")
    assert "'auto'" in found


def test_another_kind_is_refused(tmp_path: Path) -> None:
    assert error_of(write(tmp_path, GOOD.replace("train", "plan"))) == "field kind: Input should be 'train'"


@pytest.mark.parametrize("value", [".inf", ".nan", "-1"])
def test_numbers_that_are_no_quantity_are_refused(tmp_path: Path, value: str) -> None:
    assert error_of(write(tmp_path, GOOD + f"learning_rate: {value}\n")).startswith("field learning_rate: ")


def test_write_atomic_replaces_and_creates_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomic(path, "old")
    write_atomic(path, "größer\n")
    assert path.read_text(encoding="utf-8") == "größer\n"
    write_atomic(path, b"\x89PNG")
    assert path.read_bytes() == b"\x89PNG"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "fsync":
        monkeypatch.setattr("hetermoe_cli.spec.files.os.fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"plan.yaml: cannot be written \(No space left on device\)"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hetermoe_cli.spec.files.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_writing_over_a_folder_or_under_a_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path, "text")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "below", "text")
    assert (tmp_path / "file").read_text() == "kept"


def test_what_cannot_be_written_is_told_before_and_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "plan.yaml", "Not a directory"),
        (tmp_path / "file" / "sub" / "plan.yaml", "Not a directory"),
    ):
        with pytest.raises(UserError) as caught:
            check_writable(path)
        assert str(caught.value) == f"{path}: cannot be written ({reason})"
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "folder" / "plan.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
