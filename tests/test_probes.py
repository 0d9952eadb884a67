"What the probes share: readings, changes, reports, the states behind a score, short runs."
import json
import math
from pathlib import Path

import pytest
import torch

from dpo_literate.logps import pad_rows
from dpo_literate.models import tiny_model
from dpo_literate.probes.base import (Change, ProbeReport, Reading, change_between, change_of,
                                      far_pairs, interval_of, near_pairs, reading_of, scored_states,
                                      short_run, teach_replies)
from dpo_literate.results import Refusal
from dpo_literate.rows import encode_pairs, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS, _ = encode_pairs([dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}",
                             rejected=f"on the dog {'sat ' * (i % 4)}{i}") for i in range(6)],
                       TOKENIZER)
KINDS = ("llama", "qwen2", "gpt2", "gemma2")


def test_a_reading_is_finite():
    with pytest.raises(Refusal, match="not finite"): Reading("x", math.nan, 0, 1, 3)


def test_an_interval_needs_two_items():
    with pytest.raises(Refusal): interval_of(lambda w: w.sum(), 1)


def test_a_report_keeps_its_shape():
    report = ProbeReport("x", [("a (nat)", 1., 2., 1., .5, 1.5)], "words")
    assert report["a (nat)"] == report.rows[0] == Change("a (nat)", 1., 2., 1., .5, 1.5)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["difference"] == 1.
    assert "words" in str(report)
    with pytest.raises(KeyError, match="there are a"): report["b"]
    with pytest.raises(Refusal, match="not finite"):
        ProbeReport("x", [("a", 1., float("nan"), 1., .5, 1.5)], "")


def test_changes_are_paired():
    old = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    def mean_of(values): return lambda w: w @ values / w.sum()
    shifted = change_of("x", old, old + 2)
    assert shifted[3:] == pytest.approx((2, 2, 2), abs=1e-9)
    assert change_of("x", old, old)[3:] == (0., 0., 0.)
    between = change_between("x", mean_of(old), mean_of(old + 2), 30)
    assert between[3:] == pytest.approx((2, 2, 2), abs=1e-9)
    with pytest.raises(Refusal, match="30 items before, 29 after"): change_of("x", old, old[1:])


def test_a_reading_is_the_number_at_equal_weights():
    old = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    def squared_mean(w): return (w @ old / w.sum())**2
    found = reading_of("x", squared_mean, 30)
    assert found.value == pytest.approx(old.mean().item()**2)
    assert (found.low, found.high) == interval_of(squared_mean, 30)


def test_draws_without_a_number_are_left_out():
    "A mean over the first item alone exists only where it was drawn."
    x = torch.tensor([3., 1., 1., 1.], dtype=torch.float64)
    assert interval_of(lambda w: w[0] * x[0] / w[0], 4) == (3., 3.)


@pytest.mark.parametrize("kind", KINDS)
def test_scored_states_are_what_the_head_reads(kind):
    model, batch = tiny_model(kind), pad_rows(ROWS)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask,
                output_hidden_states=True)
    want = out.hidden_states[-1].flatten(0, 1)[batch.score_at]
    assert (scored_states(model, batch) - want).abs().max() < 1e-5


def test_a_short_run_leaves_the_model_and_no_folder():
    start = tiny_model()
    before = [p.clone() for p in start.parameters()]
    run = short_run(start, far_pairs()[:8], TOKENIZER, max_steps=2)
    assert all(torch.equal(p, q) for p, q in zip(before, start.parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(before, run.model.parameters()))
    assert run.state.global_step == 2 and not run.model.training
    assert not Path(run.args.output_dir).exists()


def test_both_replies_are_taught():
    from dpo_literate.probes.displacement import pair_logps
    rows, _ = encode_pairs(near_pairs(), TOKENIZER)
    start = pair_logps(tiny_model(scale=1.), rows)
    assert (pair_logps(teach_replies(tiny_model(scale=1.), rows), rows) > start + 10).all()


def test_the_pairs_of_the_pages_are_what_they_say():
    near, far = near_pairs(), far_pairs()
    assert len(near) == len(far) == 32 == len({p["prompt"] for p in near})
    for p in near: assert p["chosen"].split()[:-1] == p["rejected"].split()[:-1]
    for p in far:
        shared = set(p["chosen"].split()) & set(p["rejected"].split())
        assert shared <= {p["prompt"].split()[-1]}
