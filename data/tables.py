"""Many runs as one table: cells, means over seeds, tests against a baseline, text and JSON.

A run is {Cell: number}: its scores, and what relearn.py, prefix attacks and sharpness found. Runs that agree in
all settings but the seed are one method.
"""
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import scores
from data.formats import InputError, read_json


# ---- text ---------------------------------------------------------------------------------------------

def show(value):
    """A metric with three digits, or a dash for one that the data does not allow."""
    return "-" if value is None else f"{value:.3f}"


def cell_text(mean, se=None):
    """'.521 ±.030', or 'mean' alone for one run; a perplexity in the thousands in powers of ten."""
    def digits(value):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}"
    return digits(mean) + ("" if se is None else f" ±{digits(se)}")


def short(value):
    """A number of three digits without the zero in front: '.521', '20.5'."""
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return text.removeprefix("0")


def table(rows):
    """Text of rows of cells; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for text, width in zip(row[1:], widths[1:]):
            cells.append(text.rjust(width))
        lines.append("  ".join(cells))
    return "\n".join(lines)


# ---- one run ------------------------------------------------------------------------------------------

class Cell(NamedTuple):
    """Where a number stands: what is measured, after which attack ("" = none), and the column."""
    measure: str
    attack: str
    column: str

    def title(self):
        """Of the table it stands in."""
        return f"{self.measure} after {self.attack}" if self.attack else self.measure

    def name(self):
        """As evaluate.py --columns wants it: UT, UE relearning 60, held out mix50 500x4."""
        measure = "" if self.measure in ("scores", "corpora", "cost") else self.measure
        return " ".join(filter(None, [measure, self.attack, self.column]))


def words_of(args):
    """["npo+sam", "momentum", "linf"]: what a run of unlearn.py did, from its args; the usual goes without
    saying."""
    words = [args["loss"] if args["smooth"] == "none" else f"{args['loss']}+{args['smooth']}"]
    if args.get("lora"):
        words.append(f"lora{args['lora']}")
    for key, usual in (("sam_direction", "gradient"), ("sam_norm", "l2"), ("optimizer", "adamw")):
        if args.get(key, usual) != usual:
            words.append(args[key])
    if args.get("latent"):
        words.append(f"{args['latent']}{args['latent_eps'] or ''}")
    if args.get("ilu_lambda"):
        words.append(f"ilu{args['ilu_lambda']:g}")
    if args.get("shrink"):
        words.append(f"shrink{args['shrink']:g}")
    if args.get("undo_steps"):
        words.append(f"undo{args['undo_alpha']:g}")
    if args.get("sam_flip"):
        words.append("flipped")
    return words


def method(result):
    """(short name, settings: its args but seed and paths) of a run; runs that agree in both are averaged. A
    setting that is 0, empty or missing is the same, so that runs from before a flag existed join newer ones."""
    args = result["args"]
    if result["stage"] == "model":
        return Path(args["model"]).name, json.dumps({"model": args["model"]})
    if result["stage"] == "prepare":
        name = "retrained" if args["exclude"] == "forget" else "target"
    else:
        args = {"sam_norm": "l2", "sam_direction": "gradient", "lookahead_steps": 1,
                "optimizer": "adamw", "state_dtype": args.get("param_dtype"),
                "retain_batch": args.get("batch_size")} | args
        name = " ".join(words_of(args))
        if "sam" not in args["smooth"]:
            args = {k: v for k, v in args.items() if not k.startswith(("sam_", "lookahead_"))}
        if "wa" not in args["smooth"].split("+"):
            args = {k: v for k, v in args.items() if not k.startswith("wa_")}
        part = Path(args.get("data", ""))        # worlds differ by seed, the parts of data/split.py do not
        if re.fullmatch(r"(folds|layers)\d+", part.parent.name):
            args = args | {"part": f"{part.parent.name}/{part.name}"}
            name += f" {args['part']}"
    if args.get("loss") == "none":               # UNDO or a merge of what other runs did
        path = Path((args["merge"] or [args["model"]])[0]) / "result.json"
        if path.is_file():
            start, of = method(read_json(path, "run unlearn.py again", stage=str, args=dict))
            name = f"{start}, {'merged' if args['merge'] else 'undone'}"
            args = args | {"of": of}
    args = args | {"merge": len(args.get("merge") or [])}
    skip = ("seed", "out", "data", "model", "overwrite", "relearn", "device", "eval_every", "resume",
            "save_every", "cache_frozen")
    return name, json.dumps({k: v for k, v in args.items() if v and k not in skip}, sort_keys=True)


def budget_name(b):
    """A budget of relearn.py in a word: 20 samples, 20x3 with the epochs, 4bit, prune30 (percent)."""
    if b["samples"]:
        return f"{b['samples']}" + (f"x{b['epochs']}" if b["epochs"] > 1 else "")
    if "quantize" in b:
        return f"{b['quantize']}bit"
    scored = ("samples", "epochs", "UE", "UE_heldout", "UT", "draws")
    return next(f"{key}{value:g}" for key, value in b.items() if key not in scored)    # edit and amount


def cost_of(result):
    """{"seconds", "1000 samples"} of a run of unlearn.py and of the runs that it starts from or merges:
    samples that went through the model and back, and a third of those that went without a gradient; {} of
    other runs and of old ones."""
    if result["stage"] != "unlearn" or "passed" not in result:
        return {}
    passed = result["passed"]
    cost = Counter({"seconds": result["seconds"],
                    "1000 samples": (passed.get("trained", 0) + passed.get("seen", 0) / 3) / 1000})
    for start in result["args"]["merge"] or [result["args"]["model"]]:
        path = Path(start) / "result.json"
        if path.is_file():
            cost.update(cost_of(read_json(path, "run unlearn.py again", stage=str, args=dict)))
    return cost


def cells_of(run, metrics, result=None):
    """One run as {Cell: number}: its scores, and those of every relearn*.json, prefix attack and sharpness;
    with its result.json its cost."""
    out = {}
    for name, value in cost_of(result).items() if result else ():
        out[Cell("cost", "", name)] = value
    for name in ("UE", "UT", *metrics):
        if isinstance(metrics[name], float):
            corpus = name.startswith(("ppl_", "es_", "em_"))
            out[Cell("corpora" if corpus else "scores", "", name)] = metrics[name]
    for name, value in metrics.get("qa_forget", {}).items():
        out[Cell("scores", "", f"qa_forget_{name}")] = value
    names = {"UE": "UE", "held out": "UE_heldout", "UT": "UT", "open answers": "open_forget"}
    for path in sorted(Path(run).glob("relearn*.json")):
        result = read_json(path, "run relearn.py again", args=dict, metrics=dict)
        attack = result["args"].get("attack") or "relearning"
        budgets = result["metrics"]["budgets"]
        for b in budgets:
            column = budget_name(b)
            if b.get("lr") != budgets[0].get("lr"):
                column += f"@{b['lr']:g}"
            for measure, key in names.items():
                out[Cell(measure, attack, column)] = b.get(key)
    names = {"UE": "UE", "held out": "UE_heldout", "teacher's UE": "UE_teacher"}
    for column, m in metrics.get("attack", {}).items():
        for measure, key in names.items():
            out[Cell(measure, m.get("place", "prefix"), column.replace("_suffix", ""))] = m[key]
    names = {"UE": "UE", "UE with retain rows": "UE_retain"}
    for shots, m in metrics.get("context", {}).get("after", {}).items():
        for measure, key in names.items():
            out[Cell(measure, "context", f"{shots} shots")] = m[key]
    for layer, accuracy in metrics.get("probe", {}).get("after", {}).items():
        out[Cell("accuracy of a probe", "", f"layer {layer}")] = accuracy
    for kind, m in metrics.get("sharpness", {}).items():
        for column in ("top", "trace", "rise"):
            out[Cell(f"sharpness ({kind})", "", column)] = m[column]
    return {cell: float(value) for cell, value in out.items() if value is not None}


def relearn_curve(folders):
    """{"seen": samples, "mean": UE, "se"} along the largest budget of the relearn.json of runs, over runs, or
    over the seeds of a single one; None where relearn.py ran without --curve_every."""
    found = []
    for run in folders:
        path = Path(run) / "relearn.json"
        result = read_json(path, "run relearn.py again") if path.is_file() else None
        budgets = [b for b in result["metrics"]["budgets"] if "curves" in b] if result else []
        if not budgets:
            return None
        largest = max(budgets, key=lambda b: b["samples"] * b["epochs"])
        lines = []                               # of UE, one a seed
        for curve in largest["curves"]:
            lines.append([point["UE"] for point in curve])
        found.append(lines)
    if len(found) > 1:
        lines = [np.mean(of_run, axis=0).tolist() for of_run in found]
    most = largest["samples"] * largest["epochs"]
    seen = [min(point["step"] * result["args"]["batch_size"], most) for point in largest["curves"][0]]
    stats = [scores.mean_se(column) for column in zip(*lines)]
    return {"seen": seen, "mean": [mean for mean, _ in stats], "se": [se for _, se in stats]}


# ---- many runs ----------------------------------------------------------------------------------------

def cells_in(rows):
    """[Cell] that are in any of rows [{Cell: ...}], each once, in order of appearance."""
    found = {}
    for row in rows:
        found |= dict.fromkeys(row)
    return list(found)


def name_apart(names):
    """Methods of one name get what differs between their settings (the keys, JSON) added, in place."""
    for name in set(names.values()):
        twins = {s: json.loads(s) for s in names if names[s] == name}
        values = {}
        for key in set().union(*twins.values()):
            values[key] = {json.dumps(args.get(key)) for args in twins.values()}
        for settings, args in twins.items():
            for key in sorted(values):
                if len(values[key]) > 1:
                    names[settings] += f" {key}={args.get(key)}"


class Runs:
    """Runs put together by method as they come: add() each, then summary()."""

    def __init__(self):
        self.seeds = defaultdict(dict)           # settings -> {seed: {Cell: number}}
        self.names = {}                          # settings -> name
        self.folders = defaultdict(list)
        self.landscapes = {}                     # of the first run of each method

    def add(self, run, result, metrics):
        """A run folder, its result.json and its metrics."""
        name, settings = method(result)
        seed = result["args"]["seed"]
        if seed in self.seeds[settings]:
            raise InputError(
                f"{run}: a second run of {name} with seed {seed} and the same settings; drop one")
        try:
            self.seeds[settings][seed] = cells_of(run, metrics, result)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InputError(f"{run}: its evaluate.json or relearn*.json is not what the scripts write ({e!r}): "
                             "evaluate.py --overwrite and relearn.py write them again")
        self.names[settings] = name
        self.folders[settings].append(run)
        self.landscapes.setdefault(settings, metrics.get("landscape"))

    def summary(self, baseline=None):
        """(name of the baseline, {name: {"runs", "seeds", "stats": {Cell: (mean, se)}, "landscape"}}, {name:
        compare() with the baseline}); the baseline is the first method unless one is named."""
        name_apart(self.names)
        base = next((s for s in self.seeds if baseline in (None, self.names[s])), None)
        if base is None:
            raise InputError(f"--baseline {baseline}: not among {', '.join(self.names.values())}")
        methods = {}
        paired = {}
        for settings, rows in self.seeds.items():
            stats = {}
            for cell in cells_in(rows.values()):
                stats[cell] = scores.mean_se([row[cell] for row in rows.values() if cell in row])
            name = self.names[settings]
            methods[name] = {"runs": self.folders[settings], "seeds": rows, "stats": stats,
                             "landscape": self.landscapes[settings]}
            if settings != base:
                paired[name] = compare(rows, self.seeds[base])
        correct_for_methods(paired)
        return self.names[base], methods, paired


def compare(group, base):
    """{Cell: {"mean", "t", "p", "n", "higher", "d"}} of group - base, both {seed: {Cell: number}}, by seed; d
    is Cohen's effect size for pairs, the mean difference over its standard deviation."""
    out = {}
    for cell in cells_in(group.values()):
        seeds = [s for s in sorted(group) if cell in group[s] and cell in base.get(s, {})]
        differences = [group[s][cell] - base[s][cell] for s in seeds]
        if len(differences) > 1:
            t, p = scores.t_test(differences)
            out[cell] = {"mean": scores.mean_se(differences)[0], "t": t, "p": p, "n": len(differences),
                         "higher": sum(d > 0 for d in differences),
                         "d": None if t is None else t / math.sqrt(len(differences))}
    return out


