"""Where trials run: in this process one after the other, or several at a time in processes."""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Protocol as Interface

import torch

from quotientopt.compare.errors import RunFailedError
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
        if hasattr(signal, "pthread_sigmask"):
            resource_tracker.ensure_running()  # which unblocks SIGINT when it starts
        try:
            for _ in range(jobs):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, protocol, task))
                process.daemon = True
                with _interrupts_held_back():
                    process.start()
                    self._processes.append(process)
                there.close()
                self._idle.append(here)
        except BaseException:
            self.close()
            raise

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
        except (EOFError, OSError):
            trial = self._busy[connection]
            raise RunFailedError(
                f"the process running {trial} {self._end_of_one()}; fewer --jobs need less memory"
            ) from None
        if isinstance(message, str):
            raise RunFailedError(f"{self._busy[connection]} failed: {message}")
        return message

    def _end_of_one(self) -> str:
        """How a process that has gone away ended."""
        for process in self._processes:
            process.join(0.2)
            if process.exitcode is not None and process.exitcode < 0:
                return f"was killed by {signal.Signals(-process.exitcode).name}"
        return "has ended"

    def close(self) -> None:
        """Stop all processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Within it Ctrl-C waits, and processes started here never see it.

    It reaches the whole process group: the children inherit the blocked signal, and are stopped by
    `close`. This process, in which another thread may get it, hears of it when the block is left.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    blocked = hasattr(signal, "pthread_sigmask")  # not on Windows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if blocked else set()
    try:
        yield
    finally:
        if blocked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _serve(connection: Connection, protocol: Protocol, task: Task) -> None:
    """Body of a worker process: receive trials, send (step, loss) pairs, then the run."""
    torch.set_num_threads(protocol.threads)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            trial = connection.recv()
            try:
                run = train(trial, protocol, task, lambda step, loss: connection.send((step, loss)))
            except OSError:
                raise
            except Exception as error:
                connection.send(" ".join(f"{type(error).__name__}: {error}".split()))
            else:
                connection.send(run)
