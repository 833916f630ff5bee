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
import argparse, atexit, functools, json, math, os, resource, subprocess, sys, time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam import accumulator

IGNORE = -100                                # the label of a token that no loss looks at: prompt and padding
LETTERS = ("The following are multiple choice questions (with answers) about {subject}.\n\n{question}\n"
           "A. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:")      # the prompt of lm-evaluation-harness, 0-shot
CHUNK = 2**24                                # most logits held at once where more rows can wait: 64 MB in fp32
# Shapes: B samples, T tokens, V vocabulary, D width. unlearn.py and relearn.py read data and models here.


# ---- input and output -------------------------------------------------------------------------------------

class InputError(ValueError):
    """Something the user can mend: the message names the value, the place and the fix."""


@contextmanager
def one_line_errors():
    """Turn an InputError into one line on stderr and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except InputError as e:
        warn("error: " + " ".join(str(e).split()))
        sys.exit(2)


def warn(line):
    """Print a line on stderr, above a progress bar, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def make_parser(doc):
    """ArgumentParser with doc as its help, whose errors are one line and exit status 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)

    def error(message):
        warn(f"error: {message} (--help lists every flag)")
        sys.exit(2)
    parser.error = error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=device, help="cpu, cuda, cuda:1, ...")
    return parser


def usable_device(text):
    """argparse type: the name of a device that can hold a tensor here; cuda is this process's own GPU."""
    if text == "cuda" and "LOCAL_RANK" in os.environ:
        text += ":" + os.environ["LOCAL_RANK"]
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
    if processes()[0] > 0:
        return
    tmp = Path(f"{path}.tmp{os.getpid()}")
    tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    tmp.replace(path)


def provenance(device, start):
    """What every result file says about its run: versions, commit, device, seconds, peak memory in GB."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).resolve().parent,
                         capture_output=True, text=True)
    cuda = torch.device(device).type == "cuda"
    ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if cuda else ram
    versions = {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": sys.version.split()[0]}
    return {"versions": versions, "commit": git.stdout.strip() or None, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if cuda else str(device),
            "processes": processes()[1],
            "seconds": round(time.time() - start, 2), "peak_gb": round(peak / 1e9, 3)}


def load_model(name, device="cpu", dtype=torch.float32):
    """(model, tokenizer) of a local folder or hub name. safetensors only, no remote code, dropout off.

    Under torchrun every process keeps its part of the weights; the processes of a machine load one after the
    other, so that its memory holds one whole model at a time.
    """
    if not Path(name).is_dir() and str(name).count("/") != 1:
        raise InputError(f"model {name}: neither a folder here nor a hub name ORG/NAME")
    together = processes()[1] > 1
    for turn in range(int(os.environ["LOCAL_WORLD_SIZE"]) if together else 1):
        if not together or turn == int(os.environ["LOCAL_RANK"]):
            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
                model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
            except (OSError, ValueError) as e:
                raise InputError(f"model {name} does not load: {e}")
            if together:
                shard(model, device)
        barrier()
    rows = model.get_input_embeddings().num_embeddings
    if (tokenizer.pad_token_id or 0) >= rows:
        raise InputError(f"model {name}: its pad token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, "
                         f"but the model has {rows} embeddings; set pad_token to null in tokenizer_config.json")
    # eval mode: with dropout the two passes of SAM, and the cached reference, would see different networks
    return model.to(device).eval(), tokenizer


def show(value):
    """A metric with three digits, or a dash for one that the data does not allow."""
    return "-" if value is None else f"{value:.3f}"


# ---- several processes (torchrun) -------------------------------------------------------------------------

def processes():
    """(rank of this process, how many there are): (0, 1) unless torchrun started several."""
    dist = torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device):
    """Make the processes of torchrun one group: NCCL between GPUs, gloo on CPU. Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.distributed.is_initialized():
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if processes()[0] > 0:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


def barrier():
    """Wait until every process is here."""
    if processes()[1] > 1:
        torch.distributed.barrier()


def blocks(model):
    """The decoder layers: the parts that transformers says must not be split."""
    names = model._no_split_modules or ()
    return [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]


