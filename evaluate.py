"""Score models and compare methods: questions, corpora, attacks by a prompt, what relearning brought back.

    python evaluate.py out/*-s0                       # one table; about 2 s a run the first time
    python evaluate.py out/* --baseline npo           # runs that differ only in seed become mean and standard
                                                      # error; each method against the baseline, pair by pair
    python evaluate.py MODEL --data data/muse/news --limit 20      # any Hugging Face folder, a quick look
    python evaluate.py out/*-s0 --show 6                           # look before you count: answers side by side
    python evaluate.py out/npo-s0 --attack prefix                  # a prompt that brings it back: 35 s
    python evaluate.py out/*-s0 --attack context                   # is hearing of other facts enough?
    python evaluate.py out/*-s0 data/tiny/seed0/retrained --probe 1 2      # is the answer in the states?
    python evaluate.py out/* --sharpness own --landscape 21 --json table.json    # assets/plot.py draws that

The files of the data folder decide what is measured: UE and UT, and what each data/NAME/metrics.py adds. Reads
RUN/result.json, the model beside it, DATA/*.jsonl and every RUN/relearn*.json that is there. Writes
RUN/evaluate.json (kept while it is newer than the model) and, with --json, the table.

Multiple choice alone overstates forgetting (arXiv 2510.07626), so open questions are asked too: the share
whose answer is, token for token, what the model says greedily. UE = 1 - accuracy on mcq_forget, UT = accuracy
on mcq_retain.
"""
import argparse
import importlib
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from data import formats, losses, models, processes, prompts, runs, scores, stream, tables
from data.finetune import draw_samples, finetune
from data.formats import InputError
from data.models import IGNORE
from sam import SAM, accumulator, kernel_file, trainable

LETTERS = ("The following are multiple choice questions (with answers) about {subject}.\n\n{question}\n"
           "A. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:")            # the prompt of lm-evaluation-harness, 0-shot
# Shapes: B samples, T tokens, V vocabulary.


# ---- questions ----------------------------------------------------------------------------------------

def ask(rows, prompt=None):
    """Multiple-choice rows with "context", "asked", which is its beginning up to the question's end, and
    "endings", the four texts that may follow it.

    With a prompt, a text with {question} in it, the choices' own texts are scored after it. Without one, the
    question and its choices are shown as LETTERS and " A" to " D" are scored.
    """
    out = []
    for row in rows:
        question = row["question"].strip()
        if prompt:
            context = prompt.replace("{question}", question)
            before = prompt.split("{question}")[0]
            endings = [" " + choice.strip() for choice in row["choices"]]
        else:
            subject = row.get("subject", "the topic").replace("_", " ")
            context = LETTERS.format(*row["choices"], question=question, subject=subject)
            before = LETTERS.split("{question}")[0].format(subject=subject)
            endings = [" A", " B", " C", " D"]
        out.append(row | {"context": context, "endings": endings, "asked": before + question})
    return out


