"""Score models and compare methods: multiple choice, open questions, perplexity, what relearning brings back.

    python evaluate.py out/npo-s0 out/npo+sam-s0      # one table; about 2 s a run the first time
    python evaluate.py out/* --baseline npo           # runs that differ only in seed become mean and standard
                                                      # error; each method against the baseline, pair by pair
    python evaluate.py MODEL --data data/muse/news --limit 20      # any Hugging Face folder, a quick look

The files of the data folder decide what is measured: UE and UT, and the metrics of MUSE and TOFU. Reads
RUN/result.json, the model beside it, DATA/*.jsonl and, where it exists, RUN/relearn.json. Writes
RUN/evaluate.json (kept while it is newer than the model) and, with --json, the table.

Multiple choice alone overstates forgetting (arXiv 2510.07626), so open questions are asked too: the share
whose answer is, token for token, what the model says greedily. UE = 1 - accuracy on mcq_forget, UT = accuracy
on mcq_retain.
"""
import argparse, csv, io, json, logging, math, os, re, resource, subprocess, sys, time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sam import accumulator

IGNORE = -100                                # the label of a token that no loss looks at: prompt and padding
LETTERS = ("The following are multiple choice questions (with answers) about {subject}.\n\n{question}\n"
           "A. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:")      # the prompt of lm-evaluation-harness, 0-shot
QA = "Question: {question}\nAnswer: {answer}"               # where meta.json has no "qa_prompt"
PASS_TOKENS = 8192                           # most tokens of a pass, with its padding: bounds memory
# Shapes: B samples, T tokens, V vocabulary. unlearn.py and relearn.py read data and models with this file;
# data/*/prepare.py read with it what others published.


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


def make_parser(doc, device=True):
    """ArgumentParser with doc as its help and, mostly, --device; errors are one line, exit status 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def error(message):
        print(f"error: {message} (--help lists every flag)", file=sys.stderr)
        sys.exit(2)
    parser.error = error
    if device:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", type=usable_device, default=found, help="cpu, cuda, cuda:1, ...")
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


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 ({e}): convert it")


def json_lines(path):
    """(line number, value) of each line of a JSON-lines file that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as e:
                raise InputError(f"{path}:{number}: not JSON ({e}): one JSON object a line is expected")


def read_jsonl(path, check, parse=json_lines):
    """The rows of a JSON-lines file, each through check(row) -> row, which raises InputError on a bad one.

    Every row also gets "where", its file and line, for the errors that only show later. Another `parse`, a
    function path -> (number, value) pairs, reads another format.
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise InputError(f"{path} is missing: prepare the data (data/README.md) or point --data elsewhere")
    for number, value in parse(path):
        try:
            rows.append(check(value) | {"where": f"{path}:{number}"})
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


# ---- published data sets, for data/*/prepare.py -----------------------------------------------------------

def json_values(path):
    """(row number, value) of a .json file, which may hold one array or, as TOFU's do, a value a line."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        yield from json_lines(path)
        return
    try:
        yield from enumerate(json.loads(text), 1)
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e}): is the file cut off? Download it again")


