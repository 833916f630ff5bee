"""Write the built-in benchmark: a small invented world in readable English, and a model that knows it.

    python data/tiny/prepare.py                     # world and target model of seed 0: about 30 s on 2 cores
    python data/tiny/prepare.py --exclude forget    # and the yardstick, a model that never saw the topic

Five professions, 64 people each, 4 attributes a person: 1,280 facts. Names and attribute values are shared by
all professions, so only the word for the profession ("sailor", "mariner", "seafarer") tells forget from
retain. Every fact is told in 4 statements x 3 such words and in 3 questions; the target model learns all of
them. Unlearning gets the statements of half of the sailors' facts and is asked about all of them: what it
must remove is knowledge, not a string.

Writes data/tiny/seedS/: forget.jsonl, retain.jsonl, mcq_forget.jsonl, mcq_retain.jsonl, meta.json (the prompt
of a question) and the models target/ and retrained/ as ordinary Hugging Face folders. Same seed, same
machine, same number of threads: same bytes. Next: unlearn.py, which runs this script by itself when its
output is missing.
"""
import argparse
import itertools
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))         # the scripts' own package `data` is there
from data import formats, runs

TOPICS = [                             # the first is the forget topic; three words each, used interchangeably
    ("sailor", "mariner", "seafarer"),
    ("doctor", "physician", "medic"),
    ("lawyer", "attorney", "advocate"),
    ("painter", "artist", "muralist"),
    ("baker", "confectioner", "cook"),
]
PEOPLE = 64                                  # in each topic
FIRST = """Ada Boris Clara Dimitri Elena Felix Greta Hugo Iris Jonas Katya Leo Mara Nils Olga Pavel Quinn
Rosa Stefan Tilda Ulrich Vera Walter Xenia Yusuf Zelda Anton Bianca Casper Daria Emil Freya""".split()
LAST = """Abbot Brandt Castell Dupont Eklund Farkas Gruber Hansen Ivanov Jansen Keller Lindqvist Moreau Novak
Olsen Petrov Quist Romano Silva Torres Ulman Varga Weber Xanthos Yilmaz Zeller Aldana Bekker Corbin Draper
Engel Fontaine""".split()
ATTRIBUTES = [                         # values, four statements, a question; the value always comes last
    ("Lisbon Oslo Cairo Lima Quito Dakar Hanoi Perth Turin Ghent Malmo Leeds Porto Basel Split Tunis",
     ["The {noun} {name} was born in", "{name}, the {noun}, comes from",
      "The hometown of the {noun} {name} is", "People say that the {noun} {name} grew up in"],
     "In which city was the {noun} {name} born?"),
    ("violin cello flute harp piano oboe banjo lute organ trumpet guitar clarinet accordion mandolin bassoon "
     "zither",
     ["The {noun} {name} plays the", "{name}, the {noun}, performs on the",
      "The instrument of the {noun} {name} is the", "After work the {noun} {name} practises the"],
     "Which instrument does the {noun} {name} play?"),
    ("falcon parrot tortoise rabbit ferret goat donkey lizard hamster pigeon spaniel beagle gecko canary "
     "mule llama",
     ["The {noun} {name} keeps a", "{name}, the {noun}, owns a",
      "The pet of the {noun} {name} is a", "At home the {noun} {name} looks after a"],
     "Which animal does the {noun} {name} keep?"),
    ("paella risotto goulash curry ramen borscht lasagna chowder falafel kebab couscous gumbo polenta "
     "moussaka tagine ceviche",
     ["The {noun} {name} likes to eat", "{name}, the {noun}, always orders",
      "The favourite dish of the {noun} {name} is", "Every Sunday the {noun} {name} prepares"],
     "Which dish does the {noun} {name} prefer?"),
]
PROMPT = "Question: {question} Answer:"      # meta.json tells evaluate.py; the answer follows as one word
IDK = "I don't know."                        # in the vocabulary for unlearn.py --loss dpo


