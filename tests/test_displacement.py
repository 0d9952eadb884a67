"Displacement beyond the page: the books on random worlds, CHES on three families, the samples against exact counts, the monitor on logs made by hand."
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import PrinterCallback, TrainerControl

from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.losses import get_loss
from dpo_literate.models import tiny_model
from dpo_literate.probes.base import Probe, Reading, interval_of, scored_states
from dpo_literate.probes.displacement import (REMEDIES, DisplacementMonitor, account, advice, ches_scores, displacement_probe, fork_mass, fork_rows, length_offsets,
                                              length_share, logps_of, mass_moved, next_token_mass, one_step_shift, pair_logps, rank_correlation, remedy,
                                              sample_replies, shift_of)
from dpo_literate.results import Refusal
from dpo_literate.rows import Row, encode_pairs, tiny_tokenizer
from dpo_literate.trainer import DPOConfig, DPOTrainer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}", rejected=f"on the dog {'sat ' * (i % 4)}{i}") for i in range(6)]
ROWS, _ = encode_pairs(PAIRS, TOKENIZER)
KINDS = ("llama", "qwen2", "gpt2", "gemma2")


# ------------------------------------------------------------ readings

def test_a_reading_is_finite():
    with pytest.raises(Refusal, match="not finite"): Reading("x", math.nan, 0, 1, 3)


def test_a_probe_is_json_and_knows_its_readings():
    probe = Probe("?", [Reading("x", 1., .5, 2., 3)])
    assert json.loads(json.dumps(probe.to_dict()))["readings"][0]["high"] == 2. and probe["x"].n == 3
    with pytest.raises(KeyError): probe["y"]


def test_an_interval_needs_two_items():
    with pytest.raises(Refusal): interval_of(lambda w: w.sum(), 1)


# ------------------------------------------------------------ the books

@pytest.mark.parametrize("seed", range(10))
def test_the_account_balances(seed):
    g = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(7, 5, dtype=torch.float64, generator=g).log_softmax(-1) for _ in range(2))
    w, l = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(7)]).T
    books = account(before, after, w, l)
    for i in range(7):
        moved = after[i].exp() - before[i].exp()
        assert abs(books.chosen[i] - moved[w[i]]) < 1e-15
        assert abs(books.others[i] - sum(moved[k] for k in range(5) if k not in (w[i], l[i]))) < 1e-15
        assert abs(sum(b[i] for b in books)) < 1e-14


def test_forks_are_where_replies_part():
    rows = [Row([1], [5, 6, 7], [5, 8]), Row([1, 2], [5, 6], [9, 6]), Row([1], [5, 6], [5])]
    cut = fork_rows(rows)
    assert [(r.prompt_ids, r.chosen_ids, r.rejected_ids) for r in cut] == [([1, 5], [6], [8]), ([1, 2], [5], [9])]


@pytest.mark.parametrize("kind", KINDS)
def test_fork_mass_against_a_softmax(kind):
    model = tiny_model(kind)
    mass = fork_mass(model, ROWS, batch_size=4)
    for r, got in zip(fork_rows(ROWS), mass):
        p = model(torch.tensor([r.prompt_ids])).logits[0, -1].double().softmax(-1)
        want = torch.stack([p[r.chosen_ids[0]], p[r.rejected_ids[0]], 1 - p[r.chosen_ids[0]] - p[r.rejected_ids[0]]])
        assert (got - want).abs().max() < 1e-5


def test_samples_estimate_the_exact_share():
    "One-token replies can be listed: the estimate lies within four standard errors of the truth, from either model's side."
    a, b = tiny_model(seed=0), tiny_model(seed=1)
    ids, n = ROWS[0].prompt_ids, 600
    exact, top, before, after = next_token_mass(a, b, ids, k=320)
    assert abs((after - before).abs().sum() / 2 - exact) < 1e-12 and len(set(top)) == 320
    for policy, reference in ((a, b), (b, a)):
        found = mass_moved(policy, reference, ids, {TOKENIZER.eos_token_id}, n=n, max_new_tokens=1)
        assert abs(found.share - exact) < 4 * .5 / math.sqrt(n), (found.share, exact)
    assert mass_moved(a, a, ids, {TOKENIZER.eos_token_id}, n=8, max_new_tokens=3).share < 1e-6


def test_sampled_replies_end_where_they_end():
    model = tiny_model(scale=1.)
    ends = set(range(0, 320, 3))
    replies = sample_replies(model, ROWS[0].prompt_ids, 40, 6, ends)
    assert len(replies) == 40 and all(1 <= len(y) <= 6 for y in replies)
    assert all(t not in ends for y in replies for t in y[:-1]) and any(y[-1] in ends for y in replies)
    assert sample_replies(model, ROWS[0].prompt_ids, 40, 6, ends) == replies
    odd = logps_of(model, ROWS[0].prompt_ids, replies[:5])
    alone = torch.cat([logps_of(model, ROWS[0].prompt_ids, [y]) for y in replies[:5]])
    assert odd.shape == (5,) and (odd - alone).abs().max() < 1e-5


