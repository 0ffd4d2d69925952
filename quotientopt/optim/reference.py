"""QuotientAdam in its plainest form: read this first.

One pair and one matrix at a time, nothing stacked, scheduled or saved; tests hold the fast path to
it. :class:`PlainQuotientAdam` covers attention heads and matrices on the residual stream,
:class:`PlainLowRankAdam` pairs of LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of σ, σ³, …: one step towards the polar factor, and the composition that reaches it.
from quotientopt.optim.polar import COEFFICIENTS, COMPOSITION

State = dict[str, Any]
Pairs = Sequence[tuple[Tensor, Tensor]]


def svd_section(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(g, g^{-T}) with equal diagonal Grams of (g^{-T} A, g B), head by head."""
    fields: tuple[list[Tensor], list[Tensor]] = ([], [])
    for a, b in zip(A, B, strict=True):
        left, right = torch.linalg.cholesky(a @ a.T), torch.linalg.cholesky(b @ b.T)
        U, sigma, Vt = torch.linalg.svd(left.T @ right)
        fields[0].append(sigma.sqrt().diag() @ Vt @ torch.linalg.inv(right))
        fields[1].append(sigma.sqrt().diag() @ U.T @ torch.linalg.inv(left))
    return torch.stack(fields[0]), torch.stack(fields[1])


