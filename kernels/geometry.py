"""Where fine-tuning takes the weights, beside where the smoothers of sam.py would look. Copy it alone.

Losses are closures that give a 0-dim tensor with graph; params is a list of parameters, n weights in all.
"""
import torch
import torch.nn.functional as F


def flat(tensors):
    """(n,) all elements of a list of tensors, fp32."""
    return torch.cat([t.flatten().float() for t in tensors])


def gradient(loss, params):
    """[gradient of loss() with respect to each parameter], zeros where there is none."""
    return torch.autograd.grad(loss(), params, materialize_grads=True)


def aims(own, other, nll, params, rho):
    """{name: [a tensor for each parameter]}: where the smoothers would move the weights from here.

    own, other: the forget loss on two batches; nll: the attacker's loss. momentum is the gradient of the other
    batch at the weights that the first one moved by rho each: what a step before would have left behind.
    random, one normal draw, tells what a cosine of nothing is. Puts the weights back, bit for bit.
    """
    rng = torch.Generator().manual_seed(0)
    here = gradient(own, params)
    saved = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, g in zip(params, here):
                p.add_(rho * g.sign())
        momentum = gradient(other, params)
    finally:
        put(params, saved)
    return {"gradient": here,
            "momentum": momentum,
            "lookahead": [-g for g in gradient(nll, params)],
            "random": [torch.randn(p.shape, generator=rng).to(p.device) for p in params]}


@torch.no_grad()
def put(params, values):
    """Copy values into params."""
    for p, value in zip(params, values):
        p.copy_(value)


@torch.no_grad()
def displacement(start, goals, objectives, points=5):
    """Where an attack went from start = [(parameter, old weights)]: {"l2", "mean", "max": size of the whole
    move, and of a single weight's; "cosine": {name: with each of aims(), and with its signs}; "path": losses
    of objectives ({name: closure}) at evenly spaced weights on the straight line}. Leaves the weights at its
    end."""
    params = [p for p, _ in start]
    ends = [p.detach().clone() for p in params]
    moved = flat([p - old for p, old in start])
    cosines = {}
    for name, goal in goals.items():
        cosines[name] = F.cosine_similarity(moved, flat(goal), dim=0).item()
    for name, goal in goals.items():
        cosines[f"sign of {name}"] = F.cosine_similarity(moved, flat(goal).sign(), dim=0).item()
    path = []
    for i in range(points):
        part = i / (points - 1)
        put(params, [old + part * (end - old) for (_, old), end in zip(start, ends)])
        path.append({"part": part, **{name: loss().item() for name, loss in objectives.items()}})
    put(params, ends)
    return {"l2": moved.norm().item(), "mean": moved.abs().mean().item(), "max": moved.abs().max().item(),
            "cosine": cosines, "path": path}
