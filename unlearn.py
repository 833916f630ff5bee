"""Unlearn a forget set so that it stays forgotten: climb rho, take the forget gradient there, return, step.

    python unlearn.py                                 # laptop CPU, built-in data: 40 s, then 15 s; NPO + SAM
                                                      # along the last step's signs (data/tiny/readme.md)
                                                      # UE .00 -> .77, .72 after relearning on 60 samples
    python unlearn.py --sam_rho 0.1                   # the paper's SAM: .61, then .47
    python unlearn.py --sam_rho 0                     # plain NPO: .76, then .24
    python unlearn.py --lora 8                        # adapters alone, merged: .76, then .46
    python unlearn.py --loss graddiff --smooth gp+wa  # any loss with any smoother
    python unlearn.py --model ORG/NAME --data FOLDER --lr 5e-6 --beta 0.015 --gamma 2.25 --sam_rho 0.01
    torchrun --nproc_per_node=8 unlearn.py ... --save_every 20      # sharded; go on with --resume when killed

min over theta of  forget loss(theta + rho v) + gamma * retain loss(theta), v = g/||g||   (arXiv 2502.05374)

The losses are in data/losses.py, the smoothers in sam.py. Reads DATA/{forget,retain,mcq_forget,
mcq_retain}.jsonl (data/README.md has the formats). Writes OUT/model.safetensors, OUT/config.json, the
tokenizer, OUT/result.json (args, metrics, every step) and OUT/relearn.json. Next: relearn.py attacks the
result with other budgets, evaluate.py compares runs. UE = 1 - accuracy on questions about the forget set
(four choices: .75 is chance), UT = accuracy on the rest.
"""
import argparse
import math
import os
import random
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import relearn
import sam
from data import (adapters, formats, frozen, ilu, latent, losses, memory, merge, models, optimizers,
                  processes, runs, states, tables, undo)
from data.formats import InputError
from data.texts import Texts, shuffled


# ---- the smoothers by name ----------------------------------------------------------------------------
# Each takes args, the parameters that train, and those of them that --sam_modules wants perturbed.

def make_plain(args, params, perturb):
    """No smoothing."""
    return sam.Plain()


def make_sam(args, params, perturb):
    """SAM along --sam_direction, of radius --sam_rho in --sam_norm."""
    how = {"rho": args.sam_rho, "norm": args.sam_norm, "perturb": perturb, "flip": args.sam_flip,
           "triton": args.triton}
    if args.sam_direction == "momentum":
        return sam.Momentum(params, **how)
    if args.sam_direction == "lookahead":
        return sam.Lookahead(params, **how, steps=args.lookahead_steps)
    if args.sam_direction == "random":
        return sam.Random(params, **how, seed=args.seed)
    return sam.SAM(params, **how)


def make_rs(args, params, perturb):
    """Randomized smoothing."""
    return sam.RS(params, args.rs_sigma, args.rs_samples, args.seed, args.triton)


def make_gp(args, params, perturb):
    """Gradient penalty."""
    return sam.GP(params, args.gp_lambda, args.gp_radius, args.triton)


def make_cr(args, params, perturb):
    """Curvature regularization."""
    return sam.CR(params, args.cr_lambda, args.cr_mu, triton=args.triton)


SMOOTHERS = {                                    # --smooth
    "none": make_plain,
    "sam": make_sam,
    "rs": make_rs,
    "gp": make_gp,
    "cr": make_cr,
}


def parse_smooth(text):
    """'sam+wa' -> ('sam', True): one of SMOOTHERS inside a step goes with wa across steps."""
    parts = text.split("+")
    for part in parts:
        if part not in SMOOTHERS and part != "wa":
            raise InputError(f"--smooth {text}: {part!r} is not one of {', '.join(SMOOTHERS)}, wa")
    inside = [part for part in parts if part != "wa"]
    if len(inside) > 1:
        raise InputError(f"--smooth {text} has no meaning: {' and '.join(inside)} each define the forget "
                         "gradient of a step; choose one, and add +wa if you like")
    if parts.count("wa") > 1 or ("none" in parts and "wa" in parts):
        raise InputError(f"--smooth {text} has no meaning: write wa")
    return (inside[0] if inside else "none"), "wa" in parts


# ---- inputs, and what a step descends -----------------------------------------------------------------

def find_inputs(args):
    """The data folder; fills in args.data and args.model, which for the built-in benchmark follow from it."""
    folder = runs.world(args.data, args.seed)
    args.data = str(folder)
    if args.model is None and folder.resolve().parent == runs.TINY:
        args.model = str(folder / "target")
    if args.model is None:
        raise InputError(f"--data {args.data}: name the model to unlearn with --model")
    return folder


