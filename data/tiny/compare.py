"""Every defence under every attack on the built-in benchmark: one table, one picture.

    python data/tiny/compare.py                     # 144 runs on 2 cores: 100 minutes, by the time of 48;
                                                    # goes on where it was killed
    python data/tiny/compare.py --defences NPO SAM --seeds 700 701 --out out/small
    python data/tiny/compare.py --tune              # and choose the strengths again: 102 runs more

Each defence meets all attacks on the worlds of --seeds, beside a model that never saw the topic, and
evaluate.py prints the table. Its strength was chosen by one rule, out of three tries on worlds of their own
(--tune_seeds): of those that keep a mean UT of at least .98 the one with the highest score, the mean of UE
after 60 samples and of UE held out after 500 mixed steps; if none keeps UT, the one that keeps most. Those
of fast-SAM and shrink come from a longer search, which readme.md describes.

Writes OUT/NAME-STRENGTH-sSEED/, runs with their attacks; OUT/table.json; with --tune OUT/tuned.json; with
matplotlib OUT/attacks.png and cost.png. Adapters have a table of their own in readme.md.
"""
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))                    # the scripts, and their package `data`
import evaluate
import relearn
from data import formats, runs, tables
from data.formats import InputError

NPO = "unlearn.py --sam_rho 0"
LINF = "--sam_norm linf --sam_rho {x}"
SPUNGE = """data/split.py {world} --folds 3 --out {run}-data/folds3
unlearn.py --sam_rho 0 --lr {x} --model {world}/target --data {run}-data/folds3/1 --out {run}-1
unlearn.py --sam_rho 0 --lr {x} --model {world}/target --data {run}-data/folds3/2 --out {run}-2
unlearn.py --sam_rho 0 --lr {x} --model {world}/target --data {run}-data/folds3/3 --out {run}-3
unlearn.py --merge {run}-1 {run}-2 {run}-3"""
LAYERED = """data/split.py {world} --folds 3 --layered --out {run}-data/layers3
unlearn.py --sam_rho 0 --lr {x} --model {world}/target --data {run}-data/layers3/1 --out {run}-1
unlearn.py --sam_rho 0 --lr {x} --model {run}-1 --data {run}-data/layers3/2 --out {run}-2
unlearn.py --sam_rho 0 --lr {x} --model {run}-2 --data {run}-data/layers3/3"""
UNDO = """unlearn.py --sam_rho 0 --out {run}-1
unlearn.py --loss none --model {run}-1 --undo_alpha {x} --undo_beta .05 --undo_steps 1280 --undo_lr 4e-3"""
SHRINK = ("unlearn.py --shrink {x} --steps 640 --batch_size 4 --retain_batch 28 --lr 4e-3 --decay linear "
          "--sam_direction momentum --sam_norm linf --sam_rho 3e-4")

DEFENCES = {                                     # name: (strength {x}, chosen of three, commands of a run)
    "NPO": ("6e-4", ["2e-4", "3e-4", "6e-4"], NPO + " --lr {x}"),
    "SAM": (".1", [".05", ".1", ".2"], "unlearn.py --sam_rho {x}"),
    "GP": (".2", [".05", ".1", ".2"], "unlearn.py --smooth gp --gp_lambda {x}"),
    "momentum": ("1e-3", ["5e-4", "1e-3", "2e-3"], "unlearn.py --sam_direction momentum " + LINF),
    "lookahead": ("1e-3", ["5e-4", "1e-3", "2e-3"], "unlearn.py --sam_direction lookahead " + LINF),
    "fast-SAM": ("3e-3", ["1e-3", "2e-3", "3e-3"],
                 "unlearn.py --sam_rho .2 --steps 214 --lr {x} --decay linear"),
    "shrink": (".3", [".2", ".3", ".4"], SHRINK),
    "UNDO": (".6", [".4", ".6", ".8"], UNDO),
    "latent": (".1", [".1", ".5", "2"], NPO + " --latent_eps {x}"),
    "direction": ("6e-4", ["2e-4", "3e-4", "6e-4"], NPO + " --latent direction --lr {x}"),
    "direction+momentum": ("1e-3", ["5e-4", "1e-3", "2e-3"],
                           "unlearn.py --latent direction --sam_direction momentum " + LINF),
    "ILU": (".01", [".01", ".1", "1"], NPO + " --ilu_lambda {x} --ilu_data {unrelated}"),
    "sign": ("3e-4", ["1e-4", "3e-4", "1e-3"], NPO + " --optimizer sign --lr {x}"),
    "hybrid": (".3", [".03", ".1", ".3"], NPO + " --optimizer hybrid --steps 320 --zo_lr {x}"),
    "RMU": ("40", ["10", "20", "40"], NPO + " --loss rmu --train_modules . --lr 1e-3 --rmu_c {x}"),
    "SPUNGE": ("1e-3", ["3e-4", "6e-4", "1e-3"], SPUNGE),
    "layered": ("6e-4", ["3e-4", "6e-4", "1e-3"], LAYERED),
}
MIXED = "--draws 1 --samples 500 --epochs 4 --lr 5e-4 --mix .5"
TUNE_ON = ["--draws 1 --samples 60", MIXED]                          # flags of relearn.py
ATTACKS = ["--draws 1 --samples 20 40 60 240", MIXED, "--draws 1 --samples 60 --lora 8 --lr 1e-2",
           "--quantize 4", "--ablate 0"]
