"""NPO, SAM and their relatives on a real model: worlds of 256 invented facts each, attacks at two rates.

    python data/people/compare.py --model SMOLLM2 --tune     # choose the strengths: 2 cores, 3 minutes a try
    python data/people/compare.py --model SMOLLM2            # 8 worlds: 72 minutes for three defences

Both go on where they were killed.

A world is a seed of prepare.py: other names, facts, batches and samples, taught to the same model; several
targets, because a yardstick for each forget set of one target would cost the same. To fit 2 cores everything,
teaching and attacks too, trains the last blocks alone (--blocks), and what the others say is computed once.

Each defence takes as many steps, but for "longer", which is NPO with more of them in the place of a
smoother: 90 are as many passes as 60 of SAM. It meets attacks on 60 of the 128 forget facts, told once and
four times, at two rates; the score of a run is the mean UE over these four. --tune tries what stands in
DEFENCES; among those with a mean UT of at least .98 before the attack, and a perplexity elsewhere of at most
1.5 times the target's, the one with the highest mean score is taken. Elsewhere is what no one taught or
retained: Python's documentation.

Writes data/people/seedN/, OUT/elsewhere/, OUT/NAME-FLAGS-sSEED/ (540 MB each), with --tune OUT/tuned.json,
else --json.
"""
import shlex
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))                    # the scripts, and their package `data`
import relearn
import unlearn
from data import formats, runs, tables
from data.formats import InputError
from data.tiny.compare import all_of, call, refuse_shared, renamed, was_done, world_flags

HERE = Path(__file__).resolve().parent
ATTACK = "--samples 60 --epochs 1 4 --lr 3e-4 1e-3 --draws 1 --open"
LINF = "--sam_direction momentum --sam_norm linf --sam_rho"
SHRINK = "--sam_rho 0 --batch_size 4 --retain_batch 12 --shrink"
DEFENCES = {                                     # name: the flags that are tried
    "NPO": ["--sam_rho 0 --lr 5e-4", "--sam_rho 0 --lr 1e-3", "--sam_rho 0 --lr 2e-3",
            "--sam_rho 0 --lr 4e-3"],
    "SAM": ["--sam_rho .1 --lr 1e-3", "--sam_rho .3 --lr 1e-3", "--sam_rho .1 --lr 2e-3",
            "--sam_rho .3 --lr 2e-3"],
    "momentum": [f"{LINF} 1e-4 --lr 1e-3", f"{LINF} 3e-4 --lr 1e-3", f"{LINF} 1e-4 --lr 2e-3",
                 f"{LINF} 3e-4 --lr 2e-3"],
    "shrink": [f"{SHRINK} .05 --lr 1e-3", f"{SHRINK} .15 --lr 1e-3", f"{SHRINK} .05 --lr 2e-3",
               f"{SHRINK} .15 --lr 2e-3"],
    "longer": ["--sam_rho 0 --lr 1e-3 --steps 75", "--sam_rho 0 --lr 1e-3 --steps 90",
               "--sam_rho 0 --lr 1e-3 --steps 120"],
}
MEANS = {"UE attacked": "UE", "UE attacked, held out": "UE_heldout", "answers attacked": "open_forget"}
COLUMNS = ["UE", *MEANS, "UE modules 60", "UE modules 60x4", "UE modules 60@0.001", "UE modules 60x4@0.001",
           "held out modules 60@0.001", "held out modules 60x4@0.001", "open answers modules 60x4@0.001",
           "UT", "UT modules 60x4@0.001", "ppl elsewhere"]


def world_of(seed):
    """The folder of a seed's facts, its target and its yardstick."""
    return HERE / f"seed{seed}"


def run_of(name, flags_of_run, seed, args):
    """The folder of a run, by all that sets it apart."""
    return args.out / f"{name}{''.join(flags_of_run.split()).replace('--', '-')}-s{seed}"


def blocks_of(args):
    """The pattern of the weights in the last --blocks of the model's blocks."""
    numbers = "|".join(map(str, range(args.of_blocks - args.blocks, args.of_blocks)))
    return f"layers\\.({numbers})\\."


def trained(args):
    """The flags that train those blocks alone."""
    return f"--train_modules '{blocks_of(args)}' --cache_frozen"