def find_questions(args, folder):
    """({part: questions}, those of them that are asked on the way)."""
    questions = evaluate.load_questions(folder)
    if (args.stop_ue or args.keep == "best") and "mcq_forget" not in questions:
        raise InputError(f"--stop_ue and --keep best need {folder / 'mcq_forget.jsonl'}, which is missing")
    few = {name: formats.spaced(rows, args.eval_limit) for name, rows in questions.items()}
    return questions, few


def say_what(args, model, texts, adapters=None):
    """Print what is about to be unlearned from what, and what trains."""
    size = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {size:,} parameters, {args.param_dtype} on {args.device}; "
          f"{len(texts.forget):,} forget and {len(texts.retain):,} retain samples")
    saved = model.saved_dtype
    if saved and saved.itemsize < model.dtype.itemsize:
        print(f"the checkpoint is in {str(saved)[6:]}: in {args.param_dtype} the result is larger on disk")
    if adapters:
        size = sum(p.numel() for _, p in adapters.named())
        line = f"adapters of rank {args.lora} on {len(adapters.pairs)} layers train: {size:,} fp32 parameters"
        if parse_smooth(args.smooth)[0] == "sam":
            moved = {"adapters": "A and B", "weights": "the weights"}[args.lora_perturb]
            line += f"; rho is the move of {moved}"
        print(line)


def inputs_of(texts, model):
    """What tells that --resume has the same data and the same model: a hash of all tokens, and the norm of the
    weights to six digits, since sums over other numbers of processes differ in the last ones."""
    norm = sam.global_norm([p.detach() for p in model.parameters()])
    return {"data": texts.digest(), "model": f"{norm:.6g}"}


def frozen_model(args, model, adapters=None):
    """The model before unlearning, where the loss compares with its states or its whole vocabulary: the same one
    with its adapters off, or a second one."""
    if args.loss != "rmu" and args.retain != "kl":
        return None
    if adapters:
        return adapters.without()
    start = models.load_model(args.model, args.device, model.dtype)[0].requires_grad_(False)
    if processes.count() > 1:
        start.set_reshard_after_forward(False, recurse=False)       # it never changes; kl_sum needs it
    return start


def objectives(args, model, start, hidden=None):
    """Two functions of micro-batches, forward and backward of the forget loss and of the weighted retain loss:
    each adds to p.grad and returns the mean, the second one without its weight. hidden: None, or an
    attack of data/latent.py."""
    forget = (losses.forget_sum(args), "samples")
    retain = {"nll": (losses.nll_sum, "labels", args.gamma), "none": None,
              "kl": (losses.kl_sum(start), "labels", args.gamma)}[args.retain]
    if args.loss == "rmu":
        goal = losses.rmu_goal(model, args.rmu_c, model.dtype)
        forget = (losses.rmu_forget_sum(args.rmu_layer, goal), "tokens")
        retain = (losses.rmu_retain_sum(args.rmu_layer, start), "tokens", args.rmu_alpha)

    def descend_forget(micro):
        if not hidden:
            return losses.descend(model, micro, *forget)
        hidden.prepare(micro)
        return losses.descend(model, micro, latent.under(hidden, forget[0]), forget[1])

    def descend_retain(micro):
        return losses.descend(model, micro, *retain) if retain else 0.0
    return descend_forget, descend_retain


# ---- what trains, and how -----------------------------------------------------------------------------

def complete_for(args, model):
    """Fill in the flags whose defaults follow from the model, so that vars(args) is what runs."""
    config = model.config.get_text_config()
    if args.loss == "rmu":
        depth = config.num_hidden_layers
        if args.rmu_layer is None:
            args.rmu_layer = depth * 7 // 32
        if args.rmu_layer > depth - 2:
            raise InputError(f"--rmu_layer {args.rmu_layer}: rmu takes one of the first {depth - 1} of "
                             f"{depth} layers")
    if args.loss == "rmu" and not args.lora:
        layers = "|".join(map(str, range(max(0, args.rmu_layer - 2), args.rmu_layer + 1)))
        usual = f"layers\\.({layers})\\.mlp\\.down_proj"
        if not args.train_modules and not any(re.search(usual, name) for name, _ in model.named_parameters()):
            raise InputError(f"--loss rmu usually trains {usual}, which {type(model).__name__} does not have: "
                             "name the matrices to train with --train_modules")
        args.train_modules = args.train_modules or usual
    if args.sam_rho is None:          # a sign step changes a layer's output by up to rho * width, as Adam's
        args.sam_rho = float(f"{0.1 / config.hidden_size:.0e}")      # does: muP, arXiv 2203.03466


