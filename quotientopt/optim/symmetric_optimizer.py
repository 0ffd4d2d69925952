"""What optimizers on a model's symmetries have in common: parameters, names, groups, copies."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quotientopt.optim.bookkeeping.checks import full_precision
from quotientopt.optim.bookkeeping.saved import (
    NAMES,
    arranged,
    refuse_damaged,
    refuse_foreign_groups,
    refuse_foreign_keys,
    with_names,
)
from quotientopt.optim.bookkeeping.slices import parameter_name
from quotientopt.symmetries import HeadSymmetry, SymmetryMap, symmetries_from, warn_of_gaps
from quotientopt.symmetries.block import is_sharded, refuse_flattened


class SymmetricOptimizer(Optimizer):
    """A torch optimizer that knows the symmetries of its parameters.

    Subclasses plan in :meth:`_plan` how each parameter is updated, refuse options in
    :meth:`_refuse_options` and settle a loaded state in :meth:`_settle`.

    Parameters
    ----------
    model_or_params : Module or iterable
        A model, whose symmetries are found by :func:`quotientopt.find_symmetries`; or tensors,
        named tensors or param-group dicts, with ``symmetries`` from the caller.
    defaults : dict
        Options of param groups.
    symmetries : SymmetryMap or sequence of HeadSymmetry, optional
        For a model, overrides what would be found.
    example_inputs : Tensor, tuple, list or mapping, optional
        Arguments of one call of the model, from which symmetries are found that no class tells.

    Raises
    ------
    TypeError
        If there are example inputs and no model.

    Warns
    -----
    UserWarning
        If there is neither a model nor symmetries, or something in the model is not understood.
    """

    symmetries: SymmetryMap
    _torch_name = "torch.optim"
    # Options that only states of this optimizer have, and those of torch's counterpart as well.
    _marks: tuple[str, str]
    # Entries of a parameter's state, before the suffix of blocks of a fused one.
    _keys: tuple[str, ...]

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        symmetries: SymmetryMap | Sequence[HeadSymmetry] | None,
        example_inputs: Any = None,
    ) -> None:
        self._refuse_options(defaults)
        refuse_partitions()
        if example_inputs is not None and not isinstance(model_or_params, nn.Module):
            raise TypeError(
                f"{type(self).__name__} finds symmetries from example_inputs in a model; pass the "
                "model itself, or symmetries=find_symmetries(model, ...)"
            )
        self._names: dict[int, str] = {}
        # Whether to look after the parameters in the next step.
        self._asked = False
        # Of the parameters at the last plan; empty before the first one.
        self._signature: tuple[Any, ...] = ()
        if isinstance(model_or_params, nn.Module):
            if symmetries is None:
                symmetries = symmetries_from(model_or_params, example_inputs)
                as_torch = f"{type(self).__name__} steps as {self._torch_name}"
                warn_of_gaps(model_or_params, symmetries, as_torch, stacklevel=4)
            self._names |= {id(p): name for name, p in model_or_params.named_parameters()}
            model_or_params = list(model_or_params.parameters())
        elif symmetries is None:
            warnings.warn(
                f"{type(self).__name__} knows no symmetries of these parameters and steps as torch "
                "does: pass the model, or symmetries=find_symmetries(model); symmetries=() says "
                "that there are none",
                UserWarning,
                stacklevel=3,
            )
        if not isinstance(symmetries, SymmetryMap):
            symmetries = SymmetryMap(symmetries or ())
        symmetries = self._dressed(symmetries)
        self.symmetries = symmetries
        for block in (block for symmetry in symmetries.heads for block in symmetry.blocks):
            if block.name:
                self._names.setdefault(id(block.parameter), block.name)
        # At the last plan: parameters of the symmetries in a param group, and all parameters.
        self._held: dict[int, str] = {}
        self._places: list[list[Tensor]] = []
        super().__init__(model_or_params, defaults)
        refuse_flattened(None, self._parameters())
        refuse_foreign_symmetries(self.param_groups, symmetries)
        self._plan()

    def _dressed(self, symmetries: SymmetryMap) -> SymmetryMap:
        """The symmetries whose pairs are dressed: those of heads, unless a subclass takes more."""
        return symmetries

    def _refuse_options(self, options: Mapping[str, Any]) -> None:
        """Refuse unknown values of a param group's options."""
        raise NotImplementedError

    def _plan(self) -> None:
        """Decide how each parameter is updated; sets the signature."""
        raise NotImplementedError

    def _refuse_replaced(self) -> None:
        """Refuse param groups that have lost a parameter of a symmetry.

        Its partner would be stepped along a geometry that is not the model's any more.
        """
        self._follow_sharding()
        own = {id(p): p for p in self._parameters()}
        refuse_flattened(None, own.values())
        for key, name in self._held.items():
            if key not in own:
                if own and all(p.ndim == 1 for p in own.values()):
                    raise ValueError(
                        f"the param groups hold flat tensors in place of {name!r} and the others, "
                        "as DeepSpeed's ZeRO makes them: pairs and heads are cut anywhere there; "
                        "shard with FSDP2 (torch.distributed.fsdp.fully_shard), which keeps every "
                        "parameter's shape"
                    )
                raise ValueError(
                    f"parameter {name!r}, which belongs to a symmetry, is not in the param groups "
                    "any more; make a new optimizer for the model as it is now"
                )
        blocks = (block for symmetry in self.symmetries.heads for block in symmetry.blocks)
        self._held = {id(b.parameter): b.name for b in blocks if id(b.parameter) in own}
        self._places = [list(group["params"]) for group in self.param_groups]

    def _follow_sharding(self) -> None:
        """Go on with sharded parameters that have taken the places of whole ones.

        As accelerate does, which shards a model after its optimizer was made.
        """
        places = [list(group["params"]) for group in self.param_groups]
        if not self._places or list(map(len, places)) != list(map(len, self._places)):
            return
        pairs = [
            (old, new)
            for before, after in zip(self._places, places, strict=True)
            for old, new in zip(before, after, strict=True)
            if old is not new
        ]
        followed = all(is_sharded(new) and old.shape == new.shape for old, new in pairs)
        if not pairs or not followed or self.state:
            return
        # What was not sharded along, a frozen base under adapters say, is let go.
        moved = self.symmetries.on({id(old): new for old, new in pairs})
        self.symmetries = moved.within(new for group in places for new in group)
        for old, new in pairs:
            if id(old) in self._names:
                self._names[id(new)] = self._names.pop(id(old))
        self._held = {}

    def _settle(self, loaded: Mapping[str, Any]) -> None:
        """Check a state that torch has just loaded from ``loaded``, and undo its casts."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; refuses one that would split a pair.

        Parameters
        ----------
        param_group : dict
            ``params`` and the options that differ from the defaults.
        """
        super().add_param_group(param_group)
        group, before = self.param_groups[-1], (self._held, self._places)
        try:
            self._refuse_options(group)
            if self._signature:
                self._plan()
        except (ValueError, TypeError):
            self.param_groups.pop()
            self._held, self._places = before
            if self._signature:
                self._plan()
            raise
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
            self._names.setdefault(id(parameter), name)

    @torch.no_grad()
    @full_precision()
    def move_state_(self, element: Mapping[str, Tensor]) -> None:
        """Move the state by a group element that acts on the parameters.

        After ``symmetries.act_(element)`` and ``optimizer.move_state_(element)`` training goes on
        as if nothing had happened.

        Parameters
        ----------
        element : mapping of str to Tensor
            As from :meth:`SymmetryMap.random_element`: symmetry name to ``(heads, r, r)``,
            ``"residual"`` to ``(d, d)``.

        Raises
        ------
        ValueError
            If the element does not act on these symmetries, moves parameters whose state has no
            law of transformation (that of plain Adam), or translates biases of values whose output
            bias is not trained. Nothing is changed then.
        """
        self._move_state_(element)

    def _move_state_(self, element: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def parameters_changed(self) -> None:
        """Tell that parameters were written to in a way that torch does not count.

        Writes through ``p.data`` in place and by NumPy are such; ``torch.no_grad()`` blocks,
        ``load_state_dict`` and replaced ``p.data`` are seen without a word. The next step makes
        frames where those in use do not fit the parameters any more; values that came back change
        nothing.
        """
        self._asked = True

    def _name(self, parameter: Tensor) -> str:
        return parameter_name(parameter, self._names, self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups, as of torch's optimizers.

        Returns
        -------
        dict
            Tensors and plain values. Groups have ``param_names`` where all names are known, and
            ``has_state``, from which :meth:`load_state_dict` sees what was lost. Of sharded
            parameters every tensor is a DTensor: torch.distributed.checkpoint saves and loads it
            on any number of processes, all of which have to call this and load.
        """
        sharded = self._current_sharded()
        if sharded is not None:
            found: dict[str, Any] = sharded.state_dict()
            return found
        return with_names(super().state_dict(), self._names_of_groups())

    def _current_sharded(self) -> Any:
        """What steps parameters that are sharded, and has their state; None for whole ones."""
        return None

    def _names_of_groups(self) -> list[list[str | None]]:
        """Names of the parameters of every group, as far as they are known."""
        return [
            list(group[NAMES])
            if len(group.get(NAMES, ())) == len(group["params"])
            else [self._names.get(id(parameter)) for parameter in group["params"]]
            for group in self.param_groups
        ]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state; training then continues bit for bit.

        Parameters
        ----------
        state_dict : dict
            From :meth:`state_dict` of an optimizer over parameters of the same names and shapes,
            in any order; in the same order where names are not known on both sides. Its options
            replace those given at construction, as in torch. For sharded parameters its tensors
            may be sharded in any way.

        Raises
        ------
        ValueError
            If it does not fit, is damaged or is another optimizer's; names the parameter and the
            entry. The optimizer is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(
                f"this is not the state of a {type(self).__name__}: it is a "
                f"{type(state_dict).__name__}, not the mapping that state_dict() returns"
            )
        sharded = self._current_sharded()
        if sharded is not None:
            sharded.load_state_dict(state_dict)
            return
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._checked(given))
            return loaded

        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._settle(loaded), prepend=True),
        ]
        before = self.state, self.param_groups
        try:
            with full_precision():
                super().load_state_dict(dict(state_dict))
        except Exception:
            self.state, self.param_groups = before
            self._plan()
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict in the order of the parameters, checked as far as it goes without them."""
        saved = arranged(given, self._names_of_groups(), type(self).__name__)
        groups = saved["param_groups"]
        kinds = type(self).__name__, self._torch_name
        refuse_foreign_keys(saved["state"], groups, self._keys, self._name_at, kinds)
        refuse_foreign_groups(groups, self._marks, kinds, plain=self._takes_states_of_torch())
        refuse_damaged(saved["state"], groups, self._name_at)
        return saved

    def _name_at(self, group: int, place: int) -> str:
        """Name of the parameter at a place of a group, for messages."""
        if group < len(self.param_groups) and place < len(self.param_groups[group]["params"]):
            return self._name(self.param_groups[group]["params"][place])
        return f"param_groups[{group}]['params'][{place}]"

    def _takes_states_of_torch(self) -> bool:
        """Whether a state of torch's counterpart means the same here, or its entries tell."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        named = [(p, self._names[id(p)]) for p in self._parameters() if id(p) in self._names]
        return super().__getstate__() | {"symmetries": self.symmetries, "_named": named}

    def __setstate__(self, state: dict[str, Any]) -> None:
        named = state.pop("_named", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        if named is not None:
            self._asked = False
            self._held = {}
            self._places = []
            self._names = {id(parameter): name for parameter, name in named}
            self._plan()


def refuse_foreign_symmetries(
    param_groups: Sequence[Mapping[str, Any]], symmetries: SymmetryMap
) -> None:
    """Refuse symmetries of another model, which would silently leave plain steps."""
    own = {id(p) for group in param_groups for p in group["params"]}
    known = {id(b.parameter) for s in symmetries.heads for b in s.blocks}
    if symmetries.residual is not None:
        known |= {id(p) for p in symmetries.residual.parameters.values()}
    if known and not known & own:
        raise ValueError(
            "the symmetries belong to another model: none of its parameters is in the "
            "optimizer; pass find_symmetries(model) of the model that is trained"
        )


_ZERO_REDUNDANCY = "torch.distributed.optim.zero_redundancy_optimizer"


def refuse_partitions() -> None:
    """Refuse to be made by ZeroRedundancyOptimizer, which gives each process some parameters.

    Raises
    ------
    ValueError
        With the reason and the way out.
    """
    if _ZERO_REDUNDANCY not in sys.modules:
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _ZERO_REDUNDANCY:
            raise ValueError(
                "ZeroRedundancyOptimizer deals parameters out one by one, which cuts pairs, and "
                "lets every process clip and refuse steps by itself; shard with FSDP2 "
                "(torch.distributed.fsdp.fully_shard), where pairs stay whole"
            )
        frame = frame.f_back  # type: ignore[assignment]
