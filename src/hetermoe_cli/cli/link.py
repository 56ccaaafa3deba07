"""`hetermoe link`: measure the link between two nodes into a link record."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hetermoe_cli.cli.run_options import Json, MasterAddr, MasterPort, NodeRank
from hetermoe_cli.errors import UserError

if TYPE_CHECKING:
    from hetermoe_cli.profiler.network import LinkTask
    from hetermoe_cli.spec.cluster import LinkRecord


def link(
    name: Annotated[str, typer.Argument(help="What cluster files call it, as in `network: NAME`.", show_default=False)],
    nics: Annotated[int, typer.Option(min=1, help="NICs that the devices of one node share.")] = 1,
    nproc_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="Workers of a node, a device each, that send at once.", show_default="CUDA devices; one CPU"
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="NCCL between cuda, gloo between cpu.")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats.")] = False,
    node_rank: NodeRank = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
    output: Annotated[Path, typer.Option(help="Folder of the profiles.")] = Path("profiles"),
    json_output: Json = False,
) -> None:
    """Measure the link between two nodes: the same command on both, as for `train`.

    Devices of a node send at once, so that NICs are shared as they are in training. Node 0 writes
    OUTPUT/links/NAME.yaml: bandwidth and latency of one NIC, and what all-reduces over both nodes move.
    """
    from hetermoe_cli.launch.place import LINK, PlaceOptions, announce, find_place
    from hetermoe_cli.spec.files import check_writable, dump

    check_name(name, "NAME")
    place = find_place(2, PlaceOptions(node_rank, master_addr, master_port), os.environ, sys.argv[1:], subject=LINK)
    assert place  # both nodes have workers
    path = output / "links" / f"{name}.yaml"

    def prepare() -> "LinkTask":
        if place.leads:
            check_writable(path)
        return _task(device, nproc_per_node, nics, quick)

    announce(place, f"hetermoe: node {place.node} of 2")

    from hetermoe_cli.launch.link import measure_link

    measured = measure_link(prepare, name, place)
    if not measured:
        typer.echo("hetermoe: node 1 of 2: done; node 0 has the figures", err=True)
        return
    dump(measured, path, "Measured by `hetermoe link`.")
    typer.echo(measured.model_dump_json() if json_output else describe(measured))
    typer.echo(f"hetermoe: wrote {path}", err=True)


def _task(device: str, nproc_per_node: int | None, nics: int, quick: bool) -> "LinkTask":
    """UserError where this node has no such devices, or too few."""
    import torch

    from hetermoe_cli.profiler.network import NODES_QUICK_SIZES, NODES_SIZES, LinkTask
    from hetermoe_cli.profiler.profile import resolve_device

    cuda = resolve_device(device).type == "cuda"
    count = torch.cuda.device_count() if cuda else 1
    if cuda and (nproc_per_node or 1) > count:
        raise UserError(f"--nproc-per-node {nproc_per_node}: this node has {count} CUDA devices: pass fewer on both")
    workers = nproc_per_node or count
    if nics > workers:
        raise UserError(f"--nics {nics}: only {workers} of a node's devices send, over as many NICs at most")
    sizes = NODES_QUICK_SIZES if quick else NODES_SIZES
    return LinkTask("nccl" if cuda else "gloo", nodes=2, width=workers, nics=nics, sizes=sizes)


def check_name(name: str, option: str) -> None:
    """Usage error unless a profile or link may be called so."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise typer.BadParameter(f"{name!r}: letters, digits, '.', '_' and '-' only", param_hint=option)


def describe(record: "LinkRecord") -> str:
    """A line about a measured link."""
    link, ring = record.link, record.link.ring_bandwidth / 1e9
    return (
        f"link {record.name}: {link.bandwidth_gigabytes_per_second:.2f} GB/s, {link.latency_microseconds:.0f} us, "
        f"all-reduce {ring:.2f} GB/s, spread {record.spread or 0:.0%}"
    )