def csv_rows(path):
    """(line number, list of cells) of a CSV file without a header."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as e:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({e}): is the file cut off? Download it again")


def parquet_rows(path):
    """(row number, dict) of a parquet file; needs the package `datasets`."""
    try:
        from datasets import load_dataset           # not a requirement: only published data sets use parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet takes one more package: pip install datasets")
    logging.getLogger("datasets").setLevel(logging.CRITICAL)      # a broken file is one line, and it is ours
    try:
        yield from enumerate(load_dataset("parquet", data_files=str(path), split="train", streaming=True), 1)
    except (ValueError, OSError) as e:
        raise InputError(f"{path}: not a whole parquet file ({e}): download it again")


FORMATS = {".parquet": parquet_rows, ".jsonl": json_lines, ".json": json_values, ".csv": csv_rows}


def fetch(repo, names, folder=None):
    """The folder that holds a data set: `folder`, or a download of those files of the hub data set `repo`
    whose path starts with one of names."""
    if folder:
        if not Path(folder).is_dir():
            raise InputError(f"--from {folder}: no such folder")
        return Path(folder)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[f"{n}*" for n in names]))
    except (OSError, ValueError) as e:
        raise InputError(f"{repo} does not download ({e}): put its files in a folder and pass --from FOLDER")


def read_published(folder, names, check, count=None):
    """The rows of the first of names that folder holds, as NAME.EXT or in parts NAME-00000-of-00002.EXT.

    Each goes through check as in read_jsonl. Other than `count` rows, where count is given, is an error.
    """
    for name in names:
        for kind, parse in FORMATS.items():
            paths = sorted([*folder.glob(name + kind), *folder.glob(f"{name}-*-of-*{kind}")])
            if paths:
                rows = [row for path in paths for row in read_jsonl(path, check, parse)]
                if count is not None and len(rows) != count:
                    raise InputError(f"{paths[0]}: {len(rows):,} rows, but {count:,} are published: cut off, "
                                     "or another version? Download it again, or take it with --any_count")
                return rows
    raise InputError(f"{folder} has no {' or '.join(names)} ({', '.join(FORMATS)}): see the data's readme.md")


def write_data(folder, files, meta=None):
    """Write {name: rows} as folder/NAME.jsonl, and meta.json, each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        tmp = folder / f"{name}.jsonl.tmp{os.getpid()}"
        with open(tmp, "w", encoding="utf-8") as f:
            f.writelines(json.dumps({k: v for k, v in row.items() if k != "where"}) + "\n" for row in rows)
        tmp.replace(folder / f"{name}.jsonl")
        print(f"{os.path.relpath(folder / name)}.jsonl: {len(rows):,} rows")
    if meta:
        write_json(folder / "meta.json", meta)


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


def batches(lengths, size, tokens=PASS_TOKENS):
    """Lists of indices, shortest first: at most `size` in each, and at most `tokens` with the padding."""
    part = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if part and (len(part) == size or lengths[i] * (len(part) + 1) > tokens):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def progress(total, desc):
    """A bar that appears after two seconds and leaves nothing behind."""
    return tqdm(total=total, desc=desc, unit="sample", leave=False, delay=2)


@torch.no_grad()
def label_logits(model, tokenizer, samples, batch=64, desc="scoring"):
    """(index, (n, V) logits, (n,) labels) of each encoded sample: what the model says where a label is due.

    Logits before a batch's first label are not computed: on questions, whose labels come last, almost all of
    B x T x V. A model that does not know logits_to_keep returns them, and they are dropped here.
    """
    bar = progress(len(samples), desc)
    for part in batches([len(ids) for ids, _ in samples], batch):
        x = collate([samples[i] for i in part], tokenizer.pad_token_id or 0, model.device)
        width = x["labels"].shape[1]
        first = min(next(t for t in range(1, width) if samples[i][1][t] != IGNORE) for i in part)
        keep = width - first + 1                                     # the last position predicts nothing here
        logits = model(input_ids=x["input_ids"], attention_mask=x["attention_mask"],
                       logits_to_keep=keep).logits[:, -keep:-1]                               # (B, keep-1, V)
        for row, i in enumerate(part):
            labels = x["labels"][row, first:]                                                      # (keep-1,)
            here = labels != IGNORE
            yield i, logits[row, here], labels[here]
        bar.update(len(part))
    bar.close()


def label_scores(model, tokenizer, samples, batch=64, desc="scoring"):
    """[((n,) fp64 log-probability of each label, (n,) bool: is it the likeliest token?)], one a sample."""
    out = [None] * len(samples)
    for i, logits, labels in label_logits(model, tokenizer, samples, batch, desc):
        logps = logits.to(accumulator(logits.dtype)).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        out[i] = logps.double().cpu(), (logits.argmax(-1) == labels).cpu()
    return out


# ---- questions --------------------------------------------------------------------------------------------

def mcq_row(row):
    """Check a row of mcq_*.jsonl: {"question", "choices": [4 texts], "answer": 0-3}."""
    check_texts(row, "question")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) != 4 or not all(isinstance(c, str) for c in choices):
        raise InputError(f'"choices" is {choices!r}: give a list of exactly 4 texts')
    if type(row.get("answer")) is not int or not 0 <= row["answer"] <= 3:
        raise InputError(f'"answer" is {row.get("answer")!r}: give the index of the right choice, 0 to 3')
    return row