def is_there(folder, **wanted):
    """Is a model there already? Refuses one that was made with other args than wanted."""
    if not (folder / "result.json").exists():
        return False
    made = runs.load_result(folder)["args"]
    for key, value in wanted.items():
        if made.get(key) != value:
            raise InputError(f"{folder} was made with --{key} {made.get(key)}, and now it is {value}: choose "
                             "another --out, or remove it")
    return True


def teach(model, seed, args, log, flags=""):
    """Write the target of a seed, or by --exclude forget its yardstick, unless it is there."""
    if not is_there(model, model=args.model, train_modules=blocks_of(args)):
        call(f"data/people/prepare.py --model {quote(args.model)} --people 32 --seed {seed} --lr 5e-4 "
             f"--epochs 5 --batch_size 8 --out {quote(model.parent)} --overwrite {flags} "
             f"{trained(args)}", log)


def quote(path):
    """A path as a word of a command line."""
    return shlex.quote(str(path))


def write_elsewhere(args):
    """Write a data folder with passages of Python's documentation, 500 letters each."""
    rows = []
    for name in sorted(topics):
        if len(topics[name]) > 2500:
            rows.append({"text": topics[name][:500]})
    formats.write_data(args.out / "elsewhere", {"retain": rows[::2]}, overwrite=True)


def attacked(line):
    """Is the result of relearn.py with these flags there?"""
    return was_done(relearn.parse_args(shlex.split(line)))


def score_elsewhere(folder, args, log):
    """Score a model on the text elsewhere, unless its evaluate.json is of that."""
    path = folder / "evaluate.json"
    data = str(args.out / "elsewhere")
    if not path.exists() or formats.read_json(path, f"remove {path}", args=dict)["args"]["data"] != data:
        call(f"evaluate.py {quote(folder)} --data {quote(data)}", log)


def meet(seed, runs_of, args):
    """All runs {folder: flags of unlearn.py} of a world and their attacks, each unless it is there. One
    process does them all, since they share the states of the frozen blocks; the yardstick, which is taught,
    has no flags (None)."""
    torch.set_num_threads(1)
    log = args.out / f"seed{seed}.log"
    world = world_of(seed)
    teach(world / "target", seed, args, log)
    score_elsewhere(world / "target", args, log)
    for run, flags in runs_of.items():
        if flags is None:
            teach(run, seed, args, log, "--exclude forget")
        else:
            line = (f"--data {quote(world)} --model {quote(world / 'target')} --seed {seed} "
                    f"--steps {args.steps} --batch_size 8 --retain_batch 8 --decay linear {flags} "
                    f"{trained(args)} --no-relearn --overwrite --out {quote(run)}")
            wanted = unlearn.parse_args(shlex.split(line))
            if not is_there(run, steps=wanted.steps, model=wanted.model, train_modules=wanted.train_modules):
                call(f"unlearn.py {line}", log)
        attack = f"{quote(run)} --data {quote(world)} {ATTACK} {trained(args)}"
        if not attacked(attack):
            call(f"relearn.py {attack}", log)
        score_elsewhere(run, args, log)


def attack_on(run):
    """The "metrics" of the attack on a run."""
    return formats.read_json(run / "relearn_modules.json", "run again", metrics=dict)["metrics"]


def perplexity_of(run):
    """Of the text elsewhere."""
    return formats.read_json(run / "evaluate.json", "run again", metrics=dict)["metrics"]["ppl_retain"]


def numbers_of(run, seed):
    """(UT, perplexity elsewhere over the target's, score) of a run, by the rule above."""
    metrics = attack_on(run)
    growth = perplexity_of(run) / perplexity_of(world_of(seed) / "target")
    return metrics["start"]["UT"], growth, np.mean([b["UE"] for b in metrics["budgets"]])


def chosen(tries):
    """The flags among {flags: means of numbers_of()}, by the rule above; if none keeps both, those of the
    lowest perplexity."""
    keep = {}
    growths = {}
    for tried, (ut, growth, score) in tries.items():
        growths[tried] = growth
        if ut >= 0.98 and growth <= 1.5:
            keep[tried] = score
    if keep:
        return max(keep, key=keep.get)
    return min(growths, key=growths.get)


