"""Attack an unlearned model: fine-tune it on a few forget samples and see how much comes back.

    python relearn.py RUN                               # 20, 40, 60 samples, two seeds each: about 5 s
    python relearn.py RUN --samples 20 --epochs 1 2 3
    python relearn.py RUN --seeds 5 --curve_every 1     # and UE after every step
    python relearn.py RUN --lr 5e-4 1e-3 2e-3 4e-3      # the worst case of a learning-rate sweep
    python relearn.py RUN --optimizer sgd --lr 1e-2     # does it take AdamW's steps to undo it?
    python relearn.py RUN --attack_data retain          # fine-tuning that never mentions the topic
    python relearn.py RUN --samples 240 500 --mix .5    # longer, every second sample from the retain set
    python relearn.py RUN --lora 8 --lr 1e-2            # low-rank adapters; the weights stay as they are
    python relearn.py RUN --quantize 8 4 --prune 10 30  # no training at all
    python relearn.py RUN --ablate 0 1 2                # take a direction out of the residual stream
    python relearn.py RUN --geometry                    # does it go where the smoother looked?
    python relearn.py data/tiny/seed0/retrained         # the yardstick: a model that never knew

RUN is the folder that unlearn.py names at its end. Reads RUN/result.json (for the data and the seed), the
model beside it and DATA/forget.jsonl. Writes RUN/relearn.json, or RUN/relearn_ATTACK.json for other data,
optimizers, adapters, modules and edits. Every budget starts from the same weights; the samples of a larger
one contain those of a smaller one. No "fact" is told twice before each was told once, so N samples are N facts
while there are so many, and UE_heldout is the UE on the questions about the other facts: it tells unlocking
(old knowledge comes back) from re-teaching. Next: evaluate.py puts runs into one table.
"""
import argparse
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import sam
from data import adapters, formats, frozen, models, processes, runs, scores, stream, tables
from data.finetune import draw_mixed, finetune
from data.formats import InputError


# ---- attacks without training: an edit of the weights each --------------------------------------------

@torch.no_grad()
def quantize(model, bits, args):
    """Round every matrix of adapters.matrices() to nearest, symmetric: each args.group neighbours in a row
    become scale * {-q, ..., q} with q = 2^(bits-1) - 1 and scale = max|w| / q; a row's last group may be
    shorter."""
    for weight in adapters.matrices(model):
        for part in weight.split(args.group, dim=1):                                 # (out, group)
            wide = part.to(sam.accumulator(part.dtype))
            scale = wide.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)         # (out, 1)
            part.copy_(torch.where(scale > 0, (wide / scale).round() * scale, 0.0))


@torch.no_grad()
def prune(model, percent, args):
    """Set the floor(percent/100 * size) smallest weights of every matrix to 0 (magnitude pruning)."""
    for weight in adapters.matrices(model):
        size = weight.abs().flatten()
        smallest = size.topk(math.floor(percent * weight.numel() / 100), largest=False).indices
        out = torch.zeros_like(size, dtype=torch.bool)
        out[smallest] = True
        weight.masked_fill_(out.view(weight.shape), 0)


def directions(model, tokenizer, questions, args):
    """[(D,)] for layers 0 to L, the directions of --ablate: the mean state at the last token of forget
    questions minus that of retain questions, or with --teacher that model's on the same questions."""
    parts = {}
    for part in ("mcq_forget", "mcq_retain"):
        parts[part] = [(row["context"], row["where"]) for row in questions.get(part, [])]
    if not parts["mcq_forget"] or not (parts["mcq_retain"] or args.teacher):
        raise InputError(f"--ablate compares states at questions: {args.data} needs mcq_forget.jsonl, "
                         "and mcq_retain.jsonl or --teacher")
    here = stream.residuals(model, tokenizer, parts["mcq_forget"])                   # (N, L+1, D)
    if args.teacher:
        teacher = models.load_model(args.teacher, args.device, model.dtype)[0]
        other = stream.residuals(teacher, tokenizer, parts["mcq_forget"])
    else:
        other = stream.residuals(model, tokenizer, parts["mcq_retain"])
    if here.shape[1:] != other.shape[1:]:
        raise InputError(f"--teacher {args.teacher} is of another size than {args.run}: name the model "
                         "before unlearning")
    between = sam.kernel_file("probe").between
    return [between(a, b).to(model.device) for a, b in zip(here.unbind(1), other.unbind(1))]