PROMPTS = ["--attack context --shots 3 --probe 2",                   # flags of evaluate.py
           "--attack prefix --attack_place suffix --attack_length 4 12 --attack_calls 500"]
COLUMNS = ["UE", "UE relearning 20", "UE relearning 40", "UE relearning 60", "UE relearning 240",
           "held out relearning 240", "held out mix50 500x4", "UE lora8 60", "UE compress 4bit",
           "UE ablate ablate0", "UE context 3 shots", "UE suffix gcg+", "accuracy of a probe layer 2", "UT",
           "UT relearning 60", "1000 samples", "seconds"]


class Job(NamedTuple):
    """A run, the commands that make it, and what it meets: flags of relearn.py and of evaluate.py."""
    run: Path
    log: Path
    world: Path
    commands: list
    attacks: list
    prompts: list


# ---- one run ------------------------------------------------------------------------------------------

def call(line, log):
    """Run a script of the repository in this process, which has imported what it needs; what it says goes to
    the end of the file `log`."""
    script, *flags = shlex.split(line)
    sys.argv = [script, *flags]
    with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
        print(f"$ python {line}", flush=True)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as e:
            if e.code:
                raise InputError(f"python {line}: exit status {e.code}; {log} has the reason")


def prepare(seed, log):
    """Make the world of a seed, its target and its yardstick, unless they are there."""
    if not (runs.TINY / f"seed{seed}" / "retrained" / "result.json").exists():
        call(f"data/tiny/prepare.py --seed {seed} --exclude forget", log)


def was_done(args):
    """Is the result of this very attack there?"""
    path = relearn.result_path(args)
    return path.is_file() and formats.read_json(path, f"remove {path}", args=dict)["args"] == vars(args)


def meet(job):
    """Make a job's run, attack it and score it, each unless it was done before."""
    torch.set_num_threads(1)
    if not (job.run / "result.json").exists():
        for line in job.commands:
            call(line, job.log)
    with open(job.log, "a") as file, redirect_stdout(file), redirect_stderr(file):
        for flags in job.attacks:
            args = relearn.parse_args([str(job.run), "--data", str(job.world), *flags.split()])
            if not was_done(args):
                relearn.attack(args)
        for flags in job.prompts:
            flags = f"{flags} --ppl_rows 1 --teacher {job.world}/target"
            args = evaluate.flags().parse_args([str(job.run), *flags.split()])
            done, metrics = evaluate.score(job.run, args)
            evaluate.extras(job.run, done, metrics, args)


def job_of(name, x, seed, args, attacks, prompts=()):
    """The Job of a defence at strength x on the world of a seed."""
    world = runs.world(runs.TINY, seed)
    run = args.out / f"{name}-{x}-s{seed}"
    unrelated = runs.world(runs.TINY, args.tune_seeds[0]) / "retain.jsonl"
    commands = []
    paths = {"run": shlex.quote(str(run)), "world": shlex.quote(str(world)),
             "unrelated": shlex.quote(str(unrelated))}
    for line in DEFENCES[name][2].format(x=x, **paths).splitlines():
        if line.startswith("unlearn.py"):
            line += f" --seed {seed} --no-relearn"
            line += "" if " --out " in line else f" --out {paths['run']}"
        commands.append(f"{line} --overwrite")   # what was broken off
    return Job(run, Path(f"{run}.log"), world, commands, list(attacks), list(prompts))


# ---- all runs -----------------------------------------------------------------------------------------

