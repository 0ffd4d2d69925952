"""Attention that stores G_QK and G_VO as points of the factor quotient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from quotientopt.models import Attention
from quotientopt.models.attention import rotary_angles, rotate
from quotientopt.nn.invariant_conversion import (
    Shape,
    kind_for,
    read_attention,
    write_attention,
)
from quotientopt.nn.invariant_points import CHART, FIXED_RANK, InvariantPoints
from quotientopt.nn.masks import merge_masks

Cache = tuple[Tensor, Tensor]


class InvariantAttention(InvariantPoints):
    """Multi-head attention that stores G_QK and G_VO as rank-r points, and no gauge.

    What a head computes depends on ``G_QK = W_Qᵀ W_K`` and ``G_VO = W_O W_V`` alone (with biases,
    on those of ``[W, b]``), matrices of rank r. They are points of the quotient of factor pairs by
    GL(r), of dimension r(n + m − r). Two parametrizations of such a point:

    ``"fixed-rank"``
        A pair (A, B) in a section of its orbit, r(n + m) numbers. Train it with
        :class:`quotientopt.QuotientAdam`, which sees the point alone, or by :meth:`retract_`;
        :meth:`to_section_` takes the pair back to the section, the optimizer's state with it.
    ``"chart"``
        Coordinates of the affine chart, exactly r(n + m − r) numbers: r columns of B are a fixed
        multiple of the identity. Nothing redundant is left, so that any optimizer trains the point
        itself. The chart is not global: see :meth:`chart_condition` and :meth:`rechart_`.

    With grouped queries the keys and values that heads share are B, and the queries (or output
    blocks) of one key-value head lie side by side in A. With rotary positions the query-key pair is
    one modulo (C*)^{r/2} only, a complex row of A and one of B for every plane, r(n + m − 1)
    dimensions: in the chart one entry of each row of B is fixed.

    Parameters
    ----------
    width : int
        Of the queries' input and of the output.
    heads : int
        Query heads.
    key_value_heads : int, optional
        Query head h reads key-value head ``h // (heads // key_value_heads)``. Default: `heads`.
    head_width : int, optional
        The rank r. Default: ``width // heads``.
    key_width, value_width : int, optional
        Of the inputs of keys and values. Default: `width`.
    bias : bool
        Whether there are biases. That of the queries belongs to the point; so does that of the
        keys with rotary positions (softmax drops it without), and that of the values with dropout
        (the output's bias takes it up without).
    causal : bool
        Whether a position attends to itself and earlier ones only.
    dropout : float
        Of the attention weights, while training.
    scale : float, optional
        Factor of the scores. Default: ``head_width ** -0.5``.
    batch_first : bool
        Whether inputs are (batch, length, width) or (length, batch, width).
    rotary : bool
        Whether queries and keys are turned by rotary positions, as in the reference models.
    parametrization : {"fixed-rank", "chart"}
    section : {"svd", "balanced", "orthonormal", "triangular"}
        Of ``"fixed-rank"``: see :func:`quotientopt.dress_`. ``"svd"`` has one representative per
        orbit where singular values are distinct.
    chart_scale : float, optional
        Of ``"chart"``: the multiple of the identity. Default: the power of two, head by head, that
        makes the entries of both sides equally large.
    generator : torch.Generator, optional
        Source of the initial weights; see :meth:`reset_parameters`.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    query, key, value, output : nn.Linear
        The representative; in the chart `key` and `value` are ``ChartLinear``.
    shape : Shape
        Sizes and settings, under the names of the arguments.

    Raises
    ------
    TypeError, ValueError
        On sizes that are no integers or do not fit, or an unknown option.

    Notes
    -----
    The second scheme of François & Ravera, arXiv 2602.18948 (invariant parametrizations). Keys and
    values have width r, so that a cache is as large as ever.

    Examples
    --------
    >>> ordinary = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    >>> attention = InvariantAttention.from_attention(ordinary, parametrization="chart")
    >>> attention(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        key_width: int | None = None,
        value_width: int | None = None,
        bias: bool = False,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        batch_first: bool = True,
        rotary: bool = False,
        parametrization: str = FIXED_RANK,
        section: str = "svd",
        chart_scale: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = Shape.of(
            width=width,
            heads=heads,
            key_value_heads=key_value_heads,
            head_width=head_width,
            key_width=key_width,
            value_width=value_width,
            bias=bias,
            causal=causal,
            dropout=dropout,
            scale=scale,
            batch_first=batch_first,
            rotary=rotary,
        )
        self._build(shape, parametrization, section, chart_scale, device, dtype)
        self.reset_parameters(generator)

    @classmethod
    @torch.no_grad()
    def from_attention(
        cls,
        module: nn.Module,
        *,
        parametrization: str = FIXED_RANK,
        section: str = "svd",
        chart_scale: float | None = None,
        columns: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The same function as an ordinary attention, its gauge forgotten.

        Parameters
        ----------
        module : nn.MultiheadAttention or quotientopt.models.Attention
            Read, not changed.
        parametrization, section, chart_scale
            As of the class.
        columns : mapping of str to Tensor, optional
            For the chart, which r columns of B are the multiple of the identity: ``"qk"`` and
            ``"vo"`` to integers of shape ``(key_value_heads, r)``, for rotary planes
            ``(key_value_heads, r / 2)``; of a map with a bias that is the last column. Default:
            the best conditioned, by QR with column pivoting on an orthonormal basis.

        Returns
        -------
        InvariantAttention
            Of the module's dtype, device, training mode and ``requires_grad``.

        Raises
        ------
        TypeError
            If the module is neither, or computes something else than its class.
        ValueError
            For ``add_bias_kv``, ``add_zero_attn``, partly frozen parameters,
            rank-deficient pairs, columns that make no chart, and columns without a chart.

        Warns
        -----
        UserWarning
            If the chart is badly conditioned: more than ε^{-1/2}, see :meth:`chart_condition`.
        """
        kind, shape, matrices = read_attention(module)
        trained = {parameter.requires_grad for parameter in module.parameters()}
        if len(trained) > 1:
            raise ValueError(
                f"some parameters of {type(module).__name__} are frozen and others not, and a "
                "point is trained as one; make requires_grad equal"
            )
        if columns is not None and (parametrization != CHART or set(columns) - {"qk", "vo"}):
            raise ValueError(
                "columns are chosen for parametrization='chart' and the pairs 'qk' and 'vo', got "
                f"{parametrization!r} and {sorted(columns)}"
            )
        weight = matrices.query
        self = cls.__new__(cls)
        self._build(shape, parametrization, section, chart_scale, weight.device, weight.dtype)
        self._set_points(matrices, columns)
        self.came_from = kind
        self.requires_grad_(trained.pop())
        return self.train(module.training)

    @torch.no_grad()
    def to_attention(self, kind: str | None = None) -> nn.MultiheadAttention | Attention:
        """An ordinary attention that computes the same, with the representative for weights.

        Parameters
        ----------
        kind : {"torch", "reference"}, optional
            ``nn.MultiheadAttention`` or ``quotientopt.models.Attention``. Default: the class this
            came from by :meth:`from_attention`, else the first of ``"reference"``, ``"torch"``
            that has a place for everything.

        Raises
        ------
        ValueError
            If the class has no place for something; it is named.
        """
        module = write_attention(
            kind_for(kind, self.came_from, self.shape), self.shape, self._read()
        )
        module.requires_grad_(self.query.weight.requires_grad)
        return module.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        """Attend.

        Parameters
        ----------
        query : Tensor
            Shape (batch, L, width), or (L, batch, width) without ``batch_first``, or (L, width).
        key, value : Tensor, optional
            Likewise with S. Default: `query`, and `key`.
        attn_mask : Tensor, optional
            Shape (L, S), (batch · heads, L, S), or four axes that broadcast to
            (batch, heads, L, S). As for ``nn.MultiheadAttention``: boolean, where True is not
            attended to, or floating-point, added to the scores. A query that may attend to
            nothing gets zero, plus the output's bias, which holds what that of the values added.
        key_padding_mask : Tensor, optional
            Shape (batch, S), likewise; S counts the cache.
        is_causal : bool, optional
            Default: the module's. The last query has the position of the last key, here and for
            rotary positions.
        cache : tuple of Tensor, optional
            Keys and values of earlier positions, (batch, key_value_heads, S', r) each, as returned
            before; new ones are appended.
        use_cache : bool
            Whether to return the cache; implied by `cache`.

        Returns
        -------
        Tensor, or tuple of Tensor and cache
            Shaped like `query`.

        Raises
        ------
        TypeError
            If a mask is neither boolean nor floating-point.
        ValueError
            If a shape does not fit, of inputs, masks or the cache.
        """
        key = query if key is None else key
        value = key if value is None else value
        self._check_inputs(query, key, value)
        batched = query.ndim == 3
        if batched and not self.shape.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        elif not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None and key_padding_mask.ndim == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        if cache is not None:
            self._check_cache(cache, len(query))
        queries = self._split(self.query(query))
        keys, values = self._split(self.key(key)), self._split(self.value(value))
        if self.shape.rotary:
            past = 0 if cache is None else cache[0].shape[-2]
            queries, keys = _turned(queries, keys, past)
        if cache is not None:
            keys, values = (
                torch.cat((old, new), dim=-2)
                for old, new in zip(cache, (keys, values), strict=True)
            )
        causal = self.shape.causal if is_causal is None else is_causal
        mask, causal = merge_masks(queries, keys, attn_mask, key_padding_mask, causal)
        mixed = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.shape.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.shape.scale,
            enable_gqa=self.shape.query_groups > 1,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        if not batched:
            output = output.squeeze(0)
        elif not self.shape.batch_first:
            output = output.transpose(0, 1)
        return (output, (keys, values)) if use_cache or cache is not None else output

    def _split(self, x: Tensor) -> Tensor:
        """(batch, length, heads · r) to (batch, heads, length, r)."""
        return x.unflatten(-1, (-1, self.shape.head_width)).transpose(1, 2)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = (self.shape.width, self.shape.key_width, self.shape.value_width)
        for name, x, width in zip(
            ("query", "key", "value"), (query, key, value), widths, strict=True
        ):
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != width:
                raise ValueError(
                    f"{name} must have two or three axes like the others, the last of size "
                    f"{width}, got {tuple(x.shape)}"
                )
        # The kernel broadcasts batches, and reads past the end of values that are too few.
        batch = 0 if self.shape.batch_first else 1
        length = 0 if query.ndim == 2 else 1 - batch
        one_batch = query.ndim == 2 or query.shape[batch] == key.shape[batch] == value.shape[batch]
        if not one_batch or key.shape[length] != value.shape[length]:
            raise ValueError(
                "query, key and value must have one batch size, and as many values as keys, got "
                f"{', '.join(str(tuple(x.shape)) for x in (query, key, value))}"
            )

    def _check_cache(self, cache: Cache, batch: int) -> None:
        wanted = (batch, self.shape.key_value_heads, self.shape.head_width)
        parts = cache if isinstance(cache, (tuple, list)) else ()
        shapes = [tuple(x.shape) for x in parts if isinstance(x, Tensor)]
        if (
            not len(parts) == len(shapes) == 2
            or shapes[0] != shapes[1]
            or len(shapes[0]) != 4
            or (*shapes[0][:2], shapes[0][3]) != wanted
        ):
            raise ValueError(
                f"cache must be keys and values of shape {(*wanted[:2], 'S', wanted[2])} each, as "
                f"returned before, got {shapes}"
            )

    def extra_repr(self) -> str:
        shape = self.shape
        return (
            f"width={shape.width}, heads={shape.heads}, key_value_heads={shape.key_value_heads}, "
            f"head_width={shape.head_width}, parametrization={self.parametrization!r}"
        )


def _turned(queries: Tensor, keys: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """Queries and new keys turned by their positions, the keys' after `past` earlier ones."""
    length = past + keys.shape[-2]
    start = length - queries.shape[-2]
    if start < 0:
        raise ValueError(
            f"rotary attention of {queries.shape[-2]} queries needs as many keys, got {length}"
        )
    cosines, sines = rotary_angles(length, queries.shape[-1], queries)
    return (
        rotate(queries, cosines[start:], sines[start:]),
        rotate(keys, cosines[past:], sines[past:]),
    )
