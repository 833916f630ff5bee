"""Attack an unlearned model: fine-tune it on a few forget samples and see how much comes back.

    python relearn.py RUN                               # 20, 40, 60 samples, two seeds each: about 5 s
    python relearn.py RUN --samples 20 --epochs 1 2 3
    python relearn.py RUN --seeds 5 --curve_every 1     # and UE after every step
    python relearn.py RUN --lr 5e-4 1e-3 2e-3 4e-3      # the worst case of a learning-rate sweep
    python relearn.py RUN --optimizer sgd --lr 1e-2     # does it take AdamW's steps to undo it?
    python relearn.py RUN --attack_data retain          # fine-tuning that never mentions the topic
    python relearn.py RUN --lora 8 --lr 1e-2            # low-rank adapters; the weights stay as they are
    python relearn.py RUN --quantize 8 4 --prune 10 30  # no training at all
    python relearn.py RUN --geometry                    # does it go where the smoother looked?
    python relearn.py data/tiny/seed0/retrained         # the yardstick: a model that never knew

RUN is the folder that unlearn.py names at its end. Reads RUN/result.json (for the data and the seed), the
model beside it and DATA/forget.jsonl. Writes RUN/relearn.json, or RUN/relearn_ATTACK.json for other data,
optimizers, adapters and compression. Every budget starts from the same weights; the samples of a larger one
contain those of a smaller one. No "fact" is told twice before each was told once, so N samples are N facts
while there are so many, and UE_heldout is the UE on the questions about the other facts: it tells unlocking
(old knowledge comes back) from re-teaching. Next: evaluate.py puts runs into one table.
"""
import math, random, time
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
from evaluate import (InputError, all_sum, collate, context_of, encode_rows, join_processes, load_model,
                      make_parser, number, one_line_errors, own_part, processes, provenance, read_jsonl, show,
                      text_row, token_logps, write_json)
from sam import SAM, accumulator, restore_


def draw_samples(rows, count, seed):
    """Indices of `count` rows in an order that only seed fixes, so that smaller draws are prefixes of larger
    ones: a row of every fact first, where rows carry one, then a second row of each, and so on."""
    order, told, rank = list(range(len(rows))), Counter(), {}
    random.Random(seed).shuffle(order)
    if count > len(rows):
        raise InputError(f"--samples {count}: there are {len(rows)}; ask for fewer")
    for i in order:
        fact = rows[i].get("fact", f"row {i}")
        rank[i] = told[fact]
        told[fact] += 1
    return sorted(order, key=rank.get)[:count]


