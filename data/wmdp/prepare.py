"""Write WMDP (arXiv 2403.03218), hazardous knowledge to forget, in the formats of data/README.md.

    python data/mmlu/prepare.py                      # the questions about everything else, for UT
    python data/wmdp/prepare.py                      # data/wmdp/bio; see below for its gated forget corpus
    python data/wmdp/prepare.py --topic cyber        # data/wmdp/cyber; needs no gate
    python data/wmdp/prepare.py --retain wikitext    # the retain set of the paper's own code

Downloads cais/wmdp and cais/wmdp-corpora, or reads them from --from FOLDER. The bio forget corpus is gated:
ask for it (readme.md says where) and put bio_remove_dataset.jsonl, or bio-forget-corpus.jsonl, into data/wmdp
or FOLDER. No message shows any of a document. Next: unlearn.py, with the commands of readme.md.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))         # the scripts' own package `data` is there
from data import formats, runs
from data.formats import InputError

QUESTIONS = {"bio": ("biology", 1273), "cyber": ("cybersecurity", 1987), "chem": ("chemistry", 408)}
DOCUMENTS = {"bio-retain": 60887, "cyber-forget": 1000, "cyber-retain": 4473}   # bio-forget: not published


def document(row):
    """{"text"} of a corpus line, {"text", ...} or a bare string. An error never shows any of its content."""
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise InputError('needs an object with a "text", or a bare string (not shown here)')
    return {"text": text}


if __name__ == "__main__":
    parser = runs.Parser(__doc__)
    parser.add_argument("--topic", choices=["bio", "cyber"], default="bio", help="what to forget")
    parser.add_argument("--retain", choices=["corpus", "wikitext"], default="corpus",
                        help="WMDP's own retain corpus, or wikitext-2 (test), lines of more than 50 characters")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are there already")
    parser.add_argument("--mmlu", type=Path, default=HERE.parent / "mmlu" / "mcq_retain.jsonl",
                        help="questions for UT (default: what data/mmlu/prepare.py wrote)")
    parser.add_argument("--min_chars", type=runs.number(int, 1), default=50, help="drop shorter documents")
    parser.add_argument("--max_chars", type=runs.number(int, 0), default=8000,
                        help="cut longer documents: several times what 512 tokens need (0 = keep all)")
    parser.add_argument("--any_count", action="store_true", help="accept other numbers of rows")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/wmdp/TOPIC)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    args = parser.parse_args()

    with runs.one_line_errors():
        def published(folder, names, check, count):
            return formats.read_published(folder, names, check, None if args.any_count else count)
        if not args.mmlu.is_file():
            raise InputError(f"{args.mmlu} is missing: run data/mmlu/prepare.py, or name it with --mmlu")
        files = {"mcq_retain": formats.read_jsonl(args.mmlu, formats.mcq_row)}

        folder = formats.fetch("cais/wmdp", [f"wmdp-{topic}/test" for topic in QUESTIONS], args.source)
        for topic, (subject, count) in QUESTIONS.items():
            names = [f"wmdp-{topic}/test", f"{topic}_questions", f"wmdp-mcqs/{topic}_questions"]
            asked = []
            for row in published(folder, names, formats.mcq_row, count):
                asked.append({"question": row["question"], "choices": row["choices"],
                              "answer": row["answer"], "subject": subject})
            files["mcq_forget" if topic == args.topic else f"mcq_{topic}"] = asked

        parts = ["forget"] if args.retain == "wikitext" else ["forget", "retain"]
        corpora = formats.fetch("cais/wmdp-corpora", [f"{args.topic}-{part}" for part in parts], args.source)
        for part in parts:
            name = f"{args.topic}-{part}"
            names = [f"{name}-corpus", f"{name}-corpus/train", f"wmdp-corpora/{name}-corpus"]
            folder = corpora
            if name == "bio-forget":             # gated: the user puts it there
                names.append("bio_remove_dataset")
                folder = corpora if args.source else HERE
            rows = published(folder, names, document, DOCUMENTS.get(name))
            kept = [row["text"] for row in rows if len(row["text"].strip()) >= args.min_chars]
            files[part] = [{"text": text[:args.max_chars or None]} for text in kept]
            if len(kept) < len(rows):
                print(f"{part}: dropped {len(rows) - len(kept):,} documents of fewer than "
                      f"{args.min_chars} characters")
        if args.retain == "wikitext":
            folder = formats.fetch("Salesforce/wikitext", ["wikitext-2-raw-v1/test"], args.source)
            rows = formats.read_published(folder, ["wikitext-2-raw-v1/test", "wikitext"], document)
            files["retain"] = [{"text": row["text"]} for row in rows if len(row["text"]) > 50]
        formats.write_data(args.out or HERE / args.topic, files, overwrite=args.overwrite)
