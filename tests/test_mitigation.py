"Against displacement, beyond the page: CHES, R-DPO, the monitor on logs by hand and in real runs."
import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.losses import get_loss
from dpo_literate.models import tiny_model
from dpo_literate.probes.base import far_pairs, near_pairs, short_run, teach_replies
from dpo_literate.probes.displacement import pair_logps
from dpo_literate.probes.mitigation import (REMEDIES, DisplacementMonitor, advice, ches_scores,
                                            length_offsets, length_share, one_step_shift, remedy)
from dpo_literate.rows import encode_pairs, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}",
              rejected=f"on the dog {'sat ' * (i % 4)}{i}") for i in range(6)]
ROWS, _ = encode_pairs(PAIRS, TOKENIZER)


# ------------------------------------------------------------ CHES

@pytest.mark.parametrize("normalised", [False, True])
def test_ches_equals_the_loop_in_float64(normalised):
    model = tiny_model("gpt2")
    for row, got in zip(ROWS, ches_scores(model, ROWS, normalised, batch_size=4)):
        totals, first = [], len(row.prompt_ids) - 1
        for reply in (row.chosen_ids, row.rejected_ids):
            ids = torch.tensor([row.prompt_ids + reply])
            h = model(ids, output_hidden_states=True).hidden_states[-1][0]
            total = h[first:first + len(reply)].sum(0)
            totals.append(total / len(reply) if normalised else total)
        want = totals[0] @ totals[1] - totals[0] @ totals[0]
        assert abs(got - want) < 1e-10 * max(1, abs(want))


def test_one_step_is_the_derivative_of_a_real_step():
    model, row, lr = tiny_model("gpt2"), ROWS[1], 1e-7
    moved, batch = copy.deepcopy(model), pad_rows([row])
    start, out = reply_logps(model, batch), reply_logps(moved, batch)
    gap = out.chosen - start.chosen.detach() - out.rejected + start.rejected.detach()
    (-torch.nn.functional.logsigmoid(.1 * gap)).sum().backward()
    with torch.no_grad():
        for p in moved.parameters(): p -= lr * p.grad
    real = (reply_logps(moved, batch).chosen - start.chosen).item() / lr
    assert abs(real / one_step_shift(model, row) - 1) < 1e-3


# ------------------------------------------------------------ length

def test_r_dpo_is_an_offset():
    z, alpha = torch.zeros(len(ROWS), dtype=torch.float64), .03
    def tokens(side): return torch.tensor([len(getattr(r, f"{side}_ids")) for r in ROWS]).double()
    lengths = {f"{side}_lengths": tokens(side) for side in ("chosen", "rejected")}
    four = dict(policy_chosen_logps=z - 2, policy_rejected_logps=z + 1, ref_chosen_logps=z,
                ref_rejected_logps=z)
    offset = torch.tensor([r.offset for r in length_offsets(ROWS, alpha)], dtype=torch.float64)
    plain = get_loss("sigmoid")({**four, "offset": offset})[0]
    r_dpo = get_loss("r_dpo")({**four, **lengths}, length_penalty=alpha)[0]
    assert (plain - r_dpo).abs().max() < 1e-12


def test_length_share_is_inside_its_interval():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, dtype=torch.float64, generator=g) for _ in range(2))
    found = length_share(y, x)
    assert 0 <= found.low <= found.value <= found.high <= 1


# ------------------------------------------------------------ the monitor

def logged(chosen, rejected):
    "A log line of the trainer, from changes in nat."
    return {"rewards/chosen": .1 * chosen, "rewards/rejected": .1 * rejected,
            "rewards/margins": .1 * (chosen - rejected), "logps/chosen": -50.,
            "logps/rejected": -50.}


def watch(lines, **settings):
    "Feed log lines (chosen, rejected in nat) to a monitor."
    args = SimpleNamespace(loss_type=["sigmoid"], beta=.1, learning_rate=1e-6, **settings)
    state = SimpleNamespace(log_history=[], global_step=0, is_world_process_zero=False)
    monitor, control = DisplacementMonitor(), TrainerControl()
    monitor.on_train_begin(args, state, control)
    for line in lines:
        state.global_step += 1
        monitor.on_log(args, state, control, logs=logged(*line))
    return monitor