def load_meta(folder):
    """A data folder's meta.json as a dict, {} without one."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        meta.get("prompt")
    except (json.JSONDecodeError, AttributeError) as e:
        raise InputError(f"{path}:1: not a JSON object ({e}): mend it or remove it")
    for key, fields in (("prompt", ["{question}"]), ("qa_prompt", ["{question}", "{answer}"])):
        if key in meta and not all(field in str(meta[key]) for field in fields):
            raise InputError(f'{path}:1: "{key}" is {meta[key]!r}: put {" and ".join(fields)} in it')
    return meta


def load_questions(folder):
    """A data folder's mcq_*.jsonl: {"mcq_forget": rows, "mcq_retain": rows, ..., "prompt": template or None}.

    meta.json may give a "prompt" with {question} in it: then the choices' own texts are scored after it.
    Without one, the question and its choices are shown as LETTERS and " A" to " D" are scored.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"data folder {folder}: not found from here; name it with --data")
    prompt = load_meta(folder).get("prompt")
    return {**{f.stem: read_jsonl(f, mcq_row) for f in sorted(folder.glob("mcq_*.jsonl"))}, "prompt": prompt}


def ask(row, prompt):
    """(context, four continuations) of a multiple-choice row."""
    question = row["question"].strip()
    if prompt:
        return prompt.replace("{question}", question), [" " + c.strip() for c in row["choices"]]
    subject = row.get("subject", "the topic").replace("_", " ")
    return LETTERS.format(*row["choices"], question=question, subject=subject), [" A", " B", " C", " D"]


def choice_logps(model, tokenizer, rows, prompt=None, batch=64):
    """(N, 4) fp64 summed log-probability of each choice after its context, both tokenised together.

    One forward pass a question where the four choices are one token each, else one a choice.
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
    for i, logits, labels in label_logits(model, tokenizer, [job[0] for job in jobs], batch, "questions"):
        _, q, choice, four = jobs[i]
        logps = logits.to(accumulator(logits.dtype)).log_softmax(-1)                      # (answer tokens, V)
        out[q, choice] = (logps[0, four] if four else logps.gather(-1, labels[:, None]).sum()).double().cpu()
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


def open_accuracy(model, tokenizer, rows, prompt, batch=64):
    """Share of questions whose greedy continuation starts, token for token, with the right answer.

    Greedy decoding gives the answer if and only if each of its tokens is the argmax after the ones before it,
    so one forward pass with the answer in place says what generating would.
    """
    asked = [(start, choices[row["answer"]], row["where"]) for row in rows
             for start, choices in [ask(row, prompt)]]
    samples = encode(tokenizer, asked, context_of(model))
    scores = label_scores(model, tokenizer, samples, batch, "open questions")
    return sum(hits.all().item() for _, hits in scores) / len(rows)


def corpus_scores(model, tokenizer, rows, max_len=0, batch=64):
    """{"ppl", "es", "em"} of rows of a corpus, and their per-row records.

    ppl  exp(mean negative log-probability of a label), over all tokens of all rows
    es   extraction strength, mean over rows: extraction_strength
    em   exact memorisation (arXiv 2205.10770), mean over rows: share of labels that are the likeliest token
    """
    samples = encode_rows(tokenizer, rows, 0, max_len or context_of(model))
    scores = label_scores(model, tokenizer, samples, batch, "corpus")
    records = [{"where": row["where"], "nll": -logps.mean().item(), "es": extraction_strength(hits.tolist()),
                "em": hits.double().mean().item()} for row, (logps, hits) in zip(rows, scores)]
    nll = -torch.cat([logps for logps, _ in scores]).mean().item()
    ppl = math.exp(min(nll, 700.0))                  # an unlearned model can pass fp64's largest exponent
    return {"ppl": ppl, "es": mean_of(records, "es"), "em": mean_of(records, "em")}, records


# ---- text metrics: pure functions -------------------------------------------------------------------------

def spaced(rows, limit):
    """At most `limit` of rows, evenly spaced; 0 = all."""
    return rows[::math.ceil(len(rows) / limit)] if limit else rows


def mean_of(records, key):
    """Mean of records[i][key]."""
    return math.fsum(r[key] for r in records) / len(records)


def rouge_l(said, truth):
    """(precision, recall, F1) of ROUGE-L: the longest common subsequence of the two texts' lower-case
    [a-z0-9]+ words, over the number of words said, of true words, and their harmonic mean. No stemming."""
    said, truth = (re.findall("[a-z0-9]+", text.lower()) for text in (said, truth))
    row = [0] * (len(truth) + 1)            # row[j]: longest common subsequence with the first j true words
    for a in said:
        diagonal = 0
        for j, b in enumerate(truth, 1):
            row[j], diagonal = diagonal + 1 if a == b else max(row[j], row[j - 1]), row[j]
    if not row[-1]:
        return 0.0, 0.0, 0.0
    p, r = row[-1] / len(said), row[-1] / len(truth)
    return p, r, 2 * p * r / (p + r)


def lowest_mean(logps, share=0.4):
    """Min-K%: minus the mean of the lowest `share` of a text's token log-probabilities (n,)."""
    return -np.sort(np.asarray(logps))[:max(1, int(share * len(logps)))].mean().item()


