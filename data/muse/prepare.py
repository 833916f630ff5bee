"""Write MUSE (arXiv 2407.06460), news or books to forget, in the formats of data/README.md.

    python data/muse/prepare.py --corpus news --tokenizer muse-bench/MUSE-News_target
    python data/muse/prepare.py --corpus books --tokenizer muse-bench/MUSE-Books_target

Downloads muse-bench/MUSE-News or MUSE-Books, or reads --from FOLDER with its folders knowmem, verbmem,
privleak and raw. Training text is as in MUSE: the documents joined by blank lines, tokenised, and cut into
blocks of --max_len tokens. Next: unlearn.py, with the commands of readme.md.
"""
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))         # the scripts' own package `data` is there
from data import formats, runs
from data.formats import InputError, rows_with, text_row

REPO = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
AUC_RETRAIN = {"news": 0.4772, "books": 0.5393}     # Min-40% AUC of the retrained models, for PrivLeak


def blocks(text, tokenizer, max_len):
    """text in pieces of max_len tokens, the tokenizer's own first ones included; joined they are text again.

    Cut where tokens begin in the text, since decoding tokens need not give the text back.
    """
    room = max_len - len(tokenizer("").input_ids)
    starts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True,
                       verbose=False).offset_mapping[::room]
    cuts = [0] + [start for start, _ in starts[1:]] + [len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:]) if text[a:b].strip()]


if __name__ == "__main__":
    parser = runs.Parser(__doc__)
    parser.add_argument("--corpus", choices=list(REPO), required=True, help="what to forget")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL",
                        help="folder or hub name of the model to unlearn")
    parser.add_argument("--max_len", type=runs.number(int, 8), default=2048, help="tokens of a block")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are there already")
    parser.add_argument("--any_count", action="store_true", help="accept other numbers of rows")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/muse/CORPUS)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    args = parser.parse_args()

    with runs.one_line_errors():
        from transformers import AutoTokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
        except Exception as e:                   # a foreign file can break a library anywhere
            raise InputError(f"--tokenizer {args.tokenizer} does not load ({type(e).__name__}: {e}): "
                             "name the folder or hub name of the model to unlearn")
        names = ["raw/forget", "raw/retain1", "verbmem/", "knowmem/", "privleak/"]
        folder = formats.fetch(REPO[args.corpus], names, args.source)

        def published(name, check, count=None):
            return formats.read_published(folder, [name], check, None if args.any_count else count)
        files = {}
        for part, name in (("forget", "raw/forget"), ("retain", "raw/retain1")):
            text = "\n\n".join(row["text"] for row in published(name, text_row))
            files[part] = [{"text": piece} for piece in blocks(text, tokenizer, args.max_len)]
        files["verbmem_forget"] = published("verbmem/forget", rows_with("prompt", "gt"), 100)
        for part in ("forget", "retain"):
            for ending, count in (("", 100), ("_icl", 10)):
                files[f"knowmem_{part}{ending}"] = published(
                    f"knowmem/{part}_qa{ending}", rows_with("question", "answer"), count)
        for part in ("forget", "retain", "holdout"):
            files[f"privleak_{part}"] = published(f"privleak/{part}", text_row, 100)
        meta = {"auc_retrain": AUC_RETRAIN[args.corpus], "tokenizer": args.tokenizer, "max_len": args.max_len}
        formats.write_data(args.out or HERE / args.corpus, files, meta, overwrite=args.overwrite)
        print(f"one epoch of the forget blocks is {math.ceil(len(files['forget']) / 4)} steps of 4")
