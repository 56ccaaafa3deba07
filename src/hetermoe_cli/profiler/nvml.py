"""Facts of a device: NVML for NVIDIA GPUs, the operating system for the CPU. What is not told stays null."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pynvml

from hetermoe_cli.spec.profile import DeviceFacts

T = TypeVar("T")

_CPU_INFO = Path("/proc/cpuinfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def gpu_facts(device: int | str) -> DeviceFacts:
    """Facts of the GPU with this NVML index, or this UUID ("GPU-..."); all null without a driver or such a device.

    NVML counts all GPUs of the machine, CUDA only those in CUDA_VISIBLE_DEVICES: the UUID is the safe name.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return DeviceFacts()
    try:
        by_index = isinstance(device, int)
        find = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
        return _read(find(device))
    except pynvml.NVMLError:
        return DeviceFacts()
    finally:
        pynvml.nvmlShutdown()


def cpu_facts() -> DeviceFacts:
    """Product from /proc/cpuinfo (else from the platform), memory that this process may use."""
    return DeviceFacts(product=_cpu_product(), memory_bytes=_cpu_memory())


def _read(handle: Any) -> DeviceFacts:
    """Ask for every field alone: any of them may be unsupported."""
    capability = _ask(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    milliwatts = _ask(lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle))
    ecc = _ask(lambda: pynvml.nvmlDeviceGetEccMode(handle)[0])
    mig = _ask(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0])
    return DeviceFacts(
        product=_ask(lambda: pynvml.nvmlDeviceGetName(handle)) or None,
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        memory_bytes=_ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total) or None,
        driver=_ask(pynvml.nvmlSystemGetDriverVersion) or None,
        power_limit_watts=milliwatts / 1000 if milliwatts else None,
        sm_clock_megahertz=_ask(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)) or None,
        memory_clock_megahertz=_ask(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM)) or None,
        pcie_generation=_ask(lambda: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)) or None,
        pcie_width=_ask(lambda: pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)) or None,
        ecc=None if ecc is None else bool(ecc),
        mig=None if mig is None else bool(mig),
    )


def _ask(query: Callable[[], T]) -> T | None:
    try:
        return query()
    except pynvml.NVMLError:
        return None


def _cpu_product() -> str | None:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.processor() or None)


def _cpu_memory() -> int | None:
    """Physical memory, or a container's limit if that is less."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        return min(memory, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return memory