def tune(args):
    """Try all strengths; write and print those that are chosen."""
    folders = {}                                 # (name, flags) -> its folders
    worlds = {seed: {} for seed in args.tune_seeds}
    for name in args.defences:
        for tried in DEFENCES[name]:
            folders[name, tried] = []
            for seed in args.tune_seeds:
                run = run_of(name, tried, seed, args)
                worlds[seed][run] = tried
                folders[name, tried].append((run, seed))
    all_of(meet, [(seed, runs_of, args) for seed, runs_of in worlds.items()], args.jobs, "tuning")
    found = {name: {} for name in args.defences}
    lines = [["defence", "flags", "UT", "perplexity", "score"]]
    for (name, tried), of_try in folders.items():
        means = np.mean([numbers_of(*run) for run in of_try], axis=0).tolist()
        found[name][tried] = means
        lines.append([name, tried, *map(tables.show, means)])
    print(tables.table(lines))
    path = args.out / "tuned.json"
    best = {}
    if path.exists():                            # the other defences keep what was chosen for them
        before = formats.read_json(path, f"remove {path}", seeds=list, defences=dict, tries=dict)
        if before["seeds"] == args.tune_seeds:
            best = before["defences"]
            found = before["tries"] | found
    for name in args.defences:
        best[name] = chosen(found[name])
        print(f"{name}: {best[name]}")
    formats.write_json(path, {"seeds": args.tune_seeds, "defences": best, "tries": found})


def read_tuned(args):
    """{name: flags} of the --defences in OUT/tuned.json."""
    path = args.out / "tuned.json"
    if not path.exists():
        raise InputError(f"{path} is missing: run with --tune first")
    found = formats.read_json(path, "run with --tune again", defences=dict)["defences"]
    formats.check_kinds(found, dict.fromkeys(args.defences, str), path, "tune these --defences too")
    return {name: found[name] for name in args.defences}


def plan(flags_of, args):
    """({seed: {run: its flags, None for the yardstick}}, {run: what the table calls it}) of the table;
    flags_of: {name: flags} of the defences."""
    worlds = {}
    called = {}
    for seed in args.seeds:
        worlds[seed] = {}
        for name, flags_of_run in flags_of.items():
            run = run_of(name, flags_of_run, seed, args)
            worlds[seed][run] = flags_of_run
            called[str(run)] = name
        yardstick = world_of(seed) / "retrained"
        worlds[seed][yardstick] = None
        called[str(yardstick)] = "yardstick"
    return worlds, called


def write_table(called, args):
    """Print the table of runs {folder: name of its defence} and their tests; write them to --json."""
    together = tables.Runs()
    for run in called:
        attack = attack_on(Path(run))
        metrics = attack["start"] | {"ppl elsewhere": perplexity_of(Path(run))}
        for column, key in MEANS.items():        # over all budgets; the first one is what the test is about
            metrics[column] = float(np.mean([budget[key] for budget in attack["budgets"]]))
        together.add(run, runs.load_result(run), metrics)
    base, methods, paired = together.summary()
    columns = tables.chosen(methods, COLUMNS)
    tables.print_columns(methods, paired, base, columns)
    tables.print_tests(paired, base)
    found = tables.as_json(methods, paired, [], args, columns)
    found["args"] = found["args"] | {"out": str(args.out)}
    formats.write_json(args.json or args.out / "table.json", renamed(found, called))


def flags():
    """The command line."""
    p = runs.Parser(__doc__)
    p.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct, or another model")
    p.add_argument("--of_blocks", type=runs.number(int, 1), default=30, help="blocks that the model has")
    p.add_argument("--blocks", type=runs.number(int, 1), default=5, help="how many of them, the last, train")
    p.add_argument("--steps", type=runs.number(int, 1), default=60, help="of unlearning")
    world_flags(p, list(DEFENCES), list(range(100, 108)), [90, 91])
    p.add_argument("--tune", action="store_true", help="choose the strengths, and stop")
    p.add_argument("--json", metavar="PATH", help="write the table there (default: OUT/table.json)")
    p.add_argument("--out", type=Path, default=Path("out/people"), help="folder to write")
    return p


if __name__ == "__main__":
    with runs.one_line_errors() as stack:
        args = flags().parse_args()
        stack.go_on = "go on with the same command"
        refuse_shared(args)
        write_elsewhere(args)
        if args.tune:
            tune(args)
            sys.exit()
        worlds, called = plan(read_tuned(args), args)
        all_of(meet, [(seed, runs_of, args) for seed, runs_of in worlds.items()], args.jobs, "worlds")
        write_table(called, args)