def load_questions(folder):
    """A data folder's mcq_*.jsonl, asked as its meta.json says: {"mcq_forget": rows, "mcq_retain": rows, ...}."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"data folder {folder}: not found from here; name it with --data")
    prompt = formats.load_meta(folder).get("prompt")
    questions = {}
    for path in sorted(folder.glob("mcq_*.jsonl")):
        questions[path.stem] = ask(formats.read_jsonl(path, formats.mcq_row), prompt)
    return questions


def one_pass(encoded):
    """Are the four encoded choices one token each after the same tokens? Then one pass scores them all."""
    contexts = {tuple(ids[:-1]) for ids, _ in encoded}
    return len(contexts) == 1 and all(labels.count(IGNORE) == len(ids) - 1 for ids, labels in encoded)


def choice_logps(model, tokenizer, rows, batch=64):
    """(N, 4) fp64 summed log-probability of each ending after its context, both tokenised together.

    One forward pass a question where the four endings are one token each, else one an ending.
    """
    triples = []
    for row in rows:
        for ending in row["endings"]:
            triples.append((row["context"], ending, row["where"]))
    samples = models.encode(tokenizer, triples, models.context_of(model))
    jobs = []                                    # (sample, question, choice or None for all, their tokens)
    for q in range(len(rows)):
        encoded = samples[4 * q:4 * q + 4]
        if one_pass(encoded):
            jobs.append((encoded[0], q, None, [ids[-1] for ids, _ in encoded]))
        else:
            for choice, sample in enumerate(encoded):
                jobs.append((sample, q, choice, None))
    out = torch.full((len(rows), 4), -math.inf, dtype=torch.float64)
    todo = [sample for sample, *_ in jobs]
    for i, logits, labels in models.label_logits(model, tokenizer, todo, batch, "questions"):
        _, q, choice, tokens = jobs[i]
        logps = logits.to(accumulator(logits.dtype)).log_softmax(-1)                 # (answer tokens, V)
        if choice is None:
            out[q] = logps[0, tokens].double().cpu()
        else:
            out[q, choice] = logps.gather(-1, labels[:, None]).sum().double().cpu()
    return processes.all_max(out, model.device)


def correct(model, tokenizer, rows):
    """(N,) bool: is the likeliest choice the right one? Ties go to the first."""
    answers = torch.tensor([row["answer"] for row in rows])
    return choice_logps(model, tokenizer, rows).argmax(1) == answers


def share(right):
    """The share of True in a bool tensor, None if it is empty."""
    return right.double().mean().item() if len(right) else None


def ue_ut(model, tokenizer, questions, seen=None, only_forget=False):
    """{"UE", "UT"}; None where the data has no mcq_forget or mcq_retain. With seen, a set of facts, also
    "UE_heldout": UE on the questions about other facts, None when no question names such a fact."""
    out = {"UE": None}
    forget = questions.get("mcq_forget", [])
    if forget:
        right = correct(model, tokenizer, forget)
        out["UE"] = 1 - share(right)
    if seen is not None:
        out["UE_heldout"] = None
        other = [bool(seen) and row.get("fact") not in seen | {None} for row in forget]
        if any(other):
            out["UE_heldout"] = 1 - share(right[torch.tensor(other)])
    if not only_forget:
        retain = questions.get("mcq_retain", [])
        out["UT"] = share(correct(model, tokenizer, retain)) if retain else None
    return out


def open_accuracy(model, tokenizer, rows, batch=64):
    """Share of questions whose greedy continuation starts, token for token, with the right answer.

    Greedy decoding gives the answer if and only if each of its tokens is the argmax after the ones before it,
    so one forward pass with the answer in place says what generating would.
    """
    triples = [(row["context"], row["endings"][row["answer"]], row["where"]) for row in rows]
    samples = models.encode(tokenizer, triples, models.context_of(model))
    found = models.label_scores(model, tokenizer, samples, batch, "open questions")
    return sum(hits.all().item() for _, hits in found) / len(rows)


# ---- corpora ------------------------------------------------------------------------------------------

def corpus_scores(model, tokenizer, rows, max_len=0, batch=64):
    """{"ppl", "es", "em"} of rows of a corpus, and their per-row records.

    ppl  exp(mean negative log-probability of a label), over all tokens of all rows
    es   extraction strength, mean over rows: extraction_strength
    em   exact memorisation (arXiv 2205.10770), mean over rows: share of labels that are the likeliest token
    """
    samples = models.encode_rows(tokenizer, rows, 0, max_len or models.context_of(model))
    found = models.label_scores(model, tokenizer, samples, batch, "corpus")
    records = []
    for row, (logps, hits) in zip(rows, found):
        records.append({"where": row["where"], "nll": -logps.mean().item(),
                        "es": extraction_strength(hits.tolist()), "em": hits.double().mean().item()})
    nll = -torch.cat([logps for logps, _ in found]).mean().item()
    ppl = math.exp(min(nll, 700.0))              # an unlearned model can pass fp64's largest exponent
    return {"ppl": ppl, "es": scores.mean_of(records, "es"), "em": scores.mean_of(records, "em")}, records


def extraction_strength(hits):
    """1 - k/n for n labels: k is the shortest prefix after which greedy decoding gives all that follows.

    hits says for each label whether it is the likeliest token after the true ones before it, so k ends at the
    last miss. (open-unlearning never lets k reach n: a wrong last token gives 1/n there and 0 here.)
    """
    misses = [i for i, hit in enumerate(hits) if not hit]
    k = misses[-1] + 1 if misses else 0
    return 1 - k / len(hits)


# ---- one run ------------------------------------------------------------------------------------------

def data_of(run, done, args):
    """The data folder that --data or the run names."""
    data = args.data or done["args"]["data"]
    if data is None:
        raise InputError(f"{run} is a plain model and names no data: add --data FOLDER")
    return data


def score_settings(run, done, args):
    """What a run's scores depend on, as RUN/evaluate.json keeps it."""
    data = data_of(run, done, args)
    dtype = args.param_dtype or done["args"].get("param_dtype", "float32")
    files = {"data": runs.stamp(data, "*.json*"),
             "model": runs.stamp(run, "*.safetensors", "config.json", "tokenizer*.json")}
    if args.retain_run:
        files["retain_run"] = runs.stamp(args.retain_run, "evaluate.json")
    return {"run": str(run), "data": data, "ppl_rows": args.ppl_rows,
            "max_len": done["args"].get("max_len", 0), "limit": args.limit, "bos": args.bos,
            "retain_run": args.retain_run, "device": args.device, "param_dtype": dtype, "files": files}