def test_monitor_warns_of_displacement():
    fall = [(0, 0)] + [(-k, -2 * k) for k in range(1, 7)]
    assert watch(fall).said and "displacement at step 4" in watch(fall).said[0]


@pytest.mark.parametrize("why,lines", [
    ("healthy", [(k, -k) for k in range(1, 9)]),
    ("less than a nat", [(-.5, -4.)] * 9),
    ("not in a row", [(-3, -4), (1, -4), (-3, -5), (1, -5), (-3, -6)]),
    ("the margin falls too", [(-k, -.5 * k) for k in range(1, 9)])])
def test_monitor_is_silent(why, lines): assert not watch([(0, 0)] + lines).said


def test_monitor_says_it_again_only_when_it_doubled():
    assert len(watch([(0, 0)] + [(-3, -6)] * 20).said) == 1
    assert len(watch([(0, 0)] + [(-3, -6)] * 5 + [(-7, -12)] * 5).said) == 2


def test_monitor_begins_anew_with_each_run():
    monitor = watch([(0, 0)] + [(-3, -6)] * 20)
    args, control = SimpleNamespace(loss_type=["sigmoid"], beta=.1), TrainerControl()
    monitor.on_train_begin(args, SimpleNamespace(log_history=[]), control)
    assert not monitor.said and monitor.threshold == monitor.nats


def test_monitor_ignores_lines_about_other_things():
    monitor = watch([(0, 0)] + [(-k, -2 * k) for k in range(1, 3)])
    state = SimpleNamespace(log_history=[], global_step=9, is_world_process_zero=False)
    args = SimpleNamespace(loss_type=["sigmoid"], beta=.1)
    for logs in ({"train_runtime": 3.}, None):
        monitor.on_log(args, state, TrainerControl(), logs=logs)
    assert not monitor.said


def test_advice_does_not_name_what_is_in_use():
    said = advice(SimpleNamespace(loss_type=["sigmoid", "sft"], learning_rate=1e-6))
    assert "likelihood term" not in said and "DPOP" in said
    assert "Try" not in advice(SimpleNamespace(loss_type=["dpop", "sft"], learning_rate=1e-6))


def test_remedies_change_one_thing():
    base = dict(learning_rate=1e-3, beta=.1)
    for name in REMEDIES:
        new = remedy(name, base)
        assert sum(new.get(k) != base.get(k) for k in ("learning_rate", "loss_type", "beta")) == 1
    assert base == dict(learning_rate=1e-3, beta=.1)


NEAR, FAR = near_pairs()[::2], far_pairs()[::2]


def taught(pairs):
    return teach_replies(tiny_model(scale=1.), encode_pairs(pairs, TOKENIZER)[0])


@pytest.mark.parametrize("pairs,ill", [(NEAR, True), (FAR, False)])
def test_monitor_in_a_real_run(pairs, ill, capsys):
    "Warns in a run built to displace (one word apart, both well known), silent in a healthy one."
    monitor, start = DisplacementMonitor(), taught(pairs)
    run = short_run(start, pairs, TOKENIZER, callbacks=[monitor], num_train_epochs=6)
    rows, _ = encode_pairs(pairs, TOKENIZER)
    fell = (pair_logps(run.model, rows) - pair_logps(start, rows))[:, 0].mean() < -1
    assert bool(monitor.said) == ill == bool(fell) == ("displacement" in capsys.readouterr().out)


def test_monitor_under_trl(tmp_path):
    "TRL logs under the same names, so the callback speaks there too."
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    monitor, start = DisplacementMonitor(), taught(NEAR)
    args = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, save_strategy="no", report_to=[],
                         disable_tqdm=True, logging_steps=1, num_train_epochs=6,
                         per_device_train_batch_size=8, learning_rate=1e-3,
                         lr_scheduler_type="constant", max_grad_norm=0.)
    trainer = trl.DPOTrainer(copy.deepcopy(start), copy.deepcopy(start), args=args,
                             train_dataset=Dataset.from_list(NEAR), processing_class=TOKENIZER,
                             callbacks=[monitor])
    trainer.train()
    assert monitor.said
