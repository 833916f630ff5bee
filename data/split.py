"""Cut the forget set of a data folder into folds, each a data folder, to unlearn one by one.

    world=data/tiny/seed0
    python data/split.py $world --folds 3                   # SPUNGE (arXiv 2406.11780): each fold alone,
    for i in 1 2 3; do                                      # then the mean of the task vectors
        python unlearn.py --sam_rho 0 --model $world/target --data $world/folds3/$i --out out/fold$i
    done
    python unlearn.py --merge out/fold1 out/fold2 out/fold3

    python data/split.py $world --folds 3 --layered         # layered: each run goes on from the last
    last=$world/target
    for i in 1 2 3; do
        python unlearn.py --sam_rho 0 --model $last --data $world/layers3/$i --no-relearn --out out/layer$i
        last=out/layer$i
    done
    python relearn.py out/layer3

Layer i forgets folds 1 to i and keeps the rest, which its retain.jsonl repeats until they are --share of
its rows: at their own share, a few in a hundred, they are forgotten along. Everything but the forget and
retain set is copied.
"""
import argparse
import itertools
import json
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))         # the package `data` is there
from data import formats, runs
from data.formats import InputError


def folds_of(rows, count, by=None, seed=0):
    """`count` lists that partition rows, each in the order of rows. Rows with the same value of the key
    `by` stay together; without one those of the same fact do, where all rows have facts. The values are
    dealt at random."""
    if by is None and all("fact" in row for row in rows):
        by = "fact"
    values = []
    for number, row in enumerate(rows):
        if by and by not in row:
            raise InputError(f"{row['where']}: no \"{by}\" in this row: add it, or choose another --by")
        values.append(json.dumps(row[by] if by else number))
    order = sorted(set(values))
    if count > len(order):
        raise InputError(f"--folds {count}: there are {len(order)} of {by or 'rows'}; ask for fewer")
    random.Random(seed).shuffle(order)
    fold = {value: place % count for place, value in enumerate(order)}
    out = [[] for _ in range(count)]
    for row, value in zip(rows, values):
        out[fold[value]].append(row)
    return out


def alone(folds, retain):
    """[(forget, retain)] of SPUNGE: each fold by itself."""
    return [(fold, retain) for fold in folds]


def layers(folds, retain, share):
    """[(forget, retain)] of layered unlearning: folds 1 to i go; the later ones join the retain set, one
    row after the other and again, until they are `share` of it."""
    out = []
    for i in range(1, len(folds) + 1):
        gone = list(itertools.chain(*folds[:i]))
        rest = list(itertools.chain(*folds[i:]))
        count = round(share / (1 - share) * len(retain)) if rest else 0
        out.append((gone, retain + list(itertools.islice(itertools.cycle(rest), count))))
    return out


def write(source, folder, forget, retain, overwrite):
    """A data folder with these rows and everything else that `source` has."""
    files = {"forget": forget, "retain": retain}
    others = [path for path in source.glob("*.json*") if path.stem not in files]
    for path in others:
        there = folder / path.name
        if there.exists() and there.read_bytes() != path.read_bytes() and not overwrite:
            raise InputError(f"{there} is there and differs: choose another --out, or replace it with "
                             "--overwrite")
    formats.write_data(folder, files, overwrite=overwrite, beside=[path.stem for path in others])
    for path in others:
        shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    p = runs.Parser(__doc__)
    p.add_argument("data", type=Path, help="data folder")
    p.add_argument("--folds", type=runs.number(int, 1), required=True)
    p.add_argument("--by", metavar="KEY",
                   help="rows with the same value of it stay together (default: fact)")
    p.add_argument("--layered", action=argparse.BooleanOptionalAction, default=False)
    p.add_argument("--share", type=runs.number(float, 0, 0.99), default=0.5,
                   help="of a layer's retain rows that are of folds not yet forgotten")
    p.add_argument("--seed", type=runs.SEED, default=0, help="of which value goes where")
    p.add_argument("--out", type=Path, help="folder to write (default: DATA/foldsN or DATA/layersN)")
    p.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False)
    args = p.parse_args()

    with runs.one_line_errors():
        if args.share != p.get_default("share") and not args.layered:
            p.error(f"--share {args.share}: each fold alone has all of retain; add --layered, or drop it")
        retain = formats.read_jsonl(args.data / "retain.jsonl", formats.text_row)
        forget = formats.read_jsonl(args.data / "forget.jsonl", formats.text_row)
        folds = folds_of(forget, args.folds, args.by, args.seed)
        parts = layers(folds, retain, args.share) if args.layered else alone(folds, retain)
        out = args.out or args.data / f"{'layers' if args.layered else 'folds'}{args.folds}"
        for number, (gone, kept) in enumerate(parts, 1):
            write(args.data, out / str(number), gone, kept, args.overwrite)
