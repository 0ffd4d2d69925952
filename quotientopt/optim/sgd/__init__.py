"""QuotientSGD: invariant metrics, gradients and projections of stacked pairs, the optimizer."""
