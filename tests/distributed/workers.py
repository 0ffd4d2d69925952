"""Processes that stay: each runs the functions it is sent, with torch.distributed up and ready."""

import datetime
import importlib
import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Workers:
    """``size`` processes with gloo on the CPU."""

    def __init__(self, size):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        self.ends, self.processes, self.results = [], [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank, size, port), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, function, *arguments, timeout=300):
        """The results of one function on all processes, by rank; a failure is raised here."""
        task = (function.__module__, function.__name__, arguments)
        for end in self.ends:
            end.send(task)
        self.results = []
        for rank, end in enumerate(self.ends):
            assert end.poll(timeout), f"process {rank} is silent"
            self.results.append(end.recv())
        failures = [text for ok, text in self.results if not ok]
        assert not failures, failures[0]
        return [value for _, value in self.results]

    def close(self):
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.terminate()


def serve(end, rank, size, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=180)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=limit)
    while True:
        try:
            module, name, arguments = end.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(1729)
            result = getattr(importlib.import_module(module), name)(*arguments)
            end.send((True, result))
        except BaseException:
            end.send((False, f"process {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
