"""QuotientSGD: Grams of stacked pairs, their gradients and projections, the optimizer."""