def correct_for_methods(paired):
    """Add "p_holm" to each {method: compare()}: a cell is a family of as many tests as it has methods."""
    for cell in cells_in(paired.values()):
        tests = [by[cell] for by in paired.values() if cell in by]
        for test, p in zip(tests, scores.holm([test["p"] for test in tests])):
            test["p_holm"] = p


def flat_and_robust(rows):
    """[(sharpness Cell, UE Cell, n, rho, p)] over rows [{Cell: number}]: Spearman's correlation of how sharp
    with how robust."""
    cells = cells_in(rows)
    sharp = [cell for cell in cells if cell.measure.startswith("sharpness")]
    robust = [cell for cell in cells if cell.measure == "UE" and cell.attack]
    out = []
    for flat, ue in itertools.product(sharp, robust):
        both = [(row[flat], row[ue]) for row in rows if flat in row and ue in row]
        if len(both) > 2:
            rho, p = scores.spearman(*zip(*both))
            if rho is not None:
                out.append((flat, ue, len(both), rho, p))
    return out


def correlations(methods):
    """[("methods" or "runs", flat_and_robust())]: over the means of methods, and over all runs, where p is too
    small, since runs of one method are not independent."""
    means = []
    singles = []
    for m in methods.values():
        means.append({cell: mean for cell, (mean, _) in m["stats"].items()})
        singles += m["seeds"].values()
    return [("methods", flat_and_robust(means)), ("runs", flat_and_robust(singles))]