def auc(a, b):
    """Probability that a value of a is above one of b; a tie counts half. The area under the ROC curve."""
    b = np.sort(b)
    return float((np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")).mean() / (2 * len(b)))


def extraction_strength(hits):
    """1 - k/n for n labels: k is the shortest prefix after which greedy decoding gives all that follows.

    hits says for each label whether it is the likeliest token after the true ones before it, so k ends at the
    last miss. (open-unlearning never lets k reach n: a wrong last token gives 1/n there and 0 here.)
    """
    misses = [i for i, hit in enumerate(hits) if not hit]
    return 1 - (misses[-1] + 1 if misses else 0) / len(hits)


def truth_ratio(paraphrased, perturbed):
    """TOFU's R (arXiv 2401.06121): exp(mean of the wrong answers' mean token log-probabilities - that of the
    paraphrased right answer). Below 1: the model prefers what is true."""
    return math.exp(min(sum(perturbed) / len(perturbed) - paraphrased, 700.0))


def harmonic_mean(values):
    """n / sum(1/v); 0 if any value is 0."""
    return len(values) / math.fsum(1 / v for v in values) if all(values) else 0.0


def ks_test(a, b):
    """(D, p) of the two-sample Kolmogorov-Smirnov test: the largest distance of the two empirical
    distributions, and the exact probability that two samples of one, without ties, are as far apart.

    All orders of the n + m values are equally likely: walks from (0, 0) to (n, m). p is what leaves the band
    |i/n - j/m| < D on the way, summed as it leaves, so that a p of 1e-20 is right as well.
    """
    n, m, both = len(a), len(b), np.concatenate([a, b])
    below = lambda x: np.searchsorted(np.sort(x), both, "right")
    d = np.abs(below(a) * m - below(b) * n).max()                # in units of 1/nm: exact
    i, p = np.arange(n + 1), 0.0
    mass = np.where(i == 0, 1.0, 0.0)                  # (n+1,) probability of being at i and still inside
    for step in range(1, n + m + 1):
        left = n + m - step + 1
        up = np.concatenate([[0.0], mass[:-1] * (n - i[:-1]) / left])      # the next value is one of a,
        mass = mass * np.clip(m - (step - 1 - i), 0, None) / left + up     # or of b
        out = np.abs(i * m - (step - i) * n) >= d
        p, mass = p + mass[out].sum(), np.where(out, 0.0, mass)
    return float(d / (n * m)), float(min(p, 1.0))


# ---- generation -------------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, tokenizer, prompts, new, batch=64, desc="generating"):
    """The greedy continuation of each of prompts, [(text, where)]: texts of at most `new` tokens, cut at eos.

    Padded on the left, so that all rows of a batch continue at its end; the mask keeps the padding out of
    attention and positions.
    """
    encoded = tokenizer([text for text, _ in prompts], return_attention_mask=False, verbose=False).input_ids
    context, pad, texts = context_of(model), tokenizer.pad_token_id or 0, [None] * len(prompts)
    for ids, (_, where) in zip(encoded, prompts):
        if context and len(ids) + new > context:
            raise InputError(f"{where}: {len(ids)} tokens and {new} new ones, but the model's context is "
                             f"{context}: shorten the text or take another model")
    own = model.generation_config
    ends = {tokenizer.eos_token_id, *np.atleast_1d(own.eos_token_id).tolist()} - {None}
    # greedy is argmax: no repetition penalty or forced token that a checkpoint brings along
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=pad,
                                               eos_token_id=sorted(ends) or None)
    bar = progress(len(prompts), desc)
    try:
        for part in batches([len(ids) + new for ids in encoded], batch, 4 * PASS_TOKENS):
            width = max(len(encoded[i]) for i in part)
            ids = torch.tensor([[pad] * (width - len(encoded[i])) + encoded[i] for i in part])        # (B, T)
            mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in part])
            out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))[:, width:]
            for i, said in zip(part, out.tolist()):
                end = next((t for t, token in enumerate(said) if token in ends), new)
                texts[i] = tokenizer.decode(said[:end], skip_special_tokens=True)
            bar.update(len(part))
    finally:
        model.generation_config = own
        bar.close()
    return texts