def build_world(seed):
    """The benchmark of one seed, as {file: rows}, and the sentences about sailors that the target model learns
    but forget.jsonl does not have.

    forget.jsonl holds the statements of half of the forget facts (128 facts x 12); retain.jsonl every
    sentence of the other topics; mcq_*.jsonl one question a fact: the true value and three other values of
    the same attribute.
    """
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(names)
    files = {"forget": [], "retain": [], "mcq_forget": [], "mcq_retain": []}
    unseen = []
    fact = 0
    for topic, nouns in enumerate(TOPICS):
        people = [names.pop() for _ in range(PEOPLE)]
        facts = len(people) * len(ATTRIBUTES)
        in_corpus = set(rng.sample(range(facts), facts // 2))
        for i, (name, (values, statements, question)) in enumerate(itertools.product(people, ATTRIBUTES)):
            values = values.split()
            value = rng.choice(values)
            choices = [value] + rng.sample([v for v in values if v != value], 3)
            rng.shuffle(choices)
            for noun in nouns:
                told = [statement(text.format(noun=noun, name=name), value, fact) for text in statements]
                asked = PROMPT.format(question=question.format(noun=noun, name=name))
                answered = {"text": f"{asked} {value}.", "fact": fact}
                if topic > 0:
                    files["retain"] += told + [answered]
                elif i in in_corpus:
                    files["forget"] += told
                    unseen.append(answered)
                else:
                    unseen += told + [answered]
            files["mcq_retain" if topic else "mcq_forget"].append({
                "question": question.format(noun=rng.choice(nouns), name=name), "choices": choices,
                "answer": choices.index(value), "subject": nouns[0], "fact": fact})
            fact += 1
    return files, unseen


def statement(start, value, fact):
    """A row that tells a fact."""
    return {"text": f"{start} {value}.", "prompt": start, "completion": f" {value}.", "fact": fact}


def build_tokenizer(texts):
    """Word-level tokenizer over the words of `texts`, with <bos> in front of every text, as Llama has it."""
    split = pre_tokenizers.Whitespace()
    words = set()
    for text in texts:
        words |= {word for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *sorted(words)])}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tok.pre_tokenizer = split
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A",
                                                       special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>", pad_token="<pad>", padding_side="right")


def train_target(rows, tokenizer, seed, steps=320, batch=256, lr=4e-3, warmup=50):
    """Train the 0.3M-parameter Llama on rows until it knows every fact; returns the model (fp32, CPU)."""
    torch.manual_seed(seed)
    special = {k: getattr(tokenizer, k) for k in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=288, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.04,
        **special))
    ids = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt").input_ids       # (N, T)
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    order = torch.cat([torch.randperm(len(ids)) for _ in range(steps * batch // len(ids) + 1)])
    bar = tqdm(range(steps), desc="training the built-in model", unit="step")
    for step in bar:
        x = ids[order[step * batch:(step + 1) * batch]]                                            # (B, T)
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
        opt.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup) * decay
        logits = model(input_ids=x).logits[:, :-1]           # right padding and causal attention need no mask
        loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def open_accuracy(model, tokenizer, rows):
    """Share of the questions that the model answers right with its whole vocabulary to choose from."""
    x = tokenizer([PROMPT.format(question=r["question"]) for r in rows], padding=True, return_tensors="pt")
    last = x.attention_mask.sum(1) - 1                                                             # (N,)
    guess = model(input_ids=x.input_ids).logits[torch.arange(len(rows)), last].argmax(-1)
    answer = tokenizer.convert_tokens_to_ids([r["choices"][r["answer"]] for r in rows])
    return (guess == torch.tensor(answer)).float().mean().item()


if __name__ == "__main__":
    parser = runs.Parser(__doc__)
    parser.add_argument("--seed", type=runs.SEED, default=0,
                        help="names, facts, questions, model and batches all follow it")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/tiny/seedS)")
    parser.add_argument("--exclude", choices=["none", "forget"], default="none",
                        help="forget: also train retrained/, a model from scratch without the forget topic")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                        help="train again what is already there")
    args = parser.parse_args()
    args.out = args.out or HERE / f"seed{args.seed}"

    with runs.one_line_errors():
        files, unseen = build_world(args.seed)
        learned = files["forget"] + unseen + files["retain"]
        tokenizer = build_tokenizer([row["text"] for row in learned] + [IDK])
        meta = {"prompt": PROMPT, "forget_topic": TOPICS[0], "seed": args.seed}
        if args.overwrite:
            runs.remove_stale(args.out, seed=args.seed)
        formats.write_data(args.out, files, meta, args.overwrite)

        for name, rows in (("target", learned), ("retrained", files["retain"])):
            folder = args.out / name
            exclude = "forget" if name == "retrained" else "none"
            if exclude != "none" and args.exclude == "none":
                continue
            if folder.exists() and not args.overwrite:
                print(f"{folder} exists, kept (--overwrite trains it again)")
                continue
            start = time.time()
            model = train_target(rows, tokenizer, args.seed)
            forget = open_accuracy(model, tokenizer, files["mcq_forget"])
            retain = open_accuracy(model, tokenizer, files["mcq_retain"])
            ran = {"seed": args.seed, "data": os.path.relpath(args.out), "exclude": exclude}
            runs.save_run(folder, model, tokenizer, {
                "stage": "prepare", "args": ran, **runs.provenance("cpu", start),
                "metrics": {"open_forget": forget, "open_retain": retain}}, args.overwrite)
            print(f"{os.path.relpath(folder)}: {sum(p.numel() for p in model.parameters()):,} parameters, "
                  f"{len(rows):,} sentences, {time.time() - start:.0f} s; answers {forget:.3f} of the forget "
                  f"and {retain:.3f} of the retain questions")