def ablate(model, layer, args):
    """Project a direction out of the residual stream, at all tokens, in front of the first block and
    behind each, not inside: that of one layer (arXiv 2406.11717, section 2.4), or with layer 0 each's own, as
    ReFAT's attack does (arXiv 2409.20089). Returns the hooks that do it."""
    if layer >= len(args.directions):
        raise InputError(f"--ablate {layer}: the model has {len(args.directions) - 1} layers")
    project_out = sam.kernel_file("probe").project_out

    def project(here, states):
        return project_out(states, args.directions[layer or here])
    return stream.on_stream(model, project)


EDITS = {                                        # each has a flag of its name, with the amounts to try
    "quantize": quantize,
    "prune": prune,
    "ablate": ablate,
}


def edits(args):
    """[(name, amount)] of the edits that were asked for."""
    return [(name, amount) for name in EDITS for amount in getattr(args, name)]


def score(model, tokenizer, questions, args, seen=None):
    """evaluate.ue_ut() and, with --open, the share of forget questions that are answered freely."""
    found = evaluate.ue_ut(model, tokenizer, questions, seen=seen)
    if args.open:
        found["open_forget"] = evaluate.open_accuracy(model, tokenizer, questions["mcq_forget"])
    return found


def try_edits(model, tokenizer, questions, args):
    """The "metrics" of an attack without training: each edit alone, from the same weights."""
    saved = [(p, p.detach().clone()) for p in model.parameters()]
    metrics = {"start": score(model, tokenizer, questions, args), "budgets": []}
    args = argparse.Namespace(**vars(args))
    if args.ablate:
        args.directions = directions(model, tokenizer, questions, args)
    hooks = []
    try:
        for name, amount in edits(args):
            hooks += EDITS[name](model, amount, args) or []
            found = score(model, tokenizer, questions, args)
            metrics["budgets"].append({"samples": 0, "epochs": 0, "UE_heldout": None, name: amount, **found,
                                       "draws": [found]})
            put_back(list(saved), hooks)
    finally:
        put_back(saved, hooks)
    return metrics


def put_back(saved, hooks):
    """Put back the weights of saved = [(parameter, old weights)], and take off an edit's hooks."""
    sam.restore_(saved)
    while hooks:
        hooks.pop().remove()


# ---- attacks by fine-tuning ---------------------------------------------------------------------------

class Attack:
    """A model under attack: what every draw of every budget shares.

    rows: read_jsonl(forget.jsonl); questions: evaluate.load_questions(); objective: a function (kind, first)
    -> evaluate.forget_objective(), for args.geometry; others: rows for args.mix. A seed fixes the sample
    list, the batches and the adapters.
    """

    def __init__(self, model, tokenizer, rows, questions, args, objective=None, others=()):
        self.model = model
        self.tokenizer = tokenizer
        self.rows = [*rows, *others]
        self.questions = questions
        self.args = args
        self.pad = tokenizer.pad_token_id or 0
        self.encoded = models.encode_rows(tokenizer, self.rows, models.context_of(model), args.max_len)
        self.lists = {}                          # (draw, samples) -> indices of rows
        for number in range(args.draws):
            for count in args.samples:
                seed = f"{args.seed} {number}"
                self.lists[number, count] = draw_mixed(rows, others, count, args.mix, seed)
        self.saved = []
        if not args.lora:                        # adapters leave the weights as they are
            self.saved = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        self.start = score(model, tokenizer, questions, args)
        self.goals = None
        if args.geometry:
            self.objectives = {"own": objective("own", 0), "nll": objective("nll", 0)}
            params = [p for p, _ in self.saved]
            self.goals = sam.kernel_file("geometry").aims(self.objectives["own"], objective("own", 1),
                                                      self.objectives["nll"], params, args.geometry)

    def draw(self, number, lr, count, epochs):
        """One draw of a budget, and the weights back: (scores, curve of UE, geometry or None)."""
        args = self.args
        picks = self.lists[number, count]
        curve = [{"step": 0, "UE": self.start["UE"]}]

        def watch(step, steps):
            if args.curve_every and step % args.curve_every == 0 and step < steps:
                now = evaluate.ue_ut(self.model, self.tokenizer, self.questions, only_forget=True)
                curve.append({"step": step, "UE": now["UE"]})
        added = None
        params = None
        if args.lora:
            added = adapters.Adapters(self.model, args.lora, 2 * args.lora, seed=f"{args.seed} {number} lora")
            params = [p for _, p in added.named()]
        try:
            finetune(self.model, [self.encoded[i] for i in picks], self.pad, lr, args.batch_size, epochs,
                     f"{args.seed} {number} order", watch, args.optimizer, params)
            facts = {self.rows[i]["fact"] for i in picks if "fact" in self.rows[i]}
            found = score(self.model, self.tokenizer, self.questions, args, facts)
        finally:
            if added:
                added.remove()
        moved = None
        if self.goals:
            moved = sam.kernel_file("geometry").displacement(self.saved, self.goals, self.objectives)
        sam.restore_(list(self.saved))
        curve.append({"step": epochs * math.ceil(count / args.batch_size), "UE": found["UE"]})
        return found, curve, moved

    def budget(self, lr, count, epochs, bar):
        """One entry of "budgets": means over the draws, "se" their standard errors."""
        found = []
        curves = []
        moves = []
        for number in range(self.args.draws):
            scored, curve, moved = self.draw(number, lr, count, epochs)
            found.append(scored)
            curves.append(curve)
            moves.append(moved)
            bar.set_postfix(samples=count, UE=tables.show(scored["UE"]))
            bar.update()
        mean = {}
        error = {}
        for key in found[0]:
            values = [d[key] for d in found if d[key] is not None]
            mean[key] = None                     # no draw has it, as UE_heldout where all facts were told
            if values:
                mean[key] = sum(values) / len(values)
                error[key] = scores.mean_se(values)[1]
        out = {"samples": count, "epochs": epochs, "lr": lr, **mean, "draws": found, "se": error}
        if self.args.mix:
            out["mixed"] = round(self.args.mix * count)              # so many samples are --mix_data's
        if self.args.curve_every:
            out["curves"] = curves                                   # one list of points a seed
        if self.goals:
            out["geometry"] = moves                                  # one a seed
        return out

    def run(self):
        """The "metrics" of relearn.json: all budgets lr x samples x epochs. The weights come back, bit for
        bit."""
        args = self.args
        plan = []
        for lr in args.lr:
            for count in sorted(args.samples):
                plan += [(lr, count, epochs) for epochs in sorted(args.epochs)]
        metrics = {"start": self.start, "budgets": []}
        try:
            with tqdm(total=len(plan) * args.draws, desc="relearning", unit="run") as bar:
                for lr, count, epochs in plan:
                    metrics["budgets"].append(self.budget(lr, count, epochs, bar))
        finally:
            sam.restore_(self.saved)
        return metrics | {"worst": worst_case(metrics, args.ut_drop)}


