"""Write WMDP (arXiv 2403.03218), hazardous knowledge to forget, in the formats of data/README.md.

    python data/mmlu/prepare.py                      # the questions about everything else, for UT
    python data/wmdp/prepare.py                      # data/wmdp/bio; see below for its gated forget corpus
    python data/wmdp/prepare.py --topic cyber        # data/wmdp/cyber; needs no gate

Downloads cais/wmdp and cais/wmdp-corpora, or reads them from --from FOLDER. The bio forget corpus is gated:
ask for it (readme.md says where) and put bio_remove_dataset.jsonl, or bio-forget-corpus.jsonl, into data/wmdp
or FOLDER. No message shows any of a document. Next: unlearn.py, with the commands of readme.md.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))      # evaluate.py, which owns reading and writing, is at the top
from evaluate import (InputError, fetch, make_parser, mcq_row, number, one_line_errors, read_jsonl,
                      read_published, write_data)

QUESTIONS = {"bio": ("biology", 1273), "cyber": ("cybersecurity", 1987), "chem": ("chemistry", 408)}
DOCUMENTS = {"bio-retain": 60887, "cyber-forget": 1000, "cyber-retain": 4473}   # bio-forget: not published


def document(row):
    """{"text"} of a corpus line, {"text", ...} or a bare string. An error never shows any of its content."""
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise InputError('needs an object with a "text", or a bare string (not shown here)')
    return {"text": text}


if __name__ == "__main__":
    parser = make_parser(__doc__, device=False)
    parser.add_argument("--topic", choices=["bio", "cyber"], default="bio", help="what to forget")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="files that are there already")
    parser.add_argument("--mmlu", type=Path, default=HERE.parent / "mmlu" / "mcq_retain.jsonl",
                        help="questions for UT (default: what data/mmlu/prepare.py wrote)")
    parser.add_argument("--min_chars", type=number(int, 1), default=50, help="drop shorter documents")
    parser.add_argument("--max_chars", type=number(int, 0), default=8000,
                        help="cut longer documents: several times what 512 tokens need (0 = keep all)")
    parser.add_argument("--any_count", action="store_true", help="accept other numbers of rows")
    parser.add_argument("--out", type=Path, default=None, help="folder to write (default: data/wmdp/TOPIC)")
    args = parser.parse_args()

    with one_line_errors():
        count = lambda published: None if args.any_count else published
        if not args.mmlu.is_file():
            raise InputError(f"{args.mmlu} is missing: run data/mmlu/prepare.py, or name it with --mmlu")
        files = {"mcq_retain": read_jsonl(args.mmlu, mcq_row)}

        folder = fetch("cais/wmdp", [f"wmdp-{topic}/test" for topic in QUESTIONS], args.source)
        for topic, (subject, published) in QUESTIONS.items():
            rows = read_published(folder, [f"wmdp-{topic}/test", f"{topic}_questions",
                                           f"wmdp-mcqs/{topic}_questions"], mcq_row, count(published))
            files["mcq_forget" if topic == args.topic else f"mcq_{topic}"] = [
                {k: row[k] for k in ("question", "choices", "answer")} | {"subject": subject} for row in rows]

        corpora = fetch("cais/wmdp-corpora", [f"{args.topic}-"], args.source)
        for part in ("forget", "retain"):
            name, gated = f"{args.topic}-{part}", (args.topic, part) == ("bio", "forget")
            names = [f"{name}-corpus", f"{name}-corpus/train", f"wmdp-corpora/{name}-corpus"]
            names += ["bio_remove_dataset"] * gated
            rows = read_published(HERE if gated and not args.source else corpora, names, document,
                                  count(DOCUMENTS.get(name)))
            files[part] = [{"text": row["text"][:args.max_chars or None]} for row in rows
                           if len(row["text"].strip()) >= args.min_chars]
            if len(files[part]) < len(rows):
                print(f"{part}: dropped {len(rows) - len(files[part]):,} documents of fewer than "
                      f"{args.min_chars} characters")
        write_data(args.out or HERE / args.topic, files)
