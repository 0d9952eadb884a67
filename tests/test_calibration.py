"Calibration beyond the page: every statistic against a loop that says it in words, ties, limits."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_literate.probes.calibration import (aurc, auroc, bin_of, calibration_figure, ece,
                                             ece_floor, risk_coverage, selective_honesty)


def f64(*x): return torch.tensor(x, dtype=torch.float64)


def random_answers(seed, n=30, levels=6):
    "Confidences with many ties, and outcomes that are not all alike."
    g = torch.Generator().manual_seed(seed)
    c = torch.randint(0, levels + 1, (n,), generator=g).double() / levels
    o = torch.randint(0, 2, (n,), generator=g).double()
    o[0], o[1] = 0, 1
    return c, o


# ------------------------------------------------------------ calibration

def loop_ece(c, o, bins, adaptive):
    "Bins as lists; equal counts cut the sorted answers, and a tie goes to the lower bin."
    c, o = c.tolist(), o.tolist()
    edges = [k / bins for k in range(1, bins)]
    if adaptive: edges = [sorted(c)[max(k * len(c) // bins, 1) - 1] for k in range(1, bins)]
    held = {}
    for x, y in zip(c, o): held.setdefault(sum(x > e + 1e-12 for e in edges), []).append((x, y))
    def gap(h): return abs(sum(y for _, y in h) / len(h) - sum(x for x, _ in h) / len(h))
    return sum(len(h) / len(c) * gap(h) for h in held.values())


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_ece_equals_the_loop(seed, adaptive):
    c, o = random_answers(seed)
    for bins in (1, 3, 10):
        assert abs(ece(c, o, bins, adaptive) - loop_ece(c, o, bins, adaptive)) < 1e-12


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=2, max_size=40),
       st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_ece_does_not_know_the_order_and_stays_in_its_range(answers, bins, adaptive, rng):
    shuffled = answers[:]
    rng.shuffle(shuffled)
    def error(some):
        c, o = f64(*(c / 20 for c, _ in some)), f64(*(float(o) for _, o in some))
        return ece(c, o, bins, adaptive)
    assert abs(error(answers) - error(shuffled)) < 1e-12 and -1e-12 <= error(answers) <= 1 + 1e-12


def test_ece_at_its_limits():
    ones, zeros = torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for adaptive in (False, True):
        for c, o, want in ((ones, ones, 0), (ones, zeros, 1), (zeros, zeros, 0)):
            assert ece(c, o, adaptive=adaptive) == want
    assert set(bin_of(f64(0., .1, .1001, 1.), 10, False).tolist()) == {0, 1, 9}


@pytest.mark.parametrize("n,bins", [(40, 4), (10, 5), (30, 10), (100, 7)])
def test_adaptive_bins_hold_as_many(n, bins):
    c = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    counts = torch.bincount(bin_of(c, bins), minlength=bins)
    assert counts.max() - counts.min() <= 1 and counts.sum() == n


def test_a_calibrated_answerer_reads_as_the_floor_says():
    g = torch.Generator().manual_seed(0)
    def uniform(): return torch.rand(300, generator=g, dtype=torch.float64)
    c = uniform()
    read = f64(*(ece(c, (uniform() < c).double(), 10) for _ in range(100)))
    assert abs(read.mean() - ece_floor(c, 10)) < 4 * read.std() / 10
    assert ece(c, torch.zeros(300), 10) > 5 * ece_floor(c, 10)


# ------------------------------------------------------------ ranking

@pytest.mark.parametrize("seed", range(8))
def test_auroc_equals_all_pairs(seed):
    c, o = random_answers(seed)
    both = itertools.product(zip(c.tolist(), o.tolist()), repeat=2)
    won = [(a > b) + (a == b) / 2 for (a, x), (b, y) in both if x > y]
    assert abs(auroc(c, o) - sum(won) / len(won)) < 1e-12
    assert abs(auroc(-c, o) + auroc(c, o) - 1) < 1e-12
    assert abs(auroc(c.exp() * 7, o) - auroc(c, o)) < 1e-12


def test_auroc_by_hand_and_where_there_is_none():
    assert auroc(f64(.9, .8, .1), f64(1, 1, 0)) == 1 and auroc(f64(.1, .2, .9), f64(1, 1, 0)) == 0
    assert auroc(f64(.5, .5), f64(1, 0)) == .5
    assert auroc(f64(.9, .5, .5, .1), f64(1, 1, 0, 0)) == .875
    assert math.isnan(auroc(f64(.1, .2), f64(1, 1))) and math.isnan(auroc(f64(.1, .2), f64(0, 0)))


@pytest.mark.parametrize("seed", range(4))
def test_risk_and_coverage_equal_the_mean_over_all_orders_of_ties(seed):
    c, o = random_answers(seed, n=6, levels=2)
    orders = [order for order in itertools.permutations(range(6))
              if all(c[i] >= c[j] for i, j in zip(order, order[1:]))]
    risks = [(1 - o)[list(order)].cumsum(0) / torch.arange(1, 7) for order in orders]
    coverage, risk = risk_coverage(c, o)
    assert (risk - sum(risks) / len(orders)).abs().max() < 1e-12
    assert coverage.tolist() == [k / 6 for k in range(1, 7)]


def test_risk_and_coverage_by_hand():
    c, o = f64(.2, .9, .6, .4), f64(0, 1, 0, 1)
    assert (risk_coverage(c, o)[1] - f64(0, 1 / 2, 1 / 3, 1 / 2)).abs().max() < 1e-12
    assert abs(aurc(c, o) - 1 / 3) < 1e-12
    assert risk_coverage(f64(.3, .3), f64(1, 0))[1].tolist() == [.5, .5]


@given(st.lists(st.integers(-4000, 4000), min_size=4, max_size=30, unique=True), st.floats(-3, 3))
@settings(max_examples=80, deadline=None)
def test_a_shift_of_the_log_odds_keeps_the_ranking(a, shift):
    "Formula (33.5)."
    odds = torch.tensor(a, dtype=torch.float64) / 1000
    o = torch.arange(len(a)).remainder(2).double()
    assert abs(auroc(odds.sigmoid(), o) - auroc((odds + shift).sigmoid(), o)) < 1e-12


def test_selective_honesty_and_its_limits():
    o, ones = f64(1, 1, 0, 0, 0), torch.ones(5, dtype=torch.float64)
    for a, want in ((o, 1.), (1 - o, 0.), (ones, .5), (0 * ones, .5), (.3 * ones, .5),
                    (f64(.9, .7, .6, .3, 0), .75)):
        assert abs(selective_honesty(a, o) - want) < 1e-12
    assert math.isnan(selective_honesty(o, ones))


def test_the_figure_draws_what_has_no_ranking():
    "A model that is always right has no AUROC; its figure is drawn all the same."
    c = torch.linspace(.3, .9, 10, dtype=torch.float64)
    fig = calibration_figure({"before": (c, torch.ones(10)), "after": (c, torch.zeros(10))}, 5)
    left, right = (ax.get_title() for ax in fig.axes)
    assert left == "Claimed 0.60, 0.60; right 1.00, 0.00" and right == "AUROC none, none"