def all_of(function, calls, count, what):
    """function(*call) for each of the calls, `count` at a time, each in a process of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(function, *call) for call in calls]
        try:
            for done in tqdm(as_completed(waiting), what, len(waiting), unit="run"):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def numbers_of(run):
    """(UT, score) of a try, by the rule above."""
    fix = f"remove {run} and run again"
    after = formats.read_json(run / "result.json", fix, metrics=dict)["metrics"]["after"]
    found = []
    for name, key in (("relearn.json", "UE"), ("relearn_mix50.json", "UE_heldout")):
        result = formats.read_json(run / name, fix, metrics=dict)
        found.append(result["metrics"]["budgets"][-1][key])
    return after["UT"], sum(found) / len(found)


def chosen(tries):
    """The strength among {strength: (mean UT, mean score)}, by the rule above."""
    keep = {x: score for x, (ut, score) in tries.items() if ut >= 0.98}
    if keep:
        return max(keep, key=keep.get)
    return max(tries, key=tries.get)


def tune(args):
    """{name: strength}, after all tries; writes and prints them."""
    jobs = {}
    for name in args.defences:
        for x in DEFENCES[name][1]:
            jobs[name, x] = [job_of(name, x, seed, args, TUNE_ON) for seed in args.tune_seeds]
    flat = [(job,) for of_try in jobs.values() for job in of_try]
    all_of(meet, flat, args.jobs, "tuning")
    found = {}
    lines = [["defence", "chosen", "tries: UT, score"]]
    for name in args.defences:
        tries = {}
        for x in DEFENCES[name][1]:
            ut, mark = np.mean([numbers_of(job.run) for job in jobs[name, x]], axis=0)
            tries[x] = (float(ut), float(mark))
        found[name] = {"strength": chosen(tries), "tries": tries}
        said = [f"{x}: {ut:.3f}, {mark:.3f}" for x, (ut, mark) in tries.items()]
        lines.append([name, found[name]["strength"], "; ".join(said)])
    print(tables.table(lines))
    formats.write_json(args.out / "tuned.json", {"seeds": args.tune_seeds, "defences": found})
    return {name: of_name["strength"] for name, of_name in found.items()}


def renamed(table, called):
    """evaluate.py's table with the names of DEFENCES; called: {run: name}."""
    names = {old: called[m["runs"][0]] for old, m in table["methods"].items()}
    for part in ("methods", "paired"):
        table[part] = {names[old]: found for old, found in table[part].items()}
    return table


def world_flags(p, names, seeds, tune_seeds):
    """Add the flags of a comparison over worlds to a parser: of which defences, on which seeds."""
    p.add_argument("--defences", nargs="+", choices=names, default=names, metavar="NAME",
                   help=f"of {', '.join(names)} (default: all); the others are tested against the first")
    p.add_argument("--seeds", type=runs.SEED, nargs="+", default=seeds, help="worlds of the table")
    p.add_argument("--tune_seeds", type=runs.SEED, nargs="+", default=tune_seeds, help="worlds of the tries")
    p.add_argument("--jobs", type=runs.number(int, 1), default=2, help="processes, each on one core")


def refuse_shared(args):
    """Raise InputError where a world is for tuning and for the table."""
    if set(args.seeds) & set(args.tune_seeds):
        raise InputError(f"--seeds {args.seeds} --tune_seeds {args.tune_seeds}: a world for tuning says "
                         "nothing about the result; choose others")


def flags():
    """The command line."""
    p = runs.Parser(__doc__)
    world_flags(p, list(DEFENCES), list(range(600, 608)), [590, 591])
    p.add_argument("--tune", action="store_true", help="choose the strengths again, first")
    p.add_argument("--out", type=Path, default=Path("out/compare"), help="folder to write")
    return p


if __name__ == "__main__":
    with runs.one_line_errors() as stack:
        args = flags().parse_args()
        stack.go_on = "go on with the same command"
        refuse_shared(args)
        args.out.mkdir(parents=True, exist_ok=True)
        tuned_on = args.tune_seeds if args.tune else args.tune_seeds[:1]     # of which ILU takes texts
        seeds = tuned_on + args.seeds
        all_of(prepare, [(seed, args.out / f"prepare-s{seed}.log") for seed in seeds], args.jobs, "worlds")
        strengths = {name: DEFENCES[name][0] for name in args.defences}
        if args.tune:
            strengths = tune(args)

        jobs = []                                # world by world
        called = {}
        for seed in args.seeds:
            for name, x in strengths.items():
                jobs.append(job_of(name, x, seed, args, ATTACKS, PROMPTS))
                called[str(jobs[-1].run)] = name
            world = runs.world(runs.TINY, seed)
            yardstick = world / "retrained"
            jobs.append(Job(yardstick, args.out / f"retrained-s{seed}.log", world, [], ATTACKS, PROMPTS))
            called[str(yardstick)] = "yardstick"
        all_of(meet, [(job,) for job in jobs], args.jobs, "attacks")

        table = args.out / "table.json"
        subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *called, "--ppl_rows", "1", "--json",
                        str(table), "--columns", *COLUMNS], check=True)
        found = formats.read_json(table, "run again", methods=dict, paired=dict)
        formats.write_json(table, renamed(found, called))
        subprocess.run([sys.executable, str(ROOT / "assets/plot.py"), str(table), "--out", str(args.out)])
