"""A model at weights where nothing holds by accident, run in float64 without touching it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from quotientopt.symmetries.discovery.gradients import (
    Charges,
    ContractionTrace,
    Gradient,
    Store,
    blocks,
)
from quotientopt.symmetries.verification import KeepFloat64, floating_tensors, fresh

# Random functions of the outputs; the charges of two must agree where one could by chance.
FUNCTIONS = 2
# Relative size of the noise put on trained weights, and the size where they are zero.
SPREAD, LEAST_SPREAD = 0.3, 0.1
# Relative step of the second differences that measure rounding.
STEP = 1e-8


class Call(NamedTuple):
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Gradients(NamedTuple):
    """Gradients of the random functions at the point.

    Attributes
    ----------
    of : dict of str to Gradient
        By parameter name; missing where no output depends on it.
    charges : dict of str to Charges
        ``W ∂`` summed along every axis, of the same parameters.
    contracted, looked_up : dict of str to set of int
        Of :class:`ContractionTrace`.
    """

    of: dict[str, Gradient]
    charges: dict[str, Charges]
    contracted: dict[str, set[int]]
    looked_up: dict[str, set[int]]


class GenericPoint:
    """A module and arguments of a call, with float64 copies of its parameters near their values.

    Trained parameters are moved by random amounts (a third of their root mean square), so that
    zero biases, gains of one and outputs that start at zero hide nothing; frozen ones are what they
    are. The module itself is not changed.

    Parameters
    ----------
    module : Module
    call : Call
    generator : torch.Generator
        On the CPU.

    Raises
    ------
    ValueError
        If the module refuses the arguments, returns nothing to differentiate or something that is
        not finite, or does not return the same twice.
    """

    def __init__(self, module: nn.Module, call: Call, generator: torch.Generator) -> None:
        self.module = module
        self.call = call
        self.generator = generator
        given = dict(module.named_parameters())
        self._names = {id(parameter): name for name, parameter in given.items()}
        self._given = {name: parameter.detach() for name, parameter in given.items()}
        # By how much each is moved, and the seeds of that and of the direction of further steps.
        self._moves = {name: self._move(parameter) for name, parameter in given.items()}
        # The same strides: blocks are views by the strides of their parameter.
        self.parameters = {
            name: torch.empty_strided(p.shape, p.stride(), dtype=torch.float64, device=p.device)
            for name, p in given.items()
        }
        self.restore(given)

    def _move(self, parameter: Tensor) -> tuple[float, int, int]:
        near, further = torch.randint(2**62, (2,), generator=self.generator).tolist()
        if not (parameter.requires_grad and parameter.numel()):
            return 0.0, near, further
        squares = [b.to(torch.float64).square().sum() for _, b in blocks(parameter.detach())]
        mean = torch.stack(squares).sum().item() / parameter.numel()
        return SPREAD * mean**0.5 or LEAST_SPREAD, near, further

    def restore(self, names: Iterable[str], steps: int = 0) -> None:
        """Put parameters back to the point, to the bit; or by steps in a direction of all.

        The point is made from the module's parameters and seeds again, so that whoever needs other
        values may write them to :attr:`parameters`, without a copy.

        Parameters
        ----------
        names : iterable of str
        steps : int
            Of the length ``STEP``, relative to every entry.
        """
        for name in names:
            size, *seeds = self._moves[name]
            near, further = (torch.Generator().manual_seed(seed) for seed in seeds)
            pairs = zip(blocks(self.parameters[name]), blocks(self._given[name]), strict=True)
            for (_, block), (_, given) in pairs:
                block.copy_(given)
                if size:
                    block.add_(_uniform(block, near), alpha=size)
                if steps:
                    block.addcmul_(block, _uniform(block, further), value=steps * STEP)

    def _normal(self, like: Tensor) -> Tensor:
        numbers = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return numbers.to(like.device)

    def outputs(
        self, path: str = "", call: Call | None = None, values: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Floating-point outputs of the module, or of one inside it, at the point.

        Parameters
        ----------
        path : str
            Of the module inside.
        call : Call, optional
            Its arguments; by default those of the whole.
        values : mapping of str to Tensor, optional
            Used instead of the point's parameters.
        """
        values = self.parameters if values is None else values
        module = self.module.get_submodule(path)
        args, kwargs = tree_map(fresh, tuple(self.call if call is None else call))
        own = {
            name: values[self._names[id(parameter)]]
            for name, parameter in module.named_parameters()
        }
        with _quiet(module):
            output = functional_call(module, own, args, kwargs)
        return dict(floating_tensors(output, "output"))

    def reference(self) -> dict[str, Tensor]:
        """The outputs, once it is clear that they can be compared.

        Raises
        ------
        ValueError
            If not, saying why.
        """
        name = type(self.module).__name__
        with torch.no_grad():
            outputs = self._first_outputs()
            if not outputs:
                raise ValueError(f"{name} returned no floating-point tensor to learn from")
            again = self.outputs()
        for key, value in outputs.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{key} of {name} is not finite on these inputs")
            if key not in again or not torch.allclose(value, again[key], rtol=1e-9, atol=1e-12):
                raise ValueError(
                    f"{key} of {name} differs between two runs in evaluation mode; symmetries can "
                    "only be found in a deterministic forward"
                )
        return outputs

    def _first_outputs(self) -> dict[str, Tensor]:
        try:
            return self.outputs()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines()
            raise ValueError(
                f"{type(self.module).__name__} does not run on these example inputs: "
                f"{type(error).__name__}{': ' + line[0] if line else ''}"
            ) from error

    def gradients(self) -> Gradients:
        """Gradients of random functions of the outputs, with their noise.

        Raises
        ------
        ValueError
            If no output depends on a parameter.
        """
        cotangents: dict[str, Tensor] = {}
        trace = ContractionTrace(self.parameters)
        store = Store()
        of = {name: Gradient(FUNCTIONS, store) for name in self.parameters}
        charges = {n: Charges(FUNCTIONS, value, store) for n, value in self.parameters.items()}

        def take(name: str, index: int, gradient: Tensor) -> None:
            charges[name].put(index, self.parameters[name], gradient)
            of[name].put(index, gradient, self.generator)

        self._backward(take, cotangents, trace)
        complete = [name for name, gradient in of.items() if gradient.complete]
        # X(0) − 2 X(ε) + X(2ε): what is smooth cancels to ε², what is rounded does not.
        try:
            for steps, factor in ((1, -2.0), (2, 1.0)):

                def take_moved(name: str, _: int, gradient: Tensor, factor: float = factor) -> None:
                    charges[name].put_moved(factor, self.parameters[name], gradient)

                self.restore(self.parameters, steps)
                self._backward(take_moved, cotangents)
        finally:
            self.restore(self.parameters)
        return Gradients(
            {name: of[name] for name in complete},
            {name: charges[name] for name in complete},
            trace.contracted,
            trace.looked_up,
        )

    def _backward(
        self,
        take: Callable[[str, int, Tensor], None],
        cotangents: dict[str, Tensor],
        trace: ContractionTrace | None = None,
    ) -> None:
        """Hand on every gradient as it is ready: of all functions with a trace, else of the first.

        Draws the cotangents that are not there yet.
        """
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        current = 0

        def receive(name: str, leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            with torch.no_grad():
                take(name, current, gradient)

        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(partial(receive, name))
        with torch.enable_grad():
            with trace or nullcontext():
                outputs = self.outputs(values=leaves)
            outputs = {key: value for key, value in outputs.items() if value.requires_grad}
            if not outputs:
                raise ValueError(
                    f"no output of {type(self.module).__name__} has a gradient: it was computed "
                    "under no_grad, detached, or depends on no parameter"
                )
            for key, value in outputs.items():
                if key not in cotangents:
                    parts = [self._normal(value.real) for _ in range(FUNCTIONS)]
                    cotangents[key] = torch.stack(parts) / value.numel() ** 0.5
            functions = FUNCTIONS if trace else 1
            for current in range(functions):
                terms = [(cotangents[k][current] * v.real).sum() for k, v in outputs.items()]
                try:
                    torch.autograd.backward(
                        torch.stack(terms).sum(),
                        retain_graph=current + 1 < functions,
                        inputs=list(leaves.values()),
                    )
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise ValueError(
                        f"{type(self.module).__name__} cannot be differentiated on these example "
                        f"inputs: {str(error).splitlines()[0]}"
                    ) from error

    def calls(self, paths: Sequence[str]) -> dict[str, Call]:
        """Arguments of the first call of modules inside; missing where they are not called.

        Also missing where the arguments cannot be copied.
        """
        return calls_of(self.module, paths, lambda: self.outputs())


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers of mean zero and variance one; uniform ones are made much faster than normal."""
    numbers = torch.rand(like.shape, generator=generator, dtype=torch.float32)
    return numbers.to(like.device, torch.float64).sub_(0.5).mul_(12**0.5)


def calls_of(module: nn.Module, paths: Sequence[str], run: Callable[[], object]) -> dict[str, Call]:
    """Arguments of the first call of every module at `paths` during `run`, copied."""
    found: dict[str, Call] = {}

    def recorder(path: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in found:
                try:
                    found[path] = Call(*tree_map(fresh, (args, kwargs)))
                except Exception:  # whatever a deep copy of somebody's object raises
                    return

        return record

    with ExitStack() as stack, torch.no_grad():
        for path in paths:
            hook = module.get_submodule(path).register_forward_pre_hook(
                recorder(path), with_kwargs=True
            )
            stack.callback(hook.remove)
        run()
    return found


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, float64 buffers, one state of the random generators; undone afterwards."""
    training = {part: part.training for part in module.modules()}
    # A forward may register or replace buffers, so the dictionaries are kept.
    buffers = {part: dict(part._buffers) for part in module.modules()}
    devices = {parameter.device for parameter in module.parameters()}
    cuda = [device for device in devices if device.type == "cuda"]
    kind = next((device.type for device in devices), "cpu")
    try:
        for part, own in buffers.items():
            for name, buffer in own.items():
                if buffer is not None:
                    part._buffers[name] = fresh(buffer)
        module.eval()
        with (
            torch.random.fork_rng(cuda),
            torch.autocast(kind, enabled=False),
            KeepFloat64(),
        ):
            yield
    finally:
        for part, own in buffers.items():
            part._buffers.clear()
            part._buffers.update(own)
        for part, flag in training.items():
            part.training = flag
