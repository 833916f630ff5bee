"""Fine-tuning on a few samples: the relearning attack, and how data/people teaches a model what to forget."""
import math
import random
from collections import Counter

import torch

from data import losses, processes
from data.formats import InputError


def draw_samples(rows, count, seed):
    """Indices of `count` rows in an order that only seed fixes, so that smaller draws are prefixes of larger
    ones: a row of every fact first, where rows carry one, then a second row of each, and so on."""
    if count > len(rows):
        raise InputError(f"--samples {count}: there are {len(rows)}; ask for fewer")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    told = Counter()
    earlier = {}                                 # row -> how often its fact was told before
    for i in order:
        fact = rows[i].get("fact", f"row {i}")
        earlier[i] = told[fact]
        told[fact] += 1
    return sorted(order, key=earlier.get)[:count]


def draw_mixed(rows, others, count, share, seed):
    """Indices of `count` of rows + others, round(share * count) of them of others; each part is drawn by
    draw_samples, so that smaller draws are contained in larger ones."""
    foreign = round(share * count)
    picks = draw_samples(rows, count - foreign, seed)
    for i in draw_samples(others, foreign, f"{seed} mix"):
        picks.append(len(rows) + i)
    return picks


def finetune(model, samples, pad, lr, batch_size, epochs, seed, watch=None, optimizer="adamw", params=None):
    """Fine-tune model in place on encoded samples: mean NLL a token, AdamW or SGD with momentum .9, rate
    linear to 0. Trains params, or what of the model requires a gradient. watch(steps done, steps in all)
    follows every step.
    """
    rng = random.Random(seed)
    if params is None:
        params = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adamw":
        opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    else:
        opt = torch.optim.SGD(params, lr=lr, momentum=0.9)
    steps = epochs * math.ceil(len(samples) / batch_size)
    step = 0
    for _ in range(epochs):
        order = rng.sample(range(len(samples)), len(samples))
        for start in range(0, len(order), batch_size):
            picks = order[start:start + batch_size]
            micro = losses.micro_batches(samples, picks, batch_size, pad, model.device)
            opt.param_groups[0]["lr"] = lr * (1 - step / steps)
            losses.descend(model, micro, losses.nll_sum, "labels")
            opt.step()
            opt.zero_grad(set_to_none=True)
            step += 1
            if watch:
                watch(step, steps)
    with torch.no_grad():                        # after the last step, which may be the one that was too long
        last = losses.nll_sum(model, micro[-1])
    if not math.isfinite(processes.all_sum(last, model.device)):
        raise InputError(f"fine-tuning with --lr {lr:g} diverged (loss {last}): lower it")
