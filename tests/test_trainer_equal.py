"One step of the trainer against full logits of padded texts: every loss of the register, on four families; what a loss must not notice (T13); the optimum of theory through the whole stack (T11)."
import dataclasses
import types

import pytest
import torch

from dpo_literate.losses import LOSSES, all_losses
from dpo_literate.models import tiny_model
from dpo_literate.rows import Row, encode_pairs, split_pairs
from dpo_literate.objective import mismatched
from dpo_literate.settings import PAIR_INPUTS, REPLY_INPUTS, settings_of
from test_trainer import PAIRS, TOKENIZER, config, double_softmax, exact, train, trainer  # noqa: F401

NAMES = sorted(n for n, l in all_losses().items() if set(l.required) <= set(PAIR_INPUTS if l.paired else REPLY_INPUTS))
FAMILIES = ("llama", "qwen3", "gpt2", "gemma2")
OFFSETS = (0., .5, -.25)


def rows_of(loss, n=6):
    rows, _ = encode_pairs(PAIRS[:n], TOKENIZER)
    plain = loss.batch_dependent
    rows = [dataclasses.replace(r, weight=1. if plain else 1. + i % 2, offset=OFFSETS[i % 3] if "offset" in loss.needs else 0.) for i, r in enumerate(rows)]
    return rows if loss.paired else split_pairs(rows)


# ------------------------------------------------------------ the yardstick: full logits, one padded batch

def texts(model, asked):
    "Sum, length and WPO's mean of replies: [(prompt, reply)] in one right-padded batch."
    T = max(len(p) + len(y) for p, y in asked)
    ids, mask, keep = (torch.zeros(len(asked), T, dtype=torch.long) for _ in range(3))
    for i, (p, y) in enumerate(asked):
        ids[i, :len(p) + len(y)] = torch.tensor(p + y); mask[i, :len(p) + len(y)] = 1; keep[i, len(p):len(p) + len(y)] = 1
    logp = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)[:, :-1]
    token, keep = logp.gather(-1, ids[:, 1:, None]).squeeze(-1), keep[:, 1:]
    n = keep.sum(-1).double()
    return (token * keep).sum(-1), n, (((token - (2 * logp).logsumexp(-1)) * keep).sum(-1) / n).detach()


def plain_inputs(model, ref, rows, loss):
    def column(values): return torch.tensor(list(values), dtype=torch.float64)
    def both(asked):
        with torch.no_grad(): there = texts(ref, asked)[0]
        return *texts(model, asked), there
    zero = torch.zeros(len(rows), dtype=torch.float64)
    chosen = both([(r.prompt_ids, r.chosen_ids) for r in rows])
    if not loss.paired:
        away = [(m.prompt_ids, m.chosen_ids) for m in mismatched(rows) if m]
        with torch.no_grad(): z = (texts(model, away)[0] - texts(ref, away)[0]).mean().clamp(min=0)
        return dict(policy_logps=chosen[0], ref_logps=chosen[3], label=column(r.label for r in rows), z0=z, reward_mean=zero)
    rejected = both([(r.prompt_ids, r.rejected_ids) for r in rows])
    sides = {f"{name}_{side}{end}": x for side, found in (("chosen", chosen), ("rejected", rejected)) for (name, end), x in zip((("policy", "_logps"), ("", "_lengths"), ("", "_wpo"), ("ref", "_logps")), found)}
    return {k.lstrip("_"): v for k, v in sides.items()} | dict(offset=column(r.offset for r in rows), gap_mean=zero)


def plain_gradient(model, ref, rows, name, args):
    inputs = plain_inputs(model, ref, rows, LOSSES[name])
    value = LOSSES[name](inputs, **settings_of(LOSSES[name], args))[0]
    total = (value * torch.tensor([r.weight for r in rows])).mean()
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return total.item(), grads


# ------------------------------------------------------------ the trainer's step, without its optimizer

def step(t, batches):
    "Loss and gradient of one optimizer step of a trainer over these micro-batches."
    t.model.zero_grad(set_to_none=True); t.step.meter.clear()
    micro, n = t.get_batch_samples(iter([{"rows": b} for b in batches]), len(batches), t.args.device)
    loss = sum(t.training_step(t.model, m, n).item() for m in micro)
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in t.model.parameters()]