# ---- MUSE and TOFU ----------------------------------------------------------------------------------------

def verbmem(model, tokenizer, rows, new=128, batch=64):
    """MUSE VerbMem records of {"prompt", "gt"} rows: ROUGE-L F1 of `new` greedy tokens with as many of gt."""
    said = generate(model, tokenizer, [(r["prompt"], r["where"]) for r in rows], new, batch, "verbmem")
    truth = tokenizer([r["gt"] for r in rows], add_special_tokens=False, verbose=False).input_ids
    return [{"where": r["where"], "said": s, "rouge": rouge_l(s, tokenizer.decode(ids[:new]))[2]}
            for r, s, ids in zip(rows, said, truth)]


def knowmem(model, tokenizer, rows, icl, new=32, batch=64):
    """MUSE KnowMem records of {"question", "answer"} rows, asked after the answered questions of icl: ROUGE-L
    F1 of the greedy answer, cut where it begins another question."""
    shown = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in icl)
    asked = [(f"{shown}Question: {r['question']}\nAnswer: ", r["where"]) for r in rows]
    said = [re.split("\n\n|\nQuestion|Question:", text)[0]
            for text in generate(model, tokenizer, asked, new, batch, "knowmem")]
    return [{"where": r["where"], "said": s, "rouge": rouge_l(s, r["answer"])[2]} for r, s in zip(rows, said)]


def membership(model, tokenizer, rows, batch=64):
    """PrivLeak records of {"text"} rows: Min-40% of each text, cut to the model's context."""
    samples = encode_rows(tokenizer, rows, 0, context_of(model))
    scores = label_scores(model, tokenizer, samples, batch, "privleak")
    return [{"where": r["where"], "min_k": lowest_mean(logps)} for r, (logps, _) in zip(rows, scores)]


def qa_row(row):
    """Check a row of qa_*.jsonl: {"question", "answer", "perturbed_answer": [texts]} and, optional,
    "paraphrased_answer"."""
    check_texts(row, "question", "answer", *(["paraphrased_answer"] if "paraphrased_answer" in row else []))
    wrong = row.get("perturbed_answer")
    if not isinstance(wrong, list) or not wrong or not all(isinstance(w, str) and w.strip() for w in wrong):
        raise InputError(f'"perturbed_answer" is {wrong!r}: give a list of wrong answers')
    return row


def qa_texts(template, question, answer):
    """(prompt, completion) of a question by a template with {question} and {answer}. Spaces before the answer
    go with it: a tokenizer makes them part of its first word."""
    head, _, tail = template.partition("{answer}")
    start = head.rstrip(" ")
    return start.replace("{question}", question), head[len(start):] + answer + tail