def score(run, args):
    """(result.json, metrics) of one run folder; writes its evaluate.json, or reads it when nothing changed."""
    start = time.time()
    run = Path(run)
    done = runs.load_result(run)
    retained = None
    if args.retain_run:                          # scored on the same questions, unless it was already
        more = {"retain_run": None, "data": args.data or done["args"]["data"], "records": True,
                "overwrite": False}
        score(args.retain_run, argparse.Namespace(**vars(args) | more))
        retained = read_scores(Path(args.retain_run))
    settings = score_settings(run, done, args)
    path = run / "evaluate.json"
    if path.is_file() and not args.overwrite:
        old = read_scores(run)
        if old["args"] == settings and (not args.records or "records" in old):
            formats.warn(f"{run}: cached scores ({path}); --overwrite scores again")
            return done, old["metrics"]
    model, tokenizer = load_as_scored(run, settings["param_dtype"], args)
    metrics, records = measure(model, tokenizer, Path(settings["data"]), settings, args.batch_size, retained)
    result = {"stage": "evaluate", "args": settings, **runs.provenance(args.device, start),
              "metrics": metrics}
    if args.records:
        result["records"] = records
    formats.write_json(path, result)
    processes.barrier()                          # before another process looks for the file
    return done, metrics


def load_as_scored(run, dtype, args):
    """(model, tokenizer) of a run as --param_dtype and --bos want them."""
    model, tokenizer = models.load_model(run, args.device, getattr(torch, dtype))
    if args.bos == "none":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return model, tokenizer


def read_scores(run):
    """RUN/evaluate.json."""
    path = run / "evaluate.json"
    fix = "score the run again with --overwrite"
    result = formats.read_json(path, fix, args=dict, metrics=dict)
    more = {key: dict for key in ("sharpness", "landscape", "context", "probe") if key in result["metrics"]}
    formats.check_kinds(result["metrics"], more, f"{path}:1", fix)
    return result


def measure(model, tokenizer, data, settings, batch, retained):
    """(metrics, {name: per-question records}) of all that the files of folder `data` allow."""
    def thin(rows):
        return formats.spaced(rows, settings["limit"])
    prompt = formats.load_meta(data).get("prompt")
    metrics = {"UE": None, "UT": None}
    records = {}
    for name, rows in load_questions(data).items():
        rows = thin(rows)
        records[name] = []
        for row, logps in zip(rows, choice_logps(model, tokenizer, rows, batch)):
            records[name].append({"where": row["where"], "answer": row["answer"],
                                  "choice": logps.argmax().item(), "logps": logps.tolist()})
        accuracy = sum(r["choice"] == r["answer"] for r in records[name]) / len(rows)
        if name == "mcq_forget":
            metrics["UE"] = 1 - accuracy
        else:
            metrics["UT" if name == "mcq_retain" else name] = accuracy
        if prompt and name in ("mcq_forget", "mcq_retain"):
            metrics[name.replace("mcq", "open")] = open_accuracy(model, tokenizer, rows, batch)
    for part in ("forget", "retain"):
        path = data / f"{part}.jsonl"
        if path.is_file():
            rows = thin(formats.spaced(formats.read_jsonl(path, formats.text_row), settings["ppl_rows"]))
            found, records[part] = corpus_scores(model, tokenizer, rows, settings["max_len"], batch)
            metrics |= {f"{key}_{part}": value for key, value in found.items()}
    for path in sorted((runs.ROOT / "data").glob("*/metrics.py")):       # each benchmark brings its own
        benchmark = importlib.import_module(f"data.{path.parent.name}.metrics")
        found, more = benchmark.score(model, tokenizer, data, batch, thin, retained)
        metrics |= found
        records |= more
    if metrics == {"UE": None, "UT": None}:
        raise InputError(f"{data} holds nothing to measure: data/README.md names the files")
    metrics["template"] = prompt or LETTERS
    metrics["bos"] = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return metrics, records


# ---- what rows in front of a question bring back, and what the states say -----------------------------

def context_scores(model, tokenizer, data, args):
    """{shots: {"UE": asked after so many forget rows (arXiv 2407.00106), "UE_retain": retain rows}}."""
    rows = formats.spaced(load_questions(data).get("mcq_forget", []), args.limit)
    if not rows:
        raise InputError(f"{data} has no mcq_forget.jsonl: --attack context asks its questions")
    found = {}
    for part, name in (("forget", "UE"), ("retain", "UE_retain")):
        corpus = formats.read_jsonl(Path(data) / f"{part}.jsonl", formats.text_row)
        for shots in args.shots:
            asked = prompts.in_context(rows, corpus, shots, max(args.shots), args.attack_seed)
            try:
                right = correct(model, tokenizer, asked)
            except InputError as e:              # the text that is too long is ours
                raise InputError(f"--shots {shots}: {e}; or ask for fewer")
            found.setdefault(str(shots), {})[name] = 1 - share(right)
    return found