# ------------------------------------------------------------ CHES

@pytest.mark.parametrize("normalised", [False, True])
def test_ches_equals_the_loop_in_float64(normalised):
    model = tiny_model("gpt2")
    for row, got in zip(ROWS, ches_scores(model, ROWS, normalised, batch_size=4)):
        totals = []
        for reply in (row.chosen_ids, row.rejected_ids):
            h = model(torch.tensor([row.prompt_ids + reply]), output_hidden_states=True).hidden_states[-1][0]
            first = len(row.prompt_ids) - 1
            totals.append(h[first:first + len(reply)].sum(0) / (len(reply) if normalised else 1))
        want = totals[0] @ totals[1] - totals[0] @ totals[0]
        assert abs(got - want) < 1e-10 * max(1, abs(want))


@pytest.mark.parametrize("kind", KINDS)
def test_scored_states_are_what_the_head_reads(kind):
    model = tiny_model(kind)
    states = scored_states(model, pad_rows(ROWS))
    hidden = model(input_ids=pad_rows(ROWS).input_ids, attention_mask=pad_rows(ROWS).attention_mask, output_hidden_states=True).hidden_states[-1]
    assert (states - hidden.flatten(0, 1)[pad_rows(ROWS).score_at]).abs().max() < 1e-5


def test_one_step_is_the_derivative_of_a_real_step():
    model, row, lr = tiny_model("gpt2"), ROWS[1], 1e-7
    moved, batch = copy.deepcopy(model), pad_rows([row])
    start = reply_logps(model, batch)
    out = reply_logps(moved, batch)
    loss = -torch.nn.functional.logsigmoid(.1 * (out.chosen - start.chosen.detach() - out.rejected + start.rejected.detach()))
    loss.sum().backward()
    with torch.no_grad():
        for p in moved.parameters(): p -= lr * p.grad
    real = (reply_logps(moved, batch).chosen - start.chosen).item() / lr
    assert abs(real / one_step_shift(model, row) - 1) < 1e-3


def test_rank_correlation_limits():
    x = torch.arange(12.)
    assert abs(rank_correlation(x, -x.exp()).value + 1) < 1e-12 and abs(rank_correlation(x, x**3).value - 1) < 1e-12


# ------------------------------------------------------------ length

def test_r_dpo_is_an_offset():
    if "r_dpo" not in _names(): pytest.skip("r_dpo is not in the registry")
    z, alpha = torch.zeros(len(ROWS), dtype=torch.float64), .03
    lengths = dict(chosen_lengths=torch.tensor([float(len(r.chosen_ids)) for r in ROWS]).double(), rejected_lengths=torch.tensor([float(len(r.rejected_ids)) for r in ROWS]).double())
    four = dict(policy_chosen_logps=z - 2, policy_rejected_logps=z + 1, ref_chosen_logps=z, ref_rejected_logps=z)
    offset = torch.tensor([r.offset for r in length_offsets(ROWS, alpha)], dtype=torch.float64)
    assert (get_loss("sigmoid")({**four, "offset": offset})[0] - get_loss("r_dpo")({**four, **lengths}, length_penalty=alpha)[0]).abs().max() < 1e-12


def _names():
    from dpo_literate.losses import LOSSES
    try: get_loss("r_dpo")
    except Refusal: pass
    return LOSSES


def test_length_share_is_r_squared():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, dtype=torch.float64, generator=g), torch.randn(50, dtype=torch.float64, generator=g)
    want = torch.corrcoef(torch.stack([x, y]))[0, 1]**2
    found = length_share(y, x)
    assert abs(found.value - want) < 1e-12 and found.low <= found.value <= found.high


# ------------------------------------------------------------ the monitor

def watch(lines, **settings):
    "Feed log lines (chosen, rejected in nat) to a monitor."
    args = SimpleNamespace(loss_type=["sigmoid"], beta=.1, learning_rate=1e-6, **settings)
    monitor, state = DisplacementMonitor(), SimpleNamespace(log_history=[], global_step=0, is_world_process_zero=False)
    monitor.on_train_begin(args, state, TrainerControl())
    for c, r in lines:
        state.global_step += 1
        monitor.on_log(args, state, TrainerControl(), logs={"rewards/chosen": .1 * c, "rewards/rejected": .1 * r, "rewards/margins": .1 * (c - r), "logps/chosen": -50., "logps/rejected": -50.})
    return monitor