def relearn(model, samples, pad, lr, batch_size, epochs, seed, watch=None, kind="adamw"):
    """Fine-tune model in place on encoded samples: mean NLL a token, AdamW or SGD with momentum .9, rate
    linear to 0. Trains what requires a gradient. watch(steps done, steps in all) follows every step.
    """
    rng = random.Random(seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = (torch.optim.AdamW(params, lr=lr, weight_decay=0.0) if kind == "adamw" else
                 torch.optim.SGD(params, lr=lr, momentum=0.9))
    steps, step = epochs * math.ceil(len(samples) / batch_size), 0
    for _ in range(epochs):
        order = rng.sample(range(len(samples)), len(samples))
        for i in range(0, len(order), batch_size):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            part, weight = own_part(order[i:i + batch_size])
            logps, mask = token_logps(model, collate([samples[j] for j in part], pad, model.device))
            loss = -logps.sum() * weight / all_sum(mask.sum() * weight, model.device)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if watch:
                watch(step, steps)
    last = all_sum(loss.detach(), model.device).item()
    if not math.isfinite(last):
        raise InputError(f"relearning with --lr {lr:g} diverged (loss {last}): lower it")


def aims(own, other, nll, params, rho):
    """{name: [a tensor for each parameter]}: where the variants of sam.SAM would move the weights from here.

    own, other: the forget loss on two batches; nll: the attacker's loss; closures, with graph. momentum is
    the gradient of the other batch at the weights that the first one moved by rho each: what a step before
    would have left behind. random, one normal draw, tells what a cosine of nothing is.
    """
    grad = lambda loss: torch.autograd.grad(loss(), params, materialize_grads=True)
    rng = torch.Generator().manual_seed(0)
    gradient = grad(own)
    with SAM(params, rho, "linf", triton=False).perturbed(dict(zip(params, gradient))):
        momentum = grad(other)
    return {"gradient": gradient, "momentum": momentum, "lookahead": [-g for g in grad(nll)],
            "random": [torch.randn(p.shape, generator=rng).to(p.device) for p in params]}


@torch.no_grad()
def geometry(start, goals, losses, points=5):
    """Where an attack went from start = [(parameter, old weights)]: {"l2", "mean", "max": size of the whole
    move, and of a single weight's; "cosine": {name: with each of aims(), and with its signs}; "path": losses
    ({name: closure}) at evenly spaced weights on the straight line}. Leaves the weights at its end."""
    flat = lambda tensors: torch.cat([t.flatten().float() for t in tensors])
    ends, moved = [p.detach().clone() for p, _ in start], flat([p - w for p, w in start])
    cosine = lambda goal: F.cosine_similarity(moved, goal, dim=0).item()
    out = {"l2": moved.norm().item(), "mean": moved.abs().mean().item(), "max": moved.abs().max().item(),
           "cosine": {name: cosine(flat(g)) for name, g in goals.items()}, "path": []}
    out["cosine"] |= {f"sign of {name}": cosine(flat(g).sign()) for name, g in goals.items()}
    for part in [i / (points - 1) for i in range(points)]:
        for (p, w), end in zip(start, ends):
            p.copy_(w + part * (end - w))
        out["path"].append({"part": part, **{name: loss().item() for name, loss in losses.items()}})
    restore_([(p, end) for (p, _), end in zip(start, ends)])
    return out


def linears(model):
    """The nn.Linear layers but the output layer: what adapters go on, and what is quantized and pruned."""
    found = [m for m in model.modules() if isinstance(m, torch.nn.Linear)
             and m is not model.get_output_embeddings()]
    if not found:
        raise InputError(f"{type(model).__name__} has no nn.Linear: --lora, --quantize and --prune need one")
    return found


@contextmanager
def lora(model, rank, seed):
    """Train adapters instead of the weights: y + 2 B A x on every layer of linears() (arXiv 2106.09685, with
    alpha = 2 rank). A (rank, in) ~ N(0, 1/in), B (out, rank) = 0, fp32 or wider: nothing changes before the
    first step. The weights are never written and the adapters go on the way out. Rank 0: does nothing.
    """
    if not rank:
        yield
        return
    layers, trained, hooks = linears(model), [p for p in model.parameters() if p.requires_grad], []
    rng = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    try:
        model.requires_grad_(False)
        for m in layers:
            a = torch.randn(rank, m.in_features, generator=rng) / math.sqrt(m.in_features)
            kind = {"device": m.weight.device, "dtype": accumulator(m.weight.dtype)}
            m.lora_a = torch.nn.Parameter(a.to(**kind))
            m.lora_b = torch.nn.Parameter(torch.zeros(m.out_features, rank, **kind))
            hooks.append(m.register_forward_hook(lambda m, x, y: y + (                     # (B, T, out)
                2 * x[0].to(m.lora_a.dtype) @ m.lora_a.T @ m.lora_b.T).to(y.dtype)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for m in layers:
            m._parameters.pop("lora_a", None), m._parameters.pop("lora_b", None)
        for p in trained:
            p.requires_grad_(True)


@torch.no_grad()
def quantize_(weight, bits, group):
    """Round to nearest, symmetric, in place: each `group` neighbours in a row of weight (out, in) become
    scale * {-q, ..., q} with q = 2^(bits-1) - 1 and scale = max|w| / q. A row's last group may be shorter."""
    for part in weight.split(group, dim=1):                                                     # (out, group)
        wide = part.to(accumulator(part.dtype))
        scale = wide.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)                            # (out, 1)
        part.copy_(torch.where(scale > 0, (wide / scale).round() * scale, 0.0))


@torch.no_grad()
def prune_(weight, percent):
    """Set the floor(percent/100 * size) smallest weights of a matrix to 0, in place (magnitude pruning)."""
    size = int(percent / 100 * weight.numel())
    weight.view(-1)[weight.abs().view(-1).topk(size, largest=False).indices] = 0


def attack(model, tokenizer, rows, questions, args, objective=None):
    """The "metrics" of relearn.json: all budgets lr x samples x epochs, each a mean over args.draws seeds.

    rows: read_jsonl(forget.jsonl); questions: evaluate.load_questions(); objective: evaluate.forget_objective
    with all but (kind, first) given, for args.geometry. Puts the weights back, bit for bit.
    A seed fixes the sample list, the batches and the adapters; "se" is the standard error over seeds.
    """
    encoded, pad = encode_rows(tokenizer, rows, context_of(model), args.max_len), tokenizer.pad_token_id or 0
    lists = [draw_samples(rows, max(args.samples), f"{args.seed} {draw}") for draw in range(args.draws)]
    saved = [] if args.lora else [(p, p.detach().clone()) for p in model.parameters()]
    metrics = {"start": evaluate.ue_ut(model, tokenizer, questions), "budgets": []}
    plan = [(lr, n, e) for lr in args.lr for n in sorted(args.samples) for e in sorted(args.epochs)]
    bar, looks = tqdm(total=len(plan) * args.draws, desc="relearning", unit="run"), None
    if args.geometry:
        losses = {"own": objective("own", 0), "nll": objective("nll", 0)}
        looks = aims(losses["own"], objective("own", 1), losses["nll"], [p for p, _ in saved], args.geometry)
    try:
        for lr, count, epochs in plan:
            draws, curves, moves = [], [], []
            for draw, order in enumerate(lists):
                picks, curve = order[:count], [{"step": 0, "UE": metrics["start"]["UE"]}]

                def watch(step, steps):
                    if args.curve_every and step % args.curve_every == 0 and step < steps:
                        score = evaluate.ue_ut(model, tokenizer, questions, only_forget=True)
                        curve.append({"step": step, "UE": score["UE"]})
                with lora(model, args.lora, f"{args.seed} {draw} lora"):
                    relearn(model, [encoded[i] for i in picks], pad, lr, args.batch_size, epochs,
                            f"{args.seed} {draw} order", watch, args.optimizer)
                    facts = {rows[i]["fact"] for i in picks if "fact" in rows[i]}
                    draws.append(evaluate.ue_ut(model, tokenizer, questions, seen=facts))
                    moves += [geometry(saved, looks, losses)] if looks else []
                restore_(list(saved))
                steps = epochs * math.ceil(count / args.batch_size)
                curves.append(curve + [{"step": steps, "UE": draws[-1]["UE"]}])
                bar.set_postfix(samples=count, UE=show(draws[-1]["UE"]))
                bar.update()
            known = [k for k, v in draws[0].items() if v is not None]
            mean = {k: sum(d[k] for d in draws) / len(draws) if k in known else None for k in draws[0]}
            budget = {"samples": count, "epochs": epochs, "lr": lr, **mean, "draws": draws,
                      "se": {k: evaluate.mean_se([d[k] for d in draws])[1] for k in known}}
            if args.curve_every:
                budget["curves"] = curves                                   # one list of points a seed
            if looks:
                budget["geometry"] = moves                                  # one a seed
            metrics["budgets"].append(budget)
    finally:
        restore_(saved)
        bar.close()
    return metrics | {"worst": worst_case(metrics, args.ut_drop)}


def worst_case(metrics, drop):
    """Of the budgets that differ only in lr the one with the lowest UE, which an attacker would choose, as
    long as UT stays within `drop` of the start: a ruined model is no success. No entry where none does."""
    floor, worst = (metrics["start"]["UT"] or 0) - drop, {}
    for b in sorted(metrics["budgets"], key=lambda b: b["UE"] or 0):
        if b["UT"] is None or b["UT"] >= floor:
            worst.setdefault((b["samples"], b["epochs"]),
                             {k: v for k, v in b.items() if k not in ("draws", "curves", "geometry")})
    return [worst[key] for key in sorted(worst)]


def compress(model, tokenizer, questions, args):
    """The "metrics" of an attack without training: each --quantize and each --prune, alone, on linears()."""
    weights = [m.weight for m in linears(model)]
    saved, none = [(w, w.detach().clone()) for w in weights], {"samples": 0, "epochs": 0, "UE_heldout": None}
    metrics = {"start": evaluate.ue_ut(model, tokenizer, questions), "budgets": []}
    try:
        for name, amount in [("quantize", b) for b in args.quantize] + [("prune", p) for p in args.prune]:
            for w in weights:
                quantize_(w, amount, args.group) if name == "quantize" else prune_(w, amount)
            scores = evaluate.ue_ut(model, tokenizer, questions)
            metrics["budgets"].append({**none, name: amount, **scores, "draws": [scores]})
            restore_(list(saved))
    finally:
        restore_(saved)
    return metrics


def parse_args(argv=None):
    """The flags; argv None = the command line. data and seed default to those of the run's result.json."""
    p = make_parser(__doc__)
    p.add_argument("run", help="folder of a model with a result.json")
    p.add_argument("--samples", type=number(int, 1), nargs="+", default=[20, 40, 60],
                   help="forget samples of each budget")
    p.add_argument("--epochs", type=number(int, 1), nargs="+", default=[1],
                   help="passes over them; every pair is a budget")
    p.add_argument("--lr", type=number(float, 0, above=True), nargs="+", default=[2e-3],
                   help="peak rate of AdamW, linear to 0; 7B: 1e-5")
    p.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw",
                   help="sgd has momentum .9 and wants a far larger --lr, here .01 to .03")
    p.add_argument("--batch_size", type=number(int, 1), default=4, help="samples a step; 7B: 4")
    p.add_argument("--seeds", "--draws", dest="draws", type=number(int, 1), default=2,
                   help="sample lists and orders to average over")
    p.add_argument("--curve_every", type=number(int, 0), default=0,
                   help="steps between UE on the curve, 0 = none")
    p.add_argument("--attack_data", default="forget", metavar="{forget,retain,FILE.jsonl}",
                   help="what to fine-tune on; UE_heldout takes a row's fact for that of DATA's questions")
    p.add_argument("--lora", type=number(int, 0), default=0, metavar="RANK",
                   help="train adapters of this rank, 0 = all weights")
    p.add_argument("--geometry", type=number(float, 0, above=True), nargs="?", const=1e-3, default=None,
                   metavar="RHO", help="compare the attack's displacement with what sam would perturb along; "
                   "RHO (1e-3) places momentum's gradient")
    p.add_argument("--ut_drop", type=number(float, 0), default=0.05,
                   help="loss of UT that the worst case over --lr may cost")
    p.add_argument("--quantize", type=number(int, 2), nargs="+", default=[], metavar="BITS",
                   help="instead of training: round the weights, 8 and 4 are usual")
    p.add_argument("--group", type=number(int, 1), default=64, help="weights that share a scale; 64 or 128")
    p.add_argument("--prune", type=number(float, 0), nargs="+", default=[], metavar="PERCENT",
                   help="instead of training: zero the smallest weights of every matrix")
    p.add_argument("--seed", type=number(int, 0), default=None,
                   help="of the sample lists (default: the run's)")
    p.add_argument("--data", default=None, help="data folder (default: the run's)")
    p.add_argument("--param_dtype", choices=["float32", "bfloat16"], default=None,
                   help="of the attacked weights (default: the run's); in bfloat16 small steps are lost")
    p.add_argument("--max_len", type=number(int, 0), default=None, help="cut samples (default: the run's)")
    args = p.parse_args(argv)
    if (args.quantize or args.prune) and (args.lora or args.attack_data != "forget" or args.geometry
                                          or args.optimizer != "adamw"):
        p.error("--quantize and --prune train nothing: drop --lora, --attack_data, --optimizer and "
                "--geometry, or attack in two calls")
    if args.geometry and args.lora:
        p.error("--geometry looks at the weights, which --lora leaves as they are: drop one")
    if any(percent > 100 for percent in args.prune):
        p.error(f"--prune {max(args.prune):g}: give a percentage, 0 to 100")
    source = "" if args.attack_data == "forget" else Path(args.attack_data).stem
    args.attack = "compress" if args.quantize or args.prune else "_".join(
        filter(None, [source, f"lora{args.lora}" if args.lora else "", args.optimizer.replace("adamw", "")]))
    ran = evaluate.load_result(args.run)["args"]
    for name, fallback in (("data", None), ("seed", 0), ("max_len", 0)):
        if getattr(args, name) is None:
            setattr(args, name, ran.get(name, fallback))
    if args.data is None:
        raise InputError(f"{args.run} is a plain model and names no data: add --data FOLDER")
    args.param_dtype = args.param_dtype or ran.get("param_dtype", "float32")
    if args.geometry and args.param_dtype != "float32":
        raise InputError(f"--geometry: {args.param_dtype} would round the attack's path; add --param_dtype "
                         "float32")
    return args


def main(args, model=None, tokenizer=None):
    """Attack args.run (its model is loaded unless given), write the JSON file and print the table."""
    start, named = time.time(), args.attack_data in ("forget", "retain")
    path = Path(args.data) / f"{args.attack_data}.jsonl" if named else args.attack_data
    rows = None if args.attack == "compress" else read_jsonl(path, text_row)
    questions = evaluate.load_questions(args.data)
    if (args.lora or args.attack == "compress") and processes()[1] > 1:
        raise InputError("--lora, --quantize and --prune need whole weights: run without torchrun")
    if args.geometry and processes()[1] > 1:
        raise InputError("--geometry needs whole weights: run without torchrun")
    if model is None:
        model, tokenizer = load_model(args.run, args.device, getattr(torch, args.param_dtype))
    fixed = {"data": args.data, "teacher": None, "device": args.device, "sharpness_rows": 64}
    objective = lambda kind, first: evaluate.forget_objective(
        model, tokenizer, args.run, evaluate.load_result(args.run), Namespace(sharpness=kind, **fixed), first)
    metrics = (attack(model, tokenizer, rows, questions, args, objective) if rows else
               compress(model, tokenizer, questions, args))
    write_json(Path(args.run) / f"relearn{'_' * bool(args.attack)}{args.attack}.json",
               {"stage": "relearn", "args": vars(args), **provenance(args.device, start), "metrics": metrics})
    lines = [["relearned on", "lr", "UE", "UE held out", "UT"],
             ["0 samples", "-", show(metrics["start"]["UE"]), "-", show(metrics["start"]["UT"])]]
    several = len(args.lr) > 1
    for b in metrics["budgets"] + [b | {"worst": True} for b in metrics.get("worst", []) if several]:
        name = evaluate.budget_name(b) if "lr" not in b else f"{b['samples']} samples" + (
            f" x {b['epochs']} epochs" if b["epochs"] > 1 else "") + ", worst case" * ("worst" in b)
        cells = [evaluate.cell(b[k], b.get("se", {}).get(k)) if b[k] is not None else "-"
                 for k in ("UE", "UE_heldout", "UT")]
        lines.append([name, f"{b['lr']:g}" if "lr" in b else "-", *cells])
    print(evaluate.table(lines))
    moved = [(b, [m["cosine"] for m in b["geometry"]]) for b in metrics["budgets"] if "geometry" in b]
    mean = lambda cosines, key: f"{sum(c[key] for c in cosines) / len(cosines):+.3f}"
    if moved:
        print("\ncosine of the attack's displacement with where sam.SAM would look from here")
        print(evaluate.table([["samples", "lr", *moved[0][1][0]]] + [
            [evaluate.budget_name(b), f"{b['lr']:g}", *(mean(cs, k) for k in cs[0])] for b, cs in moved]))


if __name__ == "__main__":
    with one_line_errors():
        args = parse_args()
        join_processes(args.device)
        main(args)
