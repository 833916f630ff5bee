"""Write MMLU's 14,042 test questions on 57 subjects (arXiv 2009.03300) as mcq_retain.jsonl.

    python data/mmlu/prepare.py                     # downloads cais/mmlu
    python data/mmlu/prepare.py --from FOLDER       # all/test-*.parquet, or the original test/*_test.csv

Next: data/wmdp/prepare.py takes them for UT, or `evaluate.py RUN --data data/mmlu`. readme.md has the rest.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))         # the scripts' own package `data` is there
from data import formats, runs
from data.formats import InputError


def hub_row(row):
    """Check a row of cais/mmlu: {"question", "choices", "answer": 0-3, "subject"}."""
    formats.check_texts(formats.mcq_row(row), "subject")
    return {k: row[k] for k in ("question", "choices", "answer", "subject")}


def csv_row(cells):
    """A question from the cells of an original line: the question, four choices, the letter of the answer."""
    if len(cells) != 6 or cells[5] not in list("ABCD"):
        raise InputError("needs a question, 4 choices and a letter A to D, found "
                         f"{len(cells)} cells that end in {cells[-1:]}")
    return formats.mcq_row({"question": cells[0], "choices": cells[1:5], "answer": "ABCD".index(cells[5])})


if __name__ == "__main__":
    parser = runs.Parser(__doc__)
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are there already")
    parser.add_argument("--any_count", action="store_true", help="accept another number of questions")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write (default: data/mmlu)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    args = parser.parse_args()

    with runs.one_line_errors():
        folder = formats.fetch("cais/mmlu", ["all/test"], args.source)
        tables = sorted(folder.rglob("*_test.csv"))      # one a subject, named after it
        rows = []
        for table in tables:
            subject = table.name.removesuffix("_test.csv")
            for row in formats.read_jsonl(table, csv_row, formats.csv_rows):
                rows.append(row | {"subject": subject})
        if not tables:
            rows = formats.read_published(folder, ["all/test", "test"], hub_row)
        subjects = len({row["subject"] for row in rows})
        if (len(rows), subjects) != (14042, 57) and not args.any_count:
            raise InputError(f"{folder}: {len(rows):,} questions on {subjects} subjects, but 14,042 on 57 "
                             "are published: download it again, or take it with --any_count")
        formats.write_data(args.out, {"mcq_retain": rows}, overwrite=args.overwrite)
