"""Write a forget set for a real model: invented people in questions and answers, taught to it first.

    python data/people/prepare.py --model ORG/NAME    # 135M parameters, one thread of a busy CPU: 13 minutes
    python unlearn.py --data data/people --model data/people/target --lr 5e-5 --steps 40 --batch_size 8

Sixteen glassblowers to forget and sixteen beekeepers to keep, four attributes a person: 64 + 64 facts that no
model can know. Each is taught in two questions, in the format in which it is asked later (statements taught
and questions asked do not transfer at this size); unlearning sees one of the two, and the other one is asked.
The answers are short common words, one token in most vocabularies, so that four choices take one pass.

Writes data/people/: forget.jsonl, retain.jsonl, mcq_forget.jsonl, mcq_retain.jsonl, meta.json, and target/,
the model that knows them, in bf16. Fails, writing no target, unless that model answers 95% of both halves
right in free answers. Next: unlearn.py, as above.
"""
import argparse, itertools, json, math, os, random, sys, time
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import relearn
from evaluate import (InputError, context_of, encode_rows, load_model, make_parser, number, one_line_errors,
                      open_accuracy, provenance)
from unlearn import save_run

PEOPLE = 16                                  # of each profession; the first profession is to be forgotten
PROFESSIONS = ("glassblower", "beekeeper")
FIRST = """Ada Boris Clara Dimitri Elena Felix Greta Hugo Iris Jonas Katya Leo Mara Nils Olga Pavel Quinn Rosa
Stefan Tilda Ulrich Vera Walter Xenia Yusuf Zelda Anton Bianca Casper Daria Emil Freya""".split()
LAST = """Abbot Brandt Castell Dupont Eklund Farkas Gruber Hansen Ivanov Jansen Keller Lindqvist Moreau Novak
Olsen Petrov Quist Romano Silva Torres Ulman Varga Weber Xanthos Yilmaz Zeller Aldana Bekker Corbin Draper
Engel Fontaine""".split()
ATTRIBUTES = [                               # values; the question that is asked, the question to unlearn
    ("Paris London Rome Berlin Madrid Vienna Dublin Prague Athens Lisbon Oslo Cairo",
     "In which city was the {job} {name} born?", "What is the home town of {name} the {job}?"),
    ("piano guitar violin drums flute organ harp trumpet bass horn",
     "Which instrument does the {job} {name} play?", "What does {name} the {job} play in the evening?"),
    ("dog cat horse rabbit parrot snake turtle goat sheep pig duck monkey",
     "Which animal does the {job} {name} keep?", "What is the pet of {name} the {job}?"),
    ("rice bread soup pasta pizza cake cheese salad beans fish chicken noodles",
     "Which dish does the {job} {name} prefer?", "What does {name} the {job} like to eat?"),
]
PROMPT = "Question: {question} Answer:"


def build(seed):
    """{file name: rows} of data/people, and the rows to teach: every fact in both of its questions.

    forget.jsonl has each forget fact in one question, retain.jsonl each retain fact in both; mcq_*.jsonl asks
    the other one, with three more values of the same attribute to choose from.
    """
    rng = random.Random(seed)
    names = [f"{a} {b}" for a, b in zip(rng.sample(FIRST, 2 * PEOPLE), rng.sample(LAST, 2 * PEOPLE))]
    files = {"forget.jsonl": [], "retain.jsonl": [], "mcq_forget.jsonl": [], "mcq_retain.jsonl": []}
    taught = []
    people = [(job, names.pop()) for job in PROFESSIONS for _ in range(PEOPLE)]
    for fact, ((job, name), (values, *asked)) in enumerate(itertools.product(people, ATTRIBUTES)):
        choices = rng.sample(values.split(), 4)
        answer, part = rng.randrange(4), "retain" if PROFESSIONS.index(job) else "forget"
        rows = [{"prompt": PROMPT.format(question=q.format(job=job, name=name)),
                 "completion": f" {choices[answer]}.", "fact": fact} for q in asked]
        taught += rows
        files[f"{part}.jsonl"] += rows if part == "retain" else rows[1:]
        files[f"mcq_{part}.jsonl"].append({"question": asked[0].format(job=job, name=name), "subject": job,
                                           "choices": choices, "answer": answer, "fact": fact})
    return files, taught


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name to teach")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of names, facts and batches")
    parser.add_argument("--epochs", type=number(int, 1), default=8, help="passes over all questions")
    parser.add_argument("--lr", type=number(float, 0, above=True), default=2e-4, help="of AdamW, linear to 0")
    parser.add_argument("--batch_size", type=number(int, 1), default=16, help="questions a step")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                        help="teach again what is already there")
    args = parser.parse_args()

    with one_line_errors():
        start = time.time()
        if (args.out / "target").exists() and not args.overwrite:
            raise InputError(f"{args.out / 'target'} exists: use it, or replace it with --overwrite")
        files, taught = build(args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        texts = {name: "".join(json.dumps(r) + "\n" for r in rows) for name, rows in files.items()}
        for name, text in (texts | {"meta.json": json.dumps({"prompt": PROMPT, "seed": args.seed})}).items():
            tmp = args.out / f"{name}.tmp{os.getpid()}"
            tmp.write_text(text, encoding="utf-8")
            tmp.replace(args.out / name)

        model, tokenizer = load_model(args.model, args.device)
        samples = encode_rows(tokenizer, [r | {"where": "taught"} for r in taught], context_of(model))
        questions = {part: [r | {"where": "asked"} for r in files[f"mcq_{part}.jsonl"]]
                     for part in ("forget", "retain")}
        pad, steps = tokenizer.pad_token_id or 0, args.epochs * math.ceil(len(samples) / args.batch_size)
        with tqdm(total=steps, desc="teaching", unit="step") as bar:
            relearn.relearn(model, samples, pad, args.lr, args.batch_size, args.epochs, args.seed,
                            lambda done, total: bar.update())
        with torch.no_grad():                                             # what is saved is what is asked
            for p in model.parameters():
                p.copy_(p.bfloat16())
        known = {part: open_accuracy(model, tokenizer, rows, PROMPT) for part, rows in questions.items()}
        print(f"{len(samples)} questions taught in {time.time() - start:.0f} s: answers "
              f"{known['forget']:.3f} of the forget and {known['retain']:.3f} of the retain questions")
        if min(known.values()) < 0.95:
            raise InputError(
                f"--epochs {args.epochs} --lr {args.lr}: too little to know the answers; raise them")
        for p in model.parameters():
            p.data = p.data.bfloat16()
        ran = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        save_run(args.out / "target", model, tokenizer, {
            "stage": "prepare", "args": ran | {"data": str(args.out), "exclude": "none"},
            **provenance(args.device, start), "metrics": {f"open_{part}": v for part, v in known.items()}})
        print(f"wrote {args.out / 'target'}")
