"""What unlearning goes down: forget losses, retain losses, and the pass that turns them into gradients.

A new loss is one function and its line in FORGET, below. Shapes: B samples, T tokens, V vocabulary, D width.
"""
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import processes, runs
from data.formats import InputError
from data.models import IGNORE, collate, in_chunks, over_labels, run, token_logps, with_head
from sam import accumulator


# ---- forget losses on a sample's log-probability: (B,), descending them unlearns ----------------------
# logp(batch) is (B,), mean over a sample's labels (SAM paper) or their sum (NPO paper): --reduce. batch["ref"]
# is the same before unlearning, computed once; batch["chosen"] a batch of preferred answers with its own ref.

def ga(logp, batch, args):
    """Gradient ascent on the NLL."""
    return logp(batch)


def npo(logp, batch, args):
    """-2/beta log sigmoid(-beta (logp - ref)), arXiv 2404.05868."""
    return -2 / args.beta * F.logsigmoid(-args.beta * (logp(batch) - batch["ref"]))


def simnpo(logp, batch, args):
    """-2/beta log sigmoid(-beta logp - margin), arXiv 2410.07163; without a reference."""
    return -2 / args.beta * F.logsigmoid(-args.beta * logp(batch) - args.margin)


def dpo(logp, batch, args):
    """-1/beta log sigmoid(beta (chosen - its ref) - beta (logp - ref)), arXiv 2305.18290 over beta; chosen is
    "I don't know" after the same prompt, rejected the true answer."""
    rejected = logp(batch) - batch["ref"]
    chosen = logp(batch["chosen"]) - batch["chosen"]["ref"]
    return -1 / args.beta * F.logsigmoid(args.beta * chosen - args.beta * rejected)


FORGET = {                                       # --loss; and rmu, below
    "npo": npo,
    "graddiff": ga,                              # ga with a retain term
    "ga": ga,
    "simnpo": simnpo,
    "dpo": dpo,
}
NEEDS_REFERENCE = ("npo", "dpo")


# ---- sums over a batch, one for each kind of loss, and what they are a mean over ----------------------

def sample_logps(model, batch, reduce="mean"):
    """(B,) log-probability of each sample's labels, mean or sum over them."""
    logps, mask = token_logps(model, batch)
    return logps.sum(1) / mask.sum(1) if reduce == "mean" else logps.sum(1)


def forget_sum(args):
    """The sum over samples of the loss that args.loss names: a function of (model, batch)."""
    def total(model, batch):
        def logp(some):
            return sample_logps(model, some, args.reduce)
        return FORGET[args.loss](logp, batch, args).sum()
    return total


def nll_sum(model, batch):
    """Sum over labels of -log p: the retain loss, and on forget samples what a relearning attack descends."""
    return -token_logps(model, batch)[0].sum()


def kl(p, q):
    """Sum of KL(p || q) of logits (labels, V), as (1,): lse(q) - lse(p) + <softmax(p), p - q>. Its
    gradient, softmax(q) - softmax(p), is exactly 0 where the two agree; by log_softmax it would be a
    rounding there, which AdamW makes a step of."""
    p = p.to(accumulator(p.dtype))
    q = q.to(accumulator(q.dtype))
    lse = p.logsumexp(-1, keepdim=True)
    across = ((p - lse).exp() * (p - q)).sum(-1, keepdim=True)
    return (q.logsumexp(-1, keepdim=True) - lse + across).sum(0)


def kl_sum(frozen):
    """Sum over labels of KL(frozen || model) over the whole vocabulary: a function of (model, batch)."""
    def total(model, batch):
        mask = batch["labels"][:, 1:] != IGNORE                                      # (B, T-1)
        if in_chunks(model, batch):
            with torch.no_grad():
                hidden = with_head(frozen, batch, lambda h, head: h[:, :-1][mask]).logits    # (labels, D)
            head = frozen.get_output_embeddings()
            return over_labels(model, batch, lambda q, h: kl(head(h), q), hidden).sum()
        with torch.no_grad():
            p = run(frozen, batch).logits[:, :-1][mask]
        return kl(p, run(model, batch).logits[:, :-1][mask]).sum()
    return total


def hidden_states(model, batch, layer):
    """(B, T, D) output of decoder layer `layer`, counted from 0."""
    out = with_head(model, batch, lambda hidden, head: hidden.detach(), output_hidden_states=True)   # no logits
    return out.hidden_states[layer + 1]


def distance_sum(hidden, goal, batch):
    """Sum over the real tokens of the mean over D of (hidden - goal)^2: hidden (B, T, D), goal as it or (D,)."""
    squares = (hidden - goal).to(accumulator(hidden.dtype)).square().mean(-1)
    return (squares * batch["attention_mask"]).sum()


def rmu_forget_sum(layer, goal):
    """RMU (arXiv 2403.03218): distance of a layer's states from a random goal (D,)."""
    return lambda model, batch: distance_sum(hidden_states(model, batch, layer), goal, batch)


