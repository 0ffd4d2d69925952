"""Where trials run: in this process one after the other, or several at a time in processes."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Protocol as Interface

import torch

from quotientopt.compare.protocol import Protocol
from quotientopt.compare.task import Task
from quotientopt.compare.train import train
from quotientopt.compare.trial import Run, Trial

OnProgress = Callable[[Trial, int, float], None]


class Workers(Interface):
    """Runs trials, at most `capacity` at a time."""

    capacity: int

    def start(self, trial: Trial) -> None:
        """Begin a trial; at most `capacity` may be under way."""

    def collect(self) -> list[Run]:
        """Wait until at least one trial is done and return what it gave."""

    def close(self) -> None:
        """Stop everything still under way."""


class SerialWorkers:
    """One trial at a time, in this process."""

    capacity = 1

    def __init__(self, protocol: Protocol, task: Task, on_progress: OnProgress) -> None:
        self._protocol, self._task, self._on_progress = protocol, task, on_progress
        self._waiting: list[Trial] = []
        torch.set_num_threads(protocol.threads)

    def start(self, trial: Trial) -> None:
        """Keep the trial until `collect` runs it."""
        self._waiting.append(trial)

    def collect(self) -> list[Run]:
        """Run the trial started last."""
        trial = self._waiting.pop()

        def report(step: int, loss: float) -> None:
            self._on_progress(trial, step, loss)

        return [train(trial, self._protocol, self._task, report)]

    def close(self) -> None:
        """Nothing is left running."""


class ParallelWorkers:
    """Several processes, each running one trial after the other."""

    def __init__(self, jobs: int, protocol: Protocol, task: Task, on_progress: OnProgress) -> None:
        self.capacity = jobs
        self._on_progress = on_progress
        self._busy: dict[Connection, Trial] = {}
        # A forked copy of torch's thread pools can hang, hence new interpreters.
        context = multiprocessing.get_context("spawn")
        self._idle: list[Connection] = []
        self._processes = []
        # Ctrl-C reaches the whole process group; the children ignore it from their first
        # instruction on, and are stopped by `close`.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(jobs):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, protocol, task))
                process.daemon = True
                process.start()
                there.close()
                self._idle.append(here)
                self._processes.append(process)
        finally:
            signal.signal(signal.SIGINT, handler)

    def start(self, trial: Trial) -> None:
        """Send the trial to an idle process."""
        connection = self._idle.pop()
        connection.send(trial)
        self._busy[connection] = trial

    def collect(self) -> list[Run]:
        """Pass progress on until a process sends a run."""
        runs: list[Run] = []
        while not runs:
            for connection in wait(list(self._busy)):
                assert isinstance(connection, Connection)
                message = self._receive(connection)
                if isinstance(message, Run):
                    del self._busy[connection]
                    self._idle.append(connection)
                    runs.append(message)
                else:
                    self._on_progress(self._busy[connection], *message)
        return runs

    def _receive(self, connection: Connection) -> Run | tuple[int, float]:
        try:
            message = connection.recv()
        except EOFError as error:
            raise RuntimeError(f"the process running {self._busy[connection]} died") from error
        if isinstance(message, str):
            raise RuntimeError(f"{self._busy[connection]} failed:\n{message}")
        return message

    def close(self) -> None:
        """Stop all processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _serve(connection: Connection, protocol: Protocol, task: Task) -> None:
    """Body of a worker process: receive trials, send (step, loss) pairs, then the run."""
    torch.set_num_threads(protocol.threads)
    while True:
        trial = connection.recv()
        try:
            run = train(trial, protocol, task, lambda step, loss: connection.send((step, loss)))
        except Exception:
            connection.send(traceback.format_exc())
        else:
            connection.send(run)
