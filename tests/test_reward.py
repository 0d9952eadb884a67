"""Bradley–Terry beyond the page: an independent optimizer, symmetries, extreme counts, the size
of the error."""
import pytest, torch
from dpo_literate.results import Refusal
from dpo_literate.reward import bt_loss, fit_scores, linked, win_counts
from dpo_literate.world import Pairs, preference_probs, sample_pairs, small_world


def random_wins(seed, K=5, top=20):
    g = torch.Generator().manual_seed(seed)
    wins = torch.randint(0, top, (3, K, K), generator=g).double()
    wins.diagonal(dim1=-2, dim2=-1).zero_()
    ring = torch.eye(K, dtype=torch.float64).roll(1, 0)   # a circle of wins: every fit exists
    return wins + ring


@pytest.mark.parametrize("seed", range(8))
def test_same_maximum_as_a_general_optimizer(seed):
    wins = random_wins(seed)
    score = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([score], lr=1, max_iter=500, tolerance_grad=1e-13,
                            tolerance_change=1e-15, line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        loss = (wins * bt_loss(score[..., :, None], score[..., None, :])).sum()
        loss.backward()
        return loss
    opt.step(closure)
    found = score.detach() - score.detach().mean(-1, keepdim=True)
    torch.testing.assert_close(fit_scores(wins), found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_symmetries_of_the_fit(seed):
    wins = random_wins(seed)
    fit, order = fit_scores(wins), torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    # every verdict turned round
    torch.testing.assert_close(fit_scores(wins.mT), -fit, rtol=0, atol=1e-9)
    # every verdict seven times
    torch.testing.assert_close(fit_scores(7 * wins), fit, rtol=0, atol=1e-9)
    torch.testing.assert_close(fit_scores(wins[:, order][:, :, order]), fit[:, order], rtol=0,
                               atol=1e-9)
    torch.testing.assert_close(fit.mean(-1), torch.zeros(3, dtype=torch.float64), rtol=0,
                               atol=1e-12)


def test_relations_of_the_loss():
    g = torch.Generator().manual_seed(0)
    w, l = torch.randn(2, 1000, generator=g, dtype=torch.float64) * 5
    torch.testing.assert_close(bt_loss(l, w) - bt_loss(w, l), w - l, rtol=0, atol=1e-12)
    torch.testing.assert_close(bt_loss(w + 3, l + 3), bt_loss(w, l), rtol=0, atol=1e-12)
    far = torch.tensor([-1e4, 1e4], dtype=torch.float64, requires_grad=True)
    loss = bt_loss(far, torch.zeros(2, dtype=torch.float64))
    loss.sum().backward()
    assert loss.tolist() == [1e4, 0.] and far.grad.tolist() == [-1., 0.]


def test_extreme_counts_are_met():
    wins = torch.tensor([[0., 1e9], [1., 0.]], dtype=torch.float64)
    fit = fit_scores(wins)
    assert abs((fit[0] - fit[1]).item() - torch.tensor(1e9).double().log().item()) < 1e-6


@pytest.mark.parametrize("wins", [[[0, 1, 1], [0, 0, 1], [0, 0, 0]],
                                  [[0, 3, 0], [3, 0, 0], [0, 0, 0]]])
def test_no_fit_is_a_refusal(wins):
    wins = torch.tensor(wins, dtype=torch.float64)
    assert not linked(wins)
    with pytest.raises(Refusal, match="no finite scores"): fit_scores(wins)


def test_counts_are_the_verdicts():
    pairs = Pairs(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 2]))
    wins = win_counts(pairs, 2, 3)
    assert wins[0, 1, 0] == 2 and wins[1, 0, 2] == 1 and wins.sum() == 3


def test_error_has_the_predicted_size_on_seeds_the_page_does_not_use():
    world = small_world()
    centred = world.rewards - world.rewards.mean(-1, keepdim=True)
    p, win = world.ref_logps.exp(), preference_probs(world.rewards)
    drawn = p[..., :, None] * p[..., None, :] / (1 - p)[..., :, None]
    weight = world.prompt_p[:, None, None] * (drawn + drawn.mT) * win * win.mT
    weight.diagonal(dim1=-2, dim2=-1).zero_()
    cov = torch.linalg.pinv(torch.diag_embed(weight.sum(-1)) - weight) / 100_000
    fits = torch.stack([fit_scores(win_counts(sample_pairs(world, 100_000,
        torch.Generator().manual_seed(5000 + s)), 3, 4)) for s in range(60)])
    spread = (fits - centred).pow(2).mean(0)
    assert ((spread / cov.diagonal(dim1=-2, dim2=-1)).mean() - 1).abs() < .25
