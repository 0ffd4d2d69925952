"""A quotient manifold behind the interface of pymanopt's manifolds.

:class:`QuotientAdapter` comes first, then the two kinds of arrays that its points can be made of:
NumPy arrays, or torch tensors on any device (:data:`BACKENDS`).
"""

import math
from abc import abstractmethod
from typing import Any, Generic, Protocol

import numpy as np
import torch
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from quotientopt._linalg import wide_dtype
from quotientopt.manifolds.base import PointT, QuotientManifold

RETRACTIONS = ("additive", "second-order")
Dtype = torch.dtype | np.dtype | type | str | None


class QuotientAdapter(Manifold, Generic[PointT]):
    """Translates pymanopt's calls, on arrays, to a :class:`QuotientManifold`, on tensors.

    Batch items are the factors of one product manifold: inner products and squared distances are
    summed over them and returned as Python floats, which is what lets pymanopt's solvers run on
    torch tensors. No array is copied on the way to torch and back, except to change its precision.

    Points are looked at (finite, of full rank) once, when a solver has accepted them, not in every
    call; shapes and dtypes always.

    Attributes
    ----------
    quotient : QuotientManifold
        The manifold itself, with all its checks.
    backend : {"numpy", "torch"}
        What points are made of.
    device, dtype : torch.device, torch.dtype
        Of random points. Points that are passed in keep their own.
    """

    quotient: QuotientManifold[PointT]

    def __init__(
        self,
        name: str,
        quotient: QuotientManifold[PointT],
        working: QuotientManifold[PointT],
        *,
        point_layout: int,
        retraction: str,
        backend: str,
        device: torch.device | str | None,
        dtype: Dtype,
    ) -> None:
        if retraction not in RETRACTIONS:
            raise ValueError(f"retraction must be one of {RETRACTIONS}, got {retraction!r}")
        self.arrays = choose_backend(backend)
        self.backend = backend
        self.device = choose_device(backend, device)
        self.dtype = choose_dtype(backend, dtype, self.device)
        self.quotient = quotient
        self._working = working
        second_order = retraction == "second-order"
        self._retract = working.retract_second_order if second_order else working.retract
        self._batch_size = math.prod(quotient.batch_shape)
        super().__init__(name, self._batch_size * quotient.dim, point_layout)

    @abstractmethod
    def to_torch(self, name: str, point: Any) -> PointT:
        """The tensors of a point or tangent vector, on its memory."""

    @abstractmethod
    def from_torch(self, point: PointT) -> Any:
        """The point or tangent vector of this backend, on the memory of tensors."""

    @property
    @abstractmethod
    def typical_dist(self) -> float:
        """Root mean square length of a random point, as of pymanopt's Euclidean manifold."""

    def inner_product(self, point: Any, tangent_vector_a: Any, tangent_vector_b: Any) -> float:
        """The Riemannian metric, summed over the batch."""
        x = self.to_torch("point", point)
        u = self.to_torch("tangent_vector_a", tangent_vector_a)
        same = tangent_vector_b is tangent_vector_a
        v = u if same else self.to_torch("tangent_vector_b", tangent_vector_b)
        return self._working.inner(x, u, v).sum().item()

    def norm(self, point: Any, tangent_vector: Any) -> float:
        """``√⟨u, u⟩``, over the whole batch."""
        return math.sqrt(self.inner_product(point, tangent_vector, tangent_vector))

    def dist(self, point_a: Any, point_b: Any) -> float:
        """The quotient's distance, over the whole batch."""
        x, y = self.to_torch("point_a", point_a), self.to_torch("point_b", point_b)
        return torch.linalg.vector_norm(self.quotient.distance(x, y)).item()

    def projection(self, point: Any, vector: Any) -> Any:
        """The horizontal component."""
        x, u = self.to_torch("point", point), self.to_torch("vector", vector)
        return self.from_torch(self._working.horizontal_component(x, u))

    to_tangent_space = projection

    def euclidean_to_riemannian_gradient(self, point: Any, euclidean_gradient: Any) -> Any:
        """The horizontal lift of the gradient, for a cost that is constant along orbits."""
        x = self.to_torch("point", point)
        partials = self.to_torch("euclidean_gradient", euclidean_gradient)
        return self.from_torch(self._working.gradient(x, partials))

    def euclidean_to_riemannian_hessian(
        self, point: Any, euclidean_gradient: Any, euclidean_hessian: Any, tangent_vector: Any
    ) -> Any:
        """The horizontal lift of the Hessian along a horizontal vector."""
        hessian = self._working.hessian(
            self.to_torch("point", point),
            self.to_torch("euclidean_gradient", euclidean_gradient),
            self.to_torch("euclidean_hessian", euclidean_hessian),
            self.to_torch("tangent_vector", tangent_vector),
        )
        return self.from_torch(hessian)

    def retraction(self, point: Any, tangent_vector: Any) -> Any:
        """``x + u``, or the second-order retraction."""
        x, u = self.to_torch("point", point), self.to_torch("tangent_vector", tangent_vector)
        return self.from_torch(self._retract(x, u))

    def transport(self, point_a: Any, point_b: Any, tangent_vector_a: Any) -> Any:
        """The horizontal component at `point_b`, which must be where a retraction has led to."""
        x, y = self.to_torch("point_a", point_a), self.to_torch("point_b", point_b)
        u = self.to_torch("tangent_vector_a", tangent_vector_a)
        return self.from_torch(self._working.transport(x, y, u))

    def random_point(self) -> Any:
        """A point with independent standard normal entries from torch's generator."""
        return self.from_torch(self.quotient.random_point(dtype=self.dtype, device=self.device))

    def random_tangent_vector(self, point: Any) -> Any:
        """A random horizontal vector of unit norm from torch's generator."""
        x = self.to_torch("point", point)
        vector = self.from_torch(self._working.random_tangent(x))
        return vector / math.sqrt(self._batch_size)

    @abstractmethod
    def zero_vector(self, point: Any) -> Any:
        """The zero tangent vector, of point's shape and dtype."""

    @abstractmethod
    def log(self, point_a: Any, point_b: Any) -> Any:
        """A vector whose additive retraction from `point_a` is in the orbit of `point_b`."""

    def pair_mean(self, point_a: Any, point_b: Any) -> Any:
        """Half the way of :meth:`log`."""
        half = self.log(point_a, point_b) / 2
        x, u = self.to_torch("point_a", point_a), self.to_torch("half", half)
        return self.from_torch(self._working.retract(x, u))


