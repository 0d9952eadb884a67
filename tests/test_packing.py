"Packed, prefix-shared rows against padded ones: log-probs and gradients, on real families."

import random
from collections import namedtuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_literate.logps import pad_rows, reply_logps
from dpo_literate.models import tiny_model
from dpo_literate.packing import (
    bins,
    pack_rows,
    packed_reply_logps,
    packing_error,
    pair_length,
    self_check,
)
from dpo_literate.results import Refusal

NOISE = {"gemma2": 1e-5}  # its attention softmax is float32 whatever the model's dtype
Pair = namedtuple(
    "Pair",
    "prompt_ids chosen_ids rejected_ids chosen_weights rejected_weights",
    defaults=(None, None),
)


def random_pairs(rng, n):
    def ids(low):
        return [rng.randrange(3, 300) for _ in range(rng.randint(low, 12))]

    return [
        Pair([] if rng.random() < 0.15 else ids(1), ids(0) + [2], ids(0) + [2]) for _ in range(n)
    ]


def exact_norms(model):
    "transformers takes its RMS norm in float32; gradients to 1e-10 need the formula itself."
    for m in model.modules():
        if type(m).__name__.endswith("RMSNorm"):
            gemma, eps = (
                "Gemma" in type(m).__name__,
                getattr(m, "variance_epsilon", getattr(m, "eps", None)),
            )
            m.forward = lambda x, m=m, one=float(gemma), eps=eps: (
                (one + m.weight) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            )
    return model


@pytest.mark.parametrize("kind", ("llama", "qwen2", "qwen3", "gpt2", "gemma2"))
def test_packed_equals_padded(kind):
    model, rng, tol = (
        exact_norms(tiny_model(kind).double().eval()),
        random.Random(kind),
        NOISE.get(kind, 1e-10),
    )
    params = list(model.parameters())
    for trial in range(40):  # 5 families x 40 = 200 batches
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
                assert all(
                    (x - y).abs().max() <= tol * max(1.0, x.abs().max().item()) * 10
                    for x, y in zip(want, got)
                    if x is not None
                )


def test_weights_follow_their_tokens():
    model = tiny_model("llama").double().eval()
    rows = [
        Pair([5, 6], [7, 8, 2], [9, 2], [1.0, 0.5, 0.25], None),
        Pair([], [7, 8, 2], [9, 2], None, [0.1, 0.2]),
    ]
    (pack,) = pack_rows(rows)
    with torch.no_grad():
        gap = packed_reply_logps(model, pack).sums - reply_logps(model, pad_rows(rows)).sums
    assert gap.abs().max() < 1e-6  # the weights are float32


def test_bins_are_deterministic_and_tight():
    assert bins([5, 9, 1, 5], 10) == [[1, 2], [0, 3]]
    with pytest.raises(Refusal, match="capacity 4"):
        pack_rows([Pair([1], [2, 3], [4, 5])], capacity=4)


def deaf(model):
    "A model that ignores its mask."
    forward = model.forward
    model.forward = lambda *a, attention_mask=None, **kw: forward(*a, attention_mask=None, **kw)
    return model


PRECISIONS = {
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


@pytest.mark.parametrize("kind", ("llama", "qwen2", "qwen3", "gpt2", "gemma2"))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_that_cannot_is_found_out(kind, precision):
    "No false alarm in any precision, and no sleep through a broken mask."
    dtype, cast = PRECISIONS[precision]
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for seed in range(4):
            assert (
                self_check(tiny_model(kind).to(dtype), random_pairs(random.Random(seed), 4)) is None
            )
        assert "would move" in self_check(
            deaf(tiny_model(kind).to(dtype)), random_pairs(random.Random(0), 4)
        )


@pytest.mark.parametrize("kind", ("mistral", "qwen2", "gemma2", "gemma3_text"))
def test_a_window_is_found_out_when_a_text_is_longer(kind):
    shape = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
    )
    window = (
        dict(use_sliding_window=True, layer_types=["sliding_attention"] * 2)
        if kind == "qwen2"
        else {}
    )

    def model(width):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, vocab_size=320, sliding_window=width, **shape, **window),
            dtype=torch.float32,
        ).eval()
        with torch.no_grad():
            [p.mul_(3) for p in made.parameters() if p.dim() > 1]
        return made

    rows = [Pair(list(range(3, 10)), [5, 2], [6, 2])] * 5 + [
        Pair(list(range(3, 20)), [5, 6, 7, 2], [8, 2])
    ]
    why = self_check(model(8), rows)
    assert "would move" in why or "window of 8" in why
    assert self_check(model(64), rows) is None
    assert self_check(model(16), rows[:5]) is None  # the long text is what counts


def test_the_question_leaves_no_trace():
    model, rows = tiny_model("llama").float().train(), random_pairs(random.Random(0), 4)
    with torch.no_grad():
        before = reply_logps(model, pad_rows(rows)).sums
    state, forward = torch.get_rng_state(), model.forward
    error, noise = packing_error(deaf(model), rows[:3])
    model.forward = forward
    assert (
        error > 100 * noise > 0
        and model.training
        and torch.equal(state, torch.get_rng_state())
        and not model.get_input_embeddings()._forward_hooks
    )
    with torch.no_grad():
        assert torch.equal(before, reply_logps(model, pad_rows(rows)).sums)


def test_kernels_without_a_mask_are_refused():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "sdpa, eager or flex_attention" in self_check(model, random_pairs(random.Random(0), 2))
