"""What the residual stream tells: a direction between two sets of states, a linear probe. Copy it alone.

relearn.py --ablate and evaluate.py --probe are the worked examples. States are (N, D): one of width D
for each of N texts. K classes.
"""
import torch
import torch.nn.functional as F


def between(a, b):
    """(D,) direction of mean(a) - mean(b), of length 1; zeros where only rounding tells them apart."""
    a = a.double()
    b = b.double()
    apart = a.mean(0) - b.mean(0)
    if apart.norm() <= 1e-6 * b.norm(dim=-1).mean():
        return torch.zeros_like(apart)
    return apart / apart.norm()


def project_out(states, direction):
    """states (..., D) without what they have along direction (D,), which is of length 1 or 0."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    direction = direction.to(wide)
    along = (wide @ direction)[..., None]
    return (wide - along * direction).to(states.dtype)


def fit(x, y, classes):
    """(weights (D, K), bias (K,)) of multinomial logistic regression from x (N, D) to labels y (N,)
    below K: the minimum of the sum of cross-entropies + ||weights||^2 / 2, scikit-learn's default. fp64
    and convex, so that the same states give the same numbers."""
    x = x.double()
    weights = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    search = torch.optim.LBFGS([weights, bias], max_iter=500, tolerance_grad=1e-8,
                               tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = F.cross_entropy(x @ weights + bias, y, reduction="sum") + weights.square().sum() / 2
        loss.backward()
        return loss
    search.step(closure)
    return weights.detach(), bias.detach()


def probe(x, y, asked, classes):
    """(M, K) log-odds for states asked (M, D) by fit() on x (N, D), both scaled as makes x mean 0 and
    spread 1."""
    middle = x.double().mean(0)
    spread = x.double().std(0, correction=0)
    spread[spread <= 1e-9 * spread.max()] = 1.0
    weights, bias = fit((x - middle) / spread, y, classes)
    return (asked - middle) / spread @ weights + bias
