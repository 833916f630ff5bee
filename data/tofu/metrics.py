"""TOFU's metrics (arXiv 2401.06121): probability, ROUGE-L recall and truth ratio of answers, and what follows
from them: model utility and forget quality. evaluate.py calls score()."""
import math

from data.formats import InputError, check_texts, load_meta, read_jsonl
from data.models import context_of, encode, generate, label_scores
from data.scores import harmonic_mean, ks_test, mean_of, rouge_l

QA = "Question: {question}\nAnswer: {answer}"    # where meta.json has no "qa_prompt"
KEPT = ("qa_retain", "qa_real_authors", "qa_world_facts")        # the parts of model utility


def score(model, tokenizer, folder, batch, thin, retained):
    """({metric: value}, {name: records}) of the qa_*.jsonl that `folder` has; empty without any.

    thin(rows) -> the rows to score. retained: evaluate.json of a model that never saw the forget set, whose
    truth ratios the forget quality compares with, or None.
    """
    template = load_meta(folder).get("qa_prompt", QA)
    out = {}
    records = {}
    for path in sorted(folder.glob("qa_*.jsonl")):
        rows = thin(read_jsonl(path, qa_row))
        records[path.stem] = qa_scores(model, tokenizer, rows, template, batch=batch)
        out[path.stem] = qa_summary(path.stem, records[path.stem])
    if all(name in out for name in KEPT):
        out["utility"] = harmonic_mean([value for name in KEPT for value in out[name].values()])
    if "qa_forget" in out and retained:
        own = [r["R"] for r in records["qa_forget"]]
        other = [r["R"] for r in retained["records"]["qa_forget"]]
        out["forget_quality"] = ks_test(own, other)[1]
    return out, records


def qa_row(row):
    """Check a row of qa_*.jsonl: {"question", "answer", "perturbed_answer": [texts]} and, optional,
    "paraphrased_answer"."""
    check_texts(row, "question", "answer")
    if "paraphrased_answer" in row:
        check_texts(row, "paraphrased_answer")
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
    """Records: "prob" exp(mean log p of the answer), "R" truth_ratio, "rouge" recall of a greedy answer.

    Rows without a paraphrased_answer (TOFU's real authors and world facts) go as in TOFU: the answer stands
    in for it, and prob is divided by the sum over the answer and the wrong ones. TOFU's own code also counts
    the end-of-text token as part of an answer, and stems before ROUGE; this does neither.
    """
    triples = []
    asked = []
    for row in rows:
        answers = [row["answer"], row.get("paraphrased_answer", row["answer"]), *row["perturbed_answer"]]
        for answer in answers:
            triples.append((*qa_texts(template, row["question"], answer), row["where"]))
        asked.append((qa_texts(template, row["question"], "")[0], row["where"]))
    samples = encode(tokenizer, triples, context_of(model))
    means = [logps.mean().item() for logps, _ in label_scores(model, tokenizer, samples, batch, "answers")]
    out = []
    for row, said in zip(rows, generate(model, tokenizer, asked, new, batch, "answers")):
        count = 2 + len(row["perturbed_answer"])
        answer, paraphrased, *wrong = means[:count]
        means = means[count:]
        prob = math.exp(answer)
        if "paraphrased_answer" not in row:
            prob = 1 / (1 + math.fsum(math.exp(min(w - answer, 700.0)) for w in wrong))
        out.append({"where": row["where"], "said": said, "prob": prob, "R": truth_ratio(paraphrased, wrong),
                    "rouge": rouge_l(said, row["answer"])[1]})
    return out


def truth_ratio(paraphrased, perturbed):
    """R: exp(mean of the wrong answers' mean token log-probabilities - that of the paraphrased right answer).
    Below 1: the model prefers what is true."""
    return math.exp(min(sum(perturbed) / len(perturbed) - paraphrased, 700.0))


def qa_summary(name, records):
    """{"prob", "rouge", "truth"}: means over records; truth of R is min(R, 1/R) for the forget set, which is
    best at 1, and max(0, 1 - R) for what should be kept."""
    truth = []
    for r in records:
        if name == "qa_forget":
            truth.append(min(r["R"], 1 / max(r["R"], 1e-300)))
        else:
            truth.append(max(0.0, 1 - r["R"]))
    return {"prob": mean_of(records, "prob"), "rouge": mean_of(records, "rouge"),
            "truth": math.fsum(truth) / len(truth)}
