"""Write a forget set for a real model: invented people in questions and answers, taught to it first.

    python data/people/prepare.py --model ORG/NAME    # 135M parameters, one thread of a busy CPU: 13 minutes
    python unlearn.py --data data/people --model data/people/target --lr 5e-5 --steps 40 --batch_size 8 \
        --no-relearn --out out/people && python relearn.py out/people --lr 5e-5

Sixteen glassblowers to forget and sixteen beekeepers to keep, four attributes a person: 64 + 64 facts that no
model can know. Each is taught in two questions, in the format in which it is asked later (statements taught
and questions asked do not transfer at this size); unlearning sees one of the two, and the other one is asked.
The answers are short common words, one token in most vocabularies, so that four choices take one pass.

Writes data/people/: forget.jsonl, retain.jsonl, mcq_forget.jsonl, mcq_retain.jsonl, meta.json, and target/,
the model that knows them, in bf16; after it, with --exclude forget, retrained/, the yardstick, which was
told the second half alone. Fails, writing no model, unless it answers 95% of what it was told right in free
answers. Next: unlearn.py, as above.
"""
import argparse
import itertools
import math
import random
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))         # the scripts and their package `data` are there
import evaluate
from data import formats, frozen, models, runs
from data.finetune import finetune
from data.formats import InputError

PROFESSIONS = ("glassblower", "beekeeper")   # the first one is to be forgotten
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


def names_of(count, rng):
    """So many names; a first name and a last name come again once all were used, in another pair."""
    firsts = rng.sample(FIRST, min(count, len(FIRST)))
    lasts = rng.sample(LAST, len(firsts))
    names = []
    for i in range(count):
        turn, place = divmod(i, len(firsts))
        names.append(f"{firsts[place]} {lasts[(place + turn) % len(lasts)]}")
    return names


def build(seed, count=16):
    """{file: rows} of data/people with `count` people of each profession, and the rows to teach: every fact
    in both of its questions.

    forget.jsonl has each forget fact in one question, retain.jsonl each retain fact in both; mcq_*.jsonl asks
    the other one, with three more values of the same attribute to choose from.
    """
    rng = random.Random(seed)
    names = names_of(2 * count, rng)
    people = [(job, names.pop()) for job in PROFESSIONS for _ in range(count)]
    files = {"forget": [], "retain": [], "mcq_forget": [], "mcq_retain": []}
    taught = []
    for fact, ((job, name), (values, *questions)) in enumerate(itertools.product(people, ATTRIBUTES)):
        choices = rng.sample(values.split(), 4)
        answer = rng.randrange(4)
        part = "forget" if job == PROFESSIONS[0] else "retain"
        asked = [question.format(job=job, name=name) for question in questions]
        rows = [{"prompt": PROMPT.format(question=question), "completion": f" {choices[answer]}.",
                 "fact": fact} for question in asked]
        taught += rows
        files[part] += rows[1:] if part == "forget" else rows
        files[f"mcq_{part}"].append({"question": asked[0], "subject": job, "choices": choices,
                                     "answer": answer, "fact": fact})
    return files, taught


def teach(model, tokenizer, rows, args):
    """Fine-tune the model on rows until it knows them, and round it to bf16, in which it is saved."""
    samples = models.encode_rows(tokenizer, [row | {"where": "taught"} for row in rows],
                                 models.context_of(model))
    steps = args.epochs * math.ceil(len(samples) / args.batch_size)
    with tqdm(total=steps, desc="teaching", unit="step") as bar:
        finetune(model, samples, tokenizer.pad_token_id or 0, args.lr, args.batch_size, args.epochs, args.seed,
                 lambda done, total: bar.update())
    with torch.no_grad():                        # what is saved is what is asked
        for p in model.parameters():
            p.copy_(p.bfloat16())


if __name__ == "__main__":
    parser = runs.Parser(__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub name to teach")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write")
    parser.add_argument("--seed", type=runs.SEED, default=0, help="of names, facts and batches")
    parser.add_argument("--people", type=runs.number(int, 1, 256), default=16, help="of each profession")
    parser.add_argument("--exclude", choices=["none", "forget"], default="none",
                        help="forget: teach OUT/retrained, the yardstick, only what is to be retained")
    parser.add_argument("--train_modules", default="", metavar="REGEX", help="teach only matching parameters")
    frozen.flags(parser)
    parser.add_argument("--epochs", type=runs.number(int, 1), default=8, help="passes over all questions")
    parser.add_argument("--lr", type=runs.RATE, default=2e-4,
                        help="of AdamW, linear to 0")
    parser.add_argument("--batch_size", type=runs.BATCH, default=16, help="questions a step")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                        help="teach again what is already there")
    runs.add_device(parser)
    args = parser.parse_args()

    with runs.one_line_errors():
        start = time.time()
        target = args.out / ("target" if args.exclude == "none" else "retrained")
        if target.exists() and not args.overwrite:
            raise InputError(f"{target} exists: use it, or replace it with --overwrite")
        if target.exists():
            runs.refuse_foreign(target, "prepare")
        files, taught = build(args.seed, args.people)
        meta = {"prompt": PROMPT, "seed": args.seed}
        if args.exclude == "forget":             # the yardstick is asked what is there, if that is of these
            taught = files["retain"]
            formats.write_data(args.out, files, meta)
        model, tokenizer = models.load_model(args.model, args.device)
        if args.train_modules:
            frozen.train_only(model, args.train_modules)
        if args.cache_frozen:
            frozen.cache(model)
        if args.exclude == "none":
            if args.overwrite:
                runs.remove_stale(args.out, seed=args.seed, people=args.people)
            formats.write_data(args.out, files, meta, args.overwrite)
        teach(model, tokenizer, taught, args)
        known = {}
        for part, rows in evaluate.load_questions(args.out).items():
            known[part.replace("mcq", "open")] = evaluate.open_accuracy(model, tokenizer, rows)
        print(f"{len(taught)} questions taught in {time.time() - start:.0f} s: answers "
              f"{known['open_forget']:.3f} of the forget and {known['open_retain']:.3f} of the retain questions")
        if args.exclude == "forget":
            known.pop("open_forget")             # nobody told it
        if min(known.values()) < 0.95:
            raise InputError(
                f"--epochs {args.epochs} --lr {args.lr}: too little to know the answers; raise them")
        ran = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        runs.save_run(target, model.to(torch.bfloat16), tokenizer, {
            "stage": "prepare", "args": ran | {"data": str(args.out)},
            **runs.provenance(args.device, start), "metrics": known})
        print(f"wrote {target}")
