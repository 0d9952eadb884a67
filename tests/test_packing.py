"Packed, prefix-shared rows against padded ones: log-probs and gradients, on real families."
import random
from collections import namedtuple

import pytest
import torch

from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.models import tiny_model
from dpo_literate.packing import bins, pack_rows, packed_reply_logps, pair_length, self_check
from dpo_literate.results import Refusal

NOISE = {"gemma2": 1e-5}   # its attention softmax is float32 whatever the model's dtype
Pair = namedtuple("Pair", "prompt_ids chosen_ids rejected_ids chosen_weights rejected_weights", defaults=(None, None))


def random_pairs(rng, n):
    def ids(low): return [rng.randrange(3, 300) for _ in range(rng.randint(low, 12))]
    return [Pair([] if rng.random() < .15 else ids(1), ids(0) + [2], ids(0) + [2]) for _ in range(n)]


def exact_norms(model):
    "transformers takes its RMS norm in float32 whatever the dtype; gradients to 1e-10 need the formula itself."
    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            gemma, eps = "Gemma" in type(m).__name__, getattr(m, "variance_epsilon", getattr(m, "eps", None))
            m.forward = lambda x, m=m, one=float(gemma), eps=eps: (one + m.weight) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return model


@pytest.mark.parametrize("kind", ("llama", "qwen2", "qwen3", "gpt2", "gemma2"))
def test_packed_equals_padded(kind):
    model, rng, tol = exact_norms(tiny_model(kind).double().eval()), random.Random(kind), NOISE.get(kind, 1e-10)
    params = list(model.parameters())
    for trial in range(40):                                  # 5 families x 40 = 200 batches
        rows = random_pairs(rng, rng.choice([1, 1, 2, 3, 5]))
        capacity = max(map(pair_length, rows)) + rng.choice([0, 0, 7, 100])
        packs = pack_rows(rows, capacity=capacity)
        assert sum(b.input_ids.numel() for b in packs) == sum(map(pair_length, rows))
        assert all(b.input_ids.numel() <= capacity for b in packs)
        assert sorted(map(id, (r for b in packs for r in b.rows))) == sorted(map(id, rows))
        model.zero_grad()
        for b in packs:
            fast, slow = packed_reply_logps(model, b), reply_logps(model, pad_rows(b.rows))
            assert torch.equal(fast.lengths, slow.lengths)
            assert (fast.sums - slow.sums).abs().max() <= tol
            if trial % 4 == 0:
                want = torch.autograd.grad(slow.sums.sin().sum(), params, allow_unused=True)
                got = torch.autograd.grad(fast.sums.sin().sum(), params, allow_unused=True)
                assert all((x - y).abs().max() <= tol * max(1., x.abs().max().item()) * 10 for x, y in zip(want, got) if x is not None)


def test_weights_follow_their_tokens():
    model = tiny_model("llama").double().eval()
    rows = [Pair([5, 6], [7, 8, 2], [9, 2], [1., .5, .25], None), Pair([], [7, 8, 2], [9, 2], None, [.1, .2])]
    pack, = pack_rows(rows)
    with torch.no_grad(): gap = packed_reply_logps(model, pack).sums - reply_logps(model, pad_rows(rows)).sums
    assert gap.abs().max() < 1e-6                            # the weights are float32


def test_bins_are_deterministic_and_tight():
    assert bins([5, 9, 1, 5], 10) == [[1, 2], [0, 3]]
    with pytest.raises(Refusal, match="capacity 4"): pack_rows([Pair([1], [2, 3], [4, 5])], capacity=4)


def test_a_model_that_cannot_is_found_out():
    rows = random_pairs(random.Random(0), 4)
    model = tiny_model("llama").double().eval()
    assert self_check(model, rows) is None
    forward = model.forward
    def deaf(*a, attention_mask=None, **kw): return forward(*a, attention_mask=None, **kw)
    model.forward = deaf
    assert "packing would move" in self_check(model, rows)
