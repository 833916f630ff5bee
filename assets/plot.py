"""Draw what evaluate.py --json wrote: UE in bars, UE while relearning, the loss around the weights, UE
against UT, what every attack left, and what that cost.

    pip install matplotlib
    python evaluate.py out/* --landscape 21 --json table.json
    python assets/plot.py table.json                    # writes assets/*.png

A picture without data is named and left out: relearn_curves.png takes relearn.py --curve_every 1 on every run,
landscape.png takes evaluate.py --landscape, attacks.png and cost.png take --columns, as data/tiny/compare.py
gives them.
"""
import io
import itertools
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))             # the scripts' package `data` is there
from data import formats, runs
from data.formats import InputError

INK = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
       ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-.")]     # Okabe and Ito's palette
UE = "UE (1 − forget accuracy)"


def pyplot():
    """matplotlib.pyplot, set up to write files; it is not a requirement."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "savefig.dpi": 200, "savefig.bbox": "tight", "legend.frameon": False})
    return plt


def cells(m, measure, attack=""):
    """{column: cell} of a method of the JSON, for one measure after one attack."""
    return {c["column"]: c for c in m["cells"] if (c["measure"], c["attack"]) == (measure, attack)}


def chance(ax):
    """A line where guessing would be."""
    ax.axhline(0.75, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
    ax.text(1.01, 0.75, "chance", color="0.4", size=8, va="center", transform=ax.get_yaxis_transform())


def ue_bars(plt, methods):
    """UE after unlearning and after each relearning budget."""
    bars = {}                                    # label -> {method: cell}
    for name, m in methods.items():
        bars.setdefault("unlearned", {})[name] = cells(m, "scores").get("UE")
        for column, cell in cells(m, "UE", "relearning").items():
            if column.isdigit():
                bars.setdefault(f"relearned on {column} samples", {})[name] = cell
    figure, ax = plt.subplots(figsize=(max(3.4, 1.1 * len(methods)), 2.6))
    width = 0.8 / len(bars)
    for i, (label, by_method) in enumerate(bars.items()):
        x = np.arange(len(methods)) + (i - (len(bars) - 1) / 2) * width
        found = [by_method.get(name) or {"mean": np.nan, "se": None} for name in methods]
        heights = [cell["mean"] for cell in found]
        errors = [cell["se"] or np.nan for cell in found]
        shade = plt.get_cmap("Blues")(0.9 - 0.85 * i / max(1, len(bars) - 1))
        ax.bar(x, heights, width, yerr=errors, capsize=2, edgecolor="black", linewidth=0.5,
               error_kw={"linewidth": 0.8}, color=shade, label=label)
    chance(ax)
    ax.set(xticks=range(len(methods)), xticklabels=methods, ylim=(0, 1), ylabel=UE)
    ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def relearn_curves(plt, methods):
    """UE along the largest relearning budget; None without the curves."""
    if not all(m["curve"] for m in methods.values()):
        return None
    figure, ax = plt.subplots(figsize=(4.2, 2.8))
    for (name, m), (color, marker, line) in zip(methods.items(), itertools.cycle(INK)):
        curve = m["curve"]
        error = np.array([se or 0 for se in curve["se"]])
        mean = np.array(curve["mean"])
        ax.fill_between(curve["seen"], mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
        ax.plot(curve["seen"], mean, line, color=color, marker=marker, markersize=4, linewidth=1.2, label=name)
    chance(ax)
    ax.set(xlabel="forget samples relearned", ylabel=UE, ylim=(0, 1))
    ax.legend(loc="upper left", bbox_to_anchor=(1.15, 1))
    return figure


def landscape(plt, methods):
    """How the forget loss changes around the weights: surface and contours, one scale for all; None without."""
    from matplotlib.ticker import MaxNLocator
    if not all(m["landscape"] for m in methods.values()):
        return None
    grids = {name: np.array(next(iter(m["landscape"].values()))["rise"]) for name, m in methods.items()}
    levels = MaxNLocator(14).tick_values(min(z.min() for z in grids.values()),
                                         max(z.max() for z in grids.values()))
    ticks = [-0.05, 0, 0.05]
    n = len(grids)
    width = 1.7 * n + 1.8                                            # inches
    figure = plt.figure(figsize=(width, 3.6))
    figure.subplots_adjust(left=0.9 / width, right=1 - 0.9 / width, wspace=0.3, hspace=0.1)
    for i, (name, z) in enumerate(grids.items()):
        at = np.linspace(-0.05, 0.05, len(z))
        ax = figure.add_subplot(2, n, i + 1, projection="3d")
        ax.plot_surface(*np.meshgrid(at, at, indexing="ij"), z, vmin=levels[0], vmax=levels[-1], rstride=1,
                        cstride=1, cmap="cividis", linewidth=0.1, edgecolor="0.3")
        ax.set(zlim=(levels[0], levels[-1]), xticks=ticks, yticks=ticks, xticklabels=[], yticklabels=[])
        ax.set_box_aspect((1, 1, 0.8), zoom=1.1)
        ax.locator_params("z", nbins=4)
        ax.tick_params(labelsize=7, pad=0)
        ax.set_title(name, y=1)
        ax = figure.add_subplot(2, n, n + i + 1)
        shade = ax.contourf(at, at, z.T, levels, cmap="cividis")
        ax.contour(at, at, z.T, levels, colors="white", linewidths=0.4, linestyles="-")
        ax.plot(0, 0, "+", color="white")
        ax.set(aspect="equal", xticks=ticks, yticks=ticks, xlabel="direction 1")
        ax.tick_params(labelsize=7, labelleft=i == 0)
        if i == 0:
            ax.set_ylabel("direction 2\n(share of filter norm)")
    box = ax.get_position()
    bar = figure.add_axes([box.x1 + 0.1 / width, box.y0, 0.1 / width, box.height])
    figure.colorbar(shade, cax=bar, label="change of the\nforget loss (nats)", ticks=levels[::4])
    return figure


def ue_ut(plt, methods):
    """Forgetting against utility, one point a seed and the mean."""
    figure, ax = plt.subplots(figsize=(3.4, 2.8))
    for (name, m), (color, marker, _) in zip(methods.items(), itertools.cycle(INK)):
        found = cells(m, "scores")
        if "UE" not in found or "UT" not in found:
            return None
        ue = found["UE"]
        ut = found["UT"]
        ax.scatter(ut["by_seed"].values(), ue["by_seed"].values(), s=14, color=color, marker=marker, alpha=0.4,
                   linewidths=0)
        ax.errorbar(ut["mean"], ue["mean"], xerr=ut["se"], yerr=ue["se"], color=color, marker=marker,
                    markersize=7, capsize=2, linewidth=0.8, markeredgecolor="black", markeredgewidth=0.5,
                    linestyle="none", label=name)
    chance(ax)
    ax.set(xlabel="UT (accuracy on the rest)", ylabel=UE)
    ax.locator_params(nbins=5)
    ax.margins(0.15)
    ax.legend(loc="upper left", bbox_to_anchor=(1.12, 1))
    return figure


def attacks(plt, methods, columns):
    """UE of every method after every attack in the columns, a row a method; None without columns."""
    columns = [c for c in columns if c["measure"] in ("UE", "held out") or c["column"] == "UE"]
    if not columns:
        return None
    left = np.full((len(methods), len(columns)), np.nan)
    for row, m in zip(left, methods.values()):
        for i, c in enumerate(columns):
            found = cells(m, c["measure"], c["attack"]).get(c["column"])
            row[i] = found["mean"] if found else np.nan
    figure, ax = plt.subplots(figsize=(1.4 + 0.55 * len(columns), 1.2 + 0.24 * len(methods)))
    shade = ax.imshow(left, cmap="cividis", vmin=0, vmax=0.75, aspect="auto")
    for (i, k), value in np.ndenumerate(left):
        ax.text(k, i, f"{value:.2f}".removeprefix("0"), ha="center", va="center", size=7,
                color="black" if value > 0.45 else "white")
    titles = []
    for c in columns:
        measure = "" if c["measure"] in ("UE", "scores") else c["measure"]
        titles.append(" ".join(filter(None, [c["attack"] or "before", measure, c["column"]])))
    ax.set(xticks=range(len(columns)), yticks=range(len(methods)), yticklabels=methods)
    ax.set_xticks(range(len(columns)), titles, rotation=40, ha="right", size=8)
    ax.tick_params(length=0)
    figure.colorbar(shade, ax=ax, label="UE; chance .75")
    return figure


def cost(plt, methods, columns):
    """The samples that a method took against UE held out after the largest relearning budget, with its standard
    error; a line is a model without a cost, the yardstick. None without those columns."""
    held = [c["column"] for c in columns if (c["measure"], c["attack"]) == ("held out", "relearning")]
    if not held:
        return None
    figure, ax = plt.subplots(figsize=(7, 4.2))
    for name, m in methods.items():
        left = cells(m, "held out", "relearning").get(held[-1])
        samples = cells(m, "cost").get("1000 samples")
        if not left:
            continue
        height = left["mean"]
        if samples:
            place = (samples["mean"], height)
            ax.errorbar(*place, yerr=left["se"] or 0, fmt="o", color=INK[0][0], capsize=2)
            ax.annotate(name, place, xytext=(5, 3), textcoords="offset points", size=7)
        else:
            ax.axhline(height, color="grey", linestyle="--", linewidth=1)
            across = ax.get_yaxis_transform()
            ax.text(0.99, height, name, transform=across, ha="right", va="bottom", size=7)
    ax.set(xscale="log", xlabel="thousands of samples through the model and back",
           ylabel=f"UE held out, after {held[-1]} samples")
    return figure


def in_bytes(plt, figure):
    """A figure as a PNG file, None without one."""
    if figure is None:
        return None
    out = io.BytesIO()
    figure.savefig(out, format="png")
    plt.close(figure)
    return out.getvalue()


if __name__ == "__main__":
    parser = runs.Parser(__doc__)
    parser.add_argument("json", type=Path, help="what evaluate.py --json wrote")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: assets)")
    args = parser.parse_args()
    with runs.one_line_errors():
        plt = pyplot()
        if not args.json.is_file():
            raise InputError(f"{args.json} is missing: evaluate.py RUN... --json {args.json} writes it")
        fix = "evaluate.py RUN... --json writes it"
        table = formats.read_json(args.json, fix, methods=dict)
        methods = table["methods"]
        if not methods:
            raise InputError(f"{args.json}:1: no methods in it: {fix}")
        pictures = {}                            # all of them, before any is written
        try:
            for draw in (ue_bars, relearn_curves, landscape, ue_ut):
                pictures[args.out / f"{draw.__name__}.png"] = in_bytes(plt, draw(plt, methods))
            for draw in (attacks, cost):
                figure = draw(plt, methods, table.get("columns", []))
                pictures[args.out / f"{draw.__name__}.png"] = in_bytes(plt, figure)
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            raise InputError(f"{args.json}: not as evaluate.py writes it ({draw.__name__}: {e}): {fix}")
        args.out.mkdir(parents=True, exist_ok=True)
        for path in pictures:
            if path.is_dir():
                raise InputError(f"{path} is a folder: move it, or choose another --out")
        for path, picture in pictures.items():
            if picture is None:
                print(f"{path} left out: see --help for what it takes", file=sys.stderr)
                continue
            path.write_bytes(picture)
            print(f"wrote {path}")
