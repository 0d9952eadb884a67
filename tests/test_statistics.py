"Every statistic that the package computes itself, against SciPy's or the textbook's form of it."
import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from dpo_literate.align import distinct
from dpo_literate.community import Vote, thread_ranks
from dpo_literate.logps import head_extras
from dpo_literate.ppo import masked_mean, step_stats, whiten
from dpo_literate.probes.base import change_of, interval_of
from dpo_literate.probes.calibration import (aurc, auroc, brier, brier_parts, ece, risk_coverage,
                                             selective_honesty)
from dpo_literate.probes.matched import style_factor
from dpo_literate.probes.mitigation import length_share, rank_correlation
from dpo_literate.probes.refusal import agreement
from dpo_literate.probes.tdi import semantic_tdi, spread_and_distance
from dpo_literate.results import bootstrap_interval
from dpo_literate.reward_model import calibration
from dpo_literate.world import kl, log_partition, total_variation

SEEDS = range(5)


def rng(seed): return torch.Generator().manual_seed(seed)
def normal(seed, *shape): return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def with_ties(seed, n=40, levels=5):
    "Scores in which most values occur several times."
    return torch.randint(0, levels, (n,), generator=rng(seed)).double()


def outcomes(seed, n=40):
    "Right and wrong, not all alike."
    o = torch.randint(0, 2, (n,), generator=rng(seed + 100)).double()
    o[0], o[1] = 0, 1
    return o


# ------------------------------------------------------------ ranks and correlations

@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_rank_correlation_is_spearmans(seed, levels):
    "Also where the values repeat; two that share nothing but a position must not correlate."
    a, b = with_ties(seed, levels=levels), with_ties(seed + 50, levels=levels)
    found = rank_correlation(a, b)
    assert abs(found.value - stats.spearmanr(a, b).statistic) < 1e-12
    ranks = [np.array(stats.rankdata(x)) for x in (a, b)]
    assert abs(found.value - np.corrcoef(*ranks)[0, 1]) < 1e-12
    assert found.low <= found.value <= found.high


def test_ties_do_not_make_a_rank_correlation():
    "Ranks by position give two thirds here."
    halves, alternate = torch.tensor([0., 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0., 1] * 4)
    assert abs(rank_correlation(halves, alternate).value) < 1e-12
    order = torch.randperm(8, generator=rng(0))
    shuffled = rank_correlation(halves[order], alternate[order]).value
    assert abs(shuffled) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_length_share_is_the_r_squared_of_a_line(seed):
    x, y = with_ties(seed), normal(seed, 40)
    assert abs(length_share(y, x).value - stats.linregress(x, y).rvalue**2) < 1e-12


def test_a_constant_length_explains_nothing():
    assert length_share(normal(0, 9), torch.ones(9)).value == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_auroc_is_mann_whitneys(seed):
    c, o = with_ties(seed), outcomes(seed)
    right, wrong = c[o == 1], c[o == 0]
    u = stats.mannwhitneyu(right, wrong).statistic
    assert abs(auroc(c, o) - u / (len(right) * len(wrong))) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_aurc_is_a_mean_over_the_orders_of_ties(seed):
    "Against the mean of many random orders, within four of its standard errors."
    c, o = with_ties(seed), outcomes(seed)
    g, found = np.random.default_rng(seed), []
    for _ in range(2000):
        ranked = (1 - o.numpy())[np.lexsort((g.random(40), -c.numpy()))]
        found.append((ranked.cumsum() / np.arange(1, 41)).mean())
    assert abs(aurc(c, o) - np.mean(found)) < 4 * stats.sem(found)
    assert abs(risk_coverage(c, o)[1][-1] - (1 - o).mean()) < 1e-12


# ------------------------------------------------------------ calibration and agreement