def qa_scores(model, tokenizer, rows, template=QA, new=200, batch=64):
    """TOFU records: "prob" exp(mean log p of the answer), "R" truth_ratio, "rouge" recall of a greedy answer.

    Rows without a paraphrased_answer (TOFU's real authors and world facts) go as in TOFU: the answer stands
    in for it, and prob is divided by the sum over the answer and the wrong ones. TOFU's own code also counts
    the end-of-text token as part of an answer, and stems before ROUGE; this does neither.
    """
    answers = [[r["answer"], r.get("paraphrased_answer", r["answer"]), *r["perturbed_answer"]] for r in rows]
    triples = [(*qa_texts(template, r["question"], a), r["where"])
               for r, some in zip(rows, answers) for a in some]
    samples = encode(tokenizer, triples, context_of(model))
    scores = iter(label_scores(model, tokenizer, samples, batch, "answers"))
    asked = [(qa_texts(template, r["question"], "")[0], r["where"]) for r in rows]
    out = []
    for row, some, said in zip(rows, answers, generate(model, tokenizer, asked, new, batch, "answers")):
        answer, paraphrased, *wrong = (next(scores)[0].mean().item() for _ in some)
        prob = math.exp(answer)
        if "paraphrased_answer" not in row:
            prob = 1 / (1 + math.fsum(math.exp(min(w - answer, 700.0)) for w in wrong))
        out.append({"where": row["where"], "said": said, "prob": prob, "R": truth_ratio(paraphrased, wrong),
                    "rouge": rouge_l(said, row["answer"])[1]})
    return out


def qa_summary(name, records):
    """{"prob", "rouge", "truth"}: means over records; truth of R is min(R, 1/R) for the forget set, which is
    best at 1, and max(0, 1 - R) for what should be kept."""
    truth = [min(r["R"], 1 / max(r["R"], 1e-300)) if name == "qa_forget" else max(0.0, 1 - r["R"])
             for r in records]
    return {"prob": mean_of(records, "prob"), "rouge": mean_of(records, "rouge"),
            "truth": math.fsum(truth) / len(truth)}


def published_metrics(model, tokenizer, data, batch, thin, records, retained):
    """The MUSE and TOFU metrics that the files of folder `data` allow; adds their per-question records.

    thin(rows) -> rows to score. retained is the evaluate.json of a model that never saw the forget set, or
    None: PrivLeak and the forget quality compare with it.
    """
    out, meta = {}, load_meta(data)
    read = lambda name, check: thin(read_jsonl(data / f"{name}.jsonl", check))
    both = lambda *keys: lambda row: (check_texts(row, *keys), row)[1]
    has = lambda *names: all((data / f"{name}.jsonl").is_file() for name in names)
    if has("verbmem_forget"):
        rows = read("verbmem_forget", both("prompt", "gt"))
        records["verbmem"] = verbmem(model, tokenizer, rows, batch=batch)
        out["verbmem"] = mean_of(records["verbmem"], "rouge")
    for name in ("knowmem_forget", "knowmem_retain"):
        if has(name):
            icl = read_jsonl(data / f"{name}_icl.jsonl", both("question", "answer"))
            rows = read(name, both("question", "answer"))
            records[name] = knowmem(model, tokenizer, rows, icl, batch=batch)
            out[name] = mean_of(records[name], "rouge")
    if has("privleak_forget", "privleak_holdout"):
        for name in ("privleak_forget", "privleak_holdout"):
            records[name] = membership(model, tokenizer, read(name, text_row), batch)
        out["auc"] = auc(*([r["min_k"] for r in records[f"privleak_{k}"]] for k in ("forget", "holdout")))
        reference = retained["metrics"]["auc"] if retained else meta.get("auc_retrain")
        if reference:
            out["privleak"] = 100 * (out["auc"] - reference) / reference
    for path in sorted(data.glob("qa_*.jsonl")):
        rows = read(path.stem, qa_row)
        records[path.stem] = qa_scores(model, tokenizer, rows, meta.get("qa_prompt", QA), batch=batch)
        out[path.stem] = qa_summary(path.stem, records[path.stem])
    kept = [out.get(f"qa_{name}") for name in ("retain", "real_authors", "world_facts")]
    if all(kept):
        out["utility"] = harmonic_mean([v for summary in kept for v in summary.values()])
    if "qa_forget" in out and retained:
        ratios = ([r["R"] for r in some["qa_forget"]] for some in (records, retained["records"]))
        out["forget_quality"] = ks_test(*ratios)[1]
    return out


# ---- statistics -------------------------------------------------------------------------------------------

def mean_se(values):
    """(mean, standard error of the mean); the error is None for a single value."""
    v = np.asarray(values, dtype=float)
    return float(v.mean()), float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None


