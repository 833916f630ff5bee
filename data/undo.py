"""UNDO (arXiv 2506.06278): damage the weights of an unlearned model, then distil its outputs into them.

    python unlearn.py --undo_alpha 0.3 --undo_steps 320                      # after the last step
    python unlearn.py --loss none --model RUN --undo_alpha 0.3 --undo_steps 320      # of a finished run

Fine-tuning wakes what the weights still hold and the outputs no longer show: the student, which sees
only outputs, does not learn it. The paper's language models: alpha .1 to .7, beta .01 to .1; WMDP: alpha
.25, beta mostly 0.

    python unlearn.py --shrink 0.3 --steps 640 --batch_size 4 --retain_batch 28 --lr 4e-3 --decay linear \\
        --sam_direction momentum --sam_norm linf --sam_rho 3e-4

is the same damage in front, without noise, teacher or second training: at the rate of pretraining, mostly on
retain text, unlearning itself grows back what that text covers, and only that (data/tiny/readme.md).
"""
import copy
import math
import random

import torch
from tqdm import tqdm

from data import losses, optimizers, runs
from data.formats import InputError
from data.texts import shuffled
from sam import accumulator, global_norm


@torch.no_grad()
def damage_(params, alpha, beta, seed):
    """theta <- (1 - alpha) theta + alpha beta xi in place: xi is Xavier-uniform for a matrix, and each
    expert of a 3-D parameter is one; a vector only shrinks."""
    generators = {}
    for p in params:
        if p.device not in generators:
            generators[p.device] = torch.Generator(p.device).manual_seed(seed)
        wide = (1 - alpha) * p.to(accumulator(p.dtype))
        if alpha * beta > 0 and p.dim() > 1:
            for matrix in (wide if p.dim() == 3 else [wide]):                        # (rows, columns)
                noise = torch.empty_like(matrix)
                torch.nn.init.xavier_uniform_(noise, generator=generators[p.device])
                matrix.add_(noise, alpha=alpha * beta)
        p.copy_(wide)


def distil(model, teacher, optimizer, batches, steps, lr, clip=0.0):
    """Steps down the mean over labels of the forward KL(teacher || model); returns the KL before each.

    batches: an iterator of a step's micro-batches; the rate goes from lr linearly to 0; clip: of the
    gradient's norm.
    """
    kl = losses.kl_sum(teacher)
    params = optimizer.param_groups[0]["params"]
    found = []
    for step in tqdm(range(steps), "undo", unit="step"):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        found.append(losses.descend(model, next(batches), kl, "labels"))
        optimizers.clipped_step(optimizer, params, clip, global_norm)
        optimizer.zero_grad(set_to_none=True)
    found = torch.stack(found).tolist()
    if not all(map(math.isfinite, found)):
        raise InputError(f"--undo_lr {lr:g}: the student's KL is not finite; nothing written; lower it")
    return found


def text_batches(args, texts):
    """Endless micro-batches of a step's forget and retain samples; only args.seed fixes which."""
    rng = random.Random(f"{args.seed} undo")
    forget = shuffled(len(texts.forget), args.batch_size, rng)
    retain = shuffled(len(texts.retain), args.retain_batch, rng)
    while True:
        yield texts.forget_batches(next(forget)) + texts.retain_batches(next(retain))


def undo(args, model, texts, optimizer):
    """Damage the model and distil it from what it was; optimizer: on all weights. Returns the KLs."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    damage_(model.parameters(), args.undo_alpha, args.undo_beta, args.seed)
    batches = text_batches(args, texts)
    return distil(model, teacher, optimizer, batches, args.undo_steps, args.undo_lr, args.clip)


# ---- flags --------------------------------------------------------------------------------------------

def flags(g):
    """Add the flags of UNDO to a group."""
    share = runs.number(float, 0, 1)
    g.add_argument("--shrink", type=share, default=0.0,
                   help="share of the weights that goes before the first step")
    g.add_argument("--undo_steps", type=runs.number(int, 0), default=0,
                   help="UNDO after the last step: damage the weights, distil so many steps (0: none)")
    g.add_argument("--undo_alpha", type=share,
                   help="share of the weights that goes; the paper: .1 to .7, WMDP .25")
    g.add_argument("--undo_beta", type=share,
                   help="noise in its place, of Xavier's; the paper: 0 to .1 (default: 0)")
    g.add_argument("--undo_lr", type=runs.RATE, help="peak rate, linear to 0 (default: --lr)")


def check(args):
    """Complete the flags of UNDO, or refuse them in one line."""
    if args.shrink:
        if args.lora or args.loss == "none":
            raise InputError(f"--shrink {args.shrink}: what shrinks must train to grow back; drop --lora, "
                             "and choose a --loss")
        runs.refuse_torchrun(f"--shrink {args.shrink}")
    for name in ("undo_alpha", "undo_beta", "undo_lr"):
        value = getattr(args, name)
        if value is not None and not args.undo_steps:
            raise InputError(f"--{name} {value}: there is no UNDO without steps; add --undo_steps")
    if not args.undo_steps:
        return
    if args.undo_alpha is None:
        raise InputError(f"--undo_steps {args.undo_steps}: say how much to damage, --undo_alpha .25")
    if args.lora:
        raise InputError(f"--undo_steps {args.undo_steps}: UNDO trains all weights, --lora none; "
                         "finish that run, then --loss none --model OUT")
    runs.refuse_torchrun(f"--undo_steps {args.undo_steps}")
    args.undo_beta = args.undo_beta or 0.0
    args.undo_lr = args.undo_lr or args.lr