def made(path, name, kind="llama", rows=None, **settings):
    rows = rows_of(LOSSES[name]) if rows is None else rows
    reference = dict(ref_model=exact(kind, seed=1), other_reference=True) if LOSSES[name].reference else {}
    t = trainer(path, exact(kind), rows, loss_type=name, precompute_ref_log_probs=False, **(reference | settings))
    t.begin_run(); t.step.start_tolerance = None
    return t


def far(a, b): return max(((x - y).abs().max() / max(1., x.abs().max().item())).item() for x, y in zip(a, b))


@pytest.mark.usefixtures("double_softmax")
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_plain(tmp_path, name, kind):
    rows = rows_of(LOSSES[name])
    t = made(tmp_path, name, kind)
    assert t.step.layout.kind == "packed"
    want, slow = plain_gradient(t.model, t.ref_model if t.ref_model is not None else t.model, rows, name, t.args)
    for cut in ([rows], [rows[:1], rows[1:4], rows[4:]]):
        got, fast = step(t, cut)
        assert abs(got - want) <= 1e-10 * max(1., abs(want)) and far(slow, fast) <= 1e-10
    assert max(g.abs().max() for g in slow) > 1e-9


# ------------------------------------------------------------ T13, through the trainer

@pytest.mark.parametrize("name", NAMES)
def test_a_batch_said_twice(tmp_path, name):
    "Mean loss and gradient stay, for the losses that compare the rows of a step too."
    rows = rows_of(LOSSES[name], 4)
    t = made(tmp_path, name, rows=rows)
    once, twice = step(t, [rows]), step(t, [rows, rows])
    assert abs(once[0] - twice[0]) <= 1e-10 * max(1., abs(once[0])) and far(once[1], twice[1]) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_of_both_rewards(tmp_path, name):
    "A constant for each pair in both of the reference's numbers: unseen by the losses that say so, and by no other that reads them pair by pair."
    loss = LOSSES[name]
    if not (loss.reference and loss.paired): pytest.skip("no pair of reference numbers")
    t = made(tmp_path, name)
    rows, real = t.rows, t.step.reference.logps
    before = step(t, [rows])
    shift = {r.id: float(i * 7 % 5 + 1) for i, r in enumerate(rows)}
    def moved(self, batch):
        by = torch.tensor([shift[r.id] for r in batch.rows]); return tuple(x + by for x in real(batch))
    t.step.reference.logps = types.MethodType(moved, t.step.reference)
    after = step(t, [rows])
    same = abs(before[0] - after[0]) <= 1e-9 and far(before[1], after[1]) <= 1e-9
    if "level" in loss.relations or name == "rpo": assert same       # rpo's likelihood term sees the level, and no reference
    else: assert not same                                            # aot_unpaired too: each heap is shifted in an order of its own


# ------------------------------------------------------------ T11, through the whole stack

def test_theory_through_the_whole_stack(tmp_path):
    "One prompt, four replies of one token and an end, every verdict in its share: DPO's trainer finds π* ∝ π_ref exp(r/β)."
    rewards, beta = torch.tensor([1., .2, -.5, .6], dtype=torch.float64), .5
    replies = [[10 + a, 2] for a in range(4)]
    win = torch.sigmoid(rewards[:, None] - rewards)
    rows = [Row([5, 6], replies[i], replies[j], f"{i}{j}", win[i, j].item()) for i in range(4) for j in range(4) if i != j]
    def logps(model):
        with torch.no_grad(): return texts(model, [([5, 6], y) for y in replies])[0]
    start = logps(tiny_model(scale=1.))
    t = train(tmp_path, tiny_model(scale=1.), rows, beta=beta, per_device_train_batch_size=12, max_steps=150, learning_rate=3e-3, lr_scheduler_type="cosine", max_grad_norm=0., logging_steps=150)
    best = (start + rewards / beta).softmax(0)
    apart = .5 * (logps(t.model).softmax(0) - best).abs().sum()
    assert .5 * (start.softmax(0) - best).abs().sum() > .1 and apart <= 2e-3, apart
