"""Start real gloo processes for a test: forked from a server that has torch loaded, joined over loopback.

They find each other through a store that is there before them, as torchrun's: who comes before a store tries again only
after half a second.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hetermoe_cli.runtime.run.balancer", "test_engine_equality"])


def run_workers(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 90) -> list[Any]:
    """function(rank, *args) in `world_size` processes; their results by rank. A failure fails the test."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world_size):
        mine, theirs = _context.Pipe()
        process = _context.Process(
            target=_work, args=(theirs, rank, world_size, store.port, function, args), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        results = [_answer(pipe, timeout) for pipe in pipes]
    finally:
        for process in processes:
            process.join(1)
            process.kill()
    failures = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(results) if not good]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def _work(pipe: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        os._exit(1)  # a lane may be blocked in gloo: no orderly exit
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _answer(pipe: Any, timeout: float) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(timeout) else (False, "no answer in time")
    except EOFError:
        return False, "the process died"