def probe_scores(model, tokenizer, data, args):
    """{layer: accuracy} of logistic regression from the residual stream, where a forget question's
    answer is due, to the text of the right choice: is it the likeliest of the four (chance: .25)? It
    learns from half of the facts and is asked about the other half, and the other way round."""
    depth = len(stream.text_blocks(model))
    if max(args.probe) > depth:
        raise InputError(f"--probe {max(args.probe)}: the model has {depth} layers")
    rows = formats.spaced(load_questions(data).get("mcq_forget", []), args.limit)
    texts = sorted({ending for row in rows for ending in row["endings"]})
    parts = formats.halves(rows, args.attack_seed)
    known = [row["endings"][row["answer"]] for row in rows]
    if not {known[i] for i in parts[0]} & {known[i] for i in parts[1]}:
        raise InputError(f"--probe: {data} has no mcq_forget.jsonl in which several facts have the same "
                         "answer, so that one could tell of another")
    choices = []
    for row in rows:
        choices.append([texts.index(ending) for ending in row["endings"]])
    choices = torch.tensor(choices)                                                  # (N, 4) classes
    right = torch.tensor([texts.index(text) for text in known])                      # (N,) class
    states = stream.residuals(model, tokenizer, [(row["context"], row["where"]) for row in rows])
    found = {}
    for layer in args.probe:
        hits = []
        for learn, test in (parts, parts[::-1]):
            seen = states[:, layer]
            odds = kernel_file("probe").probe(seen[learn], right[learn], seen[test], len(texts))
            best = odds.gather(1, choices[test]).argmax(1, keepdim=True)             # (M, K) -> (M, 1)
            hits.append(choices[test].gather(1, best)[:, 0] == right[test])
        found[str(layer)] = share(torch.cat(hits))
    return found


# ---- an attack by a prefix or suffix: kernels/gcg.py searches, this scores and saves ------------------

def prefix_search(victim, teacher, tokenizer, rows, picks, prompt, settings, state):
    """(gcg.Search, tokens of an answer searched for) on the picked rows; lengths are cut to the context."""
    gcg = kernel_file("gcg")
    place = settings["attack_place"]
    front, behind = prompts.around(rows[0], place)
    vocabulary = len(victim.get_input_embeddings().weight)
    tokens = gcg.Tokens(tokenizer, vocabulary, behind, victim.device, front)
    longest = max(len(tokens.bare(ending)) for row in rows for ending in row["endings"])
    answer = settings["attack_answer"]
    if prompt:                                   # the choices are the answers
        answer = min(answer, longest)
    picked = [rows[i] for i in sorted(picks)]
    task = prompts.prefix_task(teacher, tokenizer, picked, tokens, answer, place)
    question = max(sum(map(len, tokens.around(*prompts.around(row, place)))) for row in rows)
    room = models.context_of(victim) or math.inf
    room -= len(tokens.head) + question + max(answer, longest)
    if room < 1:
        raise InputError(f"the context of {models.context_of(victim)} tokens leaves no room for a "
                         f"{place}: take shorter questions")
    low, high = settings["attack_length"]
    how = {key: settings[f"attack_{key}"] for key in ("weights", "moves", "buffer")}
    other = None if victim is teacher else teacher               # nothing is to be compared with itself
    search = gcg.Search(victim, other, task, tokens, how, state, min(low, room), min(high, room),
                        settings["attack_calls"], settings["attack_candidates"], settings["attack_topk"],
                        settings["attack_seed"])
    return search, answer


def attack_settings(run, done, args):
    """What a search depends on, as RUN/attack_METHOD.json keeps it."""
    teacher = args.teacher or done["args"].get("model")
    if teacher is None:
        raise InputError(f"{run}: --attack needs the model before unlearning: name it with --teacher")
    settings = {"run": str(run), "data": args.data or done["args"]["data"], "teacher": teacher,
                "bos": args.bos,
                "param_dtype": args.param_dtype or done["args"].get("param_dtype", "float32")}
    method = kernel_file("gcg").METHODS[args.attack_method]
    for key, value in vars(args).items():
        if key.startswith("attack_"):
            settings[key] = value
    for key, value in method.items():            # what the user did not choose
        settings[f"attack_{key}"] = settings[f"attack_{key}"] or value
    return settings


