"""Attack an unlearned model: fine-tune it on a few forget samples and see how much comes back.

    python relearn.py out/npo+sam-s0                        # 20, 40, 60 samples, two draws each: about 5 s
    python relearn.py out/npo+sam-s0 --samples 20 --epochs 1 2 3
    python relearn.py out/npo+sam-s0 --lr 2e-3 1e-3         # a milder attacker beside the default one
    python relearn.py data/tiny/seed0/retrained             # the yardstick: a model that never knew

Reads RUN/result.json (for the data and the seed), the model beside it and DATA/forget.jsonl. Writes
RUN/relearn.json. Every budget starts from the same weights; the samples of a larger budget contain those of a
smaller one. Rows that tell the same "fact" count once, so N samples are N facts, and UE_heldout is the UE on
the questions about the other facts: it tells unlocking (old knowledge comes back) from re-teaching. Next:
evaluate.py puts several runs into one table.
"""
import math, random, time
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
from evaluate import (InputError, all_sum, collate, context_of, encode_rows, join_processes, load_model,
                      make_parser, number, one_line_errors, own_part, provenance, read_jsonl, show, text_row,
                      token_logps, write_json)
from sam import restore_


def draw_samples(rows, count, seed):
    """Indices of `count` rows in an order that only seed fixes, so that smaller draws are prefixes of larger
    ones; no two rows tell the same fact, where rows carry one."""
    order, seen, picks = list(range(len(rows))), set(), []
    random.Random(seed).shuffle(order)
    for i in order:
        fact = rows[i].get("fact", f"row {i}")
        if fact not in seen:
            seen.add(fact)
            picks.append(i)
    if count > len(picks):
        raise InputError(f"--samples {count}: there are {len(picks)} different forget samples; ask for fewer")
    return picks[:count]


def relearn(model, samples, pad, lr, batch_size, epochs, seed):
    """Fine-tune model in place on encoded samples: mean NLL a token, AdamW, rate linear to 0."""
    rng = random.Random(seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    steps, step = epochs * math.ceil(len(samples) / batch_size), 0
    for _ in range(epochs):
        order = rng.sample(range(len(samples)), len(samples))
        for i in range(0, len(order), batch_size):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            part, weight = own_part(order[i:i + batch_size])
            logps, mask = token_logps(model, collate([samples[j] for j in part], pad, model.device))
            loss = -logps.sum() * weight / all_sum(mask.sum() * weight, model.device)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    last = all_sum(loss.detach(), model.device).item()
    if not math.isfinite(last):
        raise InputError(f"relearning with --lr {lr:g} diverged (loss {last}): lower it")


def attack(model, tokenizer, rows, questions, args):
    """The "metrics" of relearn.json: all budgets lr x samples x epochs, each a mean over args.draws lists.

    rows: read_jsonl(forget.jsonl); questions: evaluate.load_questions(). Puts the weights back, bit for bit.
    """
    encoded, pad = encode_rows(tokenizer, rows, context_of(model), args.max_len), tokenizer.pad_token_id or 0
    lists = [draw_samples(rows, max(args.samples), f"{args.seed} {draw}") for draw in range(args.draws)]
    saved = [(p, p.detach().clone()) for p in model.parameters()]
    metrics = {"start": evaluate.ue_ut(model, tokenizer, questions), "budgets": []}
    plan = [(lr, n, e) for lr in args.lr for n in sorted(args.samples) for e in sorted(args.epochs)]
    bar = tqdm(total=len(plan) * args.draws, desc="relearning", unit="run")
    try:
        for lr, count, epochs in plan:
            draws = []
            for draw, order in enumerate(lists):
                picks = order[:count]
                relearn(model, [encoded[i] for i in picks], pad, lr, args.batch_size, epochs,
                        f"{args.seed} {draw} order")
                facts = {rows[i]["fact"] for i in picks if "fact" in rows[i]}
                draws.append(evaluate.ue_ut(model, tokenizer, questions, seen=facts))
                restore_(list(saved))
                bar.set_postfix(samples=count, UE=show(draws[-1]["UE"]))
                bar.update()
            mean = {k: None if v is None else sum(d[k] for d in draws) / len(draws)
                    for k, v in draws[0].items()}
            metrics["budgets"].append({"samples": count, "epochs": epochs, "lr": lr, **mean, "draws": draws})
    finally:
        restore_(saved)
        bar.close()
    return metrics


def parse_args(argv=None):
    """The flags; argv None = the command line. data and seed default to those of the run's result.json."""
    p = make_parser(__doc__)
    p.add_argument("run", help="folder of a model with a result.json")
    p.add_argument("--samples", type=number(int, 1), nargs="+", default=[20, 40, 60],
                   help="forget samples of each budget")
    p.add_argument("--epochs", type=number(int, 1), nargs="+", default=[1],
                   help="passes over them; every pair is a budget")
    p.add_argument("--lr", type=number(float, 0, above=True), nargs="+", default=[2e-3],
                   help="peak rate of AdamW, linear to 0; 7B: 1e-5")
    p.add_argument("--batch_size", type=number(int, 1), default=4, help="samples a step; 7B: 4")
    p.add_argument("--draws", type=number(int, 1), default=2, help="sample lists to average over")
    p.add_argument("--seed", type=number(int, 0), default=None,
                   help="of the sample lists (default: the run's)")
    p.add_argument("--data", default=None, help="data folder (default: the run's)")
    p.add_argument("--max_len", type=number(int, 0), default=None, help="cut samples (default: the run's)")
    args = p.parse_args(argv)
    ran = evaluate.load_result(args.run)["args"]
    for name, fallback in (("data", None), ("seed", 0), ("max_len", 0)):
        if getattr(args, name) is None:
            setattr(args, name, ran.get(name, fallback))
    args.param_dtype = ran.get("param_dtype", "float32")
    return args


def main(args, model=None, tokenizer=None):
    """Attack args.run (its model is loaded unless given), write RUN/relearn.json and print the table."""
    start = time.time()
    rows = read_jsonl(Path(args.data) / "forget.jsonl", text_row)
    questions = evaluate.load_questions(args.data)
    if model is None:
        model, tokenizer = load_model(args.run, args.device, getattr(torch, args.param_dtype))
    metrics = attack(model, tokenizer, rows, questions, args)
    write_json(Path(args.run) / "relearn.json", {"stage": "relearn", "args": vars(args),
                                                 **provenance(args.device, start), "metrics": metrics})
    lines = [["relearned on", "lr", "UE", "UE held out", "UT"],
             ["0 samples", "-", show(metrics["start"]["UE"]), "-", show(metrics["start"]["UT"])]]
    for b in metrics["budgets"]:
        lines.append([f"{b['samples']} samples" + (f" x {b['epochs']} epochs" if b["epochs"] > 1 else ""),
                      f"{b['lr']:g}", show(b["UE"]), show(b["UE_heldout"]), show(b["UT"])])
    print(evaluate.table(lines))


if __name__ == "__main__":
    with one_line_errors():
        args = parse_args()
        join_processes(args.device)
        main(args)
