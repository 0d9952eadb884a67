"Attention of packed rows beyond the page: random rows, real families, precision, what it refuses."
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dpo_literate.attention import knows_pairs, pair_attention, pair_spans
from dpo_literate.models import tiny_model
from dpo_literate.results import Refusal


def row(p, c, r):
    return SimpleNamespace(prompt_ids=list(range(p)), chosen_ids=list(range(100, 100 + c)),
                           rejected_ids=list(range(200, 200 + r)))


def dense_mask(spans):
    "Who may look at whom, token by token, the slow way."
    where = [(j, side, k) for j, pair in enumerate(spans) for side, n in enumerate(pair)
             for k in range(n)]
    ok = torch.zeros(len(where), len(where), dtype=torch.bool)
    for q, (j, side, k) in enumerate(where):
        for t, (i, other, n) in enumerate(where):
            ok[q, t] = i == j and (other == 0 and side > 0 or other == side and n <= k)
    return ok


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_equal_the_dense_mask_in_value_and_gradient(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    spans = [(rng.choice([0, 1, 2, 9]), rng.randint(1, 6), rng.randint(1, 6))
             for _ in range(rng.randint(1, 5))]
    T, heads = sum(map(sum, spans)), rng.choice([(4, 4), (4, 2), (3, 1)])
    qkv = [torch.randn(1, h, T, 8, generator=g, dtype=torch.float64, requires_grad=True)
           for h in (heads[0], heads[1], heads[1])]
    plain = F.scaled_dot_product_attention(*qkv, attn_mask=dense_mask(spans), enable_gqa=True)
    ours = pair_attention(None, *qkv, torch.tensor(spans)[None, None])[0].transpose(1, 2)
    assert (plain - ours).abs().max() < 1e-12
    weight = torch.randn(plain.shape, generator=g, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((plain * weight).sum(), qkv),
                    torch.autograd.grad((ours * weight).sum(), qkv)):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_of_real_families(kind, checkpointing):
    model, rows = tiny_model(kind), [row(5, 3, 4), row(1, 6, 1), row(7, 2, 2)]
    if checkpointing: model.train(); model.gradient_checkpointing_enable()
    ids = torch.tensor([[t for r in rows for t in r.prompt_ids + r.chosen_ids + r.rejected_ids]])
    at = torch.tensor([[k for r in rows for k in [*range(len(r.prompt_ids)),
                                                  *range(len(r.prompt_ids),
                                                      len(r.prompt_ids + r.chosen_ids)),
                                                  *range(len(r.prompt_ids),
                                                      len(r.prompt_ids + r.rejected_ids))]]])
    mask = dense_mask([(len(r.prompt_ids), len(r.chosen_ids), len(r.rejected_ids))
                       for r in rows])[None, None]
    plain = model(ids, position_ids=at, attention_mask=mask, use_cache=False).logits
    assert knows_pairs(model)
    assert torch.equal(model(ids, position_ids=at, attention_mask=mask, use_cache=False).logits,
                       plain)
    ours = model(ids, position_ids=at, attention_mask=pair_spans(rows), use_cache=False).logits
    # these families' norms compute in float32
    assert (ours - plain).abs().max() < 1e-4 * plain.abs().max()
    a, b = (torch.autograd.grad(x.sum(), [p for p in model.parameters() if p.dim() > 1])
            for x in (ours, plain))
    assert all((x - y).abs().max() <= 1e-3 * y.abs().max() for x, y in zip(a, b))


def test_sampling_and_saving_do_not_notice(tmp_path):
    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert (knows_pairs(model) and torch.equal(model.generate(ids, max_new_tokens=5,
        do_sample=False), before))
    model.save_pretrained(tmp_path)
    assert "pairs" not in (tmp_path / "config.json").read_text()


def test_other_attention_is_left_alone():
    model = tiny_model()
    model.config._attn_implementation = "eager"
    assert not knows_pairs(model) and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("asked,word", [(dict(softcap=50.), "soft-cap"),
                                        (dict(s_aux=torch.zeros(4)), "sinks"),
                                        (dict(sliding_window=4), "window of 4")])
def test_what_two_calls_cannot_give_is_refused(asked, word):
    qkv = [torch.randn(1, 4, 9, 8) for _ in range(3)]
    with pytest.raises(Refusal, match=word):
        pair_attention(None, *qkv, torch.tensor([[[[3, 3, 3]]]]), **asked)
    pair_attention(None, *qkv, torch.tensor([[[[3, 3, 3]]]]), sliding_window=6)


def test_bfloat16_is_as_near_to_float64_as_the_mask_is():
    g = torch.Generator().manual_seed(0)
    spans = [(30, 12, 9), (4, 17, 22)]
    exact = [torch.randn(1, 4, sum(map(sum, spans)), 16, generator=g, dtype=torch.float64)
             for _ in range(3)]
    half = [x.bfloat16() for x in exact]
    truth = F.scaled_dot_product_attention(*[x.double() for x in half], attn_mask=dense_mask(spans))
    plain = F.scaled_dot_product_attention(*half, attn_mask=dense_mask(spans))
    ours = pair_attention(None, *half, torch.tensor(spans)[None, None])[0].transpose(1, 2)
    assert (ours - truth).abs().mean() <= 1.1 * (plain - truth).abs().mean()