def choose_kernels(args, model):
    """Decide args.triton and return kernels/adamw.py where it is to be the optimizer, else None; says which
    path is taken, and why."""
    try:
        ops, why = sam.operations(list(model.parameters()), args.triton)
        args.triton = ops.__name__ != "torch"
        trained = "float32" if args.lora else args.param_dtype
        own = args.triton or args.stochastic_rounding or args.state_dtype != trained
        adamw = sam.kernel_file("adamw") if own else None
    except (ValueError, ImportError, FileNotFoundError) as e:
        raise InputError(f"--triton {args.triton} --stochastic_rounding {args.stochastic_rounding}: {e}; "
                         "mend this or use --no-triton")
    print(f"the weights are moved by {'Triton kernels' if args.triton else 'torch'}: {why}")
    return adamw


def make_optimizer(args, params, adamw=None):
    """AdamW: that of kernels/adamw.py where the module is given, else torch's, whose states take the weights'
    dtype; fused on a GPU, which saves a copy of the weights."""
    if adamw:
        return adamw.AdamW(params, args.lr, weight_decay=args.weight_decay, seed=args.seed,
                           state_dtype=getattr(torch, args.state_dtype), triton=args.triton,
                           stochastic_rounding=args.stochastic_rounding)
    return torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay,
                             fused=True if params[0].is_cuda else None)


def learning_rate(step, steps, peak, warmup, decay):
    """Rate of a step counted from 0: linear warm-up over the share `warmup`, then constant or linear to 0."""
    ramp = round(warmup * steps)
    if step < ramp:
        return peak * ((step + 1) / ramp)
    if decay == "linear":
        return peak * ((steps - step) / (steps - ramp))
    return peak


def precision_warning(stats, dtype):
    """One line if what the weights' precision let through is not the perturbation asked for, else None."""
    asked = stats.get("asked_norm", 0)
    if not asked or (0.5 < stats["applied_norm"] / asked < 2 and stats["cosine"] > 0.9):
        return None
    return (f"precision: in {dtype} a perturbation of norm {asked:g} became one of norm "
            f"{stats['applied_norm']:.3g} with cosine {stats['cosine']:.2f} to it; use fp32 weights, a larger "
            "rho, or gp with a large radius")


# ---- the run: what changes from step to step ----------------------------------------------------------

