"""Unlearn a forget set so that it stays forgotten: climb rho, take the forget gradient there, return, step.

    python unlearn.py                                 # laptop CPU, built-in data: 40 s, then 15 s; NPO + SAM
                                                      # along the last step's signs (README, Beyond the paper)
                                                      # UE .00 -> .77, .72 after relearning on 60 samples
    python unlearn.py --sam_rho 0.1                   # the paper's SAM: .61, then .47
    python unlearn.py --sam_rho 0                     # plain NPO: .76, then .24
    python unlearn.py --loss graddiff --smooth gp+wa  # any loss with any smoother
    python unlearn.py --model ORG/NAME --data FOLDER --lr 5e-6 --beta 0.015 --gamma 2.25 --sam_rho 0.01
    torchrun --nproc_per_node=8 unlearn.py ... --save_every 20      # sharded; go on with --resume when killed

min over theta of  forget loss(theta + rho v) + gamma * retain loss(theta), v = g/||g||   (arXiv 2502.05374)

Reads DATA/{forget,retain,mcq_forget,mcq_retain}.jsonl (data/README.md has the formats). Writes
OUT/model.safetensors, OUT/config.json, the tokenizer, OUT/result.json (args, metrics, every step) and
OUT/relearn.json. Next: relearn.py attacks the result with other budgets, evaluate.py compares runs. UE = 1 -
accuracy on questions about the forget set (four choices: .75 is chance), UT = accuracy on the rest.
"""
import argparse, functools, json, math, os, random, re, shutil, subprocess, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate, relearn
from evaluate import (CHUNK, IGNORE, InputError, all_max, all_sum, alters_logits, barrier, blocks, chunk_rows,
                      collate, context_of, encode, encode_rows, in_turns, join_processes, load_model,
                      logits_of, make_parser, number, one_line_errors, over_labels, own_part, processes,
                      provenance, read_jsonl, show, text_row, token_logps, warn, whole, with_head, write_json)
from sam import (CR, GP, RS, SAM, WA, accumulator, kernel_file, local, local_rows, operations, plain)

TINY = Path(__file__).resolve().parent / "data" / "tiny"
# Shapes: B samples, T tokens, V vocabulary, D width.


# ---- data and batches -------------------------------------------------------------------------------------

def resolve_data(data, seed):
    """The folder to read: data, or of the built-in benchmark the world of seed, prepared if missing."""
    if Path(data).resolve() != TINY:
        if not Path(data).is_dir():
            raise InputError(f"--data {data}: no such folder (data/README.md has the formats)")
        return Path(data)
    folder = Path(os.path.relpath(TINY / f"seed{seed}"))
    if processes()[0] == 0 and not (folder / "target" / "result.json").exists():
        subprocess.run([sys.executable, str(TINY / "prepare.py"), "--seed", str(seed)], check=True)
    barrier()
    return folder


def save_run(out, model, tokenizer, result):
    """Write a whole run folder under a temporary name, then put it in the place of `out`."""
    tmp, gathered = out.with_name(f"{out.name}.tmp{os.getpid()}"), {}
    for p in model.state_dict(keep_vars=True).values() if processes()[1] > 1 else ():
        if id(p) not in gathered:            # tied weights once; all processes gather, the first one keeps
            gathered[id(p)] = whole(p).cpu() if processes()[0] == 0 else whole(p).new_empty(0)
    if processes()[0] == 0:
        named = model.state_dict(keep_vars=True).items()
        weights = {n: gathered[id(p)] for n, p in named} if gathered else None
        model.save_pretrained(tmp, state_dict=weights)
        tokenizer.save_pretrained(tmp)
        write_json(tmp / "result.json", result)
        if out.exists():
            shutil.rmtree(out)
        tmp.rename(out)
    barrier()


def write_tensors(path, tensors, note):
    """Write {name: tensor} and note (JSON) as one safetensors file, whole or not at all. Sharded tensors are
    gathered and written one after the other, so that the largest is all the memory it takes."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
             torch.int8: "I8"}
    header, end, first = {"__metadata__": {"note": json.dumps(note)}}, 0, processes()[0] == 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    tmp = Path(f"{path}.tmp{os.getpid()}")
    with open(tmp if first else os.devnull, "wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for t in tensors.values():
            t = whole(t)                                          # every process takes part
            if first:
                t.reshape(-1).view(torch.uint8).cpu().numpy().tofile(f)
        f.flush()
        if first:
            os.fsync(f.fileno())
            tmp.replace(path)


def shuffled(n, size, rng):
    """Endless lists of `size` indices below n: one shuffled pass after another."""
    order = []
    while True:
        while len(order) < size:
            order += rng.sample(range(n), n)
        yield order[:size]
        order = order[size:]


def micro_batches(samples, picks, size, pad, device, ref=None):
    """This process's part of the picked samples, collated in batches of at most `size` over all processes;
    each carries its part of ref (N,) and a weight: 0 if it only stands in, see evaluate.own_part."""
    out = []
    for i in range(0, len(picks), size):
        part, weight = own_part(picks[i:i + size])
        out.append(collate([samples[j] for j in part], pad, device) | {"weight": weight})
        if ref is not None:
            out[-1]["ref"] = ref[part].to(device)                                                      # (B,)
    return out


# ---- losses -------------------------------------------------------------------------

def sample_logps(model, batch, reduce="mean"):
    """(B,) log-probability of each sample's labels: mean over tokens (SAM paper) or sum (NPO paper)."""
    logps, mask = token_logps(model, batch)
    return logps.sum(1) / mask.sum(1) if reduce == "mean" else logps.sum(1)


