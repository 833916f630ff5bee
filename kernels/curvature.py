"""How a loss bends around the weights: Hessian-vector products, largest eigenvalue, landscape. Copy it alone.

Everything takes `loss`, a closure that gives a 0-dim tensor with graph, and `params`, a list of parameters. n is
the number of weights. Double backward wants torch's own attention: wrap loss and products in
`torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)`, the others differentiate once.
"""
import itertools

import numpy as np
import torch


def flat(tensors):
    """(n,) all elements of a list of tensors."""
    return torch.cat([t.reshape(-1) for t in tensors])


def hessian(loss, params):
    """(gradient (n,), function v (n,) -> H v (n,)) of a loss with graph (a tensor), by double backward."""
    gradient = flat(torch.autograd.grad(loss, params, create_graph=True))

    def product(v):
        return flat(torch.autograd.grad(gradient, params, v, retain_graph=True, materialize_grads=True))
    return gradient.detach(), product


def power_iteration(product, start, steps, tol, shift=0.0):
    """(eigenvalue of largest magnitude of H - shift I, plus shift; ||H v - eigenvalue v||)."""
    v = start / start.norm()
    for _ in range(steps):
        w = product(v) - shift * v
        value = (v @ w).item()
        residual = (w - value * v).norm().item()
        if residual <= tol * abs(value + shift):
            break
        v = w / w.norm()
    return value + shift, residual


def top_eigenvalue(product, start, steps, tol=1e-3):
    """(largest eigenvalue, ||H v - eigenvalue v||) by power iteration from start (n,), at most `steps` steps.

    That finds the eigenvalue of largest magnitude. When it is negative, a second run on H - eigenvalue I,
    which has none below 0, finds the largest one.
    """
    value, residual = power_iteration(product, start, steps, tol)
    if value >= 0:
        return value, residual
    return power_iteration(product, start, steps, tol, shift=value)


def filter_directions(params, seed):
    """Two random directions, each filter (row of a matrix) scaled to the norm of that filter in theta; biases
    and norms, which have one dimension, stay (Li et al., arXiv 1712.09913). [[tensor like p], [...]]"""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(2):
        direction = []
        for p in params:
            d = torch.randn(p.shape, generator=rng).to(p)
            if p.dim() > 1:
                scale = p.flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)          # (rows,)
                direction.append(d * scale.view(-1, *[1] * (p.dim() - 1)))
            else:
                direction.append(torch.zeros_like(p))
        out.append(direction)
    return out


@torch.no_grad()
def landscape(params, loss, points, seed=0, reach=0.05):
    """(points, points) array of loss(theta + a d1 + b d2), a down the rows and b along them, both from -reach
    to reach, with d1 and d2 of filter_directions(). Puts the weights back, bit for bit."""
    at = np.linspace(-reach, reach, points)
    saved = [p.detach().clone() for p in params]
    d1, d2 = filter_directions(params, seed)
    out = np.zeros((points, points))
    try:
        for (i, a), (j, b) in itertools.product(enumerate(at), enumerate(at)):
            for p, old, x, y in zip(params, saved, d1, d2):
                p.copy_(old + a * x + b * y)
            out[i, j] = loss().item()
    finally:
        for p, old in zip(params, saved):
            p.copy_(old)
    return out