def worst_case(metrics, drop):
    """Of the budgets that differ only in lr the one with the lowest UE, which an attacker would choose, as
    long as UT stays within `drop` of the start: a ruined model is no success. No entry where none does."""
    floor = (metrics["start"]["UT"] or 0) - drop
    worst = {}
    for b in sorted(metrics["budgets"], key=lambda b: b["UE"] or 0):
        key = (b["samples"], b["epochs"])
        if key not in worst and (b["UT"] is None or b["UT"] >= floor):
            worst[key] = {k: v for k, v in b.items() if k not in ("draws", "curves", "geometry")}
    return [worst[key] for key in sorted(worst)]


# ---- one run under attack -----------------------------------------------------------------------------

def corpus(name, data):
    """The rows of forget or retain of a data folder, or of a file anywhere."""
    path = Path(data) / f"{name}.jsonl" if name in ("forget", "retain") else name
    return formats.read_jsonl(path, formats.text_row)


def usual_budgets(rows, others, mix):
    """The samples of the budgets: 20, 40 and 60, as far as there are rows, and others for the share mix; else
    as many as there are rows for."""
    def enough(count):
        foreign = round(mix * count)
        return count - foreign <= len(rows) and foreign <= len(others)
    counts = [count for count in (20, 40, 60) if enough(count)]
    return counts or [max(filter(enough, range(1, 21)), default=1)]


def result_path(args):
    """The JSON file of an attack."""
    return Path(args.run) / (f"relearn_{args.attack}.json" if args.attack else "relearn.json")