def forget_loss(name, logps, ref=None, beta=0.1, margin=0.0, chosen=None, chosen_ref=None):
    """(B,) forget loss of each sample from its log-probability (B,); descending it unlearns.

    ga, graddiff  logp
    npo           -2/beta log sigmoid(-beta (logp - ref))                                  arXiv 2404.05868
    simnpo        -2/beta log sigmoid(-beta logp - margin)                                 arXiv 2410.07163
    dpo           -1/beta log sigmoid(beta (chosen - chosen_ref) - beta (logp - ref))      arXiv 2305.18290
                  chosen: "I don't know" after the same prompt; rejected: the true answer
    """
    if name in ("ga", "graddiff"):
        return logps
    if name == "npo":
        return -2 / beta * F.logsigmoid(-beta * (logps - ref))
    if name == "simnpo":
        return -2 / beta * F.logsigmoid(-beta * logps - margin)
    assert name == "dpo", name
    return -1 / beta * F.logsigmoid(beta * (chosen - chosen_ref) - beta * (logps - ref))


def kl_sum(model, frozen, batch):
    """Sum over the labelled tokens of KL(frozen || model) over the whole vocabulary; the caller divides."""
    mask, size = batch["labels"][:, 1:] != IGNORE, chunk_rows(model, batch)                         # (B, T-1)

    def kl(p, q):                                                                                # (labels, V)
        p, q = (x.to(accumulator(x.dtype)).log_softmax(-1) for x in (p, q))
        return F.kl_div(p, q, log_target=True, reduction="sum").reshape(1)
    if size and not alters_logits(model):
        with torch.no_grad():
            hidden = with_head(frozen, batch, lambda h, _: h[:, :-1][mask]).logits               # (labels, D)
        head = frozen.get_output_embeddings()
        return over_labels(model, batch, size, lambda p, h: kl(p, head(h)), hidden).sum()
    with torch.no_grad():
        q = logits_of(frozen, batch)[mask]
    return kl(logits_of(model, batch)[mask], q).sum()


def hidden_states(model, batch, layer):
    """(B, T, D) output of decoder layer `layer`, counted from 0."""
    out = with_head(model, batch, lambda hidden, _: hidden.detach(), output_hidden_states=True)    # no logits
    return out.hidden_states[layer + 1]


def distance_sum(hidden, goal, batch):
    """RMU (arXiv 2403.03218): sum over the real tokens of the mean over D of (hidden - goal)^2, with hidden
    (B, T, D) and goal the same or (D,); the caller divides by the number of tokens."""
    return ((hidden - goal).to(accumulator(hidden.dtype)).square().mean(-1) * batch["attention_mask"]).sum()


def forget_backward(model, micro, chosen, args, goal=None):
    """Forward and backward of the whole forget batch, added to p.grad; returns its loss (0-dim). `micro` is a
    list of micro-batches, `chosen` their preferred answers (dpo only). Each is divided by the count of the
    whole batch, so the split changes nothing."""
    count = all_sum(sum(b["weight"] * (b["attention_mask"].sum() if args.loss == "rmu" else len(b["labels"]))
                        for b in micro), model.device)
    total = 0.0
    for batch, other in zip(micro, chosen or [{}] * len(micro)):
        if args.loss == "rmu":
            loss = distance_sum(hidden_states(model, batch, args.rmu_layer), goal, batch)
        else:
            logps = sample_logps(model, batch, args.reduce)                                            # (B,)
            other_logps = sample_logps(model, other, args.reduce) if other else None
            loss = forget_loss(args.loss, logps, batch.get("ref"), args.beta, args.margin, other_logps,
                               other.get("ref")).sum()
        loss = loss * batch["weight"] / count
        loss.backward()
        total = total + loss.detach()
    return all_sum(total, model.device)


def retain_backward(model, micro, args, frozen=None):
    """Forward and backward of the weighted retain loss, added to p.grad; returns it without the weight."""
    if args.loss == "rmu":
        return mean_backward(model, micro, "rmu", args.rmu_alpha, frozen, args.rmu_layer)
    return 0.0 if args.retain == "none" else mean_backward(model, micro, args.retain, args.gamma, frozen)