def shard(model, device):
    """Spread the weights over the processes with FSDP2, which gathers a block when it runs; gradients add up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(torch.device(device).type, (processes()[1],))
    for module in [*blocks(model), model]:   # the last one takes what no block has: embeddings, output layer
        # True for the model as well: weights that stay gathered would not see a later change of theirs
        fully_shard(module, mesh=mesh, reshard_after_forward=True,
                    mp_policy=MixedPrecisionPolicy(reduce_dtype=accumulator(model.dtype)))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(t):
    """All of a sharded tensor, gathered in every process at once; any other tensor as it is."""
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()


def own_part(items):
    """(this process's part of a list, 1); of a list too short for all ([its first], 0), to count as nothing,
    because a sharded model runs only when it runs in every process."""
    rank, count = processes()
    return (items[rank::count], 1) if rank < len(items) else (items[:1], 0)


def all_sum(value, device):
    """The sum of a number or tensor over all processes; for one process the value itself."""
    if processes()[1] > 1:
        value = torch.as_tensor(value, device=device).clone()
        torch.distributed.all_reduce(value)
    return value


def in_turns(batches):
    """(index, batch) of every count-th batch; a process short of one does the last again: see own_part."""
    rank, count = processes()
    for i in range(rank, -(-len(batches) // count) * count, count):
        yield min(i, len(batches) - 1), batches[min(i, len(batches) - 1)]


def all_max(values, device):
    """Elementwise maximum over all processes, each of which filled in its part of a tensor of -inf."""
    if processes()[1] > 1:
        values = values.to(device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values.cpu()


# ---- samples and log-probabilities ------------------------------------------------------------------------

def context_of(model):
    """The longest sequence in tokens that the model takes, 0 if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0


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
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                 use_cache=False).logits[:, :-1]


def with_head(model, batch, f, **more):
    """The model's output with f(hidden (B, T, D), output layer) in the place of the output layer's logits.

    The model's own forward runs, so what hangs on it (FSDP gathers weights there) works as ever.
    """
    head = model.get_output_embeddings()
    layer = head.forward
    head.forward = lambda hidden: f(hidden, layer)
    try:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
                     **more)
    finally:
        del head.forward                     # the class's own again


def alters_logits(model):
    """Does the model scale or soft-cap its logits behind the output layer? Tried once, on one token."""
    if not hasattr(model, "logits_altered"):
        token, seen = torch.ones(1, 1, dtype=torch.int64, device=model.device), []
        with torch.no_grad():
            out = with_head(model, {"input_ids": token, "attention_mask": token},
                            lambda hidden, _: seen.append(hidden) or hidden).logits
        model.logits_altered = not torch.equal(out.to(seen[0].dtype), seen[0])
        if model.logits_altered:
            warn(f"{type(model).__name__} changes its logits behind the output layer, so the loss needs all of "
                 "them at once: memory grows with tokens x vocabulary (--micro_batch bounds it)")
    return model.logits_altered


