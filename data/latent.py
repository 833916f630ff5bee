"""Unlearn under an attack on hidden states: what --latent does to a layer's input while the forget loss
is taken.

    python unlearn.py --latent_eps 0.5          # a shift that brings the text back (arXiv 2408.10682)
    python unlearn.py --latent direction        # one direction is taken out at random: data/direction.py

Both are the same within a step, wherever a smoother puts the weights, and for any micro-batches; neither
moves padding. Shapes: B samples, T tokens, D width.
"""
from contextlib import contextmanager
from functools import partial

import torch

from data import losses, runs, stream
from data.direction import EVERY, Direction
from data.formats import InputError
from sam import accumulator, draw_seed


# ---- the adversary ------------------------------------------------------------------------------------

def norms(x):
    """||x|| of each sample, (B, 1, 1)."""
    return x.flatten(1).norm(dim=1)[:, None, None]


def random_start(mask, width, eps, rng):
    """(B, T, D): a random direction over the real tokens of a sample, of a length uniform on [0, eps].
    One draw after another, so that what a sample gets does not hang on the padding."""
    delta = torch.zeros(*mask.shape, width, device=mask.device)
    for row, real in zip(delta, mask.bool()):
        z = torch.randn(int(real.sum()), width, generator=rng, device=mask.device)
        length = eps * torch.rand((), generator=rng, device=mask.device)
        row[real] = length * z / z.norm()
    return delta


def adversary(nll, hidden, mask, eps, steps, delta, low, high):
    """The shift delta (B, T, D) after `steps` steps of eps/steps down nll(delta), a sum over samples,
    along each sample's normalised gradient; ||delta|| <= eps in each, and low <= hidden + delta <=
    high."""
    mask = mask[:, :, None]
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with torch.enable_grad():
            gradient = torch.autograd.grad(nll(delta), delta)[0] * mask
        delta = delta.detach() - eps / steps * gradient / norms(gradient).clamp(min=1e-30)
        delta = delta * (eps / norms(delta).clamp(min=eps + 1e-30))
        delta = delta.clamp(low - hidden, high - hidden) * mask
    return delta


def shifted(delta, hidden):
    """hidden + delta in hidden's dtype, both (B, T, D)."""
    return hidden + delta.to(hidden.dtype)


class Adversary:
    """A shift of one layer's input, new for every step, that makes the forget text likely (LAU)."""

    def __init__(self, args, model):
        self.model = model
        self.args = args
        self.block = stream.text_blocks(model)[args.latent_layer]

    def begin(self, step, forget, retain):
        """Before each step, counted from 0."""
        self.step = step

    def prepare(self, micro):
        """Before each pass over a forget batch: its states, their range, and the draws from their
        beginning."""
        states = [stream.inputs_of(self.model, batch, [self.block])[0] for batch in micro]
        real = [hidden[batch["attention_mask"].bool()] for hidden, batch in zip(states, micro)]
        self.low = min(hidden.min() for hidden in real)
        self.high = max(hidden.max() for hidden in real)
        self.states = iter(states)
        self.rng = torch.Generator(self.model.device).manual_seed(draw_seed(self.args.seed, self.step))

    @contextmanager
    def attacking(self, batch):
        """Inside, a pass over this batch, the next one that prepare() was told of, is under attack."""
        hidden = next(self.states)
        hidden = hidden.to(accumulator(hidden.dtype))
        eps = self.args.latent_eps
        start = random_start(batch["attention_mask"], hidden.shape[-1], eps, self.rng).to(hidden.dtype)

        def nll(delta):
            with stream.at_input(self.block, partial(shifted, delta)):
                return losses.nll_sum(self.model, batch)
        delta = adversary(nll, hidden, batch["attention_mask"], eps, self.args.latent_steps, start,
                          self.low, self.high)
        with stream.at_input(self.block, partial(shifted, delta)):
            yield


LATENT = {                                       # --latent
    "adversary": Adversary,
    "direction": Direction,
}


def under(attack, total):
    """total(model, batch), taken under an attack."""
    def attacked(model, batch):
        with attack.attacking(batch):
            return total(model, batch)
    return attacked


# ---- flags --------------------------------------------------------------------------------------------

def flags(g):
    """Add the flags of attacks on hidden states to a group."""
    g.add_argument("--latent", choices=list(LATENT),
                   help="attack hidden states while the forget loss is taken (default: adversary with "
                   "--latent_eps)")
    g.add_argument("--latent_eps", type=runs.number(float, 0),
                   help="largest shift of a sample's states by the adversary, 0 = none")
    g.add_argument("--latent_layer", type=runs.number(int, 0),
                   help="whose input it shifts, counted from 0 (default: a quarter of the depth)")
    g.add_argument("--latent_steps", type=runs.number(int, 1),
                   help="of the adversary, each a pass (default: 6)")


def check(args):
    """Complete the flags, or refuse them in one line; what does not run is None."""
    if args.latent == "adversary" and args.latent_eps is None:
        raise InputError("--latent adversary: say how far it may go, --latent_eps 0.5")
    if args.latent in (None, "adversary"):
        args.latent = "adversary" if args.latent_eps else None
    fix = "drop --latent direction" if args.latent == "direction" else "add --latent_eps 0.5"
    for name in ("latent_eps", "latent_layer", "latent_steps"):
        if getattr(args, name) not in (None, 0.0) and args.latent != "adversary":
            raise InputError(f"--{name} {getattr(args, name)}: no adversary runs; {fix}")
    if not args.latent:
        return
    if args.loss in ("dpo", "none"):
        raise InputError(f"--latent {args.latent}: --loss {args.loss} does not take it; choose another "
                         "loss, or drop it")
    runs.refuse_torchrun(f"--latent {args.latent}")
    if args.latent == "direction" and args.save_every % EVERY:
        raise InputError(f"--save_every {args.save_every}: --latent direction can go on from every "
                         f"{EVERY}th step only; give a multiple of {EVERY}")
    if args.latent == "adversary":
        args.latent_steps = args.latent_steps or 6


def make(args, model):
    """The attack that args.latent names, on a model; None for none."""
    if not args.latent:
        return None
    depth = len(stream.text_blocks(model))
    if not depth:
        raise InputError(f"--latent {args.latent}: {type(model).__name__} names no layers; drop it")
    if args.latent == "adversary" and args.latent_layer is None:
        args.latent_layer = depth // 4
    last = args.rmu_layer if args.loss == "rmu" else depth - 1
    if args.latent == "direction" and last < depth // 4:
        raise InputError(f"--latent direction: rmu sees no layer behind {last}, where it begins; raise "
                         "--rmu_layer, or drop it")
    if (args.latent_layer or 0) > last:
        raise InputError(f"--latent_layer {args.latent_layer}: choose 0 to {last}, which the loss sees")
    return LATENT[args.latent](args, model)