# ---- to the reader ------------------------------------------------------------------------------------

def print_tables(methods):
    """One table for each title of the cells of methods {name: {"seeds", "stats": {Cell: (mean, se)}}}."""
    columns = defaultdict(dict)                  # title -> its cells, in order
    for m in methods.values():
        for cell in m["stats"]:
            columns[cell.title()][cell] = None
    for title, cells in columns.items():
        print(f"\n{title}")
        lines = [["method", "seeds"] + [cell.column for cell in cells]]
        for name, m in methods.items():
            line = [name, str(len(m["seeds"]))]
            for cell in cells:
                line.append(cell_text(*m["stats"][cell]) if cell in m["stats"] else "-")
            lines.append(line)
        print(table(lines))


def chosen(methods, names):
    """[Cell] of the names, in that order."""
    cells = {}
    for m in methods.values():
        for cell in m["stats"]:
            cells.setdefault(cell.name(), cell)
    for name in names:
        if name not in cells:
            raise InputError(f"--columns {name!r}: there are {', '.join(map(repr, cells))}")
    return [cells[name] for name in names]


def print_columns(methods, paired, base, cells):
    """One table of the means of these cells, numbered so that many fit on a line; a star marks what differs from
    the baseline, p < .05 after Holm."""
    print()
    for number, cell in enumerate(cells, 1):
        print(f"{number:3d}  {cell.name()}")
    lines = [["method", "seeds", *(f"{number} " for number in range(1, len(cells) + 1))]]
    for name, m in methods.items():
        line = [name, str(len(m["seeds"]))]
        for cell in cells:
            text = short(m["stats"][cell][0]) if cell in m["stats"] else "-"
            p = paired.get(name, {}).get(cell, {}).get("p_holm")
            line.append(text + ("*" if p is not None and p < 0.05 else " "))
        lines.append(line)
    print()
    print(table(lines))
    print(f"* differs from {base}, paired by seed, p < .05 corrected for the methods (Holm); --json has all errors")