@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bins", [5, 10, 15])
def test_ece_of_equal_width_is_binned_means(seed, bins):
    c, o = torch.rand(60, generator=rng(seed), dtype=torch.float64), outcomes(seed, 60)
    edges = np.linspace(0, 1, bins + 1)
    def binned(values, how): return stats.binned_statistic(c, values, how, edges).statistic
    n, said, came = binned(c, "count"), binned(c, "mean"), binned(o, "mean")
    want = np.nansum(n * abs(said - came)) / 60
    assert abs(ece(c, o, bins, adaptive=False) - want) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_ece_of_equal_count_is_that_of_quantile_groups(seed):
    c, o = torch.rand(60, generator=rng(seed), dtype=torch.float64), outcomes(seed, 60)
    groups = np.array_split(np.argsort(c.numpy()), 6)
    want = sum(len(g) * abs(o[g].mean() - c[g].mean()) for g in map(torch.as_tensor, groups)) / 60
    assert abs(ece(c, o, 6) - want) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_models_calibration_is_the_same_error(seed):
    "Page 11c's groups of equal size, where no margin repeats, are page 33's adaptive bins."
    chosen, rejected = normal(seed, 60), normal(seed + 1, 60)
    sure, right = (chosen - rejected).abs().sigmoid(), (chosen > rejected).double()
    assert abs(calibration(chosen, rejected, 6).error - ece(sure, right, 6)) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_models_calibration_is_a_mean_over_the_orders_of_ties(seed):
    "Where margins repeat, the order of the rows must not say which group a pair falls in."
    chosen, rejected = with_ties(seed, 60), with_ties(seed + 1, 60)
    found, order = calibration(chosen, rejected, 6), torch.randperm(60, generator=rng(seed))
    again = calibration(chosen[order], rejected[order], 6)
    np.testing.assert_allclose(again.right, found.right, atol=1e-12)
    margin, g, shares = (chosen - rejected).numpy(), np.random.default_rng(seed), []
    right = np.where(margin == 0, .5, margin > 0)
    for _ in range(2000):
        ranked = right[np.lexsort((g.random(60), np.abs(margin)))]
        shares.append([part.mean() for part in np.array_split(ranked, 6)])
    off = np.abs(np.mean(shares, 0) - found.right)
    assert (off <= 4 * stats.sem(shares) + 1e-12).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_within_a_thread_are_scipys(seed):
    values, votes = with_ties(seed), [Vote(str(k % 3), "q", "a reply", 0.) for k in range(40)]
    found = thread_ranks(votes, values)
    for k in range(3):
        ranks = stats.rankdata(values[k::3])
        np.testing.assert_allclose(found[k::3], (ranks - .5) / len(ranks), atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_brier_is_the_mean_squared_error_in_murphys_parts(seed):
    c, o = with_ties(seed) / 4, outcomes(seed)
    off, told, hard = brier_parts(c, o)
    assert abs(brier(c, o).mean() - np.mean((c.numpy() - o.numpy())**2)) < 1e-12
    groups = [o[c == v].numpy() for v in c.unique()]
    between = sum(len(g) * (g.mean() - o.numpy().mean())**2 for g in groups) / 40
    assert abs(told - between) < 1e-12 and abs(hard - o.numpy().var()) < 1e-12
    assert abs(off - told + hard - brier(c, o).mean()) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_kappa_is_cohens_from_the_table_of_counts(seed):
    a, b = with_ties(seed, levels=3).tolist(), with_ties(seed + 9, levels=3).tolist()
    count = stats.contingency.crosstab(a, b).count
    seen = np.trace(count) / 40
    chance = np.trace(stats.contingency.expected_freq(count)) / 40
    found = agreement(a, b)
    assert abs(found.share - seen) < 1e-12
    assert abs(found.kappa - (seen - chance) / (1 - chance)) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_selective_honesty_is_half_of_one_and_a_difference_of_means(seed):
    a, o = torch.rand(40, generator=rng(seed), dtype=torch.float64).numpy(), outcomes(seed).numpy()
    want = .5 + (a[o == 1].mean() - a[o == 0].mean()) / 2
    assert abs(selective_honesty(torch.tensor(a), torch.tensor(o)) - want) < 1e-12


# ------------------------------------------------------------ intervals

@pytest.mark.parametrize("values", [normal(1, 30), with_ties(2, 30), outcomes(3, 30)])
def test_bootstrap_of_a_mean_agrees_with_scipys(values):
    "Two percentile bootstraps of one sample differ by the noise of the resampling alone."
    ours = bootstrap_interval(values, draws=20_000)
    theirs = stats.bootstrap((values.numpy(),), np.mean, n_resamples=20_000, method="percentile",
                             rng=np.random.default_rng(0)).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours[0] - theirs.low) < .05 * width and abs(ours[1] - theirs.high) < .05 * width


def test_bootstrap_of_a_ratio_agrees_with_scipys():
    a, b = normal(4, 40).exp(), normal(5, 40).exp()
    ours = interval_of(lambda w: (w @ a) / (w @ b), 40, draws=10_000)
    theirs = stats.bootstrap((a.numpy(), b.numpy()), lambda x, y: x.mean() / y.mean(), paired=True,
                             n_resamples=10_000, method="percentile", vectorized=False,
                             rng=np.random.default_rng(0)).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours[0] - theirs.low) < .06 * width and abs(ours[1] - theirs.high) < .06 * width