class Unlearning:
    """The weights that train, their optimizer and smoother, and the two losses: step() and what --resume needs."""

    def __init__(self, args, model, adamw=None, texts=None):
        self.args = args
        self.model = model
        self.adapters = None
        if args.lora:
            self.adapters = adapters.Adapters(model, args.lora, args.lora_alpha, args.lora_modules, args.seed)
            self.named = self.adapters.named()
        self.latent = latent.make(args, model)
        start = frozen_model(args, model, self.adapters)
        self.forget, self.retain = objectives(args, model, start, self.latent)
        if not args.lora:
            self.named = frozen.train_only(model, args.train_modules)
        self.params = [p for _, p in self.named]
        self.norm = sam.operations(self.params, args.triton)[0].global_norm
        perturb = [p for _, p in frozen.matching(self.named, "sam_modules", args.sam_modules)]
        inside, averaged = parse_smooth(args.smooth)
        self.smoother = SMOOTHERS[inside](args, self.params, perturb)
        if args.lora_perturb == "weights":
            self.smoother.length = self.adapters.product_norm
        self.average = sam.WA(self.params, args.triton) if averaged else None
        self.optimizer = make_optimizer(args, self.params, adamw)
        self.penalty = ilu.Penalty(args, model, self.params, texts) if args.ilu_lambda else None
        if args.optimizer in ("zo", "hybrid"):
            self.zeroth = torch.optim.SGD(self.params, args.lr, weight_decay=args.weight_decay)
        if args.optimizer == "sign":
            self.optimizer = optimizers.Sign(self.params, args.lr, weight_decay=args.weight_decay)

    def plan(self, texts):
        """memory.plan() of this run on the longest of texts."""
        args = self.args
        samples = texts.forget + texts.retain + texts.unrelated + (texts.chosen or [])
        activations = memory.activation_bytes(self.model, samples, args.micro_batch,
                                              args.gradient_checkpointing, texts.pad)
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.params)
        copies = getattr(self.smoother, "copies", 1)
        size = self.params[0].element_size()
        return memory.plan(args, total, trained, size, copies, activations, processes.count())

    def step(self, i, forget, retain, attack):
        """The smoothed forget gradient into p.grad, the retain gradient at theta on top of it, clip, AdamW.

        i: the step, counted from 0; forget, retain: micro-batches; attack: closure of the attacker's loss.
        Returns {name: number}, with "lr"; refuses to take a step that is not finite.
        """
        args = self.args
        zeroth = optimizers.is_zeroth(args, i)
        optimizer = self.zeroth if zeroth else self.optimizer
        take = optimizers.taking(args, self.params, i)
        lr = learning_rate(i, args.steps, args.zo_lr if zeroth else args.lr, args.warmup, args.decay)
        optimizer.param_groups[0]["lr"] = lr
        if self.latent:
            self.latent.begin(i, forget, retain)

        def descend():
            return take(self.forget, forget, 1.0)
        if isinstance(self.smoother, sam.Lookahead):
            f_loss = self.smoother(descend, attack)
        else:
            f_loss = self.smoother(descend)
        r_loss = take(self.retain, retain, args.rmu_alpha if args.loss == "rmu" else args.gamma)
        penalty = self.penalty(i) if self.penalty else {}
        norm = optimizers.clipped_step(optimizer, self.params, args.clip, self.norm)
        optimizer.zero_grad(set_to_none=True)
        values = {"forget": f_loss, "retain": r_loss, "grad_norm": norm,
                  **getattr(self.smoother, "stats", {}), **penalty}
        numbers = [torch.as_tensor(v, dtype=torch.float32, device=norm.device) for v in values.values()]
        values = dict(zip(values, torch.stack(numbers).tolist()))    # a GPU waits here, once a step
        if not all(map(math.isfinite, values.values())):
            raise InputError(f"step {i + 1}: a loss or gradient is not finite ({values}); stopped, nothing "
                             "written; lower --lr or --sam_rho, or use --param_dtype float32")
        if self.average and i >= args.wa_start and (i - args.wa_start) % args.wa_every == 0:
            self.average.update()
        return {"lr": lr, **values}

    def weights(self):
        """{name: tensor} of what trains."""
        return {f"weights.{name}": p.detach() for name, p in self.named}

    def keep_if_best(self, folder, point, before):
        """With --keep best, save the weights if UE is the highest so far among those that keep UT; before: UE and
        UT of the start, on the same questions. An equal UE comes too late."""
        if self.args.keep != "best" or (point["UT"] or 0) < self.args.keep_ut * (before["UT"] or 0):
            return
        _, kept = states.last(folder, UE=(int, float))
        if kept is None or point["UE"] > kept["UE"]:
            states.save(folder, point["step"], self.weights(), {k: point[k] for k in ("step", "UE", "UT")})

    def finish(self, folder):
        """Put in place what is scored, saved and attacked: with wa the mean of the weights, with --keep best those
        in `folder`, else the last ones; merge adapters. Refuses weights that are not finite. Returns the step, UE
        and UT of the best, None without."""
        part, kept = states.last(folder, UE=(int, float))
        if self.args.merge:
            merge.merge_runs(self.args, self.model)
        if part:
            states.load(part, self.weights())
        elif self.args.keep == "best":
            formats.warn(f"--keep best: UT was never at least {self.args.keep_ut} of the start; kept the last step")
        if self.average and not self.average.count:
            formats.warn(f"wa: stopped before step {self.args.wa_start}, so nothing was averaged")
        if self.average:
            self.average.swap()
        if not math.isfinite(sam.global_norm([p.detach() for p in self.params])):
            raise InputError("the last step left weights that are not finite; nothing written; lower --lr")
        if self.adapters and self.args.lora_save == "merged":
            lost = self.adapters.merge()
            print(f"merged the adapters; rounding to {self.args.param_dtype} lost {lost:.2g} of them")
        return kept

    def undo(self, texts, adamw):
        """UNDO on what finish() put in place, if asked for; the KL of each of its steps."""
        if not self.args.undo_steps:
            return []
        self.optimizer = None                    # its states and what the smoother kept have served
        self.smoother = None
        params = list(self.model.requires_grad_(True).parameters())
        return undo.undo(self.args, self.model, texts, make_optimizer(self.args, params, adamw))

    def save_adapters(self):
        """What writes the adapters alone into a folder, None where the whole model is to be written."""
        if not self.adapters or self.args.lora_save == "merged":
            return None
        return lambda folder: self.adapters.save(folder, self.args.model)

    def save(self, state, step, note):
        """Write a state that --resume goes on from."""
        tensors = states.tensors_of(self.named, self.optimizer, self.smoother, self.average)
        states.save(state, step, tensors, note | states.numbers_of(self.smoother, self.average))

    def resume(self, state, inputs):
        """Go on from a state, after a look at its flags and inputs_of(), which must be what they are now. Returns
        its note, {} where there is none."""
        kinds = {"args": dict, "curve": list, "inputs": dict, "attacks": int, "averaged": int, "draws": int,
                 "passed": dict}
        part, note = states.last(state, **kinds)
        if not part:
            return {}
        for name, value in inputs.items():
            if value != note["inputs"].get(name):
                raise InputError(f"--resume: {part.parent} was written with another {name}: put it back, or "
                                 "remove the folder to start again")
        for key, value, now in states.other_flags(note["args"], self.args):
            raise InputError(f"--resume: {part.parent} was written with --{key} {value}, now it is "
                             f"{now}: give the same flags, or remove it to start again")
        states.put_back(part, note, self.named, self.optimizer, self.smoother, self.average)
        return note