def dressing(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The section's (g, g^{-T}), taken twice: the second time repairs what the first rounded."""
    g, contragredient = svd_section(A, B)
    again, again_contragredient = svd_section(contragredient @ A, g @ B)
    return again @ g, again_contragredient @ contragredient


class PlainQuotientAdam:
    """Adam on dressed fields for pairs ``(heads, r, n)`` under GL(r) and matrices ``(rows, d)``.

    Matrices ``(experts, rows, d)`` share their frame on the residual axis; each has a polar factor.

    Each step: the dressing ``section``, the average covariances ``C`` (rows of heads, not dressed)
    and ``R`` (residual axis), their eigenframes, Adam there, the polar factor, and back. Of
    ``embeddings``, matrices ``(rows, d)`` too, the frame stays as it was first made, from the
    weights, and Adam's direction as it is; a frame of ``outputs``, also ``(rows, d)``, follows, and
    Adam's direction stays as it is. ``hidden`` frames the rows of ``matrices`` as well (with
    ``row_frame="per_matrix"``), all of their directions or the leading ones; ``factored`` keeps
    means of rows and columns of the second moment. The options are those of
    :class:`quotientopt.QuotientAdam`.
    """

    def __init__(
        self,
        pairs: Pairs,
        matrices: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        *,
        outputs: Sequence[Tensor] = (),
        embeddings: Sequence[Tensor] = (),
        refresh: int = 10,
        residual: bool = True,
        nesterov: bool = False,
        polar: bool | str = False,
        row_frame: str = "per_head",
        update_scale: float = 4.0,
        embedding_scale: float = 2.0,
        hidden: str | None = None,
        factored: bool = False,
    ) -> None:
        self.scale, self.embedding_scale, self.factored = update_scale, embedding_scale, factored
        self.pairs, self.lr, self.betas, self.decay = pairs, lr, betas, weight_decay
        self.refresh, self.residual, self.nesterov, self.t = refresh, residual, nesterov, 0
        self.params: list[Any] = [p for pair in pairs for p in pair]
        self.params += [*matrices, *outputs, *embeddings]
        self.polar, self.joint = polar, row_frame == "per_matrix"
        self.state: list[State] = [
            dict.fromkeys(("m", "v", "rows", "columns"), torch.zeros(()))
            | {"outside": place >= len(self.params) - len(embeddings) - len(outputs)}
            | {"fixed": place >= len(self.params) - len(embeddings)}
            for place in range(len(self.params))
        ]
        for matrix, s in zip([*matrices, *outputs], self.state[2 * len(pairs) :], strict=False):
            if matrix.ndim == 3:
                s["stacked"] = True
                continue
            rows, columns = matrix.shape
            framed = not s["outside"] or (rows <= 4 * columns and not factored)
            if hidden == "per_matrix" and framed:
                # No group acts on the rows; they are turned like those of heads.
                s["section"] = torch.eye(rows, dtype=matrix.dtype)[None]
            elif hidden == "leading" and rows > columns and not s["outside"]:
                s["directions"] = columns // 2

    @torch.no_grad()
    def step(self) -> None:
        """One step, from the gradients of all parameters."""
        self.t += 1
        fresh = self.t == 1 or self.t % self._interval(self.refresh) == 0
        for i, pair in enumerate(self.pairs if fresh else ()):
            for side, field in enumerate(dressing(*pair)):
                self.state[2 * i + side]["section"] = self._of_rows(field)
        pooled = sum(self._weights_gram(p, s) for p, s in zip(self.params, self.state, strict=True))
        for p, s in zip(self.params, self.state, strict=True):
            dressed = p.grad
            if "section" in s:
                rows = self._rows(p.grad)
                s["C"] = self._average(s.get("C"), rows @ rows.mT)
                dressed = s["section"] @ rows
            rows = dressed.reshape(-1, p.size(-1))
            s["R"] = self._average(s.get("R"), rows.T @ rows)
            if "directions" in s:
                self._lead(p, s, fresh)
            if fresh:
                self._turn(p, s, pooled)
            self._update(p, s)

    def _of_rows(self, blocks: Tensor) -> Tensor:
        """Matrices of the heads as one of all rows, where those share a frame."""
        return torch.block_diag(*blocks)[None] if self.joint else blocks

    def _rows(self, x: Tensor) -> Tensor:
        """A factor ``(heads, r, n)`` as ``(1, heads r, n)``, where all rows share a frame."""
        return x.reshape(1, -1, x.size(-1)) if self.joint else x

    def _toward_polar(self, update: Tensor) -> Tensor:
        """The update with its singular values made equal, or nearly, at the same norm."""
        if not self.polar:
            return update
        if self.polar == "step" and update.ndim == 3:
            return torch.stack([self._toward_polar(head) for head in update])
        U, sigma, Vt = torch.linalg.svd(update.reshape(-1, update.size(-1)), full_matrices=False)
        power, polynomials = (4, (COEFFICIENTS,)) if self.polar == "step" else (8, COMPOSITION)
        size, sigma = sigma.norm(), sigma / sigma.pow(power).sum().pow(1 / power)
        for coefficients in polynomials:
            sigma = sum((c * sigma ** (2 * i + 1) for i, c in enumerate(coefficients)), 0 * sigma)
        return (size * U @ (sigma / sigma.norm()).diag() @ Vt).reshape(update.shape)

    def _average(self, old: Tensor | None, new: Tensor) -> Tensor:
        """The average over twice as many steps as frames last, twenty at most."""
        if old is None:
            return new
        interval = self._interval(min(self.refresh, 10))
        every = 2 if interval == 10 else 1
        weight = every / (2 * interval)
        return (1 - weight) * old + weight * new if self.t % every == 0 else old

    def _interval(self, longest: int) -> int:
        """Steps between frames: an eighth of those so far."""
        return min(max(self.t // 8, 1), longest)

    @staticmethod
    def _break_ties(covariance: Tensor, *weights_grams: Tensor, ties: float = 1e-3) -> Tensor:
        first, *others = (
            x / x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            for x in (covariance, *weights_grams)
        )
        return first + ties * sum(others)

    def _dressed(self, p: Tensor, s: State) -> Tensor:
        return torch.linalg.inv(s["section"]).mT @ self._rows(p) if "section" in s else p

    def _weights_gram(self, p: Tensor, s: State) -> Tensor:
        rows = self._dressed(p, s).reshape(-1, p.size(-1))
        return rows.T @ rows

    def _turn(self, p: Tensor, s: State, pooled: Any) -> None:
        if "section" in s:
            self._turn_rows(p, s)
        if self.residual and s["fixed"]:
            if "Q" not in s:
                s["Q"] = torch.linalg.eigh(self._break_ties(self._weights_gram(p, s), pooled))[1]
        elif self.residual:
            if "Q" not in s:
                broken = self._break_ties(s["R"], self._weights_gram(p, s), pooled)
                s["Q"] = torch.linalg.eigh(broken)[1]
                return
            Q = self._iterate(s["R"], s["Q"])
            for key in ("columns" if self.factored else "v", *(["along"] if "E" in s else [])):
                s[key] = s[key] @ (s["Q"].T @ Q).square()
            s["Q"] = Q

    def _turn_rows(self, p: Tensor, s: State) -> None:
        """The head frame u = O · section; the second moment moves along."""
        section, weights = s["section"], self._dressed(p, s)
        dressed = section @ s["C"] @ section.mT
        change = section @ torch.linalg.inv(s["frame"]) if "frame" in s else None
        if not self.joint:
            turn = torch.linalg.eigh(self._break_ties(dressed, weights @ weights.mT))[1]
        elif change is None:
            # Of the weights head by head; hidden units are heads of one row.
            heads = weights.reshape(p.shape if p.ndim == 3 else (len(p), 1, -1))
            gram = torch.block_diag(*(heads @ heads.mT))[None]
            turn = torch.linalg.eigh(self._break_ties(dressed, gram, ties=0.1))[1].flip(-1)
        else:
            turn = self._iterate(dressed[0], change[0])[None]
        if change is not None:
            key = "rows" if self.factored else "v"
            s[key] = (turn.mT @ change).square() @ s[key]
        s["frame"] = turn.mT @ section

    def _lead(self, p: Any, s: State, fresh: bool) -> None:
        """The frame E of the leading directions of a matrix's rows, and its image C E."""
        if "E" not in s:
            both = p.grad / p.grad.norm() + 0.1 * p / p.norm()
            s["E"] = torch.linalg.svd(both)[0][:, : s["directions"]]
            s["along"] = torch.zeros(s["directions"], p.size(-1), dtype=p.dtype)
            return
        E = s["E"]
        s["image"] = self._average(s.get("image"), p.grad @ (p.grad.T @ E))
        if fresh:
            s["E"] = self._towards(s["image"] / (E * s["image"]).sum(), E)
            R = s["E"].T @ E
            rest = s["columns"] if self.factored else s["v"].mean(0, keepdim=True)
            lost = 1 - R.square().sum(-1, keepdim=True)
            s["along"] = R.square() @ s["along"] + lost * rest
            s["image"] = s["image"] @ R.T

    def _iterate(self, covariance: Tensor, frame: Tensor) -> Tensor:
        """One step of orthogonal iteration, largest Rayleigh quotient first."""
        return self._towards(covariance @ frame / covariance.trace(), frame)

    @staticmethod
    def _towards(image: Tensor, frame: Tensor) -> Tensor:
        order = (frame * image).sum(0).argsort(descending=True)
        Q, upper = torch.linalg.qr((image + 1e-3 / frame.size(-1) * frame)[:, order])
        return Q * upper.diagonal().sign()

    def _update(self, p: Any, s: State) -> None:
        def into(x: Tensor) -> Tensor:
            x = s["frame"] @ x if "frame" in s else x
            return x @ s["Q"] if "Q" in s else x

        (b1, b2), t = self.betas, self.t
        gradient = self._rows(p.grad) if "frame" in s else p.grad
        s["m"] = b1 * s["m"] + (1 - b1) * gradient
        E = s.get("E", gradient.new_zeros(p.size(0), 0))

        def rest(x: Tensor) -> Tensor:
            return x - E @ (E.T @ x) if "E" in s else x

        square = rest(into(gradient)).square()
        if self.factored:
            s["rows"] = b2 * s["rows"] + (1 - b2) * square.mean(-1, keepdim=True)
            means = square.mean(tuple(range(square.ndim - 1)), keepdim=True)
            s["columns"] = b2 * s["columns"] + (1 - b2) * means
            s["v"] = s["rows"] * s["columns"] / s["columns"].mean()
        else:
            s["v"] = b2 * s["v"] + (1 - b2) * square
        m = into(s["m"]) / (1 - b1**t)
        if self.nesterov:
            m = b1 * into(s["m"]) / (1 - b1 ** (t + 1)) + (1 - b1) * into(gradient) / (1 - b1**t)
        update = rest(m) / ((s["v"] / (1 - b2**t)).sqrt() + 1e-8)
        if "E" in s:
            s["along"] = b2 * s["along"] + (1 - b2) * (E.T @ into(gradient)).square()
            along = E.T @ m / ((s["along"] / (1 - b2**t)).sqrt() + 1e-8)
            update = update + E @ along
        if "stacked" in s:
            update = torch.stack([self._toward_polar(matrix) for matrix in update])
        elif not s["outside"]:
            update = self._toward_polar(update)
        update = update @ s["Q"].T if "Q" in s else update
        update = s["frame"].mT @ update if "frame" in s else update
        rate = self.lr * self.scale if "Q" in s or "frame" in s else self.lr
        if "Q" in s and s["outside"]:
            rate *= self.embedding_scale if s["fixed"] else 1.0
            rate *= 128 / min(max(p.size(-1), 128), 1024)
        p.mul_(1 - rate * self.decay).sub_(rate * update.reshape(p.shape))


class PlainLowRankAdam:
    """Adam in orthonormal coordinates of the partner, for pairs (X, Y) of shape (r, n), (r, m)."""

    def __init__(
        self,
        pairs: Pairs,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        refresh: int = 10,
        nesterov: bool = True,
        polar: bool = False,
    ) -> None:
        self.pairs, self.lr, self.betas, self.eps = pairs, lr, betas, eps
        self.decay, self.refresh = weight_decay, refresh
        self.nesterov, self.polar, self.t = nesterov, polar, 0
        self.state: list[tuple[State, State]] = [({}, {}) for _ in pairs]

    @torch.no_grad()
    def step(self, gradients: Pairs) -> None:
        """One step, from the gradients of all pairs."""
        self.t += 1
        for (X, Y), partials, states in zip(self.pairs, gradients, self.state, strict=True):
            steps = [
                self._factor_step(own, partner, partial, state)
                for own, partner, partial, state in zip(
                    (X, Y), (Y, X), partials, states, strict=True
                )
            ]
            for factor, step in zip((X, Y), steps, strict=True):
                if step is not None:
                    factor.mul_(1 - self.lr * self.decay).sub_(self.lr * step)

    def _factor_step(
        self, own: Tensor, partner: Tensor, partial: Tensor, s: State
    ) -> Tensor | None:
        """The step of one factor before the learning rate; None where the partner is zero."""
        if not partner.any():
            return None
        first = not s
        interval = min(max(self.t // self.refresh, 1), self.refresh)
        if first or self.t % interval == 0:
            self._make_coordinates(partner, partial, s, first)
        z, t = s["frame"] @ partial, s["t"] + 1
        (b1, b2), m, v = self.betas, s["m"], s["v"]
        m = b1 * m + (1 - b1) * z
        v = b2 * v + (1 - b2) * z.square()
        s.update(m=m, v=v, t=t)
        mean = m / (1 - b1**t)
        if self.nesterov:
            mean = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * z / (1 - b1**t)
        D = mean / ((v / (1 - b2**t)).sqrt() + self.eps)
        return s["frame"].T @ (orthogonal(D) if self.polar else D)

    def _make_coordinates(self, partner: Tensor, partial: Tensor, s: State, first: bool) -> None:
        """Orthonormal coordinates of the partner; the moments move along."""
        rows = partner if first else s["frame"] @ partner
        coordinates = gram_schmidt(rows)
        frame = coordinates @ torch.linalg.pinv(partner)
        z = frame @ partial
        if first:
            s.update(coordinates=coordinates, C=z @ z.T, m=0 * z, v=0 * z, t=0, made=0)
        beta = 0.95 ** (s["t"] - s["made"])
        carry = coordinates @ s["coordinates"].T
        C = s["C"] if first else beta * carry @ s["C"] @ carry.T + (1 - beta) * z @ z.T
        if first or self.t <= self.refresh or self.t % self.refresh == 0:
            places = torch.linspace(-1, 1, partner.size(1), dtype=partner.dtype).diag()
            broken = C / C.trace() + 1e-3 * coordinates @ places @ coordinates.T
            turn = torch.linalg.eigh(broken)[1].T.flip(0)
            coordinates, frame, carry = (turn @ x for x in (coordinates, frame, carry))
            C = turn @ C @ turn.T
        m, v = carry @ s["m"], carry.square() @ s["v"]
        s.update(coordinates=coordinates, frame=frame, C=C, m=m, v=v, made=s["t"])


def gram_schmidt(rows: Tensor) -> Tensor:
    """Orthonormal rows, one after the other (twice, which is enough)."""
    found: list[Tensor] = []
    for row in rows:
        for _ in range(2):
            for other in found:
                row = row - (row @ other) * other
        found.append(row / row.norm())
    return torch.stack(found)


def orthogonal(D: Tensor) -> Tensor:
    """Singular values brought closer together by the optimizer's polynomial, the norm kept."""
    U, sigma, Vt = torch.linalg.svd(D, full_matrices=False)
    size, sigma = sigma.norm(), sigma / sigma.pow(4).sum().pow(0.25)
    coefficients = (7.9348, -56.0039, 166.6517, -202.4902, 85.1685)
    terms = zip(coefficients, (1, 3, 5, 7, 9), strict=True)
    sigma = sum(coefficient * sigma**power for coefficient, power in terms)
    return size * U @ (sigma / sigma.norm()).diag() @ Vt
