"""Processes that form a group of torch.distributed, in which checks run.

They are started once for all checks. Each check runs in all of them at the same time, and fails if it fails in one.
"""

from __future__ import annotations

import faulthandler
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120.0  # for one check; a rank that another one waits for in vain would wait for ever


class Ranks:
    def __init__(self, device: str, size: int, folder: Path) -> None:
        self.device, self.size, self.folder = device, size, folder
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.started = 0

    def run(self, check: Callable[..., None], *args: Any) -> None:
        """Call a function of a module with the device, in every process. Raise AssertionError with what one raised."""
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((check, args))
        waiting = dict(zip(self.connections, range(self.size), strict=True))
        failed = []
        while waiting and not failed:
            ready = wait(list(waiting), timeout=SECONDS)
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    said = connection.recv()
                except EOFError:
                    self.processes[rank].join(SECONDS)
                    said = f"the process has ended, exit code {self.processes[rank].exitcode}"
                if said:
                    failed.append(f"rank {rank} of {self.size}: {said}")
            if not ready:
                failed.append(f"ranks {sorted(waiting.values())} of {self.size}: no answer in {SECONDS:.0f} seconds")
        if failed:  # a rank that did not fail may wait for one that did
            self.stop()
            raise AssertionError("\n".join(failed))

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.started += 1
        store = self.folder / f"store-{self.device}-{self.size}-{self.started}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, self.device, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []


def _serve(rank: int, size: int, device: str, store: str, connection: Connection) -> None:
    faulthandler.enable()  # a process that a signal ends says where it was
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            check, args = connection.recv()  # imports the check's module
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            check(device, *args)
            connection.send("")
        except BaseException:
            connection.send(traceback.format_exc())