# ---- flags: those of a part are in its file -----------------------------------------------------------

NEIGHBOURS = (merge, undo, latent, optimizers, ilu)      # other defences, each with flags() and check()


def flags():
    """The command line, in groups; "7B" is what the paper used for Zephyr-7B on WMDP-Bio."""
    yes_no = argparse.BooleanOptionalAction
    count = runs.number(int, 0)
    some = runs.number(int, 1)
    real = runs.number(float, 0)
    p = runs.Parser(__doc__)
    g = p.add_argument_group("what to unlearn, and where to write")
    g.add_argument("--model", help="Hugging Face folder or hub name (default: the built-in target)")
    g.add_argument("--data", default=os.path.relpath(runs.TINY),
                   help="folder with forget.jsonl, ... (default: built-in)")
    g.add_argument("--out", help="run folder (default: out/LOSS+SMOOTH[-VARIANT]-sSEED)")
    g.add_argument("--overwrite", action=yes_no, default=False, help="replace OUT when it exists")
    g.add_argument("--seed", type=runs.SEED, default=0,
                   help="of batches and noise; built-in: of world and target too")
    smoother_flags(p)
    losses.flags(p.add_argument_group("the loss (data/losses.py)"))
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=some, default=160, help="7B: 125")
    g.add_argument("--batch_size", type=runs.BATCH, default=32, help="forget samples a step; 7B: 4")
    g.add_argument("--retain_batch", type=count, default=0,
                   help="retain samples a step (0: as many as forget)")
    g.add_argument("--lr", type=runs.RATE, default=3e-4, help="of AdamW; 7B: 5e-6")
    g.add_argument("--warmup", type=runs.number(float, 0, 1), default=0.1, help="share of the steps")
    g.add_argument("--decay", choices=["none", "linear"], default="none", help="after warm-up; 7B: linear")
    g.add_argument("--weight_decay", type=real, default=0.0, help="of AdamW")
    g.add_argument("--clip", type=real, default=1.0, help="largest gradient norm, 0 = no clipping")
    g.add_argument("--train_modules", default="", metavar="REGEX", help="train only matching parameters "
                   "(default all; rmu: down_proj of its layer and two below)")
    frozen.flags(g)
    g.add_argument("--max_len", type=count, default=0, help="cut samples to so many tokens (0: too long = error)")
    g.add_argument("--save_every", type=count, default=0,
                   help="steps between saves of OUT.state, removed at the end (0: none)")
    g.add_argument("--resume", action=yes_no, default=False, help="go on from there, if it is there")
    adapters.flags(p.add_argument_group("adapters (data/adapters.py)"))
    memory_flags(p)
    g = p.add_argument_group("measuring")
    g.add_argument("--stop_ue", type=runs.number(float, 0, 1), default=0.0,
                   help="stop once UE reaches this (0 = fixed steps)")
    g.add_argument("--eval_every", type=count, default=0,
                   help="steps between UE and UT on the curve (0: none; 5 with stop_ue or keep)")
    g.add_argument("--eval_limit", type=some, default=256, help="most questions of each kind asked on the way")
    g.add_argument("--keep", choices=["last", "best"], default="last",
                   help="best: the weights of highest UE on the way whose UT is at least keep_ut of the start")
    g.add_argument("--keep_ut", type=runs.number(float, 0, 1), default=0.98, help="share of UT that best keeps")
    g.add_argument("--relearn", action=yes_no, default=True, help="attack the result with relearn.py's defaults")
    g = p.add_argument_group("neighbours (data/undo.py, latent.py, optimizers.py, merge.py, ilu.py)")
    for part in NEIGHBOURS:
        part.flags(g)
    return p


def smoother_flags(p):
    """Add the flags of the smoothers to a parser."""
    some = runs.number(int, 1)
    real = runs.number(float, 0)
    above = runs.number(float, 0, above=True)
    yes_no = argparse.BooleanOptionalAction
    g = p.add_argument_group("the smoother (sam.py)")
    g.add_argument("--smooth", default="sam", help=f"{', '.join(SMOOTHERS)}, wa, or one of them +wa")
    g.add_argument("--sam_rho", type=real, help="radius of sam, 0 = none; 7B: .01. Alone it means the paper's "
                   "SAM: l2, gradient (default: .1; with linf .1 / width, rounded to one digit)")
    g.add_argument("--sam_norm", choices=["l2", "linf"],
                   help="move all weights together by rho along the direction, or each by rho along its sign "
                   "(default: l2; without rho and direction, linf)")
    g.add_argument("--sam_direction", choices=["gradient", "momentum", "lookahead", "random"],
                   help="of the forget loss here (the paper); of the step before, which saves a pass; where "
                   "the attacker would go; noise, a control (default: gradient; without rho and norm, "
                   "momentum)")
    g.add_argument("--lookahead_steps", type=some, default=1, help="of lookahead, each a pass and rho/steps")
    g.add_argument("--sam_modules", default="", metavar="REGEX", help="perturb only matching parameters")
    g.add_argument("--sam_flip", action=yes_no, default=False, help="control: perturb the other way")
    g.add_argument("--rs_sigma", type=real, default=0.01, help="rs's noise on every weight; 7B: 1e-4")
    g.add_argument("--rs_samples", type=some, default=3, help="draws of rs a step; 7B: 3")
    g.add_argument("--gp_lambda", type=real, default=0.1, help="weight of gp's ||g||")
    g.add_argument("--gp_radius", type=above, default=0.01, help="finite-difference step of gp")
    g.add_argument("--cr_mu", type=above, default=0.1, help="radius of cr; 7B: .01")
    g.add_argument("--cr_lambda", type=real, default=0.3,
                   help="weight of cr; 7B: 10, on a gradient that was zero")
    g.add_argument("--wa_start", type=runs.number(int, 0),
                   help="first step averaged (default: 4/5 in); 7B: 100 of 125")
    g.add_argument("--wa_every", type=some, default=5, help="steps between averaged weights; 7B: 5")


