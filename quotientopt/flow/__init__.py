"""Gradient flow on the total space, and how much of a trajectory is gauge: ``qo.flow``.

Flows are integrated by SciPy, which is imported when one is asked for: ``pip install scipy``.
"""

from quotientopt.flow.gradient_flow import projected_gradient_flow
from quotientopt.flow.trajectory import (
    FlowEvent,
    FlowResult,
    VerticalLog,
    VerticalMotion,
    vertical_motion,
)

__all__ = [
    "FlowEvent",
    "FlowResult",
    "VerticalLog",
    "VerticalMotion",
    "projected_gradient_flow",
    "vertical_motion",
]
