"""The real pynvml on a fake libnvidia-ml.so.1, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hetermoe_cli.profiler import nvml
from hetermoe_cli.spec.profile import DeviceFacts

SOURCE = Path(__file__).parent / "fake_nvml.c"
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is missing: it builds the fake NVML")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a libnvidia-ml.so.1: a new driver's, and one without the MIG function."""
    result = {}
    for name, flags in {"new": [], "old": ["-DOLD_DRIVER"]}.items():
        result[name] = tmp_path_factory.mktemp(name)
        target = result[name] / "libnvidia-ml.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", *flags, "-o", target, SOURCE], check=True)
    return result


def ask(folder: Path, gpu: str, device: int | str = 0) -> dict[str, Any]:
    """gpu_facts(device) as a fresh process sees it with this driver and GPU."""
    code = f"from hetermoe_cli.profiler.nvml import gpu_facts; print(gpu_facts({device!r}).model_dump_json())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "FAKE_GPU": gpu}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


@needs_gcc
def test_a40_tells_every_field(libraries: dict[str, Path]) -> None:
    assert ask(libraries["new"], "A40") == {
        "product": "NVIDIA A40",
        "compute_capability": "8.6",
        "memory_bytes": 48305799168,
        "driver": "570.86.15",
        "power_limit_watts": 300.0,
        "sm_clock_megahertz": 1740,
        "memory_clock_megahertz": 7251,
        "pcie_generation": 4,
        "pcie_width": 16,
        "ecc": True,
        "mig": False,
    }


@needs_gcc
@pytest.mark.parametrize("driver", ["new", "old"])
def test_v100_has_no_mig_and_its_ecc_is_off(libraries: dict[str, Path], driver: str) -> None:
    """Not supported (new driver) and function not found (old driver) are both null, never False."""
    facts = ask(libraries[driver], "V100")
    assert facts["product"] == "Tesla V100-SXM2-16GB"
    assert facts["compute_capability"] == "7.0"
    assert facts["power_limit_watts"] == 250.5
    assert (facts["ecc"], facts["mig"]) == (False, None)


@needs_gcc
def test_unsupported_fields_are_null(libraries: dict[str, Path]) -> None:
    assert set(ask(libraries["new"], "BARE").values()) == {None}


@needs_gcc
def test_zeros_and_empty_text_are_null(libraries: dict[str, Path]) -> None:
    facts = ask(libraries["new"], "ZERO")
    told = {name: value for name, value in facts.items() if value is not None}
    assert told == {"compute_capability": "7.0", "ecc": False, "mig": False}


@needs_gcc
def test_a_gpu_is_found_by_uuid(libraries: dict[str, Path]) -> None:
    assert ask(libraries["new"], "A40", "GPU-0a1b")["product"] == "NVIDIA A40"


@needs_gcc
@pytest.mark.parametrize(("gpu", "device"), [("NO_DRIVER", 0), ("A40", 1), ("A40", "GPU-ffff")])
def test_no_driver_or_no_such_gpu_is_all_null(libraries: dict[str, Path], gpu: str, device: int | str) -> None:
    assert DeviceFacts(**ask(libraries["new"], gpu, device)) == DeviceFacts()


def test_nvml_needs_no_torch() -> None:
    code = "import sys, hetermoe_cli.profiler.nvml; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_cpu_facts_come_from_the_operating_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Brand CPU @ 2 GHz\nprocessor\t: 1\n")
    monkeypatch.setattr(nvml, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(nvml, "_CGROUP_LIMIT", tmp_path / "none")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert nvml.cpu_facts() == DeviceFacts(product="Brand CPU @ 2 GHz", memory_bytes=memory)


@pytest.mark.parametrize(("limit", "expected"), [("1073741824\n", 1073741824), ("max\n", None)])
def test_a_containers_memory_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int | None
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(nvml, "_CGROUP_LIMIT", tmp_path / "memory.max")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert nvml.cpu_facts().memory_bytes == (expected or physical)
