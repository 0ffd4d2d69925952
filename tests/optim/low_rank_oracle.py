"""QuotientAdam on LoRA pairs in its plainest form: one leg at a time, row by row."""

from __future__ import annotations

import torch


class LowRankOracle:
    """Adam in orthonormal coordinates of the partner, for pairs (X, Y) of shape (r, n), (r, m)."""

    def __init__(
        self,
        pairs,
        lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        refresh=10,
        nesterov=True,
        polar=False,
    ):
        self.pairs, self.lr, self.betas, self.eps = pairs, lr, betas, eps
        self.decay, self.refresh = weight_decay, refresh
        self.nesterov, self.polar, self.t = nesterov, polar, 0
        self.state = [({}, {}) for _ in pairs]

    @torch.no_grad()
    def step(self, gradients):
        self.t += 1
        for (X, Y), partials, states in zip(self.pairs, gradients, self.state, strict=True):
            steps = [
                self._leg(own, partner, partial, state)
                for own, partner, partial, state in zip(
                    (X, Y), (Y, X), partials, states, strict=True
                )
            ]
            for factor, step in zip((X, Y), steps, strict=True):
                if step is not None:
                    factor.mul_(1 - self.lr * self.decay).sub_(self.lr * step)

    def _leg(self, own, partner, partial, s):
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
        return s["frame"].T @ (evened(D) if self.polar else D)

    def _make_coordinates(self, partner, partial, s, first):
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


def gram_schmidt(rows):
    """Orthonormal rows, one after the other (twice, which is enough)."""
    found = []
    for row in rows:
        for _ in range(2):
            for other in found:
                row = row - (row @ other) * other
        found.append(row / row.norm())
    return torch.stack(found)


def evened(D):
    """Singular values evened out by the optimizer's polynomial, the norm kept."""
    U, sigma, Vt = torch.linalg.svd(D, full_matrices=False)
    size, sigma = sigma.norm(), sigma / sigma.pow(4).sum().pow(0.25)
    coefficients = (7.9348, -56.0039, 166.6517, -202.4902, 85.1685)
    terms = zip(coefficients, (1, 3, 5, 7, 9), strict=True)
    sigma = sum(coefficient * sigma**power for coefficient, power in terms)
    return size * U @ (sigma / sigma.norm()).diag() @ Vt
