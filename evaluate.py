"""Score models and compare methods: multiple choice, open questions, perplexity, what relearning brings back.

    python evaluate.py out/npo-s0 out/npo+sam-s0      # one table; about 2 s a run the first time
    python evaluate.py out/* --baseline npo           # runs that differ only in seed become mean and standard
                                                      # error; each method against the baseline, pair by pair

Reads RUN/result.json, the model beside it, DATA/*.jsonl and, where it exists, RUN/relearn.json. Writes
RUN/evaluate.json (kept while it is newer than the model) and, with --json, the table.

Multiple choice alone overstates forgetting (arXiv 2510.07626), so open questions are asked too: the share
whose answer is, token for token, what the model says greedily. UE = 1 - accuracy on mcq_forget, UT = accuracy
on mcq_retain.
"""
import argparse, itertools, json, math, os, random, re, resource, subprocess, sys, time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam import SAM, accumulator, restore_, trainable

IGNORE = -100                                # the label of a token that no loss looks at: prompt and padding
LETTERS = ("The following are multiple choice questions (with answers) about {subject}.\n\n{question}\n"
           "A. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:")      # the prompt of lm-evaluation-harness, 0-shot
# Shapes: B samples, T tokens, V vocabulary. unlearn.py and relearn.py read data and models with this file.


# ---- input and output -------------------------------------------------------------------------------------

class InputError(ValueError):
    """Something the user can mend: the message names the value, the place and the fix."""


@contextmanager
def one_line_errors():
    """Turn an InputError into one line on stderr and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except InputError as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)


def make_parser(doc):
    """ArgumentParser with doc as its help, whose errors are one line and exit status 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def error(message):
        print(f"error: {message} (--help lists every flag)", file=sys.stderr)
        sys.exit(2)
    parser.error = error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=device, help="cpu, cuda, cuda:1, ...")
    return parser


def usable_device(text):
    """argparse type: the name of a device that can hold a tensor here."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({str(e).splitlines()[0]}); try cpu")
    return text


def number(kind, low, above=False):
    """argparse type: a finite int or float of at least `low`, or above it."""
    def parse(text):
        value = kind(text)
        if not low <= value < math.inf or (above and value == low):
            bound = "above" if above else "of at least"
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bound} {low}")
        return value
    parse.__name__ = kind.__name__           # argparse says "invalid int value"
    return parse


def read_jsonl(path, check):
    """The rows of a JSON-lines file, each through check(row) -> row, which raises InputError on a bad one.

    Every row also gets "where", its file and line, for the errors that only show later.
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise InputError(f"{path} is missing: prepare the data (data/README.md) or point --data elsewhere")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 ({e}): convert it")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(check(json.loads(line)) | {"where": f"{path}:{number}"})
        except json.JSONDecodeError as e:
            raise InputError(f"{path}:{number}: not JSON ({e}): one JSON object a line is expected")
        except InputError as e:
            raise InputError(f"{path}:{number}: {e}")
    if not rows:
        raise InputError(f"{path} has no rows: write at least one JSON object a line")
    return rows


def check_texts(row, *keys):
    """Raise InputError unless row is a dict with a text that is not empty under each of keys."""
    if not isinstance(row, dict) or not all(k in row for k in keys):
        found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"needs the keys {', '.join(keys)}, found {found or 'none'}: see data/README.md")
    for key in keys:
        if not isinstance(row[key], str) or not row[key].strip():
            raise InputError(f'"{key}" is {row[key]!r}: give a text that is not empty')


def text_row(row):
    """Check a row of forget.jsonl or retain.jsonl: {"text"}, {"prompt", "completion"}, or a bare string."""
    row = {"text": row} if isinstance(row, str) else row
    pair = isinstance(row, dict) and "prompt" in row and "text" not in row
    check_texts(row, *(["prompt", "completion"] if pair else ["text"]))
    return row


def write_json(path, value):
    """Write JSON under a temporary name and rename it, so that a reader never sees half a file."""
    tmp = Path(f"{path}.tmp{os.getpid()}")
    tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    tmp.replace(path)


def provenance(device, start):
    """What every result file says about its run: versions, commit, device, seconds, peak memory in GB."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).resolve().parent,
                         capture_output=True, text=True)
    cuda = torch.device(device).type == "cuda"
    ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated() if cuda else ram
    versions = {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": sys.version.split()[0]}
    return {"versions": versions, "commit": git.stdout.strip() or None, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if cuda else str(device),
            "seconds": round(time.time() - start, 2), "peak_gb": round(peak / 1e9, 3)}


def load_model(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a local folder or hub name. safetensors only, no remote code, dropout off."""
    if not Path(name).is_dir() and str(name).count("/") != 1:
        raise InputError(f"model {name}: neither a folder here nor a hub name ORG/NAME")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as e:
        raise InputError(f"model {name} does not load: {e}")
    # eval mode: with dropout the two passes of SAM, and the cached reference, would see different networks
    return model.to(device).eval(), tokenizer


def show(value):
    """A metric with three digits, or a dash for one that the data does not allow."""
    return "-" if value is None else f"{value:.3f}"


# ---- samples and log-probabilities ------------------------------------------------------------------------

def context_of(model):
    """The longest sequence in tokens that the model takes, 0 if its config does not say."""
    return getattr(model.config, "max_position_embeddings", None) or 0


def encode(tokenizer, triples, context, max_len=0):
    """[(ids, labels)] of (prompt, completion, where), the two tokenised as one; a prompt's labels are IGNORE.

    A sample of more than `context` tokens is an error that names `where`; max_len > 0 cuts samples before.
    """
    prompts = list({p for p, _, _ in triples if p})
    quick = {"return_attention_mask": False, "verbose": False}
    tokens = lambda texts: tokenizer(texts, **quick).input_ids if texts else []
    known, out = dict(zip(prompts, map(len, tokens(prompts)))) | {"": 0}, []
    for (prompt, _, where), ids in zip(triples, tokens([p + c for p, c, _ in triples])):
        ids = ids[:max_len or None]
        if context and len(ids) > context:
            raise InputError(
                f"{where}: {len(ids)} tokens, but the model's context is {context}: shorten the text, "
                f"or cut it with --max_len {context}")
        labels = [IGNORE] * min(known[prompt], len(ids)) + ids[known[prompt]:]
        if all(label == IGNORE for label in labels[1:]):
            raise InputError(
                f"{where}: no token to score ({len(ids)} tokens, {known[prompt]} of them prompt): "
                f"lengthen the text or raise --max_len")
        out.append((ids, labels))
    return out


def encode_rows(tokenizer, rows, context, max_len=0):
    """encode() for the rows of a corpus: all tokens of a text, or the completion of a prompt."""
    return encode(tokenizer, [("", r["text"], r["where"]) if "text" in r else
                              (r["prompt"], r["completion"], r["where"]) for r in rows], context, max_len)


