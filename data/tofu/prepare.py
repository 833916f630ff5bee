"""Write TOFU (arXiv 2401.06121), invented authors to forget, in the formats of data/README.md.

    python data/tofu/prepare.py                              # data/tofu/forget10, "Question: ... Answer: ..."
    python data/tofu/prepare.py --template "[INST] {question} [/INST]{answer}"     # for Llama-2-chat

Downloads locuslab/TOFU, or reads its files from --from FOLDER. The template must be the one that the model
was fine-tuned with; spaces before {answer} go with the answer. Next: unlearn.py, as readme.md shows.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))         # the scripts' own package `data` is there
from data import formats, runs
from data.formats import InputError, rows_with
from data.tofu.metrics import QA, qa_row, qa_texts

SPLITS = {"forget01": ("retain99", 40), "forget05": ("retain95", 200), "forget10": ("retain90", 400)}
KEYS = ("question", "answer", "paraphrased_answer", "perturbed_answer")


if __name__ == "__main__":
    parser = runs.Parser(__doc__)
    parser.add_argument("--split", choices=list(SPLITS), default="forget10",
                        help="1, 5 or 10%% of the authors")
    parser.add_argument("--template", default=QA, help="of a question and its answer; default: %(default)r")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are there already")
    parser.add_argument("--any_count", action="store_true", help="accept other numbers of rows")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/tofu/SPLIT)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    args = parser.parse_args()

    with runs.one_line_errors():
        template = args.template.replace("\\n", "\n")
        if "{question}" not in template or "{answer}" not in template:
            raise InputError(f"--template {args.template!r}: put {{question}} and {{answer}} in it")
        retain, size = SPLITS[args.split]
        holdout = args.split.replace("forget", "holdout")
        asked = {"qa_forget": (f"{args.split}_perturbed", size),
                 "qa_retain": ("retain_perturbed", 400),
                 "qa_real_authors": ("real_authors_perturbed", 100),
                 "qa_world_facts": ("world_facts_perturbed", 117)}
        names = [args.split, retain, holdout, *(name for name, _ in asked.values())]
        folder = formats.fetch("locuslab/TOFU", [f"{name}.json" for name in names], args.source)

        def published(name, check, count):
            return formats.read_published(folder, [name], check, None if args.any_count else count)
        splits = [("forget", args.split, size), ("retain", retain, 4000 - size)]
        if list(folder.glob(f"{holdout}.*")):    # newer than the rest; only PrivLeak needs it
            splits.append(("privleak_holdout", holdout, size))
        files = {}
        for part, name, count in splits:
            files[part] = []
            for row in published(name, rows_with("question", "answer"), count):
                prompt, completion = qa_texts(template, row["question"], row["answer"])
                files[part].append({"prompt": prompt, "completion": completion})
        if "privleak_holdout" in files:
            files["privleak_forget"] = files["forget"]
        for part, (name, count) in asked.items():
            files[part] = []
            for row in published(name, qa_row, count):
                files[part].append({key: row[key] for key in KEYS if key in row})
        formats.write_data(args.out or HERE / args.split, files, {"qa_prompt": template}, overwrite=args.overwrite)