class Arrays(Protocol):
    """How arrays of one kind become torch tensors and back, without copying their memory."""

    name: str

    def to_torch(self, array: Any) -> Tensor:
        """A new tensor on the memory of `array`, outside of any autograd graph."""

    def from_torch(self, tensor: Tensor) -> Any:
        """An array of this kind on the memory of `tensor`."""


class NumpyArrays:
    """NumPy arrays, in main memory."""

    name = "numpy"

    def to_torch(self, array: Any) -> Tensor:
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"a manifold with backend='numpy' needs numpy.ndarray, got {type(array).__name__}"
                + ("; use backend='torch'" if isinstance(array, Tensor) else "")
            )
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()  # torch has no read-only tensors and no negative strides
        return torch.from_numpy(array)

    def from_torch(self, tensor: Tensor) -> Any:
        return tensor.detach().numpy()


class TorchArrays:
    """torch tensors, on any device."""

    name = "torch"

    def to_torch(self, array: Any) -> Tensor:
        if not isinstance(array, Tensor):
            raise TypeError(
                f"a manifold with backend='torch' needs torch.Tensor, got {type(array).__name__}"
                + ("; use backend='numpy'" if isinstance(array, np.ndarray) else "")
            )
        return array.detach()

    def from_torch(self, tensor: Tensor) -> Any:
        return tensor.detach()


BACKENDS: dict[str, Arrays] = {arrays.name: arrays for arrays in (NumpyArrays(), TorchArrays())}


def choose_backend(backend: str) -> Arrays:
    """The backend of that name; ``ValueError`` if there is none."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)}, got {backend!r}")
    return BACKENDS[backend]


def choose_device(backend: str, device: torch.device | str | None) -> torch.device:
    """The device of new points: torch's default, or with NumPy the CPU, unless asked for another.

    Raises
    ------
    ValueError
        If there is no such device here, or `backend` cannot use it.
    """
    try:
        if device is None:
            return torch.device("cpu") if backend == "numpy" else torch.get_default_device()
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is not available: {reason}") from None
    if backend == "numpy" and chosen.type != "cpu":
        raise ValueError(
            f"backend='numpy' keeps points in main memory; use backend='torch' for device {device}"
        )
    return chosen


def choose_dtype(backend: str, dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of new points as torch names it; without a wish the widest one of the device.

    Raises
    ------
    TypeError
        If it is no real floating-point dtype that torch, and NumPy with that backend, know.
    """
    if dtype is None:
        return wide_dtype(device)
    if not isinstance(dtype, torch.dtype):
        try:
            dtype = torch.from_numpy(np.empty(0, dtype=dtype)).dtype
        except TypeError:
            raise TypeError(f"dtype {dtype!r} is none that torch knows") from None
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be real floating-point, got {dtype}")
    if backend == "numpy":
        try:
            torch.empty(0, dtype=dtype).numpy()
        except TypeError:
            raise TypeError(f"NumPy has no {dtype}: use backend='torch'") from None
    return dtype


def same_values(new: Tensor, old: Tensor) -> bool:
    """Whether two tensors are equal in dtype, device, shape and all values."""
    return new.dtype == old.dtype and new.device == old.device and torch.equal(new, old)