def attack_prefix(run, done, args):
    """Search one prefix after which the victim, the model in `run`, answers as the teacher, the model before
    unlearning, does without; or one that makes the teacher itself surer (--attack_on teacher, arXiv
    2408.10682). Returns {"UE", "UE_heldout": on questions that the search did not use, "UE_teacher": of
    the teacher after the same prefix, "prefix", ...}.

    RUN/attack_METHOD.json holds result and state: an interrupted search goes on, and ends as if it never was.
    """
    start = time.time()
    name = args.attack_method
    name += "_suffix" if args.attack_place == "suffix" else ""
    name += "_teacher" if args.attack_on == "teacher" else ""
    path = Path(run) / f"attack_{name}.json"
    settings = attack_settings(run, done, args)
    state = {"calls": 0, "iteration": 0, "best": [], "curve": []}
    if path.is_file() and not args.overwrite:
        fix = "--overwrite starts a new search"
        old = formats.read_json(path, fix, args=dict, state=dict, metrics=dict)
        kinds = {key: type(value) for key, value in state.items()}
        formats.check_kinds(old["state"], kinds, f"{path}:1", fix)
        usual = {"attack_place": "prefix", "attack_on": "unlearned", "bos": "auto",
                 "param_dtype": done["args"].get("param_dtype", "float32")}
        if usual | old["args"] != settings:
            raise InputError(f"{path} holds a search with other flags: --overwrite starts a new one")
        state = old["state"]
        if state["calls"] >= args.attack_calls:
            return old["metrics"]
    rows = load_questions(settings["data"]).get("mcq_forget")
    if not rows:
        raise InputError(f"{settings['data']} has no mcq_forget.jsonl: --attack prefix asks its questions")
    victim, tokenizer = load_as_scored(run, settings["param_dtype"], args)
    teacher, _ = load_as_scored(settings["teacher"], settings["param_dtype"], args)
    victim.requires_grad_(False)
    teacher.requires_grad_(False)
    picks = random.Random(args.attack_seed).sample(range(len(rows)), min(args.attack_questions, len(rows)))
    prompt = formats.load_meta(settings["data"]).get("prompt")
    searched = teacher if args.attack_on == "teacher" else victim
    search, answer = prefix_search(searched, teacher, tokenizer, rows, picks, prompt, settings, state)
    every = max(1, args.attack_calls // 20)      # calls between points and saves
    bar = tqdm(total=args.attack_calls, initial=state["calls"], desc=name, unit="call")
    while not search.ended():
        before = state["calls"]
        search.step()
        bar.update(state["calls"] - before)
        if not search.ended() and state["calls"] // every == before // every:
            continue
        metrics = prefix_scores(search, victim, teacher, tokenizer, rows, picks, args.attack_place)
        metrics |= {"answer": answer, "place": args.attack_place}
        point = {key: metrics[key] for key in ("calls", "loss", "UE")}
        point["tokens"] = len(state["best"][0][2])
        state["curve"].append(point)
        bar.set_postfix(loss=f"{point['loss']:.3f}", UE=f"{point['UE']:.3f}", tokens=point["tokens"])
        formats.write_json(path, {"stage": "attack", "args": settings,
                                  **runs.provenance(args.device, start), "metrics": metrics, "state": state})
    bar.close()
    return metrics


def prefix_scores(search, victim, teacher, tokenizer, rows, picks, place):
    """The "metrics" of the best prefix so far; the held-out questions and the teacher at the end only."""
    loss, terms, ids = search.state["best"][0]
    prefix = search.tokens.text(ids)
    asked = prompts.with_found(rows, prefix, place)
    hit = correct(victim, tokenizer, asked)                                          # (N,)
    metrics = {"UE": 1 - share(hit), "loss": loss, "terms": terms, "calls": search.state["calls"],
               "length": [search.low, search.high], "prefix": prefix}
    if search.ended():
        held = [i for i in range(len(rows)) if i not in picks]
        metrics["UE_heldout"] = 1 - share(hit[held]) if held else None
        metrics["UE_teacher"] = 1 - share(correct(teacher, tokenizer, asked))
    return metrics


# ---- sharpness ----------------------------------------------------------------------------------------

def forget_objective(kind, model, tokenizer, run, rows=64, first=None, data=None, teacher=None):
    """A closure that gives the forget loss (0-dim, with graph) on a fixed batch: `rows` rows of forget.jsonl,
    evenly spaced. kind own: the loss that `run` descended; nll: what a relearning attack descends. first: the
    first row of two batches without a common row, 0 or 1 (None: of a single batch). data, teacher: the data
    folder and the model before unlearning, where not those of the run.
    """
    ran = runs.load_result(run)["args"]
    corpus = formats.read_jsonl(Path(data or ran["data"]) / "forget.jsonl", formats.text_row)
    apart = math.ceil(len(corpus) / rows)
    corpus = corpus[::apart] if first is None else corpus[first::max(2, apart)]
    samples = models.encode_rows(tokenizer, corpus, models.context_of(model), ran.get("max_len", 0))
    batch = models.collate(samples, tokenizer.pad_token_id or 0, model.device)
    total = losses.nll_sum
    unit = "labels"
    if kind == "own":
        if ran.get("loss") not in losses.FORGET or ran["loss"] == "dpo":
            raise InputError(f"{run}: the loss that a run descended can be measured where it is of log-"
                             f"probabilities alone, not {ran.get('loss', 'a model nothing was unlearned from')}: "
                             "evaluate.py has --sharpness nll, for relearn.py drop --geometry")
        total = losses.forget_sum(SimpleNamespace(**ran))
        unit = "samples"
        if ran["loss"] in losses.NEEDS_REFERENCE:
            with torch.no_grad():
                before = models.load_model(teacher or ran["model"], model.device)[0]
                batch["ref"] = losses.sample_logps(before, batch, ran["reduce"])
    return lambda: total(model, batch) / losses.size_of(batch, unit)


def sharpness(model, loss, rho, steps, probes, seed=0):
    """{"loss", "gradient": norm, "top": largest eigenvalue of the Hessian, "residual", "trace", "trace_se":
    Hutchinson's estimate with `probes` random signs, "rise": loss(theta + rho g/||g||) - loss(theta)}."""
    curvature = kernel_file("curvature")
    params = trainable(model.parameters())
    rng = torch.Generator(params[0].device).manual_seed(seed)

    def draw():
        return torch.randn(len(gradient), generator=rng, device=gradient.device, dtype=gradient.dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):   # the others differentiate once
        value = loss()
        gradient, product = curvature.hessian(value, params)
        top, residual = curvature.top_eigenvalue(product, draw(), steps)
        estimates = []
        for _ in range(probes):
            z = draw().sign()
            estimates.append((z @ product(z)).item())
        trace, error = scores.mean_se(estimates)
        along = {}
        for p, g in zip(params, gradient.split([p.numel() for p in params])):
            along[p] = g.view_as(p)
        with torch.no_grad(), SAM(params, rho).perturbed(along):
            rise = loss().item() - value.item()
    return {"loss": value.item(), "gradient": gradient.norm().item(), "top": top, "residual": residual,
            "trace": trace, "trace_se": error, "rise": rise}


def extras(run, done, metrics, args):
    """metrics and what --attack, --probe, --sharpness and --landscape find or found before, which
    evaluate.json keeps."""
    run = Path(run)
    if (args.attack or args.probe or args.sharpness or args.landscape) and processes.count() > 1:
        raise InputError("--attack, --probe, --sharpness and --landscape need the whole model: run "
                         "without torchrun")
    found = {key: dict(metrics.get(key, {})) for key in ("sharpness", "landscape", "context", "probe")}
    found["attack"] = {}
    if args.attack == "prefix":
        attack_prefix(run, done, args)
    for path in sorted(run.glob("attack_*.json")):
        fix = "--attack prefix --overwrite searches again"
        result = formats.read_json(path, fix, args=dict, metrics=dict)
        formats.check_kinds(result["args"], {"attack_calls": int}, f"{path}:1", fix)
        formats.check_kinds(result["metrics"], {"calls": int}, f"{path}:1", fix)
        if result["metrics"]["calls"] >= result["args"]["attack_calls"]:             # the search has ended
            found["attack"][path.stem.removeprefix("attack_")] = result["metrics"]
    ways = {}                                    # what is scored as the questions are
    if args.attack == "context":
        ways["context"] = (context_scores, {"shots": args.shots, "attack_seed": args.attack_seed})
    if args.probe:
        ways["probe"] = (probe_scores, {"layers": args.probe, "attack_seed": args.attack_seed})
    for name, (measured, settings) in ways.items():
        if found[name].get("args") != settings or args.overwrite:
            scored = score_settings(run, done, args)
            model, tokenizer = load_as_scored(run, scored["param_dtype"], args)
            found[name] = {"args": settings, "after": measured(model, tokenizer, scored["data"], args)}
    kind = args.sharpness or "own"
    wanted = {"sharpness": {key: value for key, value in vars(args).items() if key.startswith("sharpness_")},
              "landscape": {"points": args.landscape, "sharpness_rows": args.sharpness_rows}}
    for name, settings in wanted.items():
        settings["teacher"] = args.teacher       # None: the run's own
        old = found[name].get(kind, {}).get("args")
        if not getattr(args, name) or (old == settings and not args.overwrite):
            continue
        model, tokenizer = models.load_model(run, args.device)   # fp32: a Hessian in bf16 is mostly noise
        loss = forget_objective(kind, model, tokenizer, run, args.sharpness_rows, None, args.data,
                                args.teacher)
        if name == "sharpness":
            numbers = sharpness(model, loss, args.sharpness_rho, args.sharpness_steps, args.sharpness_probes)
        else:
            grid = kernel_file("curvature").landscape(trainable(model.parameters()), loss, args.landscape)
            numbers = {"rise": (grid - loss().item()).tolist()}
        found[name][kind] = {"args": settings, **numbers}
    found = {key: value for key, value in found.items() if value}
    if any(found[key] != metrics.get(key) for key in found):
        result = read_scores(run)
        formats.write_json(run / "evaluate.json", result | {"metrics": result["metrics"] | found})
    return metrics | found


# ---- answers, to look at before any number ------------------------------------------------------------

def answers(model, tokenizer, rows):
    """["picked / said"]: the likeliest of a question's four choices, and what the model says freely, cut."""
    picks = choice_logps(model, tokenizer, rows).argmax(1).tolist()
    said = models.generate(model, tokenizer, [(row["context"], row["where"]) for row in rows], 12)
    out = []
    for row, pick, text in zip(rows, picks, said):
        words = " ".join(text.split("\n\n")[0].split())
        out.append(f"{row['choices'][pick]} / {words if len(words) <= 24 else words[:23] + '…'}")
    return out


def relearned(model, tokenizer, done, data, lr):
    """Fine-tune the model in place as relearn.py does: 60 forget samples, its first seed."""
    corpus = formats.read_jsonl(Path(data) / "forget.jsonl", formats.text_row)
    seed = done["args"]["seed"]
    picks = draw_samples(corpus, min(60, len(corpus)), f"{seed} 0")
    samples = models.encode_rows(tokenizer, [corpus[i] for i in picks], models.context_of(model),
                                 done["args"].get("max_len", 0))
    finetune(model, samples, tokenizer.pad_token_id or 0, lr, 4, 1, f"{seed} 0 order")


def show_answers(folders, args):
    """Print --show forget questions and half as many retain questions, with what the model before unlearning,
    each run, and each run relearned on 60 samples (--show_lr) pick of the four choices, and say freely."""
    columns = {}                                 # title -> answers
    for run in folders:
        done = runs.load_result(run)
        scored = score_settings(run, done, args)
        data = scored["data"]
        questions = load_questions(data)
        rows = formats.spaced(questions.get("mcq_forget", []), args.show)
        rows = rows + formats.spaced(questions.get("mcq_retain", []), -(-args.show // 2))
        if not rows:
            raise InputError(f"{data} has no questions for --show: write its mcq_forget.jsonl")
        columns.setdefault("question", [row["question"] for row in rows])
        columns.setdefault("right", [row["choices"][row["answer"]] for row in rows])
        if columns["question"] != [row["question"] for row in rows]:
            raise InputError(f"{run}: its questions are not those of {folders[0]}: show one world at a time")
        before = args.teacher or done["args"].get("model")
        if before and "before" not in columns:
            columns["before"] = answers(*load_as_scored(before, scored["param_dtype"], args), rows)
        model, tokenizer = load_as_scored(run, scored["param_dtype"], args)
        name = tables.method(done)[0]
        if name in columns:                      # of the same method, but of another seed or strength
            name = str(run)
        columns[name] = answers(model, tokenizer, rows)
        relearned(model, tokenizer, done, data, args.show_lr or runs.attack_rate(data))
        columns[f"{name}, relearned"] = answers(model, tokenizer, rows)
    print(tables.table([list(columns), *map(list, zip(*columns.values()))]))


# ---- flags --------------------------------------------------------------------------------------------

def flags():
    """The command line, in groups."""
    some = runs.number(int, 1)
    any_number = runs.number(int, 0)
    p = runs.Parser(__doc__)
    p.add_argument("runs", nargs="+",
                   help="folders of unlearn.py, or of any Hugging Face model (then add --data)")
    g = p.add_argument_group("the table")
    g.add_argument("--baseline", help="method to compare with, by seed (default: the first)")
    g.add_argument("--columns", nargs="+", metavar="NAME", default=[],
                   help="one table of these numbers: 'UE', 'UE relearning 60', 'seconds'; a wrong name lists all")
    g.add_argument("--json", metavar="PATH", help="write the table there as well")
    g.add_argument("--overwrite", action="store_true", help="score again what is up to date")
    g.add_argument("--show", type=any_number, default=0, metavar="N", help="instead of scores: what the model "
                   "before, each run, and each run relearned on 60 samples answer to N forget questions")
    g.add_argument("--show_lr", type=runs.RATE, help="rate of that relearning (default: relearn.py's)")
    g = p.add_argument_group("scores")
    g.add_argument("--data", help="data folder (default: each run's own)")
    g.add_argument("--limit", type=any_number, default=0, metavar="N",
                   help="a quick look: at most N evenly spaced rows of each file (0 = all)")
    g.add_argument("--records", action="store_true", help="keep every question's scores in evaluate.json")
    g.add_argument("--retain_run", metavar="RUN",
                   help="a model that never saw the forget set: for forget quality and PrivLeak")
    g.add_argument("--bos", choices=["auto", "none"], default="auto",
                   help="first token: the tokenizer's, or none, as lm-eval 0.4.5 to 0.4.9 had it")
    g.add_argument("--ppl_rows", type=some, default=1024, help="most rows of a corpus for perplexity")
    g.add_argument("--probe", type=any_number, nargs="+", default=[], metavar="LAYER",
                   help="can a linear probe read answers to forget questions off the residual stream? "
                   "0 = in front of the first block")
    g.add_argument("--batch_size", type=runs.BATCH, default=64,
                   help="most samples a pass; changes no result beyond rounding")
    g.add_argument("--param_dtype", choices=["float32", "bfloat16"],
                   help="of the weights (default: the run's, float32 for a plain model)")
    runs.add_device(g)
    attack_flags(p.add_argument_group("attacks by a prompt (kernels/gcg.py)"))
    g = p.add_argument_group("sharpness (kernels/curvature.py)")
    g.add_argument("--sharpness", choices=["own", "nll"],
                   help="of the run's own forget loss, or of the attacker's: mean NLL of forget text")
    g.add_argument("--sharpness_rows", type=some, default=64, help="rows of forget.jsonl, evenly spaced")
    g.add_argument("--sharpness_rho", type=runs.number(float, 0, above=True), default=0.1,
                   help="radius of the rise; 7B: .01")
    g.add_argument("--sharpness_steps", type=some, default=100, help="most power iterations")
    g.add_argument("--sharpness_probes", type=some, default=32, help="random signs for the trace")
    g.add_argument("--landscape", type=any_number, default=0, metavar="POINTS",
                   help="of the loss around the weights, along a side; 0 = none")
    return p


def attack_flags(g):
    """Add the flags of --attack to a group."""
    some = runs.number(int, 1)
    positive = runs.number(float, 0)
    g.add_argument("--attack", choices=["prefix", "context"],
                   help="prefix: search one that brings it back; context: ask after rows of "
                   "forget.jsonl about other facts, and of retain.jsonl")
    g.add_argument("--shots", type=some, nargs="+", default=[1, 3], help="rows before a question")
    g.add_argument("--attack_place", choices=["prefix", "suffix"], default="prefix",
                   help="suffix: where the question itself ends, before \"Answer:\" or the choices")
    g.add_argument("--attack_on", choices=["unlearned", "teacher"], default="unlearned",
                   help="model searched on: the one that is scored, or that before unlearning")
    g.add_argument("--attack_method", choices=list(kernel_file("gcg").METHODS), default="gcg+",
                   help="gcg: cross-entropy and swaps only; random: the best of random prefixes")
    g.add_argument("--attack_calls", type=some, default=4000, help="model calls, the budget")
    g.add_argument("--attack_questions", type=some, default=8, help="forget questions searched on")
    g.add_argument("--attack_length", type=some, nargs=2, default=[32, 100], metavar=("MIN", "MAX"),
                   help="tokens; the minimum grows from MIN to MAX, both cut to the context's room")
    g.add_argument("--attack_weights", type=positive, nargs=5,
                   metavar=("CE", "L2", "COSINE", "FLUENCY", "REPEAT"), help="(default: the method's)")
    g.add_argument("--attack_moves", type=positive, nargs=4, metavar=("SWAP", "DELETE", "INSERT", "SAMPLE"),
                   help="shares (default: the method's)")
    g.add_argument("--attack_buffer", type=some, help="prefixes kept to start from (default: the method's)")
    g.add_argument("--attack_candidates", type=some, default=16, help="prefixes tried an iteration")
    g.add_argument("--attack_topk", type=some, default=64, help="tokens considered at each place")
    g.add_argument("--attack_answer", type=some, default=10,
                   help="tokens of the answer; at most the longest choice's where choices are answers")
    g.add_argument("--attack_seed", type=runs.SEED, default=0,
                   help="of questions and search; rows in front; halves of --probe")
    g.add_argument("--teacher", help="the model before unlearning (default: the run's --model)")


def refuse_json(path):
    """Raise InputError where --json would replace a file that is no table."""
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise InputError(f"--json {path}: give the name of a file in a folder that is there")
    if path.exists():
        try:
            formats.read_json(path, "", methods=dict, paired=dict)
        except InputError:
            raise InputError(f"--json {path} is there and is no table of this script: choose another name")


if __name__ == "__main__":
    with runs.one_line_errors():
        args = flags().parse_args()
        processes.join(args.device)
        if args.json is not None:
            refuse_json(Path(args.json))
        if args.show:
            show_answers(args.runs, args)
            sys.exit()
        together = tables.Runs()
        for run in tqdm(args.runs, desc="scoring", unit="run", disable=len(args.runs) < 2):
            done, metrics = score(run, args)
            together.add(run, done, extras(run, done, metrics, args))
        base, methods, paired = together.summary(args.baseline)
        correlated = tables.correlations(methods)
        columns = tables.chosen(methods, args.columns)
        if columns:
            tables.print_columns(methods, paired, base, columns)
        else:
            tables.print_tables(methods)
            tables.print_tests(paired, base)
            tables.print_correlations(correlated)
        if args.json:
            formats.write_json(args.json, tables.as_json(methods, paired, correlated, args, columns))
