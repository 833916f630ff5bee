"""Write TOFU (arXiv 2401.06121), invented authors to forget, in the formats of data/README.md.

    python data/tofu/prepare.py                              # data/tofu/forget10, "Question: ... Answer: ..."
    python data/tofu/prepare.py --template "[INST] {question} [/INST]{answer}"     # for Llama-2-chat

Downloads locuslab/TOFU, or reads its files from --from FOLDER. The template must be the one that the model
was fine-tuned with; spaces before {answer} go with the answer. Next: unlearn.py, as readme.md shows.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))      # evaluate.py, which owns reading and writing, is at the top
from evaluate import (QA, InputError, check_texts, fetch, make_parser, one_line_errors, qa_row, qa_texts,
                      read_published, write_data)

SPLITS = {"forget01": ("retain99", 40), "forget05": ("retain95", 200), "forget10": ("retain90", 400)}
KEYS = ("question", "answer", "paraphrased_answer", "perturbed_answer")


def pair(row):
    """Check a row of a training split: {"question", "answer"}."""
    check_texts(row, "question", "answer")
    return row


if __name__ == "__main__":
    parser = make_parser(__doc__, device=False)
    parser.add_argument("--split", choices=list(SPLITS), default="forget10",
                        help="1, 5 or 10%% of the authors")
    parser.add_argument("--template", default=QA, help="of a question and its answer; default: %(default)r")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are there already")
    parser.add_argument("--any_count", action="store_true", help="accept other numbers of rows")
    parser.add_argument("--out", type=Path, default=None, help="folder to write (default: data/tofu/SPLIT)")
    args = parser.parse_args()

    with one_line_errors():
        template, (retain, size) = args.template.replace("\\n", "\n"), SPLITS[args.split]
        if "{question}" not in template or "{answer}" not in template:
            raise InputError(f"--template {args.template!r}: put {{question}} and {{answer}} in it")
        asked = {"qa_forget": f"{args.split}_perturbed", "qa_retain": "retain_perturbed",
                 "qa_real_authors": "real_authors_perturbed", "qa_world_facts": "world_facts_perturbed"}
        holdout = args.split.replace("forget", "holdout")
        folder = fetch("locuslab/TOFU", [f"{name}.json" for name in (args.split, retain, holdout,
                                                                     *asked.values())], args.source)
        count = lambda published: None if args.any_count else published
        files, splits = {}, [("forget", args.split, size), ("retain", retain, 4000 - size)]
        if list(folder.glob(f"{holdout}.*")):                # newer than the rest; only PrivLeak needs it
            splits.append(("privleak_holdout", holdout, size))
        for part, name, published in splits:
            rows = read_published(folder, [name], pair, count(published))
            files[part] = [dict(zip(("prompt", "completion"), qa_texts(template, r["question"], r["answer"])))
                           for r in rows]
        if "privleak_holdout" in files:
            files["privleak_forget"] = files["forget"]
        published = {"qa_forget": size, "qa_retain": 400, "qa_real_authors": 100, "qa_world_facts": 117}
        for part, name in asked.items():
            rows = read_published(folder, [name], qa_row, count(published[part]))
            files[part] = [{k: row[k] for k in KEYS if k in row} for row in rows]
        write_data(args.out or HERE / args.split, files, {"qa_prompt": template})