def collate(samples, pad, device="cpu"):
    """Right-padded {"input_ids", "attention_mask", "labels"}, each (B, T) int64; padding is never a label."""
    width = max(len(ids) for ids, _ in samples)
    rows = [(ids + [pad] * (width - len(ids)), [1] * len(ids) + [0] * (width - len(ids)),
             labels + [IGNORE] * (width - len(ids))) for ids, labels in samples]
    ids, mask, labels = (torch.tensor(x, device=device) for x in zip(*rows))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model, batch):
    """(B, T-1, V): position t predicts token t+1."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]


def token_logps(model, batch):
    """log p(token t+1 | tokens to t) for every label, 0 where there is none; and the mask. Both (B, T-1)."""
    logits, labels = logits_of(model, batch), batch["labels"][:, 1:]
    logits = logits.to(accumulator(logits.dtype))        # (B, T-1, V): log-softmax in bf16 loses three digits
    nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return -nll, labels != IGNORE


# ---- questions --------------------------------------------------------------------------------------------

def mcq_row(row):
    """Check a row of mcq_*.jsonl: {"question", "choices": [4 texts], "answer": 0-3}."""
    check_texts(row, "question")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) and c.strip()
                                                                     for c in choices):
        raise InputError(f'"choices" is {choices!r}: give a list of exactly 4 texts')
    if type(row.get("answer")) is not int or not 0 <= row["answer"] <= 3:
        raise InputError(f'"answer" is {row.get("answer")!r}: give the index of the right choice, 0 to 3')
    return row


def load_questions(folder):
    """A data folder's mcq_*.jsonl: {"mcq_forget": rows, "mcq_retain": rows, ..., "prompt": template or None}.

    meta.json may give a "prompt" with {question} in it: then the choices' own texts are scored after it.
    Without one, the question and its choices are shown as LETTERS and " A" to " D" are scored.
    """
    folder, prompt = Path(folder), None
    meta = folder / "meta.json"
    if meta.is_file():
        try:
            prompt = json.loads(meta.read_text(encoding="utf-8")).get("prompt")
        except (json.JSONDecodeError, AttributeError) as e:
            raise InputError(f"{meta}:1: not a JSON object ({e}): mend it or remove it")
        if prompt is not None and "{question}" not in prompt:
            raise InputError(f'{meta}:1: "prompt" is {prompt!r}: put {{question}} in it')
    return {**{f.stem: read_jsonl(f, mcq_row) for f in sorted(folder.glob("mcq_*.jsonl"))}, "prompt": prompt}


def ask(row, prompt):
    """(context, four continuations) of a multiple-choice row."""
    question = row["question"].strip()
    if prompt:
        return prompt.replace("{question}", question), [" " + c.strip() for c in row["choices"]]
    subject = row.get("subject", "the topic").replace("_", " ")
    return LETTERS.format(*row["choices"], question=question, subject=subject), [" A", " B", " C", " D"]


@torch.no_grad()
def choice_logps(model, tokenizer, rows, prompt=None, batch=64):
    """(N, 4) fp64 summed log-probability of each choice after its context, both tokenised together.

    One forward pass a question where the four choices are one token each, else one a choice; by length.
    """
    out, jobs = torch.zeros(len(rows), 4, dtype=torch.float64), []
    asked = [(start, choice, row["where"]) for row in rows for start, choices in [ask(row, prompt)]
             for choice in choices]
    samples = encode(tokenizer, asked, context_of(model))
    for q in range(len(rows)):
        encoded = samples[4 * q:4 * q + 4]
        if all(labels.count(IGNORE) == len(ids) - 1 for ids, labels in encoded) and (
                len({tuple(ids[:-1]) for ids, _ in encoded}) == 1):
            jobs.append((encoded[0], q, slice(None), [ids[-1] for ids, _ in encoded]))   # one for all four
        else:
            jobs += [(e, q, c, None) for c, e in enumerate(encoded)]
    jobs.sort(key=lambda job: len(job[0][0]))
    for i in range(0, len(jobs), batch):
        x = collate([job[0] for job in jobs[i:i + batch]], tokenizer.pad_token_id or 0, model.device)
        logits, labels = logits_of(model, x), x["labels"][:, 1:]                       # (B, T-1, V), (B, T-1)
        for row, (_, q, choice, four) in enumerate(jobs[i:i + batch]):
            here = labels[row] != IGNORE
            logps = logits[row, here].to(accumulator(logits.dtype)).log_softmax(-1)       # (answer tokens, V)
            logps = logps[0, four] if four else logps.gather(-1, labels[row, here, None]).sum()
            out[q, choice] = logps.double().cpu()
    return out


def correct(model, tokenizer, rows, prompt=None):
    """(N,) bool: is the likeliest choice the right one? Ties go to the first."""
    return choice_logps(model, tokenizer, rows, prompt).argmax(1) == torch.tensor([r["answer"] for r in rows])


def ue_ut(model, tokenizer, questions, seen=None, only_forget=False):
    """{"UE", "UT"}; None where the data has no mcq_forget or mcq_retain. With seen, a set of facts, also
    "UE_heldout": UE on the questions about other facts, None when no question names such a fact."""
    share = lambda right: right.double().mean().item() if len(right) else None
    names, prompt = ("mcq_forget", "mcq_retain")[:1 if only_forget else 2], questions["prompt"]
    right = {name: correct(model, tokenizer, questions[name], prompt) if name in questions else []
             for name in names}
    out = {"UE": 1 - share(right["mcq_forget"]) if "mcq_forget" in questions else None}
    if seen is not None:
        held = [seen and r.get("fact", None) not in seen | {None} for r in questions.get("mcq_forget", [])]
        out["UE_heldout"] = 1 - share(right["mcq_forget"][torch.tensor(held)]) if any(held) else None
    return out if only_forget else out | {"UT": share(right["mcq_retain"])}


@torch.no_grad()
def open_accuracy(model, tokenizer, rows, prompt, batch=64):
    """Share of questions whose greedy continuation starts, token for token, with the right answer.

    Greedy decoding gives the answer if and only if each of its tokens is the argmax after the ones before it,
    so one forward pass with the answer in place says what generating would.
    """
    asked = [(start, choices[row["answer"]], row["where"]) for row in rows
             for start, choices in [ask(row, prompt)]]
    samples, right = encode(tokenizer, asked, context_of(model)), 0
    for i in range(0, len(samples), batch):
        x = collate(samples[i:i + batch], tokenizer.pad_token_id or 0, model.device)
        labels = x["labels"][:, 1:]
        right += ((logits_of(model, x).argmax(-1) == labels) | (labels == IGNORE)).all(1).sum().item()
    return right / len(rows)


@torch.no_grad()
def perplexity(model, tokenizer, rows, limit, batch=64):
    """exp(mean negative log-probability of a label) over at most `limit` rows, evenly spaced in the file."""
    rows = rows[::math.ceil(len(rows) / limit)]
    samples, total, count = encode_rows(tokenizer, rows, 0, context_of(model)), 0.0, 0
    for i in range(0, len(samples), batch):
        x = collate(samples[i:i + batch], tokenizer.pad_token_id or 0, model.device)
        logps, mask = token_logps(model, x)
        total, count = total - logps.double().sum().item(), count + mask.sum().item()
    return math.exp(min(total / count, 700.0))       # an unlearned model can pass fp64's largest exponent


# ---- input-space attack -----------------------------------------------------------------------------------

METHODS = {            # weights of prefix_terms; shares of swap, delete, insert, sample; how many are kept
    "gcg+": {"weights": [1.0, 1.0, 10.0, 1.5, 3.0], "moves": [0.7, 0.1, 0.1, 0.1], "buffer": 16},
    "gcg": {"weights": [1.0, 0.0, 0.0, 0.0, 0.0], "moves": [1.0, 0.0, 0.0, 0.0], "buffer": 1},
    "random": {"weights": [1.0, 0.0, 0.0, 0.0, 0.0], "moves": [0.0, 0.0, 0.0, 0.0], "buffer": 1}}
# More shapes: C candidates, H tokens of BOS (0 or 1), P of the prefix, Q questions, T their tokens, D width.


def prefix_rows(rows, prompt, prefix):
    """Questions asked as prefix + " " + the prompt; what comes back goes with the template "{question}"."""
    return [{**row, "question": f"{prefix} {start}", "choices": [c.strip() for c in choices]}
            for row in rows for start, choices in [ask(row, prompt)]]


@torch.no_grad()
def prefix_task(teacher, tokenizer, rows, prompt, answer):
    """What a prefix is to bring back: {"head": H ids, "ids", "labels", "mask": (Q, T), "layer", "clean"}.

    ids: a question as it is tokenised after a word, then up to `answer` tokens of the teacher's own greedy
    answer; only these have labels. clean: the teacher's states (Q, T, D) at 62% depth without a prefix.
    """
    word, samples, pad = tokenizer("a").input_ids, [], tokenizer.pad_token_id or 0
    head = word[:len(word) - len(tokenizer("a", add_special_tokens=False).input_ids)]
    for row in rows:
        ids = tokenizer("a " + ask(row, prompt)[0]).input_ids[len(word):]
        x = torch.tensor([head + ids], device=teacher.device)
        said = teacher.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=answer, do_sample=False,
                                pad_token_id=pad)[0, x.shape[1]:].tolist()
        said = said[:said.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in said else said
        samples.append((ids + said, [IGNORE] * len(ids) + said))
    batch = collate(samples, pad, teacher.device)
    task = {"head": head, "ids": batch["input_ids"], "labels": batch["labels"],
            "mask": batch["attention_mask"].bool(), "layer": round(0.62 * teacher.config.num_hidden_layers)}
    nothing = torch.zeros(1, 0, len(teacher.get_input_embeddings().weight), device=teacher.device)
    return task | {"clean": run_prefix(teacher, nothing, task)[1][0]}


def run_prefix(model, onehot, task):
    """(logits (C, Q, H+P+T, V), states (C, Q, T, D) of the questions at task["layer"]) with onehot (C, P, V)
    before every question. Questions are padded on the right, which causal attention never sees."""
    embed, (Q, T), C = model.get_input_embeddings(), task["ids"].shape, len(onehot)
    head = embed(torch.tensor(task["head"], dtype=torch.long, device=model.device))                  # (H, D)
    prefix = onehot.to(embed.weight.dtype) @ embed.weight                                         # (C, P, D)
    x = torch.cat([head.expand(C, Q, -1, -1), prefix[:, None].expand(-1, Q, -1, -1),
                   embed(task["ids"]).expand(C, -1, -1, -1)], 2)                          # (C, Q, H+P+T, D)
    out = model(inputs_embeds=x.flatten(0, 1), output_hidden_states=True, use_cache=False)
    return out.logits.unflatten(0, (C, Q)), out.hidden_states[task["layer"]][:, -T:].unflatten(0, (C, Q))


def prefix_terms(victim, teacher, onehot, task):
    """(C, 5) terms of the attack's loss for prefixes onehot (C, P, V), each to be weighted and added:

    mean cross-entropy of the teacher's answers; L2 distance of the victim's states to the teacher's on the
    same input (0 if teacher is None); 1 - cosine to the teacher's states on the clean input, both a mean over
    the tokens of questions and answers; the prefix's own cross-entropy; sum of max(count - 1, 0)^1.5 / P.
    """
    (C, P, _), T, H = onehot.shape, task["ids"].shape[1], len(task["head"])
    logits, states = run_prefix(victim, onehot, task)
    logits, states = logits.to(accumulator(logits.dtype)), states.to(accumulator(states.dtype))
    same = run_prefix(teacher, onehot, task)[1] if teacher else states
    mean = lambda x: (x * task["mask"]).sum((1, 2)) / task["mask"].sum()                  # (C, Q, T) -> (C,)
    labels = task["labels"].expand(C, -1, -1).flatten()
    nll = F.cross_entropy(logits[:, :, -T - 1:-1].flatten(0, 2), labels, reduction="none")
    said = logits[:, 0, max(H - 1, 0):H + P - 1].log_softmax(-1)      # without BOS nothing predicts the first
    return torch.stack([nll.view(C, -1).sum(1) / (task["labels"] != IGNORE).sum(),
                        mean((states - same).norm(dim=-1)),
                        mean(1 - F.cosine_similarity(states, task["clean"].to(states.dtype), dim=-1)),
                        -(onehot[:, P - said.shape[1]:] * said).sum(-1).mean(1),
                        (onehot.sum(1) - 1).clamp_min(0).pow(1.5).sum(1) / P], 1)


def mutate(ids, move, scores, count, topk, rng):
    """`count` prefixes, each one change away from ids. scores: for swap (P, V), minus the gradient: the token
    is any of the topk; for insert and sample (P+1, V), the model's logits: it is drawn from the topk.
    """
    top, out = scores.topk(topk) if move != "delete" else None, []
    for _ in range(count):
        i, new = rng.randrange(len(ids) + (move == "insert")), []
        if move != "delete":
            weights = None if move == "swap" else top.values[i].softmax(-1).tolist()
            new = rng.choices(top.indices[i].tolist(), weights)
        out.append(ids[:i] + new + ids[i + (move != "insert"):])
    return out


def attack_prefix(run, done, args):
    """Search one prefix after which the victim, the model in `run`, answers as the teacher, the model before
    unlearning, does without (enhanced GCG, arXiv 2409.18025). Returns {"UE", "UE_heldout": on questions that
    the search did not use, "UE_teacher": of the teacher after the same prefix, "prefix", ...}.

    A model call is one pass of one model over the Q questions with one prefix; a gradient counts as three.
    RUN/attack_METHOD.json holds result and state: an interrupted search goes on, and ends as if it never was.
    """
    start, run, path = time.time(), Path(run), Path(run) / f"attack_{args.attack_method}.json"
    how = {k: getattr(args, f"attack_{k}") or v for k, v in METHODS[args.attack_method].items()}
    settings = {"run": str(run), "data": args.data or done["args"]["data"],
                "teacher": args.teacher or done["args"].get("model"),
                **{k: v for k, v in vars(args).items() if k.startswith("attack_")},
                **{f"attack_{k}": v for k, v in how.items()}}
    if settings["teacher"] is None:
        raise InputError(f"{run}: --attack needs the model before unlearning: name it with --teacher")
    state = {"calls": 0, "iteration": 0, "best": [], "curve": []}               # best: [[loss, terms, ids]]
    if path.is_file() and not args.overwrite:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["args"] != settings:
            raise InputError(f"{path} holds a search with other flags: --overwrite starts a new one")
        state = old["state"]
        if state["calls"] >= args.attack_calls:
            return old["metrics"]

    # -- models, the questions searched on, and the room that the context leaves
    questions, dtype = load_questions(settings["data"]), done["args"].get("param_dtype", "float32")
    rows, prompt = questions.get("mcq_forget"), questions["prompt"]
    if not rows:
        raise InputError(f"{settings['data']} has no mcq_forget.jsonl: --attack prefix asks its questions")
    victim, tokenizer = load_model(run, args.device, getattr(torch, dtype))
    teacher, _ = load_model(settings["teacher"], args.device, getattr(torch, dtype))
    victim.requires_grad_(False), teacher.requires_grad_(False)
    picks = random.Random(args.attack_seed).sample(range(len(rows)), min(args.attack_questions, len(rows)))
    bare = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    asked = [ask(row, prompt) for row in rows]
    longest = max(len(bare(choice)) for _, choices in asked for choice in choices)
    answer = min(args.attack_answer, longest) if prompt else args.attack_answer     # choices are the answers
    task = prefix_task(teacher, tokenizer, [rows[i] for i in sorted(picks)], prompt, answer)
    head, device = task["head"], victim.device
    tails = [bare("a " + start)[len(bare("a")):] for start, _ in asked]
    used = len(head) + max(map(len, tails)) + max(answer, longest)
    low, high = (min(n, (context_of(victim) or math.inf) - used) for n in args.attack_length)
    if low < 1:
        raise InputError(f"{run}: the context of {context_of(victim)} tokens leaves no room for a prefix")
    high = high if how["moves"][2] else low                            # without insertion the length is fixed

    # -- tokens: special ones are banned, and a prefix must be what its own text is read as
    V = len(victim.get_input_embeddings().weight)
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= {*tokenizer.all_special_ids}
    allowed = [i for i in range(min(V, len(tokenizer))) if i not in special]
    banned = torch.full((V,), -math.inf, device=device)
    banned[allowed] = 0.0
    text = lambda ids: tokenizer.decode(ids).strip()
    survives = lambda ids: tokenizer(f"{text(ids)} {asked[0][0]}").input_ids == head + ids + tails[0]
    onehot = lambda prefixes: F.one_hot(torch.tensor(prefixes, device=device), V).float()         # (C, P, V)
    right = lambda model, ids: correct(model, tokenizer, prefix_rows(rows, prompt, text(ids)), "{question}")

    def fresh(rng):
        for _ in range(100):
            ids = bare(text(rng.choices(allowed, k=low)))[:low]
            if len(ids) == low and survives(ids):
                return ids
        raise InputError(f"{run}: of 100 random prefixes none survives decoding and encoding again")

    # -- the search
    weights, best = torch.tensor(how["weights"], device=device), state["best"]
    other = teacher if weights[1] else None
    each, every = 1 + bool(other), args.attack_every or max(1, args.attack_calls // 20)
    bar = tqdm(total=args.attack_calls, initial=state["calls"], desc=args.attack_method, unit="call")
    while state["calls"] < args.attack_calls:
        rng, before = random.Random(f"{args.attack_seed} {state['iteration']}"), state["calls"]
        shortest = low + (high - low) * before // args.attack_calls
        if not best or args.attack_method == "random":
            new = [fresh(rng) for _ in range(args.attack_candidates)]
        else:
            ids, scores = rng.choice(best)[2], None
            move = rng.choices(("swap", "delete", "insert", "sample"), how["moves"])[0]
            if (move, len(ids)) in (("delete", shortest), ("insert", high)):
                move = "swap"
            move = "insert" if len(ids) < shortest else move
            if move == "swap":
                x = onehot([ids]).requires_grad_()
                loss = (prefix_terms(victim, other, x, task) @ weights).sum()
                scores = banned - torch.autograd.grad(loss, x)[0][0]                                 # (P, V)
                state["calls"] += 3 * each
            elif move != "delete":
                with torch.no_grad():
                    scores = victim(torch.tensor([head + ids], device=device)).logits[0]
                scores = banned + F.pad(scores, (0, 0, 1, 0))[len(head):]    # (P+1, V): row i is for token i
                state["calls"] += 1
            new = mutate(ids, move, scores, args.attack_candidates, min(args.attack_topk, len(allowed)), rng)
        known = [b[2] for b in best]
        new = [c for i, c in enumerate(new) if c not in known + new[:i] and survives(c)]
        if new:
            with torch.no_grad():
                terms = prefix_terms(victim, other, onehot(new), task)
            best += map(list, zip((terms @ weights).tolist(), terms.tolist(), new))
            best.sort(key=lambda b: (len(b[2]) < shortest, b[0]))
            del best[how["buffer"]:]
        state["calls"] += max(1, each * len(new))                           # at least 1: the search must end
        state["iteration"] += 1
        bar.update(state["calls"] - before)
        ended = state["calls"] >= args.attack_calls
        if ended or state["calls"] // every > before // every:
            loss, terms, ids = best[0]
            hit = right(victim, ids).double()                                                          # (N,)
            metrics = {"UE": 1 - hit.mean().item(), "loss": loss, "terms": terms, "answer": answer,
                       "calls": state["calls"], "length": [low, high], "prefix": text(ids)}
            if ended:
                held = [i for i in range(len(rows)) if i not in picks]
                metrics |= {"UE_heldout": 1 - hit[held].mean().item() if held else None,
                            "UE_teacher": 1 - right(teacher, ids).double().mean().item()}
            state["curve"].append({k: metrics[k] for k in ("calls", "loss", "UE")} | {"tokens": len(ids)})
            bar.set_postfix(loss=f"{loss:.3f}", UE=f"{metrics['UE']:.3f}", tokens=len(ids))
            write_json(path, {"stage": "attack", "args": settings, **provenance(args.device, start),
                              "metrics": metrics, "state": state})
    bar.close()
    return metrics


# ---- sharpness --------------------------------------------------------------------------------------------

def forget_objective(model, tokenizer, run, done, args):
    """A closure that gives the forget loss (0-dim, with graph) on a fixed batch: args.sharpness_rows rows of
    forget.jsonl, evenly spaced. own: the loss that the run descended; nll: what a relearning attack descends.
    """
    from unlearn import forget_loss, sample_logps                             # here: it imports this file
    ran, ref = done["args"], None
    rows = read_jsonl(Path(args.data or ran["data"]) / "forget.jsonl", text_row)
    rows = rows[::math.ceil(len(rows) / args.sharpness_rows)]
    samples = encode_rows(tokenizer, rows, context_of(model), ran.get("max_len", 0))
    batch = collate(samples, tokenizer.pad_token_id or 0, model.device)
    if args.sharpness == "nll":
        return lambda: -token_logps(model, batch)[0].sum() / (batch["labels"][:, 1:] != IGNORE).sum()
    if ran.get("loss") not in ("npo", "simnpo", "ga", "graddiff"):
        raise InputError(f"{run}: --sharpness own covers npo, simnpo, ga and graddiff, not "
                         f"{ran.get('loss', 'a model that nothing was unlearned from')}: use --sharpness nll")
    if ran["loss"] == "npo":
        with torch.no_grad():
            ref = sample_logps(load_model(args.teacher or ran["model"], args.device)[0], batch, ran["reduce"])
    return lambda: forget_loss(ran["loss"], sample_logps(model, batch, ran["reduce"]), ref, ran["beta"],
                               ran["margin"]).mean()


def hessian(loss, params):
    """(gradient (n,), function v (n,) -> H v (n,)) of a loss with graph, by double backward; n weights."""
    flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])
    gradient = flat(torch.autograd.grad(loss, params, create_graph=True))
    return gradient.detach(), lambda v: flat(torch.autograd.grad(gradient, params, v, retain_graph=True,
                                                                 materialize_grads=True))


def top_eigenvalue(product, start, steps, tol=1e-3):
    """(largest eigenvalue, ||H v - eigenvalue v||) by power iteration from start (n,), at most `steps` steps.

    That finds the eigenvalue of largest magnitude. When it is negative, a second run on H - eigenvalue/2 I,
    where the largest one dominates, finds that.
    """
    def power(shift):
        v = start / start.norm()
        for _ in range(steps):
            w = product(v) - shift * v
            value = (v @ w).item()
            residual = (w - value * v).norm().item()
            if residual <= tol * abs(value + shift):
                break
            v = w / w.norm()
        return value + shift, residual
    first = power(0.0)
    return first if first[0] >= 0 else power(first[0] / 2)


def sharpness(model, loss, rho, steps, probes, seed=0):
    """{"loss", "gradient": norm, "top": largest eigenvalue of the Hessian, "residual", "trace", "trace_se":
    Hutchinson's estimate with `probes` random signs, "rise": loss(theta + rho g/||g||) - loss(theta)}."""
    params = trainable(model.parameters())
    rng = torch.Generator(params[0].device).manual_seed(seed)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):   # the others differentiate once
        value = loss()
        gradient, product = hessian(value, params)
        draw = lambda: torch.randn(len(gradient), generator=rng, device=gradient.device, dtype=gradient.dtype)
        top, residual = top_eigenvalue(product, draw(), steps)
        trace, error = mean_se([(z @ product(z)).item() for z in (draw().sign() for _ in range(probes))])
        pieces = gradient.split([p.numel() for p in params])
        with torch.no_grad(), SAM(params, rho).perturbed({p: g.view_as(p) for p, g in zip(params, pieces)}):
            rise = loss().item() - value.item()
    return {"loss": value.item(), "gradient": gradient.norm().item(), "top": top, "residual": residual,
            "trace": trace, "trace_se": error, "rise": rise}