def print_tests(paired, base):
    """The table of {method: compare()} for UE, held-out UE and UT."""
    lines = []
    for name, by in paired.items():
        for cell, c in by.items():
            if cell.measure in ("UE", "held out", "UT") or cell.column.startswith(("UE", "UT")):
                test = ["-"] * 4
                if c["t"] is not None:
                    test = [f"{c['t']:.1f}", f"{c['p']:.1g}", f"{c['p_holm']:.1g}", f"{c['d']:+.1f}"]
                where = cell.title() if cell.attack else ""
                lines.append([name, where, cell.column, f"{c['mean']:+.3f}", *test,
                              f"{c['higher']}/{c['n']}"])
    if lines:
        print(f"\ndifference to {base}, paired by seed; Holm: p corrected for a column's methods")
        print(table([["method", "", "column", "difference", "t", "p", "Holm", "effect", "higher"]]
                         + lines))


def print_correlations(found):
    """The table of [("methods" or "runs", flat_and_robust())]."""
    lines = []
    for over, rows in found:
        for flat, ue, n, rho, p in rows:
            lines.append([f"{flat.title()} {flat.column}", f"{ue.title()} {ue.column}", over, str(n),
                          f"{rho:+.2f}", f"{p:.2g}"])
    if lines:
        print("\nis flatter more robust? Spearman's rank correlation with UE after attack, below 0 if so")
        print(table([["sharpness", "attack", "over", "n", "rho", "p"]] + lines))


def as_json(methods, paired, correlations, args, columns=()):
    """The table as --json writes it: a list of {"measure", "attack", "column", ...} for each method; columns:
    the Cells of --columns."""
    out = {"args": vars(args), "methods": {}, "paired": {}, "spearman": [],
           "columns": [cell._asdict() for cell in columns]}
    for name, m in methods.items():
        cells = []
        for cell, (mean, se) in m["stats"].items():
            by_seed = {seed: row[cell] for seed, row in m["seeds"].items() if cell in row}
            cells.append(cell._asdict() | {"mean": mean, "se": se, "by_seed": by_seed})
        out["methods"][name] = {"runs": m["runs"], "cells": cells, "curve": relearn_curve(m["runs"]),
                                "landscape": m["landscape"]}
    for name, by in paired.items():
        out["paired"][name] = [cell._asdict() | test for cell, test in by.items()]
    for over, found in correlations:
        for flat, ue, n, rho, p in found:
            out["spearman"].append({"over": over, "sharpness": flat._asdict(), "UE": ue._asdict(), "n": n,
                                    "rho": rho, "p": p})
    return out
