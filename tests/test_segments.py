"Attention in segments: its layout proved without a card, on real families and by the call itself."
import inspect
import random
from itertools import combinations

import pytest
import torch
from test_attention import dense_mask
from test_trainer import TOKENIZER, exact
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_literate import segments as S
from dpo_literate.attention import pair_attention
from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.models import tiny_model
from dpo_literate.packing import pack_rows, packed_reply_logps, self_check
from dpo_literate.results import Refusal
from dpo_literate.rows import encode_pairs
from dpo_literate.shared import check_shared, pack_groups

ANSWERS = ("on the mat", "and the dog sat", "no", "please tell me what")
ROWS, _ = encode_pairs([dict(prompt=f"the cat {i}", chosen=ANSWERS[a], rejected=ANSWERS[b])
                        for i in range(2) for a, b in combinations(range(4), 2)], TOKENIZER)


def qkv_of(T, heads, g):
    return [torch.randn(1, h, T, 8, generator=g, dtype=torch.float64, requires_grad=True)
            for h in (heads[0], heads[1], heads[1])]


@pytest.mark.parametrize("seed", range(12))
def test_random_rows_equal_the_dense_mask_in_value_and_gradient(seed):
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    spans = [(rng.choice([0, 1, 2, 9]), rng.randint(1, 6), rng.randint(0, 6))
             for _ in range(rng.randint(1, 5))]
    qkv = qkv_of(sum(map(sum, spans)), rng.choice([(4, 4), (4, 2), (3, 1)]), g)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *qkv, attn_mask=dense_mask(spans), enable_gqa=True).transpose(1, 2)
    ours = S.segment_attention(None, *qkv, torch.tensor(spans)[None, None])[0]
    assert (plain - ours).abs().max() < 1e-12
    weight = torch.randn(plain.shape, generator=g, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad((plain * weight).sum(), qkv),
                    torch.autograd.grad((ours * weight).sum(), qkv)):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_log_probabilities_and_gradients_are_those_of_padded_rows(kind):
    model = exact(kind)
    weights = [p for p in model.parameters() if p.requires_grad]

    def scored(batches):
        found = {}
        for b in batches:
            out = (reply_logps if b.attention_mask is not None else packed_reply_logps)(model, b)
            found |= {r.id: torch.stack(x) for r, *x in zip(b.rows, out.chosen, out.rejected)}
        sums = torch.stack([found[r.id] for r in ROWS])
        return sums, torch.autograd.grad(sums.square().sum(), weights, allow_unused=True)
    want, want_grads = scored([pad_rows(ROWS)])
    assert S.use_segments(model)
    for pack in (pack_rows, pack_groups):
        got, grads = scored(pack(ROWS))
        assert (got - want).abs().max() < 1e-10
        for a, b in zip(want_grads, grads):
            assert a is None and b is None or (a - b).abs().max() < 1e-10 * (1 + a.abs().max())


def test_the_model_is_asked_as_with_any_packing():
    model = tiny_model()
    assert S.use_segments(model) and self_check(model, ROWS) is None
    assert check_shared(model, ROWS) is None
    shape = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    short = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **shape)).eval()
    assert S.use_segments(short) and "window of 4" in self_check(short, ROWS)
    assert not S.use_segments(model, False) and self_check(model, ROWS) is None


def test_under_autocast_values_say_the_type():
    "Queries and keys come turned in float32, values in bfloat16; both ways of attending agree."
    model, found = tiny_model(scale=1.).float(), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert S.use_segments(model) and self_check(model, ROWS) is None
        for on in (True, False):
            S.use_segments(model, on)
            found.append(packed_reply_logps(model, pack_rows(ROWS)[0]).sums)
    assert (found[0] - found[1]).abs().max() < .05 * found[1].abs().max()
    q, k, v = qkv_of(7, (4, 2), torch.Generator().manual_seed(0))
    mixed = q.float(), k.float(), v.bfloat16()
    for attend in (S.segment_attention, pair_attention):
        assert attend(None, *mixed, torch.tensor([[[[3, 2, 2]]]]))[0].dtype == torch.bfloat16


def test_texts_without_lengths_are_read_as_before():
    model, ids = tiny_model(), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model(ids).logits
        S.use_segments(model)
        assert torch.equal(model(ids).logits, before)


def test_a_checkpointed_layer_attends_twice():
    plain, saving = exact("llama"), exact("llama").train()
    saving.gradient_checkpointing_enable()
    found = []
    for model in (plain, saving):
        S.use_segments(model)
        packed_reply_logps(model, pack_rows(ROWS)[0]).sums.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-10


@pytest.mark.parametrize("grouped", [False, True])
def test_the_call_fits_the_kernel_of_this_torch(grouped):
    "What would be sent to a card can be bound to the installed signature."
    at, how = S.segments_of(((3, 2, 2),)), S.varlen_arguments(S.varlen_takes(), .5, grouped)
    q = torch.zeros(7, 4, 8)
    bound = inspect.signature(varlen_attn).bind(q, q, q, at.q_starts, at.k_starts, at.longest_q,
                                                at.longest_k, **how)
    assert bound.arguments["max_q"] == 5 and bound.arguments["cu_seq_q"].dtype == torch.int32
    assert at.q_starts[-1] == 7 and at.k_starts[-1] == len(at.keys) == 10


def test_a_kernel_that_errs_or_fails_is_not_used():
    def late(q, k, v, at, scale): return S.plain_varlen(q, k.roll(1, 0), v, at, scale)
    assert "off by" in S.check_varlen("cpu", torch.float32, kernel=late)
    assert "refused" in S.check_varlen("cpu", torch.bfloat16)
    assert S.check_varlen("cpu", torch.bfloat16, kernel=S.plain_varlen) is None
    assert not S.trusted("cpu", torch.bfloat16, 4, 2, 64)
    with pytest.raises(Refusal, match="dropout"):
        S.segment_attention(None, *qkv_of(3, (2, 1), torch.Generator()),
                            torch.tensor([[[[1, 1, 1]]]]), dropout=.1)


def test_without_a_card_rows_are_attended_pair_by_pair():
    model = tiny_model()
    assert S.takes_spans(model) and model.config._attn_implementation == "sdpa_pairs"
    model.config._attn_implementation = "eager"
    assert not S.takes_spans(model) and not S.use_segments(model)
    q, k, v = qkv_of(15, (4, 2), torch.Generator().manual_seed(0))
    lengths = torch.tensor([[[[6, 4, 5]]]])
    assert (S.segment_attention(None, q, k, v, lengths)[0]
            - pair_attention(None, q, k, v, lengths)[0]).abs().max() < 1e-12