def attack(args, model=None, tokenizer=None):
    """Attack args.run (its model is loaded unless given), write the JSON file and print the table."""
    start = time.time()
    questions = evaluate.load_questions(args.data)
    if args.open and "mcq_forget" not in questions:
        raise InputError(f"--open asks {Path(args.data) / 'mcq_forget.jsonl'}, which is missing")
    whole = edits(args) or args.lora or args.geometry
    if whole and processes.count() > 1:
        raise InputError("--lora, --quantize, --prune, --ablate and --geometry need whole weights: run "
                         "without torchrun")
    if not edits(args):
        rows = corpus(args.attack_data, args.data)
        others = corpus(args.mix_data, args.data) if args.mix else ()
        args.samples = args.samples or usual_budgets(rows, others, args.mix)
    if model is None:
        model, tokenizer = models.load_model(args.run, args.device, getattr(torch, args.param_dtype))

    if args.train_modules:
        frozen.train_only(model, args.train_modules)
    if args.cache_frozen:
        frozen.cache(model)
    if args.attack == "compress" or args.lora:
        covered = adapters.share(model, adapters.matrices(model))
        print(f"{args.attack}: on {covered}")

    def objective(kind, first):
        return evaluate.forget_objective(kind, model, tokenizer, args.run, first=first, data=args.data)
    if edits(args):
        metrics = try_edits(model, tokenizer, questions, args)
    else:
        metrics = Attack(model, tokenizer, rows, questions, args, objective, others).run()
    formats.write_json(result_path(args), {"stage": "relearn", "args": vars(args),
                                           **runs.provenance(args.device, start), "metrics": metrics})
    print_budgets(metrics, len(args.lr) > 1)
    print_geometry(metrics["budgets"])


def print_budgets(metrics, worst):
    """The table of an attack, with the worst case over --lr where asked for."""
    begin = metrics["start"]
    lines = [["relearned on", "lr", "UE", "UE held out", "UT"],
             ["0 samples", "-", tables.show(begin["UE"]), "-", tables.show(begin["UT"])]]
    budgets = [(b, "") for b in metrics["budgets"]]
    if worst:
        budgets += [(b, ", worst case") for b in metrics.get("worst", [])]
    for b, note in budgets:
        name = tables.budget_name(b)
        if b["samples"]:
            name = f"{b['samples']} samples" + (f" x {b['epochs']} epochs" if b["epochs"] > 1 else "") + note
        line = [name, f"{b['lr']:g}" if "lr" in b else "-"]
        for key in ("UE", "UE_heldout", "UT"):
            line.append("-" if b[key] is None else tables.cell_text(b[key], b.get("se", {}).get(key)))
        lines.append(line)
    print(tables.table(lines))


def print_geometry(budgets):
    """The table of --geometry, where it ran: cosines, means over draws."""
    lines = []
    for b in budgets:
        moves = b.get("geometry", [])
        if moves:
            names = list(moves[0]["cosine"])
            line = [tables.budget_name(b), f"{b['lr']:g}"]
            for name in names:
                line.append(f"{sum(move['cosine'][name] for move in moves) / len(moves):+.3f}")
            lines.append(line)
    if lines:
        print("\ncosine of the attack's displacement with where sam.py would look from here")
        print(tables.table([["samples", "lr", *names]] + lines))


# ---- flags --------------------------------------------------------------------------------------------

def flags():
    """The command line, in groups."""
    some = runs.number(int, 1)
    rate = runs.number(float, 0, above=True)
    p = runs.Parser(__doc__)
    p.add_argument("run", help="folder of a model with a result.json")
    g = p.add_argument_group("the attack")
    g.add_argument("--samples", type=some, nargs="+",
                   help="forget samples of each budget (default: 20, 40 and 60, as far as there are so many)")
    g.add_argument("--epochs", type=some, nargs="+", default=[1], help="passes over them; every pair is a budget")
    g.add_argument("--lr", type=runs.RATE, nargs="+",
                   help="peak rate, linear to 0 (default: 1e-5, the paper's on 7B; built-in data: 2e-3)")
    g.add_argument("--batch_size", type=runs.BATCH, default=4, help="samples a step; 7B: 4")
    g.add_argument("--seeds", "--draws", dest="draws", type=some, default=2,
                   help="sample lists and orders to average over")
    g.add_argument("--seed", type=runs.SEED, help="of the sample lists (default: the run's)")
    g.add_argument("--curve_every", type=runs.number(int, 0), default=0,
                   help="steps between UE on the curve, 0 = none")
    g = p.add_argument_group("other attacks")
    g.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw",
                   help="sgd has momentum .9 and wants a far larger --lr, here .01 to .03")
    g.add_argument("--attack_data", default="forget", metavar="{forget,retain,FILE.jsonl}",
                   help="what to fine-tune on; UE_heldout takes a row's fact for that of DATA's questions")
    g.add_argument("--mix", type=runs.number(float, 0, 1), default=0.0, metavar="SHARE",
                   help="of the samples of each budget, so large a share is of --mix_data instead")
    g.add_argument("--mix_data", default="retain", metavar="{retain,FILE.jsonl}",
                   help="retain, or unrelated text")
    g.add_argument("--lora", type=runs.number(int, 0), default=0, metavar="RANK",
                   help="train adapters of this rank, 0 = all weights")
    g.add_argument("--train_modules", default="", metavar="REGEX", help="train only matching parameters")
    frozen.flags(g)
    g.add_argument("--quantize", type=runs.number(int, 2, 16), nargs="+", default=[], metavar="BITS",
                   help="instead of training: round the weights, 8 and 4 are usual")
    g.add_argument("--group", type=some, default=64, help="weights that share a scale; 64 or 128")
    g.add_argument("--prune", type=runs.number(float, 0, 100), nargs="+", default=[], metavar="PERCENT",
                   help="instead of training: zero the smallest weights of every matrix")
    g.add_argument("--ablate", type=runs.number(int, 0), nargs="+", default=[], metavar="LAYER",
                   help="instead of training: take the direction of this layer, forget minus retain, "
                   "out of the residual stream; 0 = each layer's own")
    g.add_argument("--teacher", help="the model before unlearning: --ablate takes run minus teacher")
    g = p.add_argument_group("looking closer")
    g.add_argument("--open", action="store_true", help="ask the forget questions without choices as well")
    g.add_argument("--geometry", type=rate, nargs="?", const=1e-3, default=None, metavar="RHO",
                   help="compare the attack's displacement with what sam.py would perturb along; RHO (1e-3) "
                   "places momentum's gradient")
    g.add_argument("--ut_drop", type=runs.number(float, 0), default=0.05,
                   help="loss of UT that the worst case over --lr may cost")
    g = p.add_argument_group("the model")
    g.add_argument("--data", help="data folder (default: the run's)")
    g.add_argument("--param_dtype", choices=["float32", "bfloat16"],
                   help="of the attacked weights (default: the run's); in bfloat16 small steps are lost")
    g.add_argument("--max_len", type=runs.number(int, 0), help="cut samples (default: the run's)")
    runs.add_device(g)
    return p


