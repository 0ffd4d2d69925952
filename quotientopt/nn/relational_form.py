"""An ordinary Transformer in relational form: computed from inner products alone.

Under ``X → X Qᵀ, W → W Qᵀ``, all matrices written with their residual axis last, nothing moves but
coordinates. What is left of tokens x and of rows w of the weights are their inner products, and
they are enough: reading is ``⟨x, w⟩``, a norm needs ``⟨x, x⟩``, and writing ``x + Σ c_a w_a`` adds
``Σ c_a ⟨w_a, ·⟩`` to every other inner product. The stream is kept as the coefficients c of all
that was written to it; no number that depends on the frame is ever formed.

A model is read into *rows*, its vectors in the stream, and *offsets*, numbers of hidden axes; then
a *plan* says what is read and written. Gains and biases of norms that come before a layer are
folded into the rows and offsets of that layer. What else is a vector is one more row: positions,
output biases and, under LayerNorm, the all-ones vector.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from quotientopt._linalg import check_floating, wide
from quotientopt.models.attention import rotary_angles
from quotientopt.nn.relational_coefficients import (
    CoefficientStream,
    GramsOfRows,
    JointGram,
    KeptGrams,
    Masks,
    RecordingGrams,
    Rotation,
    Weights,
    attend,
    perceive,
    slices_of,
)
from quotientopt.nn.relational_plan import (
    POSITIONS,
    READOUT,
    TOKENS,
    Attend,
    Plan,
    PlannedNorm,
    read_module,
)


class StreamRelations(NamedTuple):
    """What a form without an output head returns.

    Attributes
    ----------
    tokens : Tensor, shape (*batch, N, N)
        Inner products of the tokens that the original would return.
    products : Tensor, shape (*batch, N, k)
        Their inner products with the k vectors of `readout`; k = 0 without.
    """

    tokens: Tensor
    products: Tensor


def relational_form(
    model: nn.Module, *, readout: Tensor | None = None, chunk_size: int | None = None
) -> RelationalForm:
    """The same function, of inner products alone.

    Parameters
    ----------
    model : Module
        ``quotientopt.models.GPT`` or ``Llama`` (grouped queries, rotary), an attention of theirs,
        ``nn.TransformerEncoder`` or one of its layers, ``nn.MultiheadAttention`` as self-attention,
        or the causal language model, decoder layer or attention of transformers' Llama. Gains and
        biases of norms in front of a layer are folded; a norm *on* the stream (``norm_first=False``
        or a final one without a reader) must have equal gains, since others single out a basis.
    readout : Tensor, shape (k, d), optional
        For models without an output head: vectors to read the result by, in the model's frame; a
        head, or the unit vectors, whose inner products are coordinates.
    chunk_size : int, optional
        By default the inner products between rows are computed once and kept. With a chunk size the
        rows are kept instead, in the frame that the model happens to have, and at most
        ``chunk_size²`` inner products are formed at a time.

    Returns
    -------
    RelationalForm

    Raises
    ------
    TypeError
        If the model is of no class that is understood.
    ValueError
        If a part of it singles out a basis of the stream, or does what the form has no place for.

    Examples
    --------
    >>> model = qo.models.reference_model("gpt", layers=2).double()
    >>> form = relational_form(model)
    >>> ids = torch.randint(256, (2, 16))
    >>> torch.allclose(form(ids), model(ids), atol=1e-10)
    True
    """
    return RelationalForm(model, readout=readout, chunk_size=chunk_size)


class RelationalForm(nn.Module):
    """An ordinary model computed from inner products; made by :func:`relational_form`.

    Attributes
    ----------
    rows : dict of str to int
        Names of the stacks of rows and their lengths, in the order of ``JointGram.products``.

    Notes
    -----
    With m rows written so far, reading k rows takes ``N m k`` multiplications where the original
    takes ``N d k``: cheaper while fewer vectors were written than the stream is wide, as in a first
    layer of few heads; dearer in a deep model, where m grows with every layer. Kept are the Grams
    of writers with all later rows; :meth:`cost` counts both. Tokens are never given coordinates,
    so that memory per token is m, not d.
    """

    def __init__(
        self, model: nn.Module, *, readout: Tensor | None = None, chunk_size: int | None = None
    ) -> None:
        super().__init__()
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")
        plan = read_module(model, readout)
        self.plan, self.chunk_size, self._readout = plan, chunk_size, readout is not None
        self.rows = {name: len(rows) for name, rows in plan.rows.items()}
        self.width, self._rotary = plan.width, plan.rotary
        self._pairs, self._single = self._needed()
        with torch.no_grad():
            weights = GramsOfRows(plan.rows, None) if chunk_size else self._weights(plan)
            self._store(weights, plan)
        plan.rows, plan.offsets, plan.rotary = {}, {}, None

    def forward(
        self,
        inputs: Tensor | JointGram,
        *,
        weights: Weights | Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        position_embeddings: Rotation | None = None,
    ) -> Tensor | StreamRelations:
        """The logits of the original, or the relations of what it would return.

        Parameters
        ----------
        inputs : Tensor or JointGram
            For a model with embeddings its token numbers, (*batch, N): their inner products are
            among those of the weights. For others the inner products of the tokens, as
            :meth:`joint_gram` forms them, or one matrix, the Gram matrix of tokens and rows
            together, (*batch, N + M, N + M), tokens first; the rows' own part is taken from the
            first batch item.
        weights : Weights or Tensor, optional
            Instead of the form's own, as :meth:`weights_of` returns them, for gradients; or the
            Gram matrix of all rows, (M, M), in the order of :attr:`rows`.
        attn_mask, key_padding_mask : Tensor, optional
            As of ``nn.MultiheadAttention``: True, or −inf, where one may not attend.
        position_embeddings : tuple of Tensor, optional
            Cosines and sines for a decoder layer or attention of transformers.

        Raises
        ------
        TypeError, ValueError
            If inputs do not fit.
        """
        stream = self._start(inputs, weights)
        shape = tuple(stream.squares.shape)
        masks = Masks(shape, attn_mask, key_padding_mask)
        rotation = self._rotation(position_embeddings, shape, stream)
        return self._run(stream, masks, rotation)

    @torch.no_grad()
    def contributions(
        self, inputs: Tensor | JointGram, *, position_embeddings: Rotation | None = None
    ) -> dict[tuple[str, str], Tensor]:
        """Which inner products the model uses: root mean squares of what every ⟨x, w⟩ is made of.

        Keys are (what was written, what reads it), names of :attr:`rows` or ``"input"`` for given
        tokens; values the root mean square of ``Σ c_a ⟨w_a, w⟩`` over tokens and reading rows,
        before the norm divides. Inputs as of :meth:`forward`.
        """
        stream = self._start(inputs, None)
        stream.record = {}
        shape = tuple(stream.squares.shape)
        rotation = self._rotation(position_embeddings, shape, stream)
        self._run(stream, Masks(shape, None, None), rotation)
        return stream.record

    def _start(
        self, inputs: Tensor | JointGram, weights: Weights | Tensor | None
    ) -> CoefficientStream:
        """The stream before the first layer."""
        given: JointGram | None = None
        if isinstance(weights, Tensor):
            weights = self._sliced(weights)
        if self.plan.embedded:
            ids = self._checked_ids(inputs)
            shape = tuple(ids.shape)
        else:
            given = self._given(inputs)
            weights = given.weights if weights is None else weights
            ids, shape = given.products, tuple(given.products.shape[:-1])
        source = self._own() if weights is None else weights
        grams = source if isinstance(source, GramsOfRows) else KeptGrams(source)
        stream = CoefficientStream(grams, self.width)
        if given is not None:
            stream.begin(given, self.rows)
        else:
            stream.embed(TOKENS, ids)
            if self.plan.positions:
                positions = torch.arange(shape[-1], device=ids.device).expand(shape)
                stream.embed(POSITIONS, positions)
        return stream

    def weights_of(self, model: nn.Module) -> Weights:
        """The inner products of another model of this form, with gradients to its parameters.

        ``form(ids, weights=form.weights_of(model))`` has the value and the gradients of the model.
        """
        return self._weights(self._plan_of(model))

    def joint_gram(self, model: nn.Module, X: Tensor) -> JointGram:
        """Inner products of tokens X, (*batch, N, d), with each other and with a model's rows."""
        check_floating("X", X)
        if X.ndim < 2 or X.shape[-1] != self.width:
            raise ValueError(f"X must have shape (*batch, N, {self.width}), got {tuple(X.shape)}")
        plan = self._plan_of(model)
        rows = wide(torch.cat(list(plan.rows.values())))
        tokens = wide(X)
        products, gram = tokens @ rows.mT, tokens @ tokens.mT
        return JointGram(gram.to(X.dtype), products.to(X.dtype), self._weights(plan))

    def cost(self) -> dict[str, int]:
        """Numbers kept, and multiplications per token outside the attention scores.

        ``"kept"`` and ``"parameters"``: of the form and of the rows in coordinates;
        ``"per token"`` and ``"per token, original"``: multiplications.
        """
        pairs = sum(self.rows[a] * self.rows[b] for a, b in self._pairs)
        one = {TOKENS, POSITIONS}
        per_token = sum(
            (1 if a in one else self.rows[a]) * self.rows[b] for a, b in self._pairs if b not in one
        )
        embedded = sum(self.rows[name] for name in one if name in self.rows)
        rows = sum(self.rows.values())
        kept = rows * self.width if self.chunk_size else pairs
        offsets = sum(offset.numel() for offset in self._offsets().values())
        if self.chunk_size is None:
            kept += sum(self.rows[name] for name in self._single)
        elif self._readout:
            kept += self.rows[READOUT] * self.width
        return {
            "kept": kept + offsets,
            "parameters": rows * self.width + offsets,
            "per token": per_token,
            "per token, original": (rows - embedded) * self.width,
        }

    # ---- running the plan ------------------------------------------------------------------------

    def _run(
        self, stream: CoefficientStream, masks: Masks, rotation: Rotation | None
    ) -> Tensor | StreamRelations:
        for step in self.plan.steps:
            if isinstance(step, PlannedNorm):
                stream.normalise(step)
                continue
            body = step.body
            before = stream.reading(step.norm)
            if isinstance(body, Attend):
                coefficients = attend(body, before, masks, rotation)
            else:
                coefficients = perceive(body, before)
            if not step.keeps:
                stream.terms.clear()
                stream.squares = torch.zeros_like(stream.squares)
            stream.write(body.output, coefficients)
            bias = f"{body.output} bias"
            if bias in self.rows:
                stream.write(bias, torch.ones_like(coefficients[..., :1]))
        if self.plan.head is not None:
            return stream.reading(self.plan.head_norm)(self.plan.head)
        products = stream.squares.new_zeros(*stream.squares.shape[:-1], 0)
        if self._readout:
            products = stream.read(READOUT)
        return StreamRelations(stream.gram(), products)

    def _needed(self) -> tuple[list[tuple[str, str]], list[str]]:
        """Pairs of stacks that a run asks for, found by a run over one token on no data."""
        recorder = RecordingGrams(self.rows, next(iter(self.plan.rows.values())))
        stream = CoefficientStream(recorder, self.width)
        one = torch.zeros(1, 1, dtype=torch.long, device=recorder.like.device)
        if self.plan.embedded:
            stream.embed(TOKENS, one)
            if self.plan.positions:
                stream.embed(POSITIONS, one)
        else:
            zeros = recorder.like.new_zeros(1, 1, sum(self.rows.values()))
            stream.begin(JointGram(recorder.like.new_zeros(1, 1, 1), zeros), self.rows)
        rotation = None
        if any(
            s.body.rotary for s in self.plan.steps if not isinstance(s, PlannedNorm) and s.attends
        ):
            half = next(s.body.rank for s in self.plan.steps if not isinstance(s, PlannedNorm)) // 2
            rotation = (recorder.like.new_ones(1, half), recorder.like.new_zeros(1, half))
        with torch.no_grad():
            self._run(stream, Masks((1, 1), None, None), rotation)
        return list(recorder.pairs), list(recorder.single)

    def _rotation(
        self, given: Rotation | None, shape: tuple[int, ...], stream: CoefficientStream
    ) -> Rotation | None:
        attends = [s.body for s in self.plan.steps if not isinstance(s, PlannedNorm) and s.attends]
        kind = next((body.rotary for body in attends if body.rotary), None)
        if given is not None and kind != "given":
            raise ValueError("position_embeddings are read by layers of transformers only")
        if kind is None:
            return None
        like = stream.squares
        if kind == "reference":
            return rotary_angles(shape[-1], attends[0].rank, like)
        if given is None:
            if self._rotary is None:
                raise ValueError(
                    "this layer takes its rotations from its model: pass position_embeddings="
                    "(cos, sin), as to the layer itself"
                )
            positions = torch.arange(shape[-1], device=like.device)[None]
            given = self._rotary(like[..., None], positions)
        cosines, sines = (part[..., : part.shape[-1] // 2].to(like) for part in given)
        # (batch, N, r/2) to one for all heads.
        return cosines.unsqueeze(-3), sines.unsqueeze(-3)

    # ---- inputs and weights ----------------------------------------------------------------------

    def _checked_ids(self, inputs: object) -> Tensor:
        if not isinstance(inputs, Tensor) or inputs.is_floating_point() or inputs.ndim < 1:
            raise TypeError("this form has embeddings: pass token numbers of shape (*batch, N)")
        if bool((inputs < 0).any()):
            raise IndexError(f"token numbers are not negative, got {int(inputs.min())}")
        if self.plan.context is not None and inputs.shape[-1] > self.plan.context:
            raise ValueError(
                f"{inputs.shape[-1]} tokens, but the model has only {self.plan.context} positions"
            )
        return inputs.long()

    def _given(self, inputs: object) -> JointGram:
        size = sum(self.rows.values())
        if isinstance(inputs, JointGram):
            given = inputs
        elif isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.ndim >= 2:
            count = inputs.shape[-1] - size
            if count < 1 or inputs.shape[-2] != inputs.shape[-1]:
                raise ValueError(
                    f"a joint Gram matrix must have shape (*batch, N + {size}, N + {size}), got "
                    f"{tuple(inputs.shape)}; tokens themselves: form(form.joint_gram(model, X))"
                )
            between = inputs[..., count:, count:].reshape(-1, size, size)[0]
            given = JointGram(
                inputs[..., :count, :count], inputs[..., :count, count:], self._sliced(between)
            )
        else:
            raise TypeError(
                "this form has no embeddings: pass a JointGram, as form.joint_gram(model, X), or "
                f"the Gram matrix of tokens and rows, got {type(inputs).__name__}"
            )
        count = given.products.shape[-2] if given.products.ndim >= 2 else -1
        if given.products.shape[-1] != size or given.tokens.shape != (
            *given.products.shape[:-1],
            count,
        ):
            raise ValueError(
                f"a JointGram has tokens (*batch, N, N) and products (*batch, N, {size}), got "
                f"{tuple(given.tokens.shape)} and {tuple(given.products.shape)}"
            )
        return given

    def _sliced(self, matrix: Tensor) -> Weights:
        """Weights from one Gram matrix of all rows."""
        size = sum(self.rows.values())
        if tuple(matrix.shape) != (size, size):
            raise ValueError(
                f"the Gram matrix of all rows has shape {(size, size)}, got {tuple(matrix.shape)}"
            )
        places = dict(zip(self.rows, slices_of(self.rows), strict=True))
        grams = {(a, b): matrix[places[a], places[b]] for a, b in self._pairs}
        diagonal = matrix.diagonal()
        squares = {name: diagonal[places[name]] for name in self._single}
        return Weights(grams, squares, self._offsets())

    def _plan_of(self, model: nn.Module) -> Plan:
        readout = None
        if self._readout:
            readout = getattr(self, "readout_rows", None)
            assert readout is not None
        plan = read_module(model, readout)
        rows = {name: len(rows) for name, rows in plan.rows.items()}
        if rows != self.rows or plan.width != self.width:
            raise ValueError(
                f"{type(model).__name__} is not the kind of model this form was made from"
            )
        return plan

    def _weights(self, plan: Plan) -> Weights:
        rows = GramsOfRows(plan.rows, None)
        grams = {pair: rows.gram(*pair) for pair in self._pairs}
        squares = {name: rows.square(name) for name in self._single}
        return Weights(grams, squares, dict(plan.offsets))

    def _store(self, weights: Weights | GramsOfRows, plan: Plan) -> None:
        """Keep tensors as buffers, so that they follow ``.to`` and ``.double`` and are saved."""
        if isinstance(weights, GramsOfRows):
            for index, rows in enumerate(plan.rows.values()):
                self.register_buffer(f"rows_{index}", rows.detach().clone())
        else:
            for index, gram in enumerate(weights.grams.values()):
                self.register_buffer(f"gram_{index}", gram)
            for index, square in enumerate(weights.squares.values()):
                self.register_buffer(f"square_{index}", square)
        for index, offset in enumerate(plan.offsets.values()):
            self.register_buffer(f"offset_{index}", offset.detach().clone())
        self._offset_names = list(plan.offsets)
        if self._readout:
            self.register_buffer("readout_rows", plan.rows[READOUT].detach().clone())

    def _offsets(self) -> dict[str, Tensor]:
        names = enumerate(self._offset_names)
        return {name: getattr(self, f"offset_{index}") for index, name in names}

    def _own(self) -> Weights | GramsOfRows:
        if self.chunk_size is not None:
            rows = {name: getattr(self, f"rows_{i}") for i, name in enumerate(self.rows)}
            return GramsOfRows(rows, self.chunk_size, self._offsets())
        grams = {pair: getattr(self, f"gram_{i}") for i, pair in enumerate(self._pairs)}
        squares = {name: getattr(self, f"square_{i}") for i, name in enumerate(self._single)}
        return Weights(grams, squares, self._offsets())

    def extra_repr(self) -> str:
        """Sizes."""
        kept = "rows" if self.chunk_size else "Grams"
        return f"width={self.width}, rows={sum(self.rows.values())}, {kept} kept"