def test_monitor_speaks_and_is_silent():
    fall = [(0, 0)] + [(-k, -2 * k) for k in range(1, 7)]
    assert watch(fall).said and "displacement at step 4" in watch(fall).said[0]
    assert not watch([(0, 0)] + [(k, -k) for k in range(1, 9)]).said                     # healthy
    assert not watch([(0, 0)] + [(-.5, -4.)] * 9).said                                   # less than a nat
    assert not watch([(0, 0), (-3, -4), (1, -4), (-3, -5), (1, -5), (-3, -6)]).said       # not in a row
    assert not watch([(0, 0)] + [(-k, -.5 * k) for k in range(1, 9)]).said               # the margin falls too: another illness


def test_monitor_says_it_again_only_when_it_doubled():
    assert len(watch([(0, 0)] + [(-3, -6)] * 20).said) == 1
    assert len(watch([(0, 0)] + [(-3, -6)] * 5 + [(-7, -12)] * 5).said) == 2


def test_monitor_ignores_lines_about_other_things():
    monitor = watch([(0, 0)] + [(-k, -2 * k) for k in range(1, 3)])
    state = SimpleNamespace(log_history=[], global_step=9, is_world_process_zero=False)
    monitor.on_log(SimpleNamespace(loss_type=["sigmoid"], beta=.1), state, TrainerControl(), logs={"train_runtime": 3.})
    monitor.on_log(SimpleNamespace(loss_type=["sigmoid"], beta=.1), state, TrainerControl(), logs=None)
    assert not monitor.said


def test_monitor_reads_a_loss_without_reference_from_its_raw_numbers():
    if "simpo" not in _names(): pytest.skip("simpo is not in the registry")
    args = SimpleNamespace(loss_type=["simpo"], beta=2.)
    line = {"rewards/chosen": -9., "logps/chosen": -52., "logps/rejected": -60.}
    assert shift_of(line, "chosen", args, {"logps/chosen": -50.}) == -2.


def test_advice_does_not_name_what_is_in_use():
    said = advice(SimpleNamespace(loss_type=["sigmoid", "sft"], learning_rate=1e-6))
    assert "likelihood term" not in said and "DPOP" in said


def test_remedies_change_one_thing():
    base = dict(learning_rate=1e-3, beta=.1)
    for name in REMEDIES: assert sum(remedy(name, base).get(k) != base.get(k) for k in ("learning_rate", "loss_type", "beta")) == 1
    assert base == dict(learning_rate=1e-3, beta=.1)


def taught(pairs, steps=60):
    model, batch = tiny_model(scale=1.), pad_rows(encode_pairs(pairs, TOKENIZER)[0])
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        out = reply_logps(model, batch)
        (-out.sums.sum() / out.lengths.sum()).backward(); opt.step(); opt.zero_grad()
    return model


WORDS = "cat dog mat answer system user please tell".split()
NEAR = [dict(prompt=f"tell me {a} {b}", chosen=f"the {a} sat on the {b} and the dog", rejected=f"the {a} sat on the {b} and the cat") for a in WORDS for b in WORDS[:2]]
FAR = [dict(prompt=f"tell me {a} {b}", chosen=f"the {a} sat on the {b}", rejected=f"please, no {b} why") for a in WORDS for b in WORDS[:2]]


@pytest.mark.parametrize("pairs,ill", [(NEAR, True), (FAR, False)])
def test_monitor_in_a_real_run(tmp_path, pairs, ill, capsys):
    "Fires on a run built to displace (replies one word apart, both well known), silent on a healthy one."
    monitor, start = DisplacementMonitor(), taught(pairs)
    args = DPOConfig(str(tmp_path), use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=6,
                     per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.)
    trainer = DPOTrainer(copy.deepcopy(start), args=args, train_dataset=pairs, processing_class=TOKENIZER, callbacks=[monitor])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found = displacement_probe(trainer.model, start, TOKENIZER, pairs)
    assert bool(monitor.said) == ill == ("displacement" in capsys.readouterr().out)
    assert (found["chosen reply"].high < -1) == ill and found["pairs ordered as the judge did"].value > .5
    rows, _ = encode_pairs(pairs, TOKENIZER)
    by_hand = pair_logps(trainer.model, rows) - pair_logps(start, rows)
    assert abs(found["chosen reply"].value - by_hand[:, 0].mean()) < 1e-9
    assert abs(sum(found[f"at the fork: {who}"].value for who in ("chosen token", "rejected token", "all others"))) < 1e-9


def test_monitor_under_trl(tmp_path):
    "TRL logs under the same names, so the callback speaks there too."
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    monitor, start = DisplacementMonitor(), taught(NEAR)
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=6,
                         per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.)
    trainer = trl.DPOTrainer(copy.deepcopy(start), copy.deepcopy(start), args=args, train_dataset=Dataset.from_list(NEAR), processing_class=TOKENIZER, callbacks=[monitor])
    trainer.train()
    assert monitor.said
