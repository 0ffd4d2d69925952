"""An equivariant start for the momentum of geoopt's RiemannianSGD."""

import geoopt
import torch


def zero_momentum_(optimizer: geoopt.optim.RiemannianSGD) -> None:
    """Let the momentum of a new RiemannianSGD start at zero.

    By itself geoopt 0.5 starts the momentum of a parameter with its first *Euclidean* gradient,
    which is no tangent vector: the steps then depend on the representative. From zero the first
    step is that of plain gradient descent (times ``1 - dampening``), and all steps are equivariant.

    Parameters
    ----------
    optimizer : geoopt.optim.RiemannianSGD
        Before its first step.

    Raises
    ------
    TypeError
        If it is another optimizer.
    ValueError
        If it has taken a step already; nothing is changed then.
    """
    if not isinstance(optimizer, geoopt.optim.RiemannianSGD):
        raise TypeError(f"optimizer must be a geoopt RiemannianSGD, got {type(optimizer).__name__}")
    if any("momentum_buffer" in state for state in optimizer.state.values()):
        raise ValueError("the optimizer has momentum already: call zero_momentum_ before step()")
    for group in optimizer.param_groups:
        if group["momentum"] > 0:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