def check_neighbours(args, default_of):
    """Complete or refuse the flags of other defences; --loss none leaves all to them."""
    for part in NEIGHBOURS:
        part.check(args)
    if args.loss == "none":
        if not args.undo_steps and not args.merge:
            raise InputError("--loss none: nothing is left to do; add --undo_steps or --merge")
        for name in ("smooth", "sam_rho", "sam_norm", "sam_direction", "optimizer", "stop_ue", "keep"):
            if getattr(args, name) != default_of(name):
                raise InputError(f"--{name} {getattr(args, name)}: --loss none and --merge take no step; "
                                 "drop it")
        args.steps = 0
        args.smooth = "none"


def memory_flags(p):
    """Add the flags about memory, precision and speed to a parser."""
    yes_no = argparse.BooleanOptionalAction
    g = p.add_argument_group("memory, precision and speed")
    runs.add_device(g)
    g.add_argument("--param_dtype", choices=["float32", "bfloat16"], default="float32",
                   help="of the weights; bfloat16 halves memory and swallows most of a small perturbation")
    g.add_argument("--stochastic_rounding", action=yes_no, default=False,
                   help="of the weights, for --param_dtype bfloat16, which else swallows small steps")
    g.add_argument("--state_dtype", choices=["float32", "bfloat16"],
                   help="of AdamW's two states (default: as the weights); another one takes kernels/adamw.py")
    g.add_argument("--micro_batch", type=runs.number(int, 0), default=0,
                   help="samples a pass, over all processes (0: the larger batch); same update")
    g.add_argument("--gradient_checkpointing", action=yes_no, default=False,
                   help="keep only a layer's input and run it again for its gradient: less memory, 4/3 time")
    g.add_argument("--triton", action=yes_no, default=None,
                   help="SAM, noise, averages and AdamW by kernels/ (default: when the weights are on a GPU)")


def choose_sam(args, default_of):
    """Decide --smooth and SAM's norm, direction and radius, and refuse its flags where no SAM runs."""
    base, averaged = parse_smooth(args.smooth)
    if base == "sam" and args.sam_rho == 0:      # a radius of 0 is no smoother: say what runs
        base = "none"
        args.smooth = "wa" if averaged else "none"
    for name in ("sam_flip", "sam_modules", "sam_norm", "sam_direction", "sam_rho"):
        if getattr(args, name) not in (0, default_of(name)) and base != "sam":
            raise InputError(f"--{name}: there is no SAM perturbation with --smooth {args.smooth}; drop one of "
                             "them")
    untouched = args.sam_rho is None and args.sam_norm is None and args.sam_direction is None
    if base == "sam" and untouched:
        args.sam_norm = "linf"                   # as good as the paper's SAM, and a pass cheaper:
        args.sam_direction = "momentum"          # data/tiny/readme.md, data/people/readme.md
    args.sam_norm = args.sam_norm or "l2"
    args.sam_direction = args.sam_direction or "gradient"
    if args.sam_norm == "l2" and args.sam_rho is None:
        args.sam_rho = 0.1                       # linf waits for the model's width
    if args.lookahead_steps > 1 and args.sam_direction != "lookahead":
        raise InputError(f"--lookahead_steps {args.lookahead_steps}: --sam_direction {args.sam_direction} "
                         "looks at no attacker; add --sam_direction lookahead, or drop it")


