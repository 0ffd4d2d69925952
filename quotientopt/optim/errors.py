"""Why a step is refused."""


class StepRefusedError(ValueError):
    """A step cannot be taken; parameters and state are as they were before it."""


class GradientError(StepRefusedError):
    """A gradient is NaN, infinite, or too large to be squared."""


class RankError(StepRefusedError):
    """A factor has no head frame because it is rank-deficient or not finite."""