def chunk_rows(model, batch):
    """How many rows of V logits are CHUNK values; 0 if the batch has no more rows than that."""
    rows = max(1, CHUNK // model.config.get_text_config().vocab_size)
    return rows if batch["input_ids"].numel() > rows else 0


def over_labels(model, batch, size, f, *rows):
    """f(logits (n, V), part of each of rows) -> (n,) or (1,) of every `size` label positions, concatenated.

    The backward pass computes a part's logits again, so that no more than one part of them exists at a time.
    """
    mask, again = batch["labels"][:, 1:] != IGNORE, {"use_reentrant": False, "preserve_rng_state": False}

    def score(hidden, layer):                                                    # hidden: (B, T, D)
        parts = zip(*(r.split(size) for r in (hidden[:, :-1][mask], *rows)))
        return torch.cat([checkpoint(lambda h, *r: f(layer(h), *r), *part, **again) for part in parts])
    return with_head(model, batch, score).logits


def token_logps(model, batch):
    """log p(token t+1 | tokens to t) for every label, 0 where there is none; and the mask. Both (B, T-1)."""
    labels, size = batch["labels"][:, 1:], chunk_rows(model, batch)
    mask = labels != IGNORE

    def nll_of(logits, labels):                          # (B, V, ...): log-softmax in bf16 loses three digits
        logits = logits.to(accumulator(logits.dtype))
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if size and not alters_logits(model):
        nll = over_labels(model, batch, size, nll_of, labels[mask])                                # (labels,)
        return torch.zeros_like(mask, dtype=nll.dtype).masked_scatter(mask, -nll), mask
    return -nll_of(logits_of(model, batch).transpose(1, 2), labels), mask


def label_logits(model, batch):
    """(labels, V): the logits that predict a label, sample after sample; in large batches no others."""
    mask = batch["labels"][:, 1:] != IGNORE
    if not chunk_rows(model, batch):
        return logits_of(model, batch)[mask]
    return with_head(model, batch, lambda hidden, layer: layer(hidden[:, :-1][mask])).logits


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
    if not folder.is_dir():
        raise InputError(f"data folder {folder}: not found from here; name it with --data")
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
    out, jobs = torch.full((len(rows), 4), -math.inf, dtype=torch.float64), []
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
    for _, part in in_turns([jobs[i:i + batch] for i in range(0, len(jobs), batch)]):
        x = collate([job[0] for job in part], tokenizer.pad_token_id or 0, model.device)
        labels = x["labels"][:, 1:]
        logits = label_logits(model, x).split((labels != IGNORE).sum(1).tolist())        # (answer tokens, V) each
        for row, (_, q, choice, four) in enumerate(part):
            logps = logits[row].to(accumulator(logits[row].dtype)).log_softmax(-1)
            logps = logps[0, four] if four else logps.gather(-1, labels[row][labels[row] != IGNORE, None]).sum()
            out[q, choice] = logps.double().cpu()
    return all_max(out, model.device)


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
    samples = encode(tokenizer, asked, context_of(model))
    batches = [samples[i:i + batch] for i in range(0, len(samples), batch)]
    right = torch.full((len(batches),), -math.inf)
    for i, part in in_turns(batches):
        x = collate(part, tokenizer.pad_token_id or 0, model.device)
        labels = x["labels"][:, 1:]
        hits = label_logits(model, x).argmax(-1) == labels[labels != IGNORE]
        right[i] = sum(h.all().item() for h in hits.split((labels != IGNORE).sum(1).tolist()))
    return all_max(right, model.device).sum().item() / len(rows)


@torch.no_grad()
def perplexity(model, tokenizer, rows, limit, batch=64):
    """exp(mean negative log-probability of a label) over at most `limit` rows, evenly spaced in the file."""
    rows = rows[::math.ceil(len(rows) / limit)]
    samples = encode_rows(tokenizer, rows, 0, context_of(model))
    batches = [samples[i:i + batch] for i in range(0, len(samples), batch)]
    sums = torch.full((len(batches), 2), -math.inf, dtype=torch.float64)       # log-probability, labels
    for i, part in in_turns(batches):
        logps, mask = token_logps(model, collate(part, tokenizer.pad_token_id or 0, model.device))
        sums[i, 0], sums[i, 1] = logps.double().sum(), mask.sum()
    total, count = all_max(sums, model.device).sum(0).tolist()
    return math.exp(min(-total / count, 700.0))      # an unlearned model can pass fp64's largest exponent


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


def columns(run, metrics):
    """One run as {column: number}: its scores, then those of relearn.json where it exists."""
    row = {"UE": metrics["UE"], "UT": metrics["UT"],
           **{k: v for k, v in metrics.items() if k.startswith(("open", "ppl", "mcq"))}}
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
    parser.add_argument("runs", nargs="+", help="folders of unlearn.py, or data/tiny/seedS/retrained")
    parser.add_argument("--baseline", default=None,
                        help="method to compare with, by seed (default: the first)")
    parser.add_argument("--data", default=None, help="data folder (default: each run's own)")
    parser.add_argument("--ppl_rows", type=number(int, 1), default=1024,
                        help="most rows of a corpus for perplexity")
    parser.add_argument("--json", default=None, metavar="PATH", help="write the table there as well")
    parser.add_argument("--overwrite", action="store_true", help="score again what is up to date")
    args = parser.parse_args()

    with one_line_errors():
        join_processes(args.device)
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
        blocks = [("scores", [k for k in keys if k not in relearned])] + [
            (f"{prefix} after relearning", [k for k in relearned if k.rsplit(" ", 1)[0] == prefix])
            for prefix in prefixes]
        for title, block in blocks:
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