def refuse_unused(args, default_of):
    """Refuse a flag that nothing in this run looks at."""
    base, averaged = parse_smooth(args.smooth)
    used = {"rs_sigma": base == "rs", "rs_samples": base == "rs", "gp_lambda": base == "gp",
            "gp_radius": base == "gp", "cr_mu": base == "cr", "cr_lambda": base == "cr",
            "wa_start": averaged, "wa_every": averaged, "beta": args.loss in ("npo", "simnpo", "dpo"),
            "gamma": args.retain != "none", "margin": args.loss == "simnpo", "idk_text": args.loss == "dpo",
            "rmu_layer": args.loss == "rmu", "rmu_c": args.loss == "rmu", "rmu_alpha": args.loss == "rmu",
            "keep_ut": args.keep == "best", "lr": args.optimizer != "zo" or args.undo_steps}
    for name, looked_at in used.items():
        value = getattr(args, name)
        if not looked_at and value != default_of(name):
            raise InputError(f"--{name} {value}: --loss {args.loss} --retain {args.retain} --smooth "
                             f"{args.smooth} --optimizer {args.optimizer} --keep {args.keep} do not look at "
                             "it; drop it")


def default_out(args):
    """out/LOSS+SMOOTH[-VARIANT]-sSEED."""
    words = tables.words_of(vars(args))
    if args.merge:
        words[0] = f"merged{len(args.merge)}" + ("-ties" if args.merge_ties else "")
    elif args.loss == "none":
        words[0] = Path(args.model).name if args.model else "target"
    return f"out/{'-'.join(words)}-s{args.seed}"


def parse_args(argv=None):
    """The flags, checked and completed, so that vars(args) is what runs; argv None = the command line."""
    p = flags()
    args = p.parse_args(argv)
    if args.stochastic_rounding and args.param_dtype != "bfloat16":
        raise InputError(f"--stochastic_rounding: {args.param_dtype} needs none; add --param_dtype bfloat16")
    check_neighbours(args, p.get_default)
    choose_sam(args, p.get_default)
    for name in ("sam_modules", "train_modules", "lora_modules"):
        try:
            re.compile(getattr(args, name))
        except re.error as e:
            raise InputError(f"--{name} {getattr(args, name)!r} is not a regular expression: {e}")
    frozen.check(args)
    losses.check(args)
    adapters.check(args, p.get_default)
    refuse_unused(args, p.get_default)
    args.state_dtype = args.state_dtype or ("float32" if args.lora else args.param_dtype)
    args.retain_batch = args.retain_batch or args.batch_size
    args.micro_batch = args.micro_batch or max(args.batch_size, args.retain_batch)
    if args.wa_start is None:
        args.wa_start = args.steps * 4 // 5
    if parse_smooth(args.smooth)[1] and args.wa_start >= args.steps:
        raise InputError(
            f"--wa_start {args.wa_start}: nothing to average in {args.steps} steps; start earlier")
    watched = args.stop_ue or args.keep == "best"
    args.eval_every = args.eval_every or (5 if watched else 0)
    if watched and args.eval_every > args.steps:
        raise InputError(f"--eval_every {args.eval_every}: --stop_ue and --keep best see no UE in "
                         f"{args.steps} steps; lower it")
    if args.keep == "best" and parse_smooth(args.smooth)[1]:
        raise InputError("--keep best: wa saves a mean over steps, which was never scored; drop one of them")
    args.out = str(Path(default_out(args) if args.out is None else args.out))
    return args


def find_out(args, folder, stack):
    """(OUT, OUT.state, OUT.best), which are this run's until its end; with --resume a finished OUT needs no
    training."""
    out = Path(args.out)
    state = Path(f"{args.out}.state")
    best = Path(f"{args.out}.best")
    if states.is_finished(args, out, state):
        if args.relearn and not (out / "relearn.json").exists():
            relearn.attack(relearn.parse_args([args.out, "--device", args.device]))
        print(f"{out} is finished: nothing is left to resume")
        sys.exit()
    stack.enter_context(runs.claimed(out, args.overwrite, [folder, args.model, *args.merge]))
    states.refuse_foreign(state)
    states.refuse_foreign(best)
    if state.exists() and not args.resume and not args.overwrite:
        raise InputError(f"{state}: a run was broken off; go on with --resume, or remove it")
    return out, state, best