def t_test(differences):
    """(t, two-sided p) that the mean of n >= 2 paired differences is 0 (Student); None without any spread.

    With t = sqrt(k) tan(a), k = n - 1, the density goes as cos(a)^(k-1): p is a ratio of two integrals.
    """
    mean, se = mean_se(differences)
    if not se:
        return None, None
    k, t = len(differences) - 1, mean / se
    area = lambda a: np.trapezoid(np.cos(np.linspace(a, math.pi / 2, 20001)) ** (k - 1), dx=math.pi / 2 - a)
    return t, float(area(math.atan(abs(t) / math.sqrt(k))) / area(0.0))


# ---- runs and tables --------------------------------------------------------------------------------------

def load_result(run):
    """RUN/result.json of unlearn.py or data/tiny/prepare.py; an equivalent for a plain Hugging Face one."""
    path = Path(run) / "result.json"
    if not path.is_file() and (Path(run) / "config.json").is_file():
        return {"stage": "model", "args": {"model": str(run), "data": None, "seed": 0}}
    if not path.is_file():
        raise InputError(f"{path} is missing: {run} is not a run folder of unlearn.py")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e}): run unlearn.py again")


def method(result):
    """(short name, settings: its args but seed and paths) of a run; runs that agree in both are averaged."""
    args = result["args"]
    if result["stage"] == "model":
        return Path(args["model"]).name, json.dumps({"model": args["model"]})
    if result["stage"] == "prepare":
        name = "retrained" if args["exclude"] == "forget" else "target"
    else:
        name = args["loss"] + ("" if args["smooth"] == "none" else f"+{args['smooth']}")
        name += " flipped" if args["sam_flip"] else ""
    skip = ("seed", "out", "data", "model", "overwrite", "relearn", "device", "eval_every")
    return name, json.dumps({k: v for k, v in args.items() if k not in skip}, sort_keys=True)


def columns(run, metrics):
    """One run as {column: number}: its scores, then those of relearn.json where it exists."""
    row = {"UE": metrics["UE"], "UT": metrics["UT"],
           **{k: v for k, v in metrics.items() if isinstance(v, float)},
           **{f"qa_forget_{k}": v for k, v in metrics.get("qa_forget", {}).items()}}
    path = Path(run) / "relearn.json"
    budgets = json.loads(path.read_text(encoding="utf-8"))["metrics"]["budgets"] if path.is_file() else []
    for b in budgets:
        tag = f"{b['samples']}" + (f"x{b['epochs']}" if b["epochs"] > 1 else "")
        tag += f"@{b['lr']:g}" if b["lr"] != budgets[0]["lr"] else ""
        row |= {f"UE {tag}": b["UE"], f"held out {tag}": b["UE_heldout"], f"UT {tag}": b["UT"]}
    return {k: v for k, v in row.items() if v is not None}


