"""Exactness and fuzz: every loss trained under every layout, and texts that spell control tokens.
Part of tools/soak.py."""
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from test_templates import A, FAMILIES, FORMS, PIECES, U, count, tokenizer_of
from test_trainer import TOKENIZER, config, exact
from test_trainer_equal import NAMES, rows_of  # noqa: F401

from dpo_literate.losses import LOSSES
from dpo_literate.results import Refusal
from dpo_literate.trainer import DPOTrainer
from dpo_literate.turns import encode_turns

WAYS = dict(padded=dict(layout="padded"), packed=dict(layout="packed"),
            shared=dict(layout="shared"), split=dict(layout="packed", split=3),
            two=dict(layout="packed", processes=2))


def double_softmax():
    "Softmax in the type of its input: transformers takes it in float32."
    real = torch.nn.functional.softmax
    torch.nn.functional.softmax = lambda x, dim=-1, dtype=None: real(x, dim=dim)


def trained(name, place, layout, split=1, processes=1):
    "Weights after three steps of a loss, in float64."
    rows = rows_of(LOSSES[name])
    args = config(place, loss_type=name, layout=layout, num_train_epochs=3, save_strategy="no",
                  per_device_train_batch_size=len(rows) // split // processes,
                  gradient_accumulation_steps=split, train_sampling_strategy="sequential",
                  **(dict(ddp_backend="gloo") if processes > 1 else {}))
    t = DPOTrainer(exact("llama"), args=args, train_dataset=rows, processing_class=TOKENIZER)
    t.remove_callback(transformers.PrinterCallback)
    t.train()
    model = t.accelerator.unwrap_model(t.model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one_way(name, way, place, rank=0, port=0):
    "In a fork: train, and leave the weights, or the reason why not."
    how = WAYS[way]
    if how.get("processes", 1) > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if pid := os.fork(): return pid
    silent = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2): os.dup2(silent, handle)
    try:
        double_softmax()
        transformers.logging.set_verbosity_error()
        weights = trained(name, place / f"{way}{rank}" if rank else place / way, **how)
        if rank == 0: torch.save(weights, place / f"{way}.pt")
    except Refusal as no: (place / f"{way}.txt").write_text(f"refused: {no}")
    except BaseException as why: (place / f"{way}.txt").write_text(f"{type(why).__name__}: {why}")
    os._exit(0)


def exactness(name, ram):
    "How far each way of computing a loss ends from the padded one: a number, or words."
    from tools.soak_kills import free_port
    place, found = Path(tempfile.mkdtemp(dir=ram)), {}
    try:
        for way, how in WAYS.items():
            port, n = free_port(), how.get("processes", 1)
            pids = [one_way(name, way, place, rank, port) for rank in range(n)]
            for pid in pids: os.waitpid(pid, 0)
            for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(key, None)
            if (place / f"{way}.pt").exists():
                found[way] = torch.load(place / f"{way}.pt", weights_only=True)
            else: found[way] = (place / f"{way}.txt").read_text()[:200]
    finally: shutil.rmtree(place, ignore_errors=True)
    base = found.pop("padded")
    if isinstance(base, str): return dict(padded=base)
    start = torch.cat([p.detach().flatten() for p in exact("llama").parameters()])
    moved = (base - start).abs().max().item()
    apart = {w: x if isinstance(x, str) else (x - base).abs().max().item()
             for w, x in found.items()}
    return apart | dict(moved=moved)


# ------------------------------------------------------------ fuzz

def fuzz(form, first, last):
    "Texts in a user's turn and in both replies; how many rows gained or lost a control token."
    families, found = list(FAMILIES), dict(texts=0, through=0, refused=0, spelled=0)
    rng, plain = random.Random(f"{form} {first}"), {}
    words = PIECES + FORMS[form][1] * 3 + ["<s>", "</s>", "<pad>"]
    def ids(tok, x, y, z):
        turns = encode_turns([U(x)], [[A(y)], [A(z)]], tok, score_tail=True)
        return [count(tok, turns.prompt_ids), *(count(tok, r) for r in turns.reply_ids)]
    for k in range(first, last):
        family = families[k % len(families)]
        tok = tokenizer_of(form, family)
        text = "".join(rng.choices(words, k=rng.randint(1, 8)))
        reply = text.replace("</think>", "").replace("<think>", "")   # a thought is the template's
        if family not in plain: plain[family] = ids(tok, "x", "y", "z")
        found["texts"] += 1
        found["spelled"] += any(w in text for w in [*FORMS[form][1], "<s>", "</s>", "<pad>"])
        try: found["through"] += ids(tok, text + "x", reply + "y", "z" + reply) != plain[family]
        except Refusal: found["refused"] += 1
    return found
