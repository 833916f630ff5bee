"""ILU (arXiv 2506.01339): unlearn so that training on something else does not pull the weights: a
penalty on l + lambda ||d/dw l(w theta; D)||^2 at w = 1, D unrelated data, as in invariant risk
minimization (arXiv 1907.02893, IRMv1).

    python unlearn.py --ilu_lambda 1 --ilu_data FILE.jsonl      # rows as in retain.jsonl, about neither

w is one number, the dummy classifier of IRMv1. With s = d/dw l(w theta) = theta^T g(theta), the penalty
s^2 has the gradient 2 s ds/dtheta, and ds/dtheta = d/dw [w g(w theta)]: two gradients, at (1 + r) theta
and (1 - r) theta, give both to second order in r, without a double backward pass.
"""
import random

import torch

import sam
from data import losses, runs
from data.formats import InputError
from data.texts import shuffled


class Invariance:
    """lambda s^2 and its gradient, which a call adds to p.grad."""

    def __init__(self, params, lam, radius=1e-2):
        self.params = sam.trainable(params)
        self.lam = lam
        self.radius = radius

    @sam.on_top
    def __call__(self, closure):
        """closure: forward and backward of l. Returns s^2, 0-dim."""
        saved = [(p, p.detach().clone()) for p in self.params]
        r = self.radius
        grads = []
        try:
            for w in (1 + r, 1 - r):
                with torch.no_grad():
                    for p, old in saved:
                        p.copy_(w * old)
                closure()
                grads.append(sam.take_grads(self.params))
        finally:
            sam.restore_(list(saved))
        s = 0.0
        for p, old in saved:
            for g in grads:
                if p in g:
                    s = s + (old.double() * g[p].double()).sum() / 2
        slope = self.lam * s / r                                     # lambda 2 s / (2 r)
        sam.combine(self.params, [((1 + r) * slope, grads[0]), (-(1 - r) * slope, grads[1])])
        return s.square()


class Penalty:
    """Invariance on a batch of unrelated texts for every step."""

    def __init__(self, args, model, params, texts):
        picks = shuffled(len(texts.unrelated), args.batch_size, random.Random(f"{args.seed} ilu"))
        self.picks = [next(picks) for _ in range(args.steps)]
        self.model = model
        self.texts = texts
        self.penalty = Invariance(params, args.ilu_lambda)

    def __call__(self, step):
        """Add the gradient of the penalty of a step, counted from 0; returns {"ilu": s^2}."""
        micro = self.texts.batches(self.texts.unrelated, self.picks[step])

        def closure():
            return losses.descend(self.model, micro, losses.nll_sum, "labels")
        return {"ilu": self.penalty(closure)}


# ---- flags --------------------------------------------------------------------------------------------

def flags(g):
    """Add the flags of ILU to a group."""
    g.add_argument("--ilu_lambda", type=runs.number(float, 0), default=0.0,
                   help="weight of a penalty on how training on --ilu_data pulls, two passes")
    g.add_argument("--ilu_data", metavar="FILE.jsonl", help="texts that are in neither set")


def check(args):
    """Refuse the flags of ILU where they mean nothing."""
    if bool(args.ilu_lambda) != bool(args.ilu_data):
        raise InputError(f"--ilu_lambda {args.ilu_lambda:g} --ilu_data {args.ilu_data}: give both")
    if not args.ilu_lambda:
        return
    if args.lora or args.optimizer in ("zo", "hybrid") or args.loss == "none":
        raise InputError(f"--ilu_lambda {args.ilu_lambda:g}: it takes gradients of all the weights; "
                         "drop --lora, --optimizer zo or hybrid, and --loss none")
    runs.refuse_torchrun(f"--ilu_lambda {args.ilu_lambda:g}")