# ---- statistics -------------------------------------------------------------------------------------------

def mean_se(values):
    """(mean, standard error of the mean); the error is None for a single value."""
    v = np.asarray(values, dtype=float)
    return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None


def student_p(t, k):
    """Two-sided p of Student's t with k degrees of freedom.

    With t = sqrt(k) tan(a) the density goes as cos(a)^(k-1): p is a ratio of two integrals.
    """
    area = lambda a: np.trapezoid(np.cos(np.linspace(a, math.pi / 2, 20001)) ** (k - 1), dx=math.pi / 2 - a)
    return float(area(math.atan(abs(t) / math.sqrt(k))) / area(0.0))


def t_test(differences):
    """(t, two-sided p) that the mean of n >= 2 paired differences is 0 (Student); None without any spread."""
    mean, se = mean_se(differences)
    return (mean / se, student_p(mean / se, len(differences) - 1)) if se else (None, None)


def spearman(x, y):
    """(rank correlation, two-sided p) of n >= 3 pairs; ties get their mean rank. None where one is constant.

    p counts all n! orders up to n = 8 and takes t = rho sqrt((n-2) / (1-rho^2)) as Student's t beyond.
    """
    ranks = [np.array([((v < a).sum() + (v <= a).sum() + 1) / 2 for a in v]) for v in map(np.asarray, (x, y))]
    a, b = (r - r.mean() for r in ranks)
    n, size = len(a), math.sqrt((a @ a) * (b @ b))
    if not size:
        return None, None
    rho = float(a @ b) / size
    if n <= 8:
        orders = np.array(list(itertools.permutations(b))) @ a / size                                 # (n!,)
        return rho, float((abs(orders) >= abs(rho) - 1e-9).mean())
    return rho, student_p(rho * math.sqrt((n - 2) / max(1 - rho * rho, 1e-300)), n - 2)


