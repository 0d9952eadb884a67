"""Twenty-two whole runs, against numbers of the trainer as it was before it was taken apart.

`golden_runs.json` holds what commit c45ac74 gave in float64: the loss of every step and three
projections of the trained weights. On the machine that made them the trainer of today is equal to
the bit; another processor adds in another order, so the last digits are its own."""
import json
from pathlib import Path

import pytest
import torch
import transformers
from test_trainer import TOKENIZER, config, exact, lora

from dpo_literate.rows import encode_pairs, split_pairs
from dpo_literate.trainer import DPOTrainer

GOLDEN = json.loads((Path(__file__).parent / "golden_runs.json").read_text(encoding="utf-8"))
DATA = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}",
             rejected=f"and the dog {'sat ' * (i % 4)}{i}") for i in range(13)]
WEIGHED = [dict(p, weight=1. + i % 2) for i, p in enumerate(DATA)]
ROWS, _ = encode_pairs(DATA, TOKENIZER)
THUMBS = split_pairs(ROWS)
HALVES = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
CASES = dict(
    packed={}, padded=dict(layout="padded"), cut2=dict(layout="padded", **HALVES),
    cuts=dict(per_device_train_batch_size=1, gradient_accumulation_steps=4),
    capacity=dict(capacity=48), frozen=dict(precompute_ref_log_probs=False),
    adapter=dict(precompute_ref_log_probs=False, lora=True), cached_adapter=dict(lora=True),
    aot=dict(loss_type="aot", **HALVES), kto=dict(loss_type="kto", data=THUMBS),
    bco=dict(loss_type="bco", data=THUMBS, **HALVES), beta_dpo=dict(loss_type="beta_dpo"),
    simpo=dict(loss_type="simpo"), wpo=dict(use_weighting=True),
    tr_dpo=dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=.6),
    ld=dict(ld_alpha=.5), weighed=dict(data=WEIGHED), kto_apart=dict(loss_type="kto"),
    mixture=dict(loss_type=["sigmoid", "ipo_sum", "sft"], loss_weights=[1., .5, .3]),
    aot_unpaired=dict(loss_type="aot_unpaired", data=THUMBS),
    token_metrics=dict(token_metrics=True), apo=dict(loss_type="apo_zero_unpaired", data=THUMBS))


def trained(case, folder):
    case = dict(case)
    data, tuned = case.pop("data", ROWS), case.pop("lora", False)
    torch.manual_seed(0)
    model = lora(exact("llama")) if tuned else exact("llama")
    given = dict(num_train_epochs=2, per_device_train_batch_size=4) | case
    t = DPOTrainer(model, args=config(folder, **given), train_dataset=data,
                   processing_class=TOKENIZER)
    t.remove_callback(transformers.PrinterCallback)
    t.train()
    return t


def projections(weights):
    "Three numbers that any changed weight changes."
    flat = torch.cat([w.detach().double().flatten() for _, w in sorted(weights.items())])
    at = torch.arange(len(flat), dtype=torch.float64)
    return [(flat * (k * at).cos()).sum().item() for k in (1., 2.3, 3.1)]


def test_every_case_has_its_numbers(): assert set(GOLDEN["cases"]) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_what_it_was(name, tmp_path):
    t, want = trained(CASES[name], tmp_path), GOLDEN["cases"][name]
    losses = [h["loss"] for h in t.state.log_history if "loss" in h]
    assert losses == pytest.approx(want["losses"], rel=1e-9, abs=1e-9)
    got, off = projections(dict(t.model.named_parameters())), 1e-8
    if "lora" in CASES[name]: off = 1e-6    # an adapter's start is drawn in float32
    assert got == pytest.approx(want["weights"], rel=1e-9, abs=off)
