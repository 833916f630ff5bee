"""Optimizers that know less than AdamW; arXiv 2510.00761 says that a coarser step's work lasts longer.

    python unlearn.py --optimizer sign --lr 3e-4              # the gradient's signs alone
    python unlearn.py --optimizer hybrid --zo_lr 0.1          # 10 steps of AdamW, 10 by losses, ...

A zeroth-order step has no backward pass of the forget and retain loss: it estimates the gradient from
the loss on both sides of the weights. The estimate is added to p.grad as a backward pass would, so that
smoothers, clipping and weight decay go on as ever.
"""
import math

import torch

import sam
from data import processes, runs
from data.formats import InputError


class Sign(torch.optim.SGD):
    """theta <- theta - lr (sign(g) + weight_decay theta), arXiv 1802.04434; without a state."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.sign_()
        super().step()


@torch.no_grad()
def estimate_(params, value, mu, directions, seed, weight=1.0):
    """Add to p.grad weight times the mean over directions u of d (l(theta + mu u) - l(theta - mu u)) /
    (2 mu) u, u uniform on the unit sphere of all d weights: on average the gradient, since E[u u^T] =
    I/d.

    value(): the loss at the weights as they are. Returns its mean over all that were tried; the weights
    come back bit for bit.
    """
    size = sum(p.numel() for p in params)
    saved = [(p, p.detach().clone()) for p in params]
    mean = 0.0
    for draw in range(directions):
        u = [torch.zeros_like(p) for p in params]
        sam.noise_(u, 1.0, sam.draw_seed(seed, draw))
        torch._foreach_div_(u, sam.global_norm(u))
        found = []
        try:
            for radius in (mu, -mu):
                torch._foreach_add_(params, u, alpha=radius)
                found.append(value())
                sam.restore_(list(saved))
        finally:
            sam.restore_(list(saved))
        slope = weight * size * (found[0] - found[1]) / (2 * mu) / directions
        mean = mean + (found[0] + found[1]) / 2 / directions
        for p, direction in zip(params, u):
            step = direction.mul_(slope)
            p.grad = step if p.grad is None else p.grad + step
    return mean


def clipped_step(optimizer, params, clip, norm_of):
    """Clip the gradients to a norm of `clip` (0: not) and step; returns their norm before, 0-dim.
    norm_of: of a list of tensors. kernels/adamw.py clips on the way, which saves a pass over the
    gradients, and where the norm is not finite it moves nothing."""
    if not hasattr(optimizer, "skipped"):
        norm = torch.nn.utils.clip_grad_norm_(params, clip or math.inf)
        optimizer.step()
        return processes.whole(norm)
    norm = norm_of([p.grad for p in params if p.grad is not None])
    optimizer.step(coefficient=sam.kernel_file("adamw").clip_coefficient(norm, clip))
    return norm


def is_zeroth(args, step):
    """Is this step, counted from 0, one without a gradient? hybrid: zo_every steps with one, as many
    without, so placed that the last ones are without."""
    if args.optimizer == "hybrid":
        return (args.steps - 1 - step) // args.zo_every % 2 == 0
    return args.optimizer == "zo"


def taking(args, params, step):
    """A function (descend, micro-batches, weight) that adds the gradient of weight * descend to p.grad:
    by descend itself, or in a step without gradients by estimate_(). The directions are one for all
    losses and passes of a step.
    """
    def run(descend, micro, weight):
        return descend(micro)

    def tried(descend, micro, weight):
        def value():
            return descend(micro)
        seed = sam.draw_seed(args.seed, step)
        return estimate_(params, value, args.zo_mu, args.zo_directions, seed, weight)
    return tried if is_zeroth(args, step) else run


# ---- flags --------------------------------------------------------------------------------------------

def flags(g):
    """Add the flags of optimizers to a group."""
    some = runs.number(int, 1)
    above = runs.number(float, 0, above=True)
    g.add_argument("--optimizer", choices=["adamw", "sign", "zo", "hybrid"], default="adamw",
                   help="sign: of the gradient; zo: SGD by losses alone; hybrid: adamw and zo by turns")
    g.add_argument("--zo_directions", type=some, help="of a step, two passes each (default: 1)")
    g.add_argument("--zo_mu", type=above,
                   help="how far to each side (default: .1; 7B: 80, which is MeZO's .001 a weight)")
    g.add_argument("--zo_lr", type=runs.RATE,
                   help="of steps without a gradient; their length where --clip is 1; here .1")
    g.add_argument("--zo_every", type=some,
                   help="steps of hybrid with a gradient, then as many without (default: 10)")


def check(args):
    """Complete the flags, or refuse them in one line; what does not run is None."""
    zeroth = args.optimizer in ("zo", "hybrid")
    for name in ("zo_directions", "zo_mu", "zo_lr", "zo_every"):
        if getattr(args, name) and not (args.optimizer == "hybrid" if name == "zo_every" else zeroth):
            value = getattr(args, name)
            raise InputError(f"--{name} {value}: --optimizer {args.optimizer} has none; drop it, or "
                             "choose hybrid")
    if args.optimizer != "adamw" and (args.stochastic_rounding or args.state_dtype):
        raise InputError(f"--optimizer {args.optimizer}: --stochastic_rounding and --state_dtype are "
                         "AdamW's; drop them")
    if args.optimizer != "adamw" and args.param_dtype != "float32" and not args.lora:
        raise InputError(f"--optimizer {args.optimizer}: {args.param_dtype} swallows moves that small; "
                         "use --param_dtype float32")
    if zeroth and args.zo_lr is None:
        raise InputError(f"--optimizer {args.optimizer}: say how long a step without a gradient is, "
                         "--zo_lr 0.1")
    if zeroth:
        args.zo_directions = args.zo_directions or 1
        args.zo_mu = args.zo_mu or 0.1
    if args.optimizer == "hybrid":
        args.zo_every = args.zo_every or 10