def parse_args(argv=None):
    """The flags, checked and completed from the run's result.json; argv None = the command line."""
    p = flags()
    args = p.parse_args(argv)
    trained = args.lora or args.attack_data != "forget" or args.geometry or args.optimizer != "adamw"
    budgets = args.samples or args.lr or args.epochs != [1] or args.curve_every
    if edits(args) and (trained or args.mix or budgets):
        p.error("--quantize, --prune and --ablate train nothing: drop --samples, --epochs, --lr, "
                "--curve_every, --lora, --attack_data, --mix, --optimizer and --geometry, or attack in two "
                "calls")
    if args.teacher and not args.ablate:
        p.error(f"--teacher {args.teacher}: only --ablate compares with it")
    if args.mix_data != "retain" and not args.mix:
        p.error(f"--mix_data {args.mix_data}: say with --mix which share of the samples it is")
    if args.cache_frozen and (args.lora or edits(args) or not args.train_modules):
        p.error("--cache_frozen goes with --train_modules, without --lora, --quantize, --prune and --ablate")
    if args.train_modules and (args.lora or edits(args)):
        p.error("--train_modules is about training the weights: drop it, or --lora, --quantize, --prune and "
                "--ablate")
    if args.geometry and args.lora:
        p.error("--geometry looks at the weights, which --lora leaves as they are: drop one")
    parts = []
    if args.attack_data != "forget":
        parts.append(Path(args.attack_data).stem)
    if args.mix:
        parts.append(f"mix{100 * args.mix:g}")
    if args.mix_data != "retain":
        parts.append(Path(args.mix_data).stem)
    if args.lora:
        parts.append(f"lora{args.lora}")
    if args.train_modules:
        parts.append("modules")
    if args.optimizer != "adamw":
        parts.append(args.optimizer)
    if args.ablate and len(edits(args)) == len(args.ablate):
        parts.append("ablate_teacher" if args.teacher else "ablate")
    elif edits(args):
        parts.append("compress")
    args.attack = "_".join(parts)                # "" is fine-tuning on forget samples
    ran = runs.load_result(args.run)["args"]
    for name, fallback in (("data", None), ("seed", 0), ("max_len", 0), ("param_dtype", "float32")):
        if getattr(args, name) is None:
            setattr(args, name, ran.get(name, fallback))
    if args.data is None:
        raise InputError(f"{args.run} is a plain model and names no data: add --data FOLDER")
    args.lr = args.lr or [runs.attack_rate(args.data)]
    if args.geometry and args.param_dtype != "float32":
        raise InputError(f"--geometry: {args.param_dtype} would round the attack's path; add --param_dtype "
                         "float32")
    return args


if __name__ == "__main__":
    with runs.one_line_errors():
        args = parse_args()
        processes.join(args.device)
        attack(args)
