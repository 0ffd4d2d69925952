"""QuotientAdam in its plainest form: one pair and one matrix at a time, raw first moments."""

from __future__ import annotations

import torch


def svd_section(A, B):
    """(g, g^{-T}) with equal diagonal Grams of (g^{-T} A, g B), head by head."""
    fields = [], []
    for a, b in zip(A, B, strict=True):
        left, right = torch.linalg.cholesky(a @ a.T), torch.linalg.cholesky(b @ b.T)
        U, sigma, Vt = torch.linalg.svd(left.T @ right)
        fields[0].append(sigma.sqrt().diag() @ Vt @ torch.linalg.inv(right))
        fields[1].append(sigma.sqrt().diag() @ U.T @ torch.linalg.inv(left))
    return torch.stack(fields[0]), torch.stack(fields[1])


class Oracle:
    """Adam on dressed fields for pairs ``(heads, r, n)`` under GL(r) and matrices ``(rows, d)``."""

    def __init__(
        self,
        pairs,
        matrices,
        lr,
        betas,
        weight_decay,
        *,
        refresh=10,
        residual=True,
        nesterov=False,
        polar=False,
    ):
        self.pairs, self.lr, self.betas, self.decay = pairs, lr, betas, weight_decay
        self.refresh, self.residual, self.nesterov, self.t = refresh, residual, nesterov, 0
        self.params = [p for pair in pairs for p in pair] + list(matrices)
        self.polar = polar
        self.state = [{"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in self.params]

    @torch.no_grad()
    def step(self):
        self.t += 1
        fresh = self.t == 1 or self.t % self.refresh == 0
        for i, pair in enumerate(self.pairs if fresh else ()):
            for side, field in enumerate(svd_section(*pair)):
                self.state[2 * i + side]["section"] = field
        for p, s in zip(self.params, self.state, strict=True):
            dressed = p.grad
            if "section" in s:
                s["C"] = self._average(s.get("C"), p.grad @ p.grad.mT)
                dressed = s["section"] @ p.grad
            rows = dressed.reshape(-1, p.size(-1))
            s["R"] = self._average(s.get("R"), rows.T @ rows)
            if fresh:
                self._turn(p, s)
            self._update(p, s)

    def _toward_polar(self, update):
        """Singular values by an SVD, evened out by the same polynomial."""
        U, sigma, Vt = torch.linalg.svd(update, full_matrices=False)
        size, sigma = sigma.norm(), sigma / sigma.pow(4).sum().pow(0.25)
        terms = zip((5.6041, -13.8850, 9.7343), (1, 3, 5), strict=True)
        sigma = sum(coefficient * sigma**power for coefficient, power in terms)
        return size * U @ (sigma / sigma.norm()).diag() @ Vt if self.polar else update

    @staticmethod
    def _average(old, new):
        return new if old is None else 0.95 * old + 0.05 * new

    @staticmethod
    def _break_ties(covariance, weights_gram):
        first, second = (
            x / x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            for x in (covariance, weights_gram)
        )
        return first + 1e-3 * second

    def _turn(self, p, s):
        weights = p
        if "section" in s:
            weights = torch.linalg.inv(s["section"]).mT @ p
            dressed = self._break_ties(
                s["section"] @ s["C"] @ s["section"].mT, weights @ weights.mT
            )
            frame = torch.linalg.eigh(dressed)[1].mT @ s["section"]
            if "frame" in s:
                s["v"] = (frame @ torch.linalg.inv(s["frame"])).square() @ s["v"]
            s["frame"] = frame
        if self.residual:
            weights = weights.reshape(-1, p.size(-1))
            Q = torch.linalg.eigh(self._break_ties(s["R"], weights.T @ weights))[1]
            if "Q" in s:
                s["v"] = s["v"] @ (s["Q"].T @ Q).square()
            s["Q"] = Q

    def _update(self, p, s):
        def into(x):
            x = s["frame"] @ x if "frame" in s else x
            return x @ s["Q"] if "Q" in s else x

        (b1, b2), t = self.betas, self.t
        s["m"] = b1 * s["m"] + (1 - b1) * p.grad
        s["v"] = b2 * s["v"] + (1 - b2) * into(p.grad).square()
        m = into(s["m"]) / (1 - b1**t)
        if self.nesterov:
            m = b1 * into(s["m"]) / (1 - b1 ** (t + 1)) + (1 - b1) * into(p.grad) / (1 - b1**t)
        update = m / ((s["v"] / (1 - b2**t)).sqrt() + 1e-8)
        update = self._toward_polar(update.reshape(-1, p.size(-1))).reshape(p.shape)
        update = update @ s["Q"].T if "Q" in s else update
        update = s["frame"].mT @ update if "frame" in s else update
        p.mul_(1 - self.lr * self.decay).sub_(self.lr * update)