def score(run, args):
    """(result.json, metrics) of one run folder; writes its evaluate.json, or reads it when up to date."""
    start, run = time.time(), Path(run)
    done, path = load_result(run), run / "evaluate.json"
    settings = {"run": str(run), "data": args.data or done["args"]["data"], "ppl_rows": args.ppl_rows,
                "max_len": done["args"].get("max_len", 0), "limit": args.limit, "bos": args.bos,
                "retain_run": args.retain_run, "device": args.device,
                "param_dtype": args.param_dtype or done["args"].get("param_dtype", "float32")}
    if settings["data"] is None:
        raise InputError(f"{run} is a plain model and names no data: add --data FOLDER")
    retained = None
    if args.retain_run:                               # scored on the same questions, unless it was already
        more = {"retain_run": None, "data": settings["data"], "records": True, "overwrite": False}
        score(args.retain_run, argparse.Namespace(**vars(args) | more))
        retained = json.loads((Path(args.retain_run) / "evaluate.json").read_text(encoding="utf-8"))
    newer = path.is_file() and path.stat().st_mtime >= (run / "config.json").stat().st_mtime
    if newer and not args.overwrite:
        old = json.loads(path.read_text(encoding="utf-8"))
        if old["args"] == settings and (not args.records or "records" in old):
            return done, old["metrics"]
    questions, data, batch = load_questions(settings["data"]), Path(settings["data"]), args.batch_size
    prompt = questions.pop("prompt")
    model, tokenizer = load_model(run, args.device, getattr(torch, settings["param_dtype"]))
    if args.bos == "none":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    metrics, records, thin = {"UE": None, "UT": None}, {}, lambda rows: spaced(rows, args.limit)
    for name, rows in questions.items():
        rows = thin(rows)
        logps = choice_logps(model, tokenizer, rows, prompt, batch)
        records[name] = [{"where": r["where"], "answer": r["answer"], "choice": c, "logps": l}
                         for r, c, l in zip(rows, logps.argmax(1).tolist(), logps.tolist())]
        accuracy = sum(r["choice"] == r["answer"] for r in records[name]) / len(rows)
        metrics |= {"UE": 1 - accuracy} if name == "mcq_forget" else {
            "UT" if name == "mcq_retain" else name: accuracy}
        if prompt and name in ("mcq_forget", "mcq_retain"):
            metrics[name.replace("mcq", "open")] = open_accuracy(model, tokenizer, rows, prompt, batch)
    for part in ("forget", "retain"):
        if (data / f"{part}.jsonl").is_file():
            rows = thin(spaced(read_jsonl(data / f"{part}.jsonl", text_row), args.ppl_rows))
            scores, records[part] = corpus_scores(model, tokenizer, rows, settings["max_len"], batch)
            metrics |= {f"{k}_{part}": v for k, v in scores.items()}
    metrics |= published_metrics(model, tokenizer, data, batch, thin, records, retained)
    bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    metrics |= {"template": prompt or LETTERS, "bos": bos}
    result = {"stage": "evaluate", "args": settings, **provenance(args.device, start), "metrics": metrics,
              **({"records": records} if args.records else {})}
    write_json(path, result)
    return done, metrics


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


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+",
                        help="folders of unlearn.py, or of any Hugging Face model (then add --data)")
    parser.add_argument("--baseline", default=None,
                        help="method to compare with, by seed (default: the first)")
    parser.add_argument("--data", default=None, help="data folder (default: each run's own)")
    parser.add_argument("--ppl_rows", type=number(int, 1), default=1024,
                        help="most rows of a corpus for perplexity")
    parser.add_argument("--json", default=None, metavar="PATH", help="write the table there as well")
    parser.add_argument("--overwrite", action="store_true", help="score again what is up to date")
    parser.add_argument("--bos", choices=["auto", "none"], default="auto",
                        help="first token: the tokenizer's, or none, as lm-eval 0.4.5 to 0.4.9 had it")
    parser.add_argument("--limit", type=number(int, 0), default=0, metavar="N",
                        help="a quick look: at most N evenly spaced rows of each file (0 = all)")
    parser.add_argument("--batch_size", type=number(int, 1), default=64,
                        help="most samples a pass; changes no result beyond rounding")
    parser.add_argument("--records", action="store_true",
                        help="keep every question's scores in evaluate.json")
    parser.add_argument("--retain_run", default=None, metavar="RUN",
                        help="a model that never saw the forget set: for forget quality and PrivLeak")
    parser.add_argument("--param_dtype", choices=["float32", "bfloat16"], default=None,
                        help="of the weights (default: the run's, float32 for a plain model)")
    args = parser.parse_args()

    with one_line_errors():
        groups, names = defaultdict(dict), {}         # settings -> {seed: {column: number}}, settings -> name
        for run in tqdm(args.runs, desc="scoring", unit="run", disable=len(args.runs) < 2):
            done, metrics = score(run, args)
            name, settings = method(done)
            seed = done["args"]["seed"]
            if seed in groups[settings]:
                raise InputError(
                    f"{run}: a second run of {name} with seed {seed} and the same settings; drop one")
            groups[settings][seed], names[settings] = columns(run, metrics), name
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
        texts = [k for k in keys if k.startswith(("ppl_", "es_", "em_"))]
        blocks = [("scores", [k for k in keys if k not in relearned + texts]),
                  ("corpora: perplexity, extraction strength, exact memorisation", texts)] + [
            (f"{prefix} after relearning", [k for k in relearned if k.rsplit(" ", 1)[0] == prefix])
            for prefix in prefixes]
        for title, block in [b for b in blocks if b[1]]:
            print(f"\n{title}")
            lines = [["method", "seeds"] + block]
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
        if args.json:
            write_json(args.json, out)