def mean_backward(model, micro, kind, weight=1.0, frozen=None, layer=None):
    """Forward and backward of weight * the mean over tokens of nll, kl or rmu, added to p.grad; returns the
    mean. The retain losses, and with nll on forget samples the loss that a relearning attack goes down."""
    counted = [b["attention_mask"] if kind == "rmu" else b["labels"][:, 1:] != IGNORE for b in micro]
    count = all_sum(sum(b["weight"] * c.sum() for b, c in zip(micro, counted)), model.device)
    total = 0.0
    for batch in micro:
        if kind == "rmu":
            with torch.no_grad():
                kept = hidden_states(frozen, batch, layer)
            loss = distance_sum(hidden_states(model, batch, layer), kept, batch)
        elif kind == "kl":
            loss = kl_sum(model, frozen, batch)
        else:
            loss = -token_logps(model, batch)[0].sum()                                                 # nll
        loss = loss * batch["weight"] / count
        (weight * loss).backward()
        total = total + loss.detach()
    return all_sum(total, model.device)


@torch.no_grad()
def reference_logps(model, samples, args, pad):
    """(N,) log-probability of every sample under the model as it is now: kept instead of a second model."""
    out = torch.full((len(samples),), -math.inf, dtype=accumulator(model.dtype))
    size, indices = args.micro_batch, list(range(len(samples)))
    for _, picks in in_turns([indices[i:i + size] for i in tqdm(indices[::size], "reference", leave=False)]):
        batch = collate([samples[j] for j in picks], pad, model.device)
        out[picks] = sample_logps(model, batch, args.reduce).cpu()
    return all_max(out, model.device)


# ---- the pieces of a run ----------------------------------------------------------------------------------

def parse_smooth(text):
    """'sam+wa' -> ('sam', True): one of none, sam, rs, gp, cr inside a step goes with wa across steps."""
    parts = text.split("+")
    for part in parts:
        if part not in ("none", "sam", "rs", "gp", "cr", "wa"):
            raise InputError(f"--smooth {text}: {part!r} is not one of none, sam, rs, gp, cr, wa")
    base = [part for part in parts if part != "wa"]
    if len(base) > 1:
        raise InputError(
            f"--smooth {text} has no meaning: {' and '.join(base)} each define the forget gradient of a "
            f"step; choose one, and add +wa if you like")
    if len(parts) - len(base) > 1 or ("none" in parts and len(parts) > 1):
        raise InputError(f"--smooth {text} has no meaning: write wa")
    return (base[0] if base else "none"), "wa" in parts


def make_smoother(args, named):
    """The smoother of args.smooth for named = [(name, parameter)], all that train; see sam.py."""
    base, params = parse_smooth(args.smooth)[0], [p for _, p in named]
    if base == "sam":
        return SAM(params, args.sam_rho, args.sam_norm, args.sam_direction,
                   [p for _, p in matching(named, "sam_modules", args.sam_modules)], args.sam_flip,
                   args.lookahead_steps, args.seed, args.triton)
    if base == "rs":
        return RS(params, args.rs_sigma, args.rs_samples, args.seed, args.triton)
    if base == "gp":
        return GP(params, args.gp_lambda, args.gp_radius, args.triton)
    if base == "cr":
        return CR(params, args.cr_lambda, args.cr_mu, triton=args.triton)
    return plain


def make_optimizer(args, params, adamw=None):
    """AdamW: that of kernels/adamw.py where the module is given, else torch's, whose states take the weights'
    dtype; fused on a GPU, which saves a copy of the weights."""
    if adamw:
        return adamw.AdamW(params, args.lr, weight_decay=args.weight_decay, seed=args.seed,
                           state_dtype=getattr(torch, args.state_dtype), triton=args.triton,
                           stochastic_rounding=args.stochastic_rounding)
    return torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay,
                             fused=True if params[0].is_cuda else None)


def recompute_blocks(model):
    """Gradient checkpointing: keep only a decoder layer's input, and run it again in the backward pass."""
    if not blocks(model):
        raise InputError(
            f"--gradient_checkpointing: {type(model).__name__} does not name its layers; drop it")
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          preserve_rng_state=False)


