"""GPU types for derive_profiles.py: data sheets, the shares of them that kernels reach, and where each figure is from.

"Paper" is Wu, Liu et al., HeterMoE, arXiv 2504.03871; its ratios between GPU types calibrate the two old types, and
nothing else of it is used. "FA2" is Dao, FlashAttention-2, arXiv 2307.08691; "FA3" is Shah et al., FlashAttention-3,
arXiv 2407.08608.
"""

from dataclasses import dataclass

from hetermoe_cli.spec.named_models import NAMED_MODELS
from roofline import Rates, attention_work

GEMM_SHARE = 0.6  # of the data sheet's dense rate: the middle of the 40-80 % that large GEMMs reach
BANDWIDTH_SHARE = 0.9  # of the data sheet's bandwidth: a device copy on an H100 measured 3.0 of 3.35 TB/s

# The attention core runs at the low end of what the kernel's own paper measured, as a share of the data sheet's rate:
# training has shorter runs, causal masks and other kernels between.
FA2_CORE_SHARE = 0.5  # FA2: 50-73 % on an A100; taken for the same kernel on all of Ampere and Ada
H100_CORE_SHARE = 0.525  # FA3: 1.5-2.0 x (forward) and 1.5-1.75 x (backward) FA2's 35 %; at best 740 TFLOP/s

V100_EXPERT_SLOWDOWN = 1 / 0.8  # paper: V100 runs experts at 80 % of A40's speed at every length
V100_ATTENTION_SLOWDOWN = 3.7  # paper: one Mixtral-8x7B attention layer at 64K, against A40
T4_EXPERT_SLOWDOWN = 7.0  # paper: on average, against L40S
T4_ATTENTION_SLOWDOWN = 13.6  # paper: one Mixtral-8x7B attention layer at 64K, against L40S
T4_ATTENTION_SLOWDOWN_4K = 9.9  # paper: at 4K; not used to calibrate, printed as a check
CALIBRATION_LENGTH = 64 * 1024


@dataclass(frozen=True)
class Sheet:
    """Data-sheet figures: dense fp16 tensor rate with fp32 accumulation in TFLOP/s, memory in GB (1e9 bytes),
    bandwidth in GB/s. Where there is bf16 (capability 8.0 and newer), its rate is the same. `reported_bytes` of memory,
    as CUDA (deviceQuery) gives them, where such an output was found."""

    product: str
    capability: str
    teraflops: float
    memory_gigabytes: int
    gigabytes_per_second: float
    source: str
    reported_bytes: int | None = None

    @property
    def memory_bytes(self) -> int:
        """As reported, else the data sheet's."""
        return self.reported_bytes or self.memory_gigabytes * 10**9

    @property
    def bandwidth(self) -> float:
        """Sustained bytes per second."""
        return BANDWIDTH_SHARE * self.gigabytes_per_second * 1e9

    @property
    def has_bf16(self) -> bool:
        """Tensor cores multiply bf16 from compute capability 8.0 on."""
        return int(self.capability.split(".")[0]) >= 8


@dataclass(frozen=True)
class Gpu:
    """A GPU type; experts take `expert_slowdown` times what `expert_rates` give."""

    sheet: Sheet
    rates: Rates
    expert_rates: Rates
    expert_slowdown: float
    origin: str


def new_gpu(
    sheet: Sheet,
    core_share: float = FA2_CORE_SHARE,
    core_source: str = "FlashAttention 2, low end of its paper's 50-73 % on an A100",
) -> Gpu:
    """Rates as stated shares of the data sheet; `core_share` is the attention core's."""
    peak = sheet.teraflops * 1e12
    gemm = GEMM_SHARE * peak
    rates = Rates(gemm, core_share * peak, sheet.bandwidth)
    origin = (
        f"{GEMM_SHARE} x {sheet.teraflops:g} TFLOP/s of the data sheet = {gemm / 1e12:.1f}; "
        f"{core_share} x that rate = {rates.core / 1e12:.1f} TFLOP/s ({core_source})"
    )
    return Gpu(sheet, rates, rates, 1.0, origin)