# ---- runs and tables --------------------------------------------------------------------------------------

def load_result(run):
    """RUN/result.json of unlearn.py or data/tiny/prepare.py."""
    path = Path(run) / "result.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: {run} is not a run folder of unlearn.py")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e}): run unlearn.py again")


def method(result):
    """(short name, settings: its args but seed and paths) of a run; runs that agree in both are averaged."""
    args = result["args"]
    if result["stage"] == "prepare":
        name = "retrained" if args["exclude"] == "forget" else "target"
    else:
        name = args["loss"] + ("" if args["smooth"] == "none" else f"+{args['smooth']}")
        name += " flipped" if args["sam_flip"] else ""
    skip = ("seed", "out", "data", "model", "overwrite", "relearn", "device", "eval_every")
    return name, json.dumps({k: v for k, v in args.items() if k not in skip}, sort_keys=True)


def budget_name(b):
    """A budget of relearn.py in a word: 20 samples, 20x3 with the epochs, 4bit, prune30 (percent)."""
    if b["samples"]:
        return f"{b['samples']}" + (f"x{b['epochs']}" if b["epochs"] > 1 else "")
    return f"{b['quantize']}bit" if "quantize" in b else f"prune{b['prune']:g}"


def columns(run, metrics):
    """One run as {column: number}: its scores, those of every relearn*.json that is there, prefix attacks,
    sharpness. A column with a space goes into the table that its first words name."""
    row = {"UE": metrics["UE"], "UT": metrics["UT"],
           **{k: v for k, v in metrics.items() if k.startswith(("open", "ppl", "mcq"))}}
    for path in sorted(Path(run).glob("relearn*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        budgets, attack = result["metrics"]["budgets"], result["args"].get("attack", "")
        for b in budgets:
            tag = f"{attack} " * bool(attack) + budget_name(b)
            tag += f"@{b['lr']:g}" if b.get("lr") != budgets[0].get("lr") else ""
            row |= {f"UE {tag}": b["UE"], f"held out {tag}": b["UE_heldout"], f"UT {tag}": b["UT"]}
    for name, m in metrics.get("attack", {}).items():
        row |= {f"UE prefix {name}": m["UE"], f"held out prefix {name}": m["UE_heldout"],
                f"teacher's UE prefix {name}": m["UE_teacher"]}
    for kind, m in metrics.get("sharpness", {}).items():
        row |= {f"sharpness ({kind}) {k}": m[k] for k in ("top", "trace", "rise")}
    return {k: v for k, v in row.items() if v is not None}


def score(run, args):
    """(result.json, metrics) of one run folder; writes its evaluate.json, or reads it when up to date."""
    start, run = time.time(), Path(run)
    done, path = load_result(run), run / "evaluate.json"
    settings = {"run": str(run), "data": args.data or done["args"]["data"], "ppl_rows": args.ppl_rows,
                "device": args.device, "param_dtype": done["args"].get("param_dtype", "float32")}
    newer = path.is_file() and path.stat().st_mtime >= (run / "result.json").stat().st_mtime
    if newer and not args.overwrite:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["args"] == settings:
            return done, old["metrics"]
    questions, data = load_questions(settings["data"]), Path(settings["data"])
    prompt = questions["prompt"]
    model, tokenizer = load_model(run, args.device, getattr(torch, settings["param_dtype"]))
    metrics = ue_ut(model, tokenizer, questions)
    for name in questions.keys() - {"mcq_forget", "mcq_retain", "prompt"}:
        metrics[name] = correct(model, tokenizer, questions[name], prompt).double().mean().item()
    for part in ("forget", "retain"):
        if prompt and f"mcq_{part}" in questions:
            metrics[f"open_{part}"] = open_accuracy(model, tokenizer, questions[f"mcq_{part}"], prompt)
        if (data / f"{part}.jsonl").is_file():
            rows = read_jsonl(data / f"{part}.jsonl", text_row)
            metrics[f"ppl_{part}"] = perplexity(model, tokenizer, rows, args.ppl_rows)
    bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    metrics |= {"template": prompt or LETTERS, "bos": bos}
    result = {"stage": "evaluate", "args": settings, **provenance(args.device, start), "metrics": metrics}
    write_json(path, result)
    return done, metrics


def extras(run, done, metrics, args):
    """metrics and what --attack and --sharpness find, or found before; RUN/evaluate.json keeps it too."""
    run, found = Path(run), {"attack": {}, "sharpness": dict(metrics.get("sharpness", {}))}
    if args.attack:
        attack_prefix(run, done, args)
    for path in sorted(run.glob("attack_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["metrics"]["calls"] >= result["args"]["attack_calls"]:                # the search has ended
            found["attack"][path.stem.removeprefix("attack_")] = result["metrics"]
    settings = {k: v for k, v in vars(args).items() if k.startswith("sharpness_")}
    if args.sharpness and (args.overwrite or
                           found["sharpness"].get(args.sharpness, {}).get("args") != settings):
        model, tokenizer = load_model(run, args.device)              # fp32: a Hessian in bf16 is mostly noise
        loss = forget_objective(model, tokenizer, run, done, args)
        found["sharpness"][args.sharpness] = {"args": settings, **sharpness(
            model, loss, args.sharpness_rho, args.sharpness_steps, args.sharpness_probes)}
    found = {k: v for k, v in found.items() if v}
    if found != {k: metrics[k] for k in ("attack", "sharpness") if k in metrics}:
        result = json.loads((run / "evaluate.json").read_text(encoding="utf-8"))
        write_json(run / "evaluate.json", result | {"metrics": result["metrics"] | found})
    return metrics | found


def table(rows):
    """Text of rows of cells; the first column to the left, the others to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([r[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(r[1:], widths[1:])])
                     for r in rows)


def cell(mean, se):
    """'.521 ±.030', or 'mean' alone for one run; a perplexity in the thousands in powers of ten."""
    digits = lambda v: f"{v:.3f}" if abs(v) < 1000 else f"{v:.1e}"
    return digits(mean) + ("" if se is None else f" ±{digits(se)}")


def compare(group, base, keys):
    """{column: {"mean", "t", "p", "n", "higher"}} of group - base, both {seed: {column: number}}, by seed."""
    out = {}
    for key in keys:
        seeds = [s for s in sorted(group) if key in group[s] and key in base.get(s, {})]
        d = [group[s][key] - base[s][key] for s in seeds]
        if len(d) > 1:
            t, p = t_test(d)
            out[key] = {"mean": mean_se(d)[0], "t": t, "p": p, "n": len(d), "higher": sum(x > 0 for x in d)}
    return out


def flat_and_robust(groups, methods):
    """[(sharpness column, UE column, "methods" or "runs", n, rho, p)]: over the means of methods, and over
    all runs, where p is too small, since runs of one method are not independent."""
    runs, out = [row for group in groups.values() for row in group.values()], []
    for over, rows in (("methods", [m["mean"] for m in methods.values()]), ("runs", runs)):
        keys = list(dict.fromkeys(k for row in rows for k in row))
        for flat, ue in itertools.product([k for k in keys if k.startswith("sharp")],
                                          [k for k in keys if k.startswith("UE ")]):
            both = [(row[flat], row[ue]) for row in rows if flat in row and ue in row]
            rho, p = spearman(*zip(*both)) if len(both) > 2 else (None, None)
            if rho is not None:
                out.append((flat, ue, over, len(both), rho, p))
    return out


# ---- pictures ---------------------------------------------------------------------------------------------

INK = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
       ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-.")]      # Okabe and Ito's palette


def filter_directions(params, seed):
    """Two random directions, each filter (row of a matrix) scaled to the norm of that filter in theta; biases
    and norms, which have one dimension, stay (Li et al., arXiv 1712.09913). [[tensor like p], [...]]"""
    rng, out = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        draws = [torch.randn(p.shape, generator=rng).to(p) for p in params]
        out.append([d * (p.flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)).view(-1, *[1] * (p.dim() - 1))
                    if p.dim() > 1 else torch.zeros_like(p) for d, p in zip(draws, params)])
    return out


@torch.no_grad()
def landscape(model, loss, points, seed=0, reach=0.05):
    """(points, points) array of loss(theta + a d1 + b d2), a down the rows and b along them, both from -reach
    to reach, with d1 and d2 of filter_directions(). Puts the weights back, bit for bit."""
    params, steps = trainable(model.parameters()), np.linspace(-reach, reach, points)
    saved, (d1, d2) = [(p, p.detach().clone()) for p in params], filter_directions(params, seed)
    try:
        out = np.zeros((points, points))
        for (i, a), (j, b) in itertools.product(enumerate(steps), enumerate(steps)):
            for (p, old), x, y in zip(saved, d1, d2):
                p.copy_(old + a * x + b * y)
            out[i, j] = loss().item()
        return out
    finally:
        restore_(saved)


def relearn_curve(runs):
    """(samples seen, mean UE, standard error or None) of the largest budget in the relearn.json of runs, over
    runs, or over the seeds of a single one; None where relearn.py ran without --curve_every."""
    found = []
    for run in runs:
        result = json.loads((Path(run) / "relearn.json").read_text(encoding="utf-8"))
        budgets = [b for b in result["metrics"]["budgets"] if "curves" in b]
        if not budgets:
            return None
        b = max(budgets, key=lambda b: b["samples"] * b["epochs"])
        found.append([[point["UE"] for point in curve] for curve in b["curves"]])
    batch, most = result["args"]["batch_size"], b["samples"] * b["epochs"]
    seen = [min(point["step"] * batch, most) for point in b["curves"][0]]
    stats = [mean_se(v) for v in zip(*(np.mean(f, axis=0) for f in found) if len(found) > 1 else found[0])]
    return seen, [m for m, _ in stats], [e or 0 for _, e in stats]


def pictures(folder, methods, runs, args):
    """Write ue_bars.png, relearn_curves.png, landscape.png and ue_ut.png into folder; needs matplotlib.

    methods: "methods" of the table, {name: {"rows": {seed: {column: number}}, "mean", "se"}}; runs: {name:
    [run folders]}, the first of which gives the landscape. A picture without data is named and left out.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "savefig.dpi": 200, "savefig.bbox": "tight", "legend.frameon": False})
    folder, ink, UE = Path(folder), dict(zip(methods, itertools.cycle(INK))), "UE (1 − forget accuracy)"
    folder.mkdir(parents=True, exist_ok=True)

    def save(name, figure):
        tmp = folder / f"{name}.tmp{os.getpid()}"
        figure.savefig(tmp, format="png")
        tmp.replace(folder / name)
        plt.close(figure)
        print(f"wrote {folder / name}")

    def chance(ax):
        ax.axhline(0.75, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.text(1.01, 0.75, "chance", color="0.4", size=8, va="center", transform=ax.get_yaxis_transform())

    # -- (a) UE after unlearning and after each relearning budget
    keys = [k for m in methods.values() for k in m["mean"] if re.fullmatch(r"UE( \d+)?", k)]
    keys = list(dict.fromkeys(keys))
    figure, ax = plt.subplots(figsize=(max(3.4, 1.1 * len(methods)), 2.6))
    for i, key in enumerate(keys):
        x = np.arange(len(methods)) + (i - (len(keys) - 1) / 2) * 0.8 / len(keys)
        ax.bar(x, [m["mean"].get(key, math.nan) for m in methods.values()], 0.8 / len(keys),
               yerr=[m["se"].get(key) or math.nan for m in methods.values()], capsize=2, edgecolor="black",
               linewidth=0.5, error_kw={"linewidth": 0.8},
               color=plt.get_cmap("Blues")(0.9 - 0.85 * i / max(1, len(keys) - 1)),
               label=f"relearned on {key[3:]} samples" if " " in key else "unlearned")
    chance(ax)
    ax.set(xticks=range(len(methods)), xticklabels=methods, ylim=(0, 1), ylabel=UE)
    ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    save("ue_bars.png", figure)

    # -- (b) UE along the largest relearning budget
    curves = {name: relearn_curve(runs[name]) for name in methods}
    if all(curves.values()):
        figure, ax = plt.subplots(figsize=(4.2, 2.8))
        for name, (seen, mean, error) in curves.items():
            color, marker, line = ink[name]
            low, high = np.subtract(mean, error), np.add(mean, error)
            ax.fill_between(seen, low, high, color=color, alpha=0.15, linewidth=0)
            ax.plot(seen, mean, line, color=color, marker=marker, markersize=4, linewidth=1.2, label=name)
        chance(ax)
        ax.set(xlabel="forget samples relearned", ylabel=UE, ylim=(0, 1))
        ax.legend()
        save("relearn_curves.png", figure)
    else:
        print("relearn_curves.png left out: run relearn.py --curve_every 1 on every run", file=sys.stderr)

    # -- (c) how the forget loss changes around the weights: surface and contours, one scale for all
    grids = {}
    for name in methods:
        model, tokenizer = load_model(runs[name][0], args.device)
        loss = forget_objective(model, tokenizer, runs[name][0], load_result(runs[name][0]), args)
        grids[name] = landscape(model, loss, args.plot_points) - loss().item()
    low, high = min(z.min() for z in grids.values()), max(z.max() for z in grids.values())
    levels = matplotlib.ticker.MaxNLocator(14).tick_values(low, high)
    at, ticks, n = np.linspace(-0.05, 0.05, args.plot_points), [-0.05, 0, 0.05], len(grids)
    width = 1.7 * n + 1.8                                                                       # inches
    figure = plt.figure(figsize=(width, 3.6))
    figure.subplots_adjust(left=0.9 / width, right=1 - 0.9 / width, wspace=0.3, hspace=0.1)
    for i, (name, z) in enumerate(grids.items()):
        ax = figure.add_subplot(2, n, i + 1, projection="3d")
        ax.plot_surface(*np.meshgrid(at, at, indexing="ij"), z, vmin=levels[0], vmax=levels[-1], rstride=1,
                        cstride=1, cmap="cividis", linewidth=0.1, edgecolor="0.3")
        ax.set(zlim=(levels[0], levels[-1]), xticks=ticks, yticks=ticks, xticklabels=[], yticklabels=[])
        ax.set_box_aspect((1, 1, 0.8), zoom=1.1)
        ax.locator_params("z", nbins=4)
        ax.tick_params(labelsize=7, pad=0)
        ax.set_title(name, y=1)
        ax = figure.add_subplot(2, n, n + i + 1)
        shade = ax.contourf(at, at, z.T, levels, cmap="cividis")
        ax.contour(at, at, z.T, levels, colors="white", linewidths=0.4, linestyles="-")
        ax.plot(0, 0, "+", color="white")
        ax.set(aspect="equal", xticks=ticks, yticks=ticks, xlabel="direction 1")
        ax.tick_params(labelsize=7, labelleft=i == 0)
        if i == 0:
            ax.set_ylabel("direction 2\n(share of filter norm)")
    box = ax.get_position()
    figure.colorbar(shade, cax=figure.add_axes([box.x1 + 0.1 / width, box.y0, 0.1 / width, box.height]),
                    label="change of the\nforget loss (nats)", ticks=levels[::4])
    save("landscape.png", figure)

    # -- (d) forgetting against utility, one point a seed and the mean
    figure, ax = plt.subplots(figsize=(3.4, 2.8))
    for name, m in methods.items():
        color, marker, _ = ink[name]
        ax.scatter([r["UT"] for r in m["rows"].values()], [r["UE"] for r in m["rows"].values()], s=14,
                   color=color, marker=marker, alpha=0.4, linewidths=0)
        ax.errorbar(m["mean"]["UT"], m["mean"]["UE"], xerr=m["se"]["UT"], yerr=m["se"]["UE"], color=color,
                    marker=marker, markersize=7, capsize=2, linewidth=0.8, markeredgecolor="black",
                    markeredgewidth=0.5, linestyle="none", label=name)
    chance(ax)
    ax.set(xlabel="UT (accuracy on the rest)", ylabel=UE)
    ax.locator_params(nbins=5)
    ax.margins(0.15)
    ax.legend(loc="upper left", bbox_to_anchor=(1.12, 1))
    save("ue_ut.png", figure)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of unlearn.py, or data/tiny/seedS/retrained")
    parser.add_argument("--baseline", default=None,
                        help="method to compare with, by seed (default: the first)")
    parser.add_argument("--data", default=None, help="data folder (default: each run's own)")
    parser.add_argument("--ppl_rows", type=number(int, 1), default=1024,
                        help="most rows of a corpus for perplexity")
    some, real = number(int, 1), number(float, 0, above=True)
    parser.add_argument("--attack", choices=["prefix"], default=None,
                        help="search one prefix that brings forget questions back")
    parser.add_argument("--attack_method", choices=list(METHODS), default="gcg+",
                        help="gcg: cross-entropy and swaps only; random: the best of random prefixes")
    parser.add_argument("--attack_calls", type=some, default=4000, help="model calls, the budget")
    parser.add_argument("--attack_questions", type=some, default=8, help="forget questions searched on")
    parser.add_argument("--attack_length", type=some, nargs=2, default=[32, 100], metavar=("MIN", "MAX"),
                        help="tokens; the minimum grows from MIN to MAX, both cut to the context's room")
    parser.add_argument("--attack_weights", type=number(float, 0), nargs=5, default=None,
                        metavar=("CE", "L2", "COSINE", "FLUENCY", "REPEAT"), help="(default: the method's)")
    parser.add_argument("--attack_moves", type=number(float, 0), nargs=4, default=None,
                        metavar=("SWAP", "DELETE", "INSERT", "SAMPLE"), help="shares (default: the method's)")
    parser.add_argument("--attack_buffer", type=some, default=None,
                        help="prefixes kept to start from (default: the method's)")
    parser.add_argument("--attack_candidates", type=some, default=16, help="prefixes tried an iteration")
    parser.add_argument("--attack_topk", type=some, default=64, help="tokens considered at each place")
    parser.add_argument("--attack_answer", type=some, default=10,
                        help="tokens of the answer; at most the longest choice's where choices are answers")
    parser.add_argument("--attack_every", type=number(int, 0), default=0,
                        help="calls between UE on the curve and saves (0: a twentieth of the budget)")
    parser.add_argument("--attack_seed", type=number(int, 0), default=0, help="of questions and search")
    parser.add_argument("--teacher", default=None,
                        help="the model before unlearning (default: the run's --model)")
    parser.add_argument("--sharpness", choices=["own", "nll"], default=None,
                        help="of the run's own forget loss, or of the attacker's: mean NLL of forget text")
    parser.add_argument("--sharpness_rows", type=some, default=64, help="rows of forget.jsonl, evenly spaced")
    parser.add_argument("--sharpness_rho", type=real, default=0.1, help="radius of the rise; 7B: .01")
    parser.add_argument("--sharpness_steps", type=some, default=100, help="most power iterations")
    parser.add_argument("--sharpness_probes", type=some, default=32, help="random signs for the trace")
    parser.add_argument("--plot", default=None, metavar="FOLDER", help="write pictures there (matplotlib)")
    parser.add_argument("--plot_points", type=some, default=21, help="of the loss landscape, along a side")
    parser.add_argument("--json", default=None, metavar="PATH", help="write the table there as well")
    parser.add_argument("--overwrite", action="store_true", help="score again what is up to date")
    args = parser.parse_args()

    with one_line_errors():
        folders = defaultdict(list)                   # settings -> run folders
        groups, names = defaultdict(dict), {}         # settings -> {seed: {column: number}}, settings -> name
        for run in tqdm(args.runs, desc="scoring", unit="run", disable=len(args.runs) < 2):
            done, metrics = score(run, args)
            metrics = extras(run, done, metrics, args)
            name, settings = method(done)
            seed = done["args"]["seed"]
            if seed in groups[settings]:
                raise InputError(
                    f"{run}: a second run of {name} with seed {seed} and the same settings; drop one")
            groups[settings][seed], names[settings] = columns(run, metrics), name
            folders[settings].append(run)
        for name in set(names.values()):               # same name, other settings: add what differs
            twins = {s: json.loads(s) for s in names if names[s] == name}
            values = {k: {json.dumps(p.get(k)) for p in twins.values()} for p in twins.values() for k in p}
            for s, p in twins.items():
                names[s] = name + "".join(f" {k}={p.get(k)}" for k in sorted(values) if len(values[k]) > 1)
        base = next((s for s in groups if args.baseline in (None, names[s])), None)
        if base is None:
            raise InputError(f"--baseline {args.baseline}: not among {', '.join(names.values())}")

        keys = list(dict.fromkeys(k for group in groups.values() for row in group.values() for k in row))
        out = {"args": vars(args), "methods": {}, "paired": {}}
        for s, group in groups.items():
            stats = {k: mean_se([row[k] for row in group.values() if k in row]) for k in keys
                     if any(k in row for row in group.values())}
            out["methods"][names[s]] = {"rows": group, "mean": {k: v[0] for k, v in stats.items()},
                                        "se": {k: v[1] for k, v in stats.items()}}
            if s != base:
                out["paired"][names[s]] = compare(group, groups[base], keys)
        relearned = [k for k in keys if " " in k]    # "UE 20" and so on: a table of their own for each prefix
        prefixes = list(dict.fromkeys(k.rsplit(" ", 1)[0] for k in relearned))
        blocks = [("scores", [k for k in keys if k not in relearned])] + [
            (prefix + " after relearning" * (prefix in ("UE", "held out", "UT")),
             [k for k in relearned if k.rsplit(" ", 1)[0] == prefix]) for prefix in prefixes]
        for title, block in blocks:
            print(f"\n{title}")
            lines = [["method", "seeds"] + [k.rsplit(" ", 1)[-1] for k in block]]
            for name, m in out["methods"].items():
                cells = [cell(m["mean"][k], m["se"][k]) if k in m["mean"] else "-" for k in block]
                lines.append([name, str(len(m["rows"]))] + cells)
            print(table(lines))
        paired = []
        for name, by in out["paired"].items():
            for key, c in by.items():
                if key.startswith(("UE", "held", "UT")):
                    test = ["-", "-"] if c["t"] is None else [f"{c['t']:.1f}", f"{c['p']:.1g}"]
                    paired.append([name, key, f"{c['mean']:+.3f}", *test, f"{c['higher']}/{c['n']}"])
        if paired:
            print(f"\ndifference to {names[base]}, paired by seed")
            print(table([["method", "column", "difference", "t", "p", "higher"]] + paired))
        out["spearman"] = flat_and_robust(groups, out["methods"])
        if out["spearman"]:
            print("\nis flatter more robust? Spearman's rank correlation with UE after attack, below 0 if so")
            print(table([["sharpness", "attack", "over", "n", "rho", "p"]] + [
                [*r[:3], str(r[3]), f"{r[4]:+.2f}", f"{r[5]:.2g}"] for r in out["spearman"]]))
        if args.json:
            write_json(args.json, out)
        if args.plot:
            pictures(args.plot, out["methods"], {names[s]: folders[s] for s in groups}, args)