if __name__ == "__main__":
    with runs.one_line_errors() as stack:
        # -- setup
        start = time.time()
        args = parse_args()
        processes.join(args.device)
        folder = find_inputs(args)
        out, state, best = find_out(args, folder, stack)
        asked = dict(vars(args))                 # some of it is completed when the model is known
        runs.prepare_world(folder, args.seed)
        rng = random.Random(args.seed)
        torch.manual_seed(args.seed)

        # -- data and model
        questions, few = find_questions(args, folder)
        model, tokenizer = models.load_model(args.model, args.device, getattr(torch, args.param_dtype))
        texts = Texts(args, folder, model, tokenizer)
        if args.relearn:
            attack_plan = memory.attack_plan(args, model, texts)
        adamw = choose_kernels(args, model)
        complete_for(args, model)
        if args.cache_frozen:
            frozen.train_only(model, args.train_modules)
            frozen.cache(model)
        before = evaluate.ue_ut(model, tokenizer, questions)
        start_few = evaluate.ue_ut(model, tokenizer, few) if args.keep == "best" else None
        models.PASSED.clear()
        texts.add_references(model)
        run = Unlearning(args, model, adamw, texts)
        if args.shrink:                          # after the references, which are of the model that knew
            undo.damage_(run.params, args.shrink, 0, args.seed)
        say_what(args, model, texts, run.adapters)
        plan = run.plan(texts)
        print(memory.plan_line(plan, args.device))
        if args.relearn:
            print(f"the attack after it {memory.plan_line(attack_plan, args.device, memory.LESS_ATTACK)}")
        if args.gradient_checkpointing:
            models.recompute_blocks(model)

        # -- the loop
        inputs = inputs_of(texts, model) if args.resume or args.save_every else {}
        note = {"args": vars(args), "inputs": inputs, "curve": [], "warning": None, "attacks": 0, "passed": {}}
        found = run.resume(state, inputs) if args.resume else {}
        if found:
            note |= found | {"args": vars(args)}
            stack.go_on = "go on with the same command and --resume"
        else:
            states.remove(best)                  # of a run that was broken off and is not gone on with
        if note["passed"]:                       # as if it had not been broken off
            models.PASSED.clear()
            models.PASSED.update(note["passed"])
        curve = note["curve"]
        forget_picks = shuffled(len(texts.forget), args.batch_size, rng)
        retain_picks = shuffled(len(texts.retain), args.retain_batch, rng)
        attack_picks = shuffled(len(texts.forget), args.batch_size, random.Random(f"{args.seed} lookahead"))
        for _ in curve:                          # the batches that were seen
            next(forget_picks)
            next(retain_picks)
        for _ in range(note["attacks"]):
            next(attack_picks)

        def attack():
            note["attacks"] += 1
            return losses.descend(model, texts.forget_batches(next(attack_picks)), losses.nll_sum, "labels")
        bar = tqdm(range(len(curve), args.steps), f"{args.loss}+{args.smooth}", args.steps,
                   initial=len(curve), unit="step")
        for i in bar:
            tick = time.time()
            micro = texts.forget_batches(next(forget_picks)), texts.retain_batches(next(retain_picks))
            point = {"step": i + 1, **run.step(i, *micro, attack)}
            point["seconds"] = round(time.time() - tick, 4)
            if not note["warning"]:
                note["warning"] = precision_warning(point, args.param_dtype)
                if note["warning"]:
                    formats.warn(note["warning"])
            if args.eval_every and "mcq_forget" in questions and (i + 1) % args.eval_every == 0:
                point |= evaluate.ue_ut(model, tokenizer, few)
                run.keep_if_best(best, point, start_few)
            curve.append(point)
            watched = [k for k in ("forget", "retain", "applied_norm", "cosine", "UE", "UT") if point.get(k)]
            bar.set_postfix({k: f"{point[k]:.3g}" for k in watched})
            if args.stop_ue and point.get("UE", 0) >= args.stop_ue:
                break
            if args.save_every and (i + 1) % args.save_every == 0:
                note["passed"] = dict(models.PASSED)
                run.save(state, i + 1, note)
                stack.go_on = "go on with the same command and --resume"
        kept = run.finish(best)
        undone = run.undo(texts, adamw)
        passed = dict(models.PASSED)             # what this run cost, in samples

        # -- score, save, attack
        after = evaluate.ue_ut(model, tokenizer, questions)
        asked = {key: value for key, value in asked.items() if value != vars(args)[key]}
        result = {"stage": "unlearn", "args": vars(args), "asked": asked,
                  **runs.provenance(args.device, start),
                  "plan_gb": {part: round(value / 1e9, 4) for part, value in plan.items()},
                  "passed": passed, "metrics": {"before": before, "after": after}, "kept": kept,
                  "curve": curve, "undo": undone}
        runs.save_run(out, model, tokenizer, result, save=run.save_adapters())
        states.remove(state)
        states.remove(best)
        stack.go_on = f"{out} is saved; --resume attacks it"
        for name, found in (("before", before), ("after", after)):
            print(f"{name:7s} UE {tables.show(found['UE'])}  UT {tables.show(found['UT'])}")
        if args.relearn:
            if args.lora_save == "adapter" and run.adapters:
                run.adapters.merge()             # the attack is on the weights
            model.requires_grad_(True)
            run = None                           # the attack has an optimizer of its own
            whole = (None, None) if args.cache_frozen else (model, tokenizer)    # its front no longer trains
            relearn.attack(relearn.parse_args([str(out), "--device", args.device]), *whole)
        print(f"{time.time() - start:.0f} s in all; wrote {out}/")