def old_gpu(sheet: Sheet, reference: Gpu, expert_slowdown: float, attention_slowdown: float) -> Gpu:
    """GEMM rate from the paper's expert ratio; core rate solved so that the attention ratio holds at 64K.

    The ratio is taken over forward + backward of one Mixtral-8x7B attention stage, one sequence.
    """
    work = attention_work(NAMED_MODELS["mixtral-8x7b"].shape, CALIBRATION_LENGTH, 1)
    target = attention_slowdown * (reference.rates.forward(work) + reference.rates.backward(work))
    gemm = reference.rates.gemm / expert_slowdown
    no_core = Rates(gemm, float("inf"), sheet.bandwidth)
    left = target - no_core.forward(work) - no_core.backward(work)
    rates = Rates(gemm, (work.core + work.core_backward) / left, no_core.bandwidth)
    name = reference.sheet.product.split()[-1]
    origin = (
        f"{gemm / 1e12:.1f} TFLOP/s; {rates.core / 1e12:.1f}\n"
        f"  experts take {expert_slowdown:g} x {name}'s seconds at every size, all GEMM rates follow;\n"
        f"  the core's rate is solved so that a Mixtral-8x7B attention stage, forward + backward, takes\n"
        f"  {attention_slowdown} x {name}'s seconds at 64K: ratios measured by Wu, Liu et al., arXiv 2504.03871"
    )
    return Gpu(sheet, rates, reference.rates, expert_slowdown, origin)


def gpus() -> dict[str, Gpu]:
    """The reference GPU types by device name."""
    geforce = "white paper (tensor rate with fp32 accumulation, half of that with fp16)"
    a40 = new_gpu(Sheet("NVIDIA A40", "8.6", 149.7, 48, 696, "A40 data sheet"))
    l40s = new_gpu(Sheet("NVIDIA L40S", "8.9", 362, 48, 864, "L40S data sheet"))
    v100 = Sheet("Tesla V100-PCIE-16GB", "7.0", 112, 16, 900, "V100 data sheet (PCIe)", 16_945_512_448)
    t4 = Sheet("Tesla T4", "7.5", 65, 16, 320, "T4 data sheet", 15_843_721_216)
    a100 = Sheet("NVIDIA A100-SXM4-80GB", "8.0", 312, 80, 2039, "A100 data sheet (SXM 80 GB)")
    h100 = Sheet("NVIDIA H100 80GB HBM3", "9.0", 989, 80, 3350, "H100 data sheet (SXM; half of its rate with sparsity)")
    rtx3090 = Sheet("NVIDIA GeForce RTX 3090", "8.6", 71, 24, 936, f"GA102 {geforce}")
    rtx4090 = Sheet("NVIDIA GeForce RTX 4090", "8.9", 165, 24, 1008, f"Ada {geforce}")
    return {
        "A40": a40,
        "V100": old_gpu(v100, a40, V100_EXPERT_SLOWDOWN, V100_ATTENTION_SLOWDOWN),
        "L40S": l40s,
        "T4": old_gpu(t4, l40s, T4_EXPERT_SLOWDOWN, T4_ATTENTION_SLOWDOWN),
        "A100-80": new_gpu(a100),
        "H100": new_gpu(
            h100, H100_CORE_SHARE, "FlashAttention 3, low end of its paper's 1.5-2.0 x the 35 % of FlashAttention 2"
        ),
        "RTX3090": new_gpu(rtx3090),
        "RTX4090": new_gpu(rtx4090),
    }


def slowdown(old: Gpu, new: Gpu, length: int) -> float:
    """Seconds of `old` over seconds of `new`, forward + backward of one Mixtral-8x7B attention stage."""
    work = attention_work(NAMED_MODELS["mixtral-8x7b"].shape, length, 1)
    seconds_old, seconds_new = (gpu.rates.forward(work) + gpu.rates.backward(work) for gpu in (old, new))
    return seconds_old / seconds_new


def report() -> str:
    """The paper's attention ratios against the model's."""
    by_name, lines = gpus(), []
    for old, new, length, paper, how in (
        ("V100", "A40", CALIBRATION_LENGTH, V100_ATTENTION_SLOWDOWN, "calibrated"),
        ("T4", "L40S", CALIBRATION_LENGTH, T4_ATTENTION_SLOWDOWN, "calibrated"),
        ("T4", "L40S", 4096, T4_ATTENTION_SLOWDOWN_4K, "check"),
    ):
        model = slowdown(by_name[old], by_name[new], length)
        lines.append(f"attention {old} / {new} at {length}: {model:.2f}x, paper {paper}x ({how})")
    return "\n".join(lines)
