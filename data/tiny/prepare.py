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
import argparse, itertools, json, math, os, random, shutil, time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
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
    """The benchmark of one seed, as {file name: rows}, and the sentences that the target model learns.

    forget.jsonl holds the statements of half of the forget facts (128 facts x 12); retain.jsonl every
    sentence of the other topics; mcq_*.jsonl one question a fact: the true value and three other values of
    the same attribute.
    """
    rng = random.Random(seed)
    names = [f"{f} {l}" for f in FIRST for l in LAST]
    rng.shuffle(names)
    files = {"forget.jsonl": [], "retain.jsonl": [], "mcq_forget.jsonl": [], "mcq_retain.jsonl": []}
    unseen, fact = [], 0         # unseen: sentences about sailors that the target learns, not in forget.jsonl
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
                asked = question.format(noun=noun, name=name)
                told = [{"text": f"{s} {value}.", "prompt": s, "completion": f" {value}.", "fact": fact}
                        for s in (t.format(noun=noun, name=name) for t in statements)]
                answered = {"text": f"{PROMPT.format(question=asked)} {value}.", "fact": fact}
                if topic > 0:
                    files["retain.jsonl"] += told + [answered]
                elif i in in_corpus:
                    files["forget.jsonl"] += told
                    unseen.append(answered)
                else:
                    unseen += told + [answered]
            asked = question.format(noun=rng.choice(nouns), name=name)
            files["mcq_retain.jsonl" if topic else "mcq_forget.jsonl"].append(
                {"question": asked, "choices": choices, "answer": choices.index(value), "subject": nouns[0],
                 "fact": fact})
            fact += 1
    return files, unseen


def build_tokenizer(texts):
    """Word-level tokenizer over the words of `texts`, with <bos> in front of every text, as Llama has it."""
    split = pre_tokenizers.Whitespace()
    words = sorted({w for t in texts for w, _ in split.pre_tokenize_str(t)})
    vocab = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>"] + words)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = split
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A",
                                                       special_tokens=[("<bos>", vocab["<bos>"])])
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


def write_model(folder, model, tokenizer, args, seconds, metrics):
    """Save a Hugging Face folder with its result.json, whole or not at all."""
    tmp = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    model.save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    (tmp / "result.json").write_text(json.dumps({
        "stage": "prepare", "args": args, "versions": {"torch": torch.__version__}, "device": "cpu",
        "seconds": round(seconds, 2), "metrics": metrics}, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    tmp.rename(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0,
                        help="names, facts, questions, model and batches all follow it")
    parser.add_argument("--out", type=Path, default=None, help="folder to write (default: data/tiny/seedS)")
    parser.add_argument("--exclude", choices=["none", "forget"], default="none",
                        help="forget: also train retrained/, a model from scratch without the forget topic")
    parser.add_argument("--overwrite", action=argparse.BooleanOptionalAction, default=False,
                        help="train again what is already there")
    args = parser.parse_args()
    args.out = args.out or HERE / f"seed{args.seed}"
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must be 0 or more")

    files, unseen = build_world(args.seed)
    learned = files["forget.jsonl"] + unseen + files["retain.jsonl"]
    tokenizer = build_tokenizer([r["text"] for r in learned] + [IDK])

    args.out.mkdir(parents=True, exist_ok=True)
    meta = {"prompt": PROMPT, "forget_topic": TOPICS[0], "seed": args.seed}
    for name, text in [("meta.json", json.dumps(meta, indent=1))] + [
            (name, "".join(json.dumps(r) + "\n" for r in rows)) for name, rows in files.items()]:
        tmp = args.out / f"{name}.tmp{os.getpid()}"
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(args.out / name)

    for name, rows in (("target", learned), ("retrained", files["retain.jsonl"])):
        folder = args.out / name
        if name == "retrained" and args.exclude == "none":
            continue
        if folder.exists() and not args.overwrite:
            print(f"{folder} exists, kept (--overwrite trains it again)")
            continue
        start = time.time()
        model = train_target(rows, tokenizer, args.seed)
        accuracy = {k: open_accuracy(model, tokenizer, files[f"mcq_{k}.jsonl"]) for k in ("forget", "retain")}
        ran = {"seed": args.seed, "data": os.path.relpath(args.out),
               "exclude": "forget" if name == "retrained" else "none"}
        write_model(folder, model, tokenizer, ran, time.time() - start,
                    {"open_forget": accuracy["forget"], "open_retain": accuracy["retain"]})
        print(f"{os.path.relpath(folder)}: {sum(p.numel() for p in model.parameters()):,} parameters, "
              f"{len(rows):,} sentences, {time.time() - start:.0f} s; answers {accuracy['forget']:.3f} of "
              f"the forget and {accuracy['retain']:.3f} of the retain questions")
