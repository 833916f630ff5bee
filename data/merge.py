"""Merge runs into one model: the mean of their task vectors, tau = theta - theta before (arXiv
2212.04089), or TIES.

    python unlearn.py --merge out/fold1 out/fold2 out/fold3     # SPUNGE, arXiv 2406.11780: data/split.py
    python unlearn.py --merge out/fold1 out/fold2 out/fold3 --merge_ties 0.2
"""
import math

import torch

from data import models, runs
from data.formats import InputError


def floor_of(deltas, density):
    """The smallest |tau| among the `density` largest of all elements of a task vector, a list of
    tensors."""
    sizes = torch.cat([delta.abs().flatten() for delta in deltas])
    return sizes.kthvalue(len(sizes) - math.ceil(density * len(sizes)) + 1).values


def elected(deltas, floors):
    """TIES (arXiv 2306.01708, algorithm 1) on one weight tensor: of deltas (runs, ...) what is below its
    run's floor is 0; then the mean of those that have the sign of the sum, 0 where none has one."""
    shape = [-1] + [1] * (deltas.dim() - 1)
    trimmed = torch.where(deltas.abs() >= floors.view(shape), deltas, 0.0)
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


@torch.no_grad()
def merge_(params, others, density=0.0):
    """theta <- theta + mean of tau in place, over lists of tensors like params, one for each run;
    density above 0: by TIES. In fp64, so that equal runs merge to the run bit for bit: theta +
    mean(other - theta) = mean(other)."""
    floors = None
    if density:
        found = []
        for other in others:
            found.append(floor_of([o.double() - p.double() for p, o in zip(params, other)], density))
        floors = torch.stack(found)
    for p, *same in zip(params, *others):
        weights = torch.stack([o.double() for o in same])                            # (runs, ...)
        if density:
            p.copy_(p.double() + elected(weights - p.double(), floors))
        else:
            p.copy_(weights.mean(0))


def merge_runs(args, model):
    """Merge the runs of --merge in the place of the model that they all started from."""
    own = dict(model.named_parameters())
    others = []
    for run in args.merge:
        found = dict(models.load_model(run, args.device, model.dtype)[0].named_parameters())
        if {n: p.shape for n, p in found.items()} != {n: p.shape for n, p in own.items()}:
            raise InputError(f"--merge {run}: its weights are not those of {args.model}: name what it "
                             "started from with --model")
        others.append([found[name] for name in own])
    merge_(list(own.values()), others, args.merge_ties)


# ---- flags --------------------------------------------------------------------------------------------

def flags(g):
    """Add the flags of merging to a group."""
    g.add_argument("--merge", nargs="+", metavar="RUN",
                   help="take no step: the mean of the task vectors of these runs from --model")
    g.add_argument("--merge_ties", type=runs.number(float, 0, 1), default=0.0,
                   help="by TIES, which keeps this share of each; the paper: .2 (0: the plain mean)")


def check(args):
    """Complete the flags, or refuse them in one line."""
    args.merge = args.merge or []
    if args.merge_ties and not args.merge:
        raise InputError(f"--merge_ties {args.merge_ties}: nothing is merged; add --merge RUN RUN")
    if not args.merge:
        return
    if args.loss not in ("npo", "none"):         # npo is the default
        raise InputError(f"--merge {args.merge[0]}: it takes no step, so --loss {args.loss} has no use; "
                         "drop one")
    if args.lora:
        raise InputError(f"--merge {args.merge[0]}: it takes no step, and --lora trains; drop one")
    runs.refuse_torchrun("--merge")
    args.loss = "none"
