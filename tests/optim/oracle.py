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
        pooled = sum(self._weights_gram(p, s) for p, s in zip(self.params, self.state, strict=True))
        for p, s in zip(self.params, self.state, strict=True):
            dressed = p.grad
            if "section" in s:
                s["C"] = self._average(s.get("C"), p.grad @ p.grad.mT)
                dressed = s["section"] @ p.grad
            rows = dressed.reshape(-1, p.size(-1))
            s["R"] = self._average(s.get("R"), rows.T @ rows)
            if fresh:
                self._turn(p, s, pooled)
            self._update(p, s)

    def _toward_polar(self, update):
        """Singular values, of each head or of a matrix, evened out by the same polynomial."""
        if update.ndim == 3:
            return torch.stack([self._toward_polar(head) for head in update])
        U, sigma, Vt = torch.linalg.svd(update, full_matrices=False)
        size, sigma = sigma.norm(), sigma / sigma.pow(4).sum().pow(0.25)
        coefficients = (7.9348, -56.0039, 166.6517, -202.4902, 85.1685)
        terms = zip(coefficients, (1, 3, 5, 7, 9), strict=True)
        sigma = sum(coefficient * sigma**power for coefficient, power in terms)
        return size * U @ (sigma / sigma.norm()).diag() @ Vt if self.polar else update

    def _average(self, old, new):
        if old is None:
            return new
        return 0.9 * old + 0.1 * new if self.t % 2 == 0 else old

    @staticmethod
    def _break_ties(covariance, *weights_grams):
        first, *others = (
            x / x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
            for x in (covariance, *weights_grams)
        )
        return first + 1e-3 * sum(others)

    @staticmethod
    def _dressed(p, s):
        return torch.linalg.inv(s["section"]).mT @ p if "section" in s else p

    def _weights_gram(self, p, s):
        rows = self._dressed(p, s).reshape(-1, p.size(-1))
        return rows.T @ rows

    def _turn(self, p, s, pooled):
        weights = self._dressed(p, s)
        if "section" in s:
            dressed = self._break_ties(
                s["section"] @ s["C"] @ s["section"].mT, weights @ weights.mT
            )
            frame = torch.linalg.eigh(dressed)[1].mT @ s["section"]
            if "frame" in s:
                s["v"] = (frame @ torch.linalg.inv(s["frame"])).square() @ s["v"]
            s["frame"] = frame
        if self.residual:
            if "Q" not in s:
                broken = self._break_ties(s["R"], self._weights_gram(p, s), pooled)
                s["Q"] = torch.linalg.eigh(broken)[1]
                return
            R = s["R"] / s["R"].trace()
            image = (R + 1e-3 / len(R) * torch.eye(len(R), dtype=R.dtype)) @ s["Q"]
            image = image[:, (s["Q"] * image).sum(0).argsort(descending=True)]
            Q, upper = torch.linalg.qr(image)
            Q = Q * upper.diagonal().sign()
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
        update = self._toward_polar(update)
        update = update @ s["Q"].T if "Q" in s else update
        update = s["frame"].mT @ update if "frame" in s else update
        p.mul_(1 - self.lr * self.decay).sub_(self.lr * update)