def activation_bytes(model, samples, args, pad):
    """Estimate of what a pass over the largest micro-batch keeps for its backward pass: in the blocks, as
    measured on the longest sample, and in the output layer three times the fp32 logits of a chunk."""
    longest, config, kept = max(samples, key=lambda s: len(s[0])), model.config.get_text_config(), {}
    width, depth = config.hidden_size, config.num_hidden_layers

    def pack(t):
        weights = {local(p).untyped_storage().data_ptr() for p in model.parameters()}
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = with_head(model, collate([longest], pad, model.device), lambda hidden, _: hidden.clone())
    size, token = model.dtype.itemsize, sum(kept.values()) / out.logits.shape[1]
    if args.gradient_checkpointing:                         # each block's input, and the inside of one block
        token = depth * width * size + token / depth
    tokens = -(-args.micro_batch // processes()[1]) * len(longest[0])
    rows = min(tokens, max(1, CHUNK // config.vocab_size))
    gathered = 0
    if processes()[1] > 1:                                    # two blocks at a time, and what is in no block
        inside = [sum(p.numel() for p in b.parameters()) for b in blocks(model)]
        gathered = sum(p.numel() for p in model.parameters()) - sum(inside) + 2 * max(inside, default=0)
    return tokens * token + 3 * 4 * rows * config.vocab_size + gathered * size


def memory_plan(args, total, trained, activations, count=1):
    """{part: bytes} of what a step holds in each of `count` processes; `trained` of `total` parameters train.

    Not all parts peak together, so the sum is an upper bound. The interpreter itself (0.5 GB) is not in it.
    """
    size, state = (getattr(torch, name).itemsize for name in (args.param_dtype, args.state_dtype))
    base, averaged = parse_smooth(args.smooth)
    frozen = args.loss == "rmu" or args.retain == "kl"
    aside = {"none": 0, "sam": 1, "rs": 1, "gp": 2, "cr": 5}[base]        # copies of weights or of gradients
    if base == "sam" and args.sam_direction == "momentum":
        aside += 1 / size if args.sam_norm == "linf" else 1                   # a byte a weight for its sign
    plan = {"weights": total * size * (1 + frozen), "gradients": trained * size,
            "put aside": aside * trained * size, "optimizer": 2 * trained * state,
            "average": 4 * trained * averaged}
    return {k: v / count for k, v in plan.items() if v} | {"activations": activations}


def plan_line(plan, device):
    """The plan as one line, and a second one with what to do where it is more than the device has."""
    cuda = torch.device(device).type == "cuda"
    room = torch.cuda.mem_get_info(device)[1] if cuda else (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    need, parts = sum(plan.values()), ", ".join(f"{k} {v / 1e9:.2f}" for k, v in plan.items())
    line = (f"needs {need / 1e9:.2f} GB ({parts}) in each of {processes()[1]} processes on "
            f"{torch.cuda.get_device_name(device) if cuda else 'cpu'} with {room / 1e9:.0f} GB")
    return line + ("" if need < room else "\nthat is too much: try --gradient_checkpointing, a smaller "
                   "--micro_batch, --param_dtype bfloat16, or torchrun with more GPUs")


def matching(named, flag, pattern):
    """The (name, parameter) pairs whose name contains a match of pattern."""
    some = [(n, p) for n, p in named if re.search(pattern, n)]
    if not some:
        raise InputError(
            f"--{flag} {pattern!r} matches no parameter: the names go from {named[0][0]} to {named[-1][0]}")
    return some


def learning_rate(step, steps, peak, warmup, decay):
    """Rate of a step counted from 0: linear warm-up over the share `warmup`, then constant or linear to 0."""
    ramp = min(1.0, (step + 1) / max(1, round(warmup * steps)))
    return peak * ramp * (1 - step / steps if decay == "linear" else 1.0)


def state_tensors(named, optimizer, smoother, average):
    """{name: tensor} of all that changes from step to step: weights, optimizer states, the directions that
    SAM keeps, averaged weights."""
    tensors, kept = {f"weights.{n}": p for n, p in named}, getattr(smoother, "kept", {})
    tensors |= {f"{key}.{n}": t for n, p in named for key, t in optimizer.state[p].items()}
    tensors |= {f"direction.{n}": kept[p] for n, p in named if p in kept}
    means = average.mean if average and average.mean else []
    return tensors | {f"mean.{n}": m for (n, _), m in zip(named, means)}


@torch.no_grad()
def resume(path, args, named, optimizer, smoother, average):
    """Put the state that write_tensors saved in place, for any number of processes; returns its note."""
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["note"])
        free = {"out", "overwrite", "resume", "save_every", "relearn", "device", "micro_batch"}
        for key in note["args"].keys() - free:
            if note["args"][key] != vars(args)[key]:
                raise InputError(f"--resume: {path} was written with --{key} {note['args'][key]}, now it is "
                                 f"{vars(args)[key]}: give the same flags, or remove the file to start again")
        for _, p in named:                              # a step that moves nothing allocates the states
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average and note["averaged"]:
            average.update()
            average.count = note["averaged"]
        if isinstance(smoother, SAM) and smoother.direction == "momentum":
            kind = torch.int8 if smoother.linf else None
            smoother.kept = {p: torch.zeros_like(p, dtype=kind) for n, p in named
                             if f"direction.{n}" in file.keys()}
        for name, t in state_tensors(named, optimizer, smoother, average).items():
            local(t).copy_(local_rows(t, file.get_slice(name)))   # a process reads its own rows only
    if isinstance(smoother, (RS, SAM)):
        smoother.draws = note["draws"]
    return note


def precision_warning(applied, cosine, radius, dtype):
    """One line if what the weights' precision let through is not the perturbation asked for, else None."""
    if 0.5 < applied / radius < 2 and cosine > 0.9:
        return None
    return (f"precision: in {dtype} a perturbation of norm {radius:g} became one of norm {applied:.3g} with "
            f"cosine {cosine:.2f} to it; use fp32 weights, a larger rho, or gp with a large radius")


def parse_args(argv=None):
    """The flags, checked and completed, so that vars(args) is what runs; argv None = the command line."""
    p, flag = make_parser(__doc__), argparse.BooleanOptionalAction
    some, real, above = number(int, 1), number(float, 0), number(float, 0, above=True)
    # what to unlearn, and where to write
    p.add_argument("--model", default=None,
                   help="Hugging Face folder or hub name (default: the built-in target)")
    p.add_argument("--data", default=os.path.relpath(TINY),
                   help="folder with forget.jsonl, ... (default: built-in)")
    p.add_argument("--out", default=None, help="run folder (default: out/LOSS+SMOOTH[-VARIANT]-sSEED)")
    p.add_argument("--seed", type=number(int, 0), default=0,
                   help="of batches and noise; built-in: of world and target too")
    p.add_argument("--overwrite", action=flag, default=False, help="replace OUT when it exists")
    p.add_argument("--param_dtype", choices=["float32", "bfloat16"], default="float32",
                   help="of the weights; bfloat16 halves memory and swallows most of a small perturbation")
    p.add_argument("--triton", action=flag, default=None,
                   help="SAM, noise, averages and AdamW by kernels/ (default: when the weights are on a GPU)")
    p.add_argument("--stochastic_rounding", action=flag, default=False,
                   help="of the weights, for --param_dtype bfloat16, which else swallows small steps")
    p.add_argument("--state_dtype", choices=["float32", "bfloat16"], default=None,
                   help="of AdamW's two states (default: as the weights); another one takes kernels/adamw.py")
    p.add_argument("--gradient_checkpointing", action=flag, default=False,
                   help="keep only a layer's input and run it again for its gradient: less memory, 4/3 time")
    # the objective; "7B" is what the paper used for Zephyr-7B on WMDP-Bio
    p.add_argument("--loss", choices=["npo", "graddiff", "ga", "simnpo", "dpo", "rmu"], default="npo",
                   help="on the forget set; ga has no retain term, dpo needs rows with prompt and completion")
    p.add_argument("--retain", choices=["nll", "kl", "none"], default=None,
                   help="on the retain set (default nll; ga has none, rmu its own); kl keeps a frozen model")
    p.add_argument("--beta", type=above, default=0.5, help="of npo, simnpo, dpo; 7B: .0225 npo, .015 npo+sam")
    p.add_argument("--gamma", type=real, default=1.0,
                   help="weight of the retain loss; 7B: 1 npo, 2.25 npo+sam")
    p.add_argument("--margin", type=real, default=0.0, help="of simnpo, in nats")
    p.add_argument("--reduce", choices=["mean", "sum"], default="mean",
                   help="a sample's log-probability over tokens")
    p.add_argument("--idk_text", default="I don't know.", help="the preferred answer of dpo")
    p.add_argument("--rmu_layer", type=int, default=-1,
                   help="counted from 0; 7B: 7 (default: 7/32 of the depth)")
    p.add_argument("--rmu_c", type=real, default=6.5, help="length of rmu's random goal; 7B: 6.5 or 20")
    p.add_argument("--rmu_alpha", type=real, default=1200.0, help="weight of rmu's retain term; 7B: 1200")
    # the smoother
    p.add_argument("--smooth", default="sam", help="none, sam, rs, gp, cr, wa, or one of them +wa")
    p.add_argument("--sam_rho", type=real, default=None,
                   help="radius of sam, 0 = none; 7B: .01. Alone it means the paper's SAM: l2, gradient "
                   "(default: .1; with linf .1 / width, rounded to one digit)")
    p.add_argument("--sam_norm", choices=["l2", "linf"], default=None,
                   help="move all weights together by rho along the direction, or each by rho along its sign "
                   "(default: l2; on the built-in data, without rho and direction, linf)")
    p.add_argument("--sam_direction", choices=["gradient", "momentum", "lookahead", "random"],
                   default=None, help="of the forget loss here (the paper); of the step before, which saves "
                   "a pass; where the attacker would go; noise, a control (default: gradient; on the "
                   "built-in data, without rho and norm, momentum)")
    p.add_argument("--lookahead_steps", type=some, default=1, help="of lookahead, each a pass and rho/steps")
    p.add_argument("--sam_modules", default="", metavar="REGEX",
                   help="perturb only parameters whose name matches")
    p.add_argument("--sam_flip", action=flag, default=False,
                   help="control: perturb the other way")
    p.add_argument("--rs_sigma", type=real, default=0.01, help="rs's noise on every weight; 7B: 1e-4")
    p.add_argument("--rs_samples", type=some, default=3, help="draws of rs a step; 7B: 3")
    p.add_argument("--gp_lambda", type=real, default=0.1, help="weight of gp's ||g||")
    p.add_argument("--gp_radius", type=above, default=0.01, help="finite-difference step of gp")
    p.add_argument("--cr_mu", type=above, default=0.1, help="radius of cr; 7B: .01")
    p.add_argument("--cr_lambda", type=real, default=0.3,
                   help="weight of cr; 7B: 10, on a gradient that was zero")
    p.add_argument("--wa_start", type=int, default=-1,
                   help="first step averaged (default: 4/5 in); 7B: 100 of 125")
    p.add_argument("--wa_every", type=some, default=5, help="steps between averaged weights; 7B: 5")
    # training
    p.add_argument("--steps", type=some, default=160, help="7B: 125")
    p.add_argument("--batch_size", type=some, default=32,
                   help="forget samples, and as many retain, a step; 7B: 4")
    p.add_argument("--micro_batch", type=number(int, 0), default=0,
                   help="samples a pass, over all processes (0 = batch_size); same update")
    p.add_argument("--lr", type=above, default=3e-4, help="of AdamW; 7B: 5e-6")
    p.add_argument("--warmup", type=real, default=0.1, help="share of the steps")
    p.add_argument("--decay", choices=["none", "linear"], default="none", help="after warm-up; 7B: linear")
    p.add_argument("--weight_decay", type=real, default=0.0, help="of AdamW")
    p.add_argument("--clip", type=real, default=1.0, help="largest gradient norm, 0 = no clipping")
    p.add_argument(
        "--train_modules", default="", metavar="REGEX",
        help="train only matching parameters (default all; rmu: down_proj of its layer and two below)")
    p.add_argument("--max_len", type=number(int, 0), default=0,
                   help="cut samples to so many tokens (0: too long = error)")
    p.add_argument("--save_every", type=number(int, 0), default=0,
                   help="steps between saves of OUT.state.safetensors, removed at the end (0: none)")
    p.add_argument("--resume", action=flag, default=False, help="go on from that file, if it is there")
    # measuring
    p.add_argument("--stop_ue", type=real, default=0.0, help="stop once UE reaches this (0 = fixed steps)")
    p.add_argument("--eval_every", type=number(int, 0), default=0,
                   help="steps between UE on the curve (0: 5 with stop_ue)")
    p.add_argument("--relearn", action=flag, default=True,
                   help="attack the result with relearn.py's defaults")
    args = p.parse_args(argv)

    if args.stochastic_rounding and args.param_dtype != "bfloat16":
        raise InputError(f"--stochastic_rounding: {args.param_dtype} needs none; add --param_dtype bfloat16")
    base, averaged = parse_smooth(args.smooth)
    if base == "sam" and args.sam_rho == 0:                      # a radius of 0 is no smoother: say what runs
        base, args.smooth = "none", "wa" if averaged else "none"
    for name in ("sam_flip", "sam_modules", "sam_norm", "sam_direction"):
        if getattr(args, name) != p.get_default(name) and base != "sam":
            raise InputError(
                f"--{name}: there is no SAM perturbation with --smooth {args.smooth}; drop one of them")
    where, free = Path(args.data).resolve(), args.sam_rho is args.sam_norm is args.sam_direction is None
    if base == "sam" and free and TINY in (where, where.parent):
        args.sam_norm, args.sam_direction = "linf", "momentum"   # as good, cheaper: README, Beyond the paper
    args.sam_norm, args.sam_direction = args.sam_norm or "l2", args.sam_direction or "gradient"
    if args.sam_norm == "l2" and args.sam_rho is None:
        args.sam_rho = 0.1
    if args.lookahead_steps > 1 and args.sam_direction != "lookahead":
        raise InputError(f"--lookahead_steps {args.lookahead_steps}: --sam_direction {args.sam_direction} "
                         "looks at no attacker; add --sam_direction lookahead, or drop it")
    for name in ("sam_modules", "train_modules"):
        try:
            re.compile(getattr(args, name))
        except re.error as e:
            raise InputError(f"--{name} {getattr(args, name)!r} is not a regular expression: {e}")
    if args.loss in ("ga", "rmu") and args.retain not in (None, "none"):
        fix = {"ga": "ga has none; use --loss graddiff", "rmu": "rmu brings its own, --rmu_alpha; drop it"}
        raise InputError(f"--retain {args.retain}: {fix[args.loss]}")
    args.retain = args.retain or ("none" if args.loss in ("ga", "rmu") else "nll")
    args.state_dtype = args.state_dtype or args.param_dtype
    args.micro_batch = args.micro_batch or args.batch_size
    args.wa_start = args.steps * 4 // 5 if args.wa_start < 0 else args.wa_start
    if averaged and args.wa_start >= args.steps:
        raise InputError(
            f"--wa_start {args.wa_start}: nothing to average in {args.steps} steps; start earlier")
    args.eval_every = args.eval_every or (5 if args.stop_ue else 0)
    variant = "".join(f"-{v}" for v, usual in ((args.sam_direction, "gradient"), (args.sam_norm, "l2"))
                      if v != usual) + "-flip" * args.sam_flip
    suffix = ("" if args.smooth == "none" else f"+{args.smooth}") + variant
    args.out = args.out or f"out/{args.loss}{suffix}-s{args.seed}"
    if Path(args.out).exists() and not args.overwrite:
        raise InputError(f"--out {args.out} exists: choose another name, or replace it with --overwrite")
    if Path(f"{args.out}.state.safetensors").exists() and not args.resume and not args.overwrite:
        raise InputError(
            f"{args.out}.state.safetensors: a run was broken off; go on with --resume, or remove it")
    return args


if __name__ == "__main__":
    with one_line_errors():
        # -- setup
        args, start = parse_args(), time.time()
        join_processes(args.device)
        folder, out = resolve_data(args.data, args.seed), Path(args.out)
        args.data = str(folder)
        args.model = args.model or (str(folder / "target") if folder.resolve().parent == TINY else None)
        if args.model is None:
            raise InputError(f"--data {args.data}: name the model to unlearn with --model")
        rng = random.Random(args.seed)
        torch.manual_seed(args.seed)

        # -- data and model
        forget_rows = read_jsonl(folder / "forget.jsonl", text_row)
        retain_rows = read_jsonl(folder / "retain.jsonl", text_row)
        questions = evaluate.load_questions(folder)
        if args.stop_ue and "mcq_forget" not in questions:
            raise InputError(
                f"--stop_ue {args.stop_ue}: needs {folder / 'mcq_forget.jsonl'}, which is missing")
        model, tokenizer = load_model(args.model, args.device, getattr(torch, args.param_dtype))
        try:
            ops, why = operations(list(model.parameters()), args.triton)
            args.triton = ops.__name__ != "torch"
            own = args.triton or args.stochastic_rounding or args.state_dtype != args.param_dtype
            adamw = kernel_file("adamw") if own else None
        except (ValueError, ImportError, FileNotFoundError) as e:
            raise InputError(f"--triton {args.triton} --stochastic_rounding {args.stochastic_rounding}: {e}; "
                             "mend this or use --no-triton")
        print(f"the weights are moved by {'Triton kernels' if args.triton else 'torch'}: {why}")
        context, pad = context_of(model), tokenizer.pad_token_id or 0
        forget = encode_rows(tokenizer, forget_rows, context, args.max_len)
        retain = encode_rows(tokenizer, retain_rows, context, args.max_len)
        before = evaluate.ue_ut(model, tokenizer, questions)
        print(
            f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.param_dtype} on "
            f"{args.device}; {len(forget):,} forget and {len(retain):,} retain samples")

        # -- constants of the loss, from the model as it is
        ref = chosen = chosen_ref = frozen = goal = None
        if args.loss == "dpo":
            for row in forget_rows:
                if "prompt" not in row or "completion" not in row:
                    raise InputError(
                        f"{row['where']}: --loss dpo needs prompt and completion, found only a text")
            forget, chosen = (encode(tokenizer, [(r["prompt"], answer or r["completion"], r["where"])
                                                 for r in forget_rows], context, args.max_len)
                              for answer in (None, " " + args.idk_text))
            chosen_ref = reference_logps(model, chosen, args, pad)
        if args.loss in ("npo", "dpo"):
            ref = reference_logps(model, forget, args, pad)
        if args.loss == "rmu" or args.retain == "kl":
            frozen = load_model(args.model, args.device, model.dtype)[0].requires_grad_(False)
            if processes()[1] > 1:
                frozen.set_reshard_after_forward(False, recurse=False)     # it never changes; kl_sum needs it
        if args.loss == "rmu":
            depth = model.config.num_hidden_layers
            args.rmu_layer = depth * 7 // 32 if args.rmu_layer < 0 else args.rmu_layer
            if args.rmu_layer > depth - 2:
                raise InputError(
                    f"--rmu_layer {args.rmu_layer}: choose 0 to {depth - 2}, the model has {depth} layers")
            args.train_modules = args.train_modules or "layers\\.({})\\.mlp\\.down_proj".format(
                "|".join(str(i) for i in range(max(0, args.rmu_layer - 2), args.rmu_layer + 1)))
            goal = torch.rand(model.config.hidden_size)            # entries uniform on [0, 1), as published
            goal = (args.rmu_c * goal / goal.norm()).to(model.device, model.dtype)                     # (D,)

        # -- what trains, and how
        named = matching(list(model.named_parameters()), "train_modules", args.train_modules)
        params = [p for _, p in named]
        model.requires_grad_(False)
        for p in params:
            p.requires_grad_(True)
        if args.sam_rho is None:      # a sign step changes a layer's output by up to rho * width, as Adam's
            width = model.config.get_text_config().hidden_size            # does: muP, arXiv 2203.03466
            args.sam_rho = float(f"{0.1 / width:.0e}")
        smoother = make_smoother(args, named)
        average = WA(params, args.triton) if parse_smooth(args.smooth)[1] else None
        radius = {SAM: args.sam_rho / args.lookahead_steps, GP: args.gp_radius,
                  CR: args.cr_mu}.get(type(smoother))
        optimizer = make_optimizer(args, params, adamw)
        count = lambda some: sum(p.numel() for p in some)
        plan = memory_plan(args, count(model.parameters()), count(params), activation_bytes(
            model, forget + retain + (chosen or []), args, pad), processes()[1])
        print(plan_line(plan, args.device))
        if args.gradient_checkpointing:
            recompute_blocks(model)

        # -- the loop
        forget_picks, retain_picks = (shuffled(len(s), args.batch_size, rng) for s in (forget, retain))
        attack_picks = shuffled(len(forget), args.batch_size, random.Random(f"{args.seed} lookahead"))
        looks = args.lookahead_steps * (getattr(smoother, "direction", "") == "lookahead")    # passes a step
        curve, warning, done, state_file = [], None, 0, Path(f"{out}.state.safetensors")
        if args.resume and state_file.exists():
            note = resume(state_file, args, named, optimizer, smoother, average)
            curve, warning, done = note["curve"], note["warning"], len(note["curve"])
            for _ in range(done):
                next(forget_picks), next(retain_picks)             # the batches that were seen
            for _ in range(done * looks):
                next(attack_picks)
        out.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(range(done, args.steps), f"{args.loss}+{args.smooth}", args.steps, initial=done,
                   unit="step")
        for step in bar:
            tick = time.time()
            lr = learning_rate(step, args.steps, args.lr, args.warmup, args.decay)
            optimizer.param_groups[0]["lr"] = lr
            f, r, how = next(forget_picks), next(retain_picks), (args.micro_batch, pad, args.device)
            f_micro, r_micro = micro_batches(forget, f, *how, ref), micro_batches(retain, r, *how)
            c_micro = micro_batches(chosen, f, *how, chosen_ref) if chosen else None

            # the smoothed forget gradient goes into p.grad, and the retain gradient at theta on top of it
            descend = lambda: forget_backward(model, f_micro, c_micro, args, goal)
            attack = lambda: mean_backward(model, micro_batches(forget, next(attack_picks), *how), "nll")
            f_loss = smoother(descend, attack) if looks else smoother(descend)
            r_loss = retain_backward(model, r_micro, args, frozen)
            norm = whole(torch.nn.utils.clip_grad_norm_(params, args.clip or math.inf))

            values = {"forget": f_loss, "retain": r_loss, "grad_norm": norm, **getattr(smoother, "stats", {})}
            numbers = [torch.as_tensor(v, dtype=torch.float32, device=norm.device) for v in values.values()]
            values = dict(zip(values, torch.stack(numbers).tolist()))
            if not all(map(math.isfinite, values.values())):       # a GPU waits here, once a step
                raise InputError(f"step {step + 1}: a loss or gradient is not finite ({values}); stopped, "
                                 "nothing written; lower --lr or --sam_rho, or use --param_dtype float32")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average and step >= args.wa_start and (step - args.wa_start) % args.wa_every == 0:
                average.update()

            point = {"step": step + 1, "lr": lr, **values, "seconds": round(time.time() - tick, 4)}
            if radius and not warning and point["norm"] > 0:
                size = radius * (point["norm"] if getattr(smoother, "linf", False) else 1)
                warning = precision_warning(point["applied_norm"], point["cosine"], size, args.param_dtype)
                if warning:
                    warn(warning)
            if args.eval_every and "mcq_forget" in questions and (step + 1) % args.eval_every == 0:
                point["UE"] = evaluate.ue_ut(model, tokenizer, questions, only_forget=True)["UE"]
            curve.append(point)
            watched = [k for k in ("forget", "retain", "applied_norm", "cosine", "UE") if k in point]
            bar.set_postfix({k: f"{point[k]:.3g}" for k in watched})
            if args.stop_ue and point.get("UE", 0) >= args.stop_ue:
                break
            if args.save_every and (step + 1) % args.save_every == 0:
                write_tensors(state_file, state_tensors(named, optimizer, smoother, average), {
                    "args": vars(args), "curve": curve, "warning": warning,
                    "draws": getattr(smoother, "draws", 0), "averaged": average.count if average else 0})
        if average and not average.count:
            warn(f"wa: stopped before step {args.wa_start}, so nothing was averaged")
        if average:
            average.swap()                                    # the mean is what is scored, saved and attacked

        # -- score, save, attack
        after = evaluate.ue_ut(model, tokenizer, questions)
        result = {"stage": "unlearn", "args": vars(args), **provenance(args.device, start),
                  "plan_gb": {k: round(v / 1e9, 4) for k, v in plan.items()},
                  "metrics": {"before": before, "after": after}, "curve": curve}
        save_run(out, model, tokenizer, result)
        state_file.unlink(missing_ok=True)
        for name, scores in (("before", before), ("after", after)):
            print(f"{name:7s} UE {show(scores['UE'])}  UT {show(scores['UT'])}")
        if args.relearn:
            model.requires_grad_(True)
            relearn.main(relearn.parse_args([str(out), "--device", args.device]), model, tokenizer)
        print(f"{time.time() - start:.0f} s in all; wrote {out}/")
