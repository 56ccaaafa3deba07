"""Link records for derive_profiles.py: stated rates, the share of them that messages reach, and assumed latencies."""

from datetime import date

from hetermoe_cli.spec.cluster import Link, LinkRecord

ETHERNET_SHARE = 0.9  # of the line rate: Ethernet, IP and transport headers, and NCCL's pipelining
INFINIBAND_SHARE = 0.95  # of the data rate: headers of 4 kB packets take 2 %, the rest is NCCL's pipelining
PCIE_SHARE = 0.8  # of the raw lane rate: packet headers and flow control
NVLINK_SHARE = 0.8  # of the data sheet's rate per direction


def links() -> dict[str, LinkRecord]:
    """The stated link records: (raw GB/s a direction, share that lasts, microseconds, where from)."""
    stated = {
        "ethernet-25g": (3.125, ETHERNET_SHARE, 20, "25 Gb/s line rate"),
        "ethernet-100g": (12.5, ETHERNET_SHARE, 20, "100 Gb/s line rate"),
        "ethernet-200g": (25.0, ETHERNET_SHARE, 20, "200 Gb/s line rate"),
        "infiniband-hdr": (25.0, INFINIBAND_SHARE, 10, "4 lanes of 50 Gb/s, InfiniBand HDR"),
        "infiniband-ndr": (50.0, INFINIBAND_SHARE, 10, "4 lanes of 100 Gb/s, InfiniBand NDR"),
        "pcie3-x16": (15.75, PCIE_SHARE, 10, "16 lanes of 8 GT/s, 128b/130b coded"),
        "pcie4-x16": (31.5, PCIE_SHARE, 10, "16 lanes of 16 GT/s, 128b/130b coded"),
        "pcie5-x16": (63.0, PCIE_SHARE, 10, "16 lanes of 32 GT/s, 128b/130b coded"),
        "nvlink-a100": (300.0, NVLINK_SHARE, 5, "12 NVLink 3 links of 25 GB/s a direction, A100 data sheet"),
        "nvlink-h100": (450.0, NVLINK_SHARE, 5, "18 NVLink 4 links of 25 GB/s a direction, H100 data sheet"),
    }
    return {
        name: LinkRecord(
            name=name,
            source="modelled",
            date=date.today(),
            link=Link(bandwidth_gigabytes_per_second=round(raw * share, 4), latency_microseconds=latency),
            comment=f"Stated, not measured: {share} of {raw:g} GB/s ({origin}); latency assumed for NCCL send/recv.",
        )
        for name, (raw, share, latency, origin) in stated.items()
    }