def test_the_level_is_the_share_of_resampled_means_inside():
    x = normal(6, 25)
    narrow, wide = (bootstrap_interval(x, level=level, draws=5000) for level in (.5, .9))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    z = [stats.norm.ppf((1 + level) / 2) for level in (.5, .9)]
    widths = [high - low for low, high in (narrow, wide)]
    assert abs(widths[1] / widths[0] / (z[1] / z[0]) - 1) < .06       # a mean is nearly normal


def test_a_paired_change_is_the_interval_of_the_differences():
    old, new = normal(7, 30), normal(8, 30)
    change = change_of("x", old, new)
    assert (change.low, change.high) == bootstrap_interval(new - old)
    assert abs(change.difference - (new - old).mean()) < 1e-12


# ------------------------------------------------------------ spread, covariance, cosine

@pytest.mark.parametrize("seed", SEEDS)
def test_spread_of_a_class_is_the_root_mean_square_of_its_distances(seed):
    from scipy.spatial.distance import pdist
    e, labels = normal(seed, 12, 4), [i // 4 for i in range(12)]
    spread, apart = spread_and_distance(e, labels)
    older, _ = spread_and_distance(e, labels, older=True)
    for c in range(3):
        d = pdist(e[4 * c:4 * c + 4].numpy())
        assert abs(spread[c] - math.sqrt((d**2).mean())) < 1e-12
        assert abs(older[c] - d.mean()) < 1e-12
    centres = e.view(3, 4, 4).mean(1).numpy()
    assert np.allclose(apart[np.triu_indices(3, 1)], pdist(centres), atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_semantic_tdi_is_a_ratio_of_cosine_distances(seed):
    from scipy.spatial.distance import cosine
    a, b = normal(seed, 6, 2, 5), normal(seed + 1, 7, 2, 5)
    def mean(pairs): return np.mean([cosine(*p.numpy()) for p in pairs])
    assert abs(semantic_tdi(a, b).value - mean(a) / mean(b)) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_the_style_factor_is_a_root_of_the_covariance(seed):
    delta = normal(seed, 30, 3) @ normal(seed + 1, 3, 8)
    L = style_factor(delta, shrinkage=0.)
    assert np.allclose(L @ L.T, np.cov(delta.numpy().T), atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_whitened_advantages_are_z_scores(seed):
    x, mask = normal(seed, 4, 6), torch.randint(0, 2, (4, 6), generator=rng(seed)).double()
    mask[0, :2] = 1
    kept = mask.bool()
    assert abs(masked_mean(x, mask) - np.mean(x[kept].numpy())) < 1e-12
    found = whiten(x, mask)
    assert np.allclose(found[kept], stats.zscore(x[kept].numpy()), atol=1e-6)
    assert (found[~kept] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_explained_variance_is_one_minus_the_ratio_of_squares(seed):
    logps, old, values, returns = (normal(seed + k, 4, 6) for k in range(4))
    mask = torch.ones(4, 6)
    found = step_stats(logps, old, values, returns, mask)["explained_variance"]
    r, v = returns.numpy().ravel(), values.numpy().ravel()
    assert abs(found - (1 - np.mean((r - v)**2) / r.var())) < 1e-9


# ------------------------------------------------------------ entropies and divergences

@pytest.mark.parametrize("seed", SEEDS)
def test_entropy_of_a_token_is_scipys(seed):
    z = normal(seed, 5, 11)
    lse, targets = z.logsumexp(-1), torch.zeros(5, dtype=torch.long)
    found = head_extras(z, lse, targets, ("entropy", "sum_p2"))
    p = special.softmax(z.numpy(), -1)
    assert np.allclose(found["entropy"], stats.entropy(p, axis=-1), atol=1e-10)
    assert np.allclose(found["sum_p2"], np.log((p**2).sum(-1)), atol=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_total_variation_and_partition_function(seed):
    p, q = (special.softmax(normal(seed + k, 3, 7).numpy(), -1) for k in (0, 1))
    logp, logq = (torch.tensor(x).log() for x in (p, q))
    assert np.allclose(kl(logp, logq), special.rel_entr(p, q).sum(-1), atol=1e-12)
    assert np.allclose(total_variation(logp, logq), abs(p - q).sum(-1) / 2, atol=1e-12)
    rewards = normal(seed + 2, 3, 7)
    want = special.logsumexp(logq.numpy() + rewards.numpy() / .5, axis=-1)
    assert np.allclose(log_partition(logq, rewards, .5), want, atol=1e-12)


def test_distinct_counts_ngrams():
    assert distinct(["a b a b", "a b"], 2) == 2 / 4          # ab, ba, ab and ab
    assert distinct(["one"], 2) == 0 and distinct(["a a a"], 1) == 1 / 3