def rmu_retain_sum(layer, frozen):
    """RMU: distance of a layer's states from those of the frozen model."""
    def total(model, batch):
        with torch.no_grad():
            kept = hidden_states(frozen, batch, layer)
        return distance_sum(hidden_states(model, batch, layer), kept, batch)
    return total


def rmu_goal(model, length, dtype):
    """The goal of RMU, (D,): entries uniform on [0, 1) as published, scaled to `length`."""
    goal = torch.rand(model.config.get_text_config().hidden_size)
    return (length * goal / goal.norm()).to(model.device, dtype)


def size_of(batch, unit):
    """How many samples, labels or tokens (padding is none) a batch has; 0-dim or int."""
    if unit == "samples":
        return len(batch["labels"])
    if unit == "labels":
        return (batch["labels"][:, 1:] != IGNORE).sum()
    assert unit == "tokens", unit
    return batch["attention_mask"].sum()


def descend(model, micro, total, unit, weight=1.0):
    """Forward and backward of weight * (sum of total / number of units), added to p.grad; returns the mean.
    Under no_grad the mean alone.

    micro: micro_batches(); total(model, batch): one of the sums above; unit: what it is a mean over. Each
    micro-batch is divided by the count of the whole batch, so that the split changes nothing.
    """
    count = processes.all_sum(sum(b["weight"] * size_of(b, unit) for b in micro), model.device)
    mean = 0.0
    for batch in micro:
        loss = total(model, batch) * batch["weight"] / count
        if torch.is_grad_enabled():
            if not loss.requires_grad:
                raise InputError("no parameter that trains has a part in a loss: name others with "
                                 "--train_modules")
            (weight * loss).backward()
        mean = mean + loss.detach()
    return processes.all_sum(mean, model.device)


# ---- batches ------------------------------------------------------------------------------------------

def micro_batches(samples, picks, size, pad, device, ref=None):
    """This process's part of the picked samples, collated in batches of at most `size` over all processes;
    each carries its part of ref (N,) and a weight: 0 if it only stands in, see processes.own_part."""
    out = []
    for i in range(0, len(picks), size):
        part, weight = processes.own_part(picks[i:i + size])
        batch = collate([samples[j] for j in part], pad, device)
        batch["weight"] = weight
        if ref is not None:
            batch["ref"] = ref[part].to(device)                                      # (B,)
        out.append(batch)
    return out


@torch.no_grad()
def reference_logps(model, samples, size, pad, reduce):
    """(N,) log-probability of every sample under the model as it is now: kept instead of a second model."""
    out = torch.full((len(samples),), -math.inf, dtype=accumulator(model.dtype))
    parts = []
    for start in tqdm(range(0, len(samples), size), "reference", leave=False):
        parts.append(list(range(start, min(start + size, len(samples)))))
    for _, picks in processes.in_turns(parts):
        batch = collate([samples[j] for j in picks], pad, model.device)
        out[picks] = sample_logps(model, batch, reduce).cpu()
    return processes.all_max(out, model.device)


# ---- the flags of unlearn.py --------------------------------------------------------------------------

def flags(g):
    """Add the flags of the losses to a group."""
    real = runs.number(float, 0)
    g.add_argument("--loss", choices=[*FORGET, "rmu", "none"], default="npo",
                   help="on the forget set; ga has no retain term, dpo needs rows with prompt and "
                   "completion; none takes no step")
    g.add_argument("--beta", type=runs.number(float, 0, above=True), default=0.5,
                   help="of npo, simnpo, dpo; 7B: .0225 npo, .015 npo+sam")
    g.add_argument("--gamma", type=real, default=1.0, help="weight of the retain loss; 7B: 1 npo, 2.25 npo+sam")
    g.add_argument("--retain", choices=["nll", "kl", "none"],
                   help="on the retain set (default nll; ga has none, rmu its own); kl keeps a frozen model")
    g.add_argument("--margin", type=real, default=0.0, help="of simnpo, in nats")
    g.add_argument("--reduce", choices=["mean", "sum"], default="mean",
                   help="a sample's log-probability over tokens")
    g.add_argument("--idk_text", default="I don't know.", help="the preferred answer of dpo")
    g.add_argument("--rmu_layer", type=runs.number(int, 0),
                   help="counted from 0; 7B: 7 (default: 7/32 of the depth)")
    g.add_argument("--rmu_c", type=real, default=6.5, help="length of rmu's random goal; 7B: 6.5 or 20")
    g.add_argument("--rmu_alpha", type=real, default=1200.0, help="weight of rmu's retain term; 7B: 1200")


def check(args):
    """Refuse what a loss does not go with, and fill in its retain loss."""
    if args.loss == "ga" and args.retain not in (None, "none"):
        raise InputError(f"--retain {args.retain}: ga has none; use --loss graddiff")
    if args.loss == "rmu" and args.retain is not None:
        raise InputError(f"--retain {args.retain}: rmu brings its own, --rmu_alpha (0: none); drop it")
    if args.loss == "simnpo" and args.reduce == "sum":
        raise InputError("--reduce sum: simnpo is defined by the mean over tokens; drop it, or use --loss npo")
    args.retain = args.retain or ("none" if args.loss in ("ga", "rmu", "none") else "nll")
