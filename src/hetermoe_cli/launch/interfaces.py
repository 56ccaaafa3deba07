"""Which address and which network interface of this machine reach node 0."""

import fcntl
import os
import socket
import struct

from hetermoe_cli.errors import UserError
from hetermoe_cli.launch.place import Place

_GET_ADDRESS = 0x8915  # SIOCGIFADDR


def resolve(host: str) -> str:
    """The IPv4 address of `host`; UserError if it has none, or only one that other machines cannot reach."""
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(f"--master-addr {host}: no IPv4 address found: pass the address of node 0") from error
    if address.startswith("127.") and host not in (address, "localhost"):  # as in some systems' /etc/hosts
        raise UserError(
            f"--master-addr {host}: is {address} on this machine, which no other reaches: pass node 0's address in the "
            "network"
        )
    return address


def socket_environment(place: Place) -> dict[str, str]:
    """Variables that make gloo and NCCL talk through the interface that reaches node 0; what the user set stays.

    With one node, gloo takes loopback.
    """
    if place.nodes == 1:
        return {"GLOO_SOCKET_IFNAME": "lo"}
    gloo, nccl = (os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"))
    if not gloo:
        gloo = _interface_towards(resolve(place.host), place.host)
        nccl = nccl or f"={gloo}"  # without "=" it is a prefix of names
    return {"GLOO_SOCKET_IFNAME": gloo} | ({"NCCL_SOCKET_IFNAME": nccl} if nccl else {})


def own_address(place: Place) -> str:
    """Where other nodes reach this one: the address at which it listens, or from which it reaches who does."""
    address = resolve(place.host)
    return address if place.leads else _source(address, place.host)


def _source(address: str, host: str) -> str:
    """The address of this machine from which `address` is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket: nothing is sent
        except OSError as error:
            raise UserError(f"--master-addr {host}: {address} cannot be reached ({error.strerror})") from error
        return str(probe.getsockname()[0])


def _interface_towards(address: str, host: str) -> str:
    """Name of the interface whose address is the source of what is sent to `address`."""
    own = _source(address, host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            if _address_of(name, probe) == own:
                return name
    raise UserError(
        f"--master-addr {host}: no network interface has {own}, from which it is reached: set GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME"
    )


def _address_of(interface: str, probe: socket.socket) -> str | None:
    """Its IPv4 address, if it has one."""
    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)[20:24])
    except OSError:
        return None
