"Style beyond the page: the rules on real replies, the four definitions against loops and limits."
import json

import pytest
import torch
import torch.nn.functional as F

from dpo_literate.models import tiny_model
from dpo_literate.probes import tdi
from dpo_literate.probes.tdi import (STYLES, added_noise, blocks_of, content_of, embed,
                                     hidden_layers, layout_of, layout_tdi, path_tdi, probe,
                                     semantic_tdi, shipped_answers, spread_and_distance,
                                     style_variants, styled_ids, tdi_change, trajectory_tdi)
from dpo_literate.results import Refusal, data_dir
from dpo_literate.rows import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAID = ("the cat sat on the mat", "yes", "the dog and the cat, and why", "please tell me")
TEXTS = [TOKENIZER(t)["input_ids"] for t in SAID]
KINDS = ("llama", "qwen2", "gpt2", "gemma2")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------ styles

def test_content_is_fixed_on_real_replies():
    if data_dir() is None: pytest.skip("no data")
    lines = (data_dir() / "polite_pairs" / "pairs.jsonl").read_text().splitlines()
    texts = [r[side] for r in map(json.loads, lines) for side in ("chosen", "rejected")]
    assert len(texts) > 2000
    for text in texts:
        for style, styled in style_variants(text).items():
            assert content_of(styled) == content_of(text), (style, text)


ODD = ["", "I CANNOT.", "It is \"quoted\" {and} <tagged>\n- listed", "Straße, naïve, 你好。",
       "don't do not", "A. B! C? D"]


@pytest.mark.parametrize("text", ODD)
def test_content_is_fixed_on_odd_text(text):
    for style, rule in STYLES.items(): assert content_of(rule(text)) == content_of(text), style


def test_what_is_another_word_is_another_content():
    assert content_of("I won't.") == content_of("I will not.") != content_of("I wont.")


def test_a_style_that_changes_nothing_is_left_out():
    assert "lower" not in style_variants("all small here")
    assert "contraction" not in style_variants("all small here")


def test_shipped_answers():
    pairs = shipped_answers(TOKENIZER)
    assert len(pairs) == 16 == len({p["chosen"] for p in pairs})
    for p in pairs:
        assert p["prompt"][0]["content"].endswith("?") and p["chosen"].endswith(".")
        assert len(style_variants(p["chosen"])) >= 5
    assert shipped_answers(tiny_tokenizer("plain"))[0]["prompt"] == "How far is the station?"


# ------------------------------------------------------------ embeddings

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_embedding_is_the_same_alone_and_in_a_batch(kind, pooling):
    model, tolerance = tiny_model(kind), 1e-10 if kind == "gpt2" else 1e-4
    for layer in (0, 1, -1):
        together = embed(model, TEXTS, layer, pooling, batch_size=3)
        alone = torch.cat([embed(model, [t], layer, pooling) for t in TEXTS])
        assert (together - alone).abs().max() < tolerance * alone.abs().max()
    h = model(torch.tensor([TEXTS[0]]), output_hidden_states=True).hidden_states[-1][0]
    want = {"mean": h.mean(0), "last": h[-1], "first": h[0]}[pooling]
    assert (embed(model, TEXTS, pooling=pooling)[0] - want).abs().max() < 1e-4 * want.abs().max()


def test_unknown_pooling_is_refused():
    with pytest.raises(Refusal, match="pooling"): embed(tiny_model(), TEXTS, pooling="max")


@pytest.mark.parametrize("kind", KINDS)
def test_noise_enters_a_block_and_leaves_it_as_it_was(kind):
    model = tiny_model(kind)
    assert len(blocks_of(model)) == 2
    still, mask = hidden_layers(model, TEXTS)
    with added_noise(model, 1, random(32)): moved, _ = hidden_layers(model, TEXTS)
    assert (still[0] - moved[0]).abs().max() == 0 and (still[-1] - moved[-1]).abs().max() > 1e-3
    again, _ = hidden_layers(model, TEXTS)
    assert (still[-1] - again[-1]).abs().max() == 0


# ------------------------------------------------------------ the four definitions

def loop(e, labels, older):
    "Layout TDI over all pairs of vectors."
    if not older: e = [v / v.norm() for v in e]
    groups = [[v for v, l in zip(e, labels) if l == c] for c in dict.fromkeys(labels)]
    def between(vs): return [a - b for i, a in enumerate(vs) for b in vs[i + 1:]]
    def mean(values): return sum(values) / len(values)
    spread = [mean([d.norm() for d in between(vs)]) if older else
              mean([d.square().sum() for d in between(vs)]).sqrt() for vs in groups]
    apart = [d.norm() for d in between([mean(vs) for vs in groups])]
    return (mean(spread) / mean(apart)).item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("older", [False, True])
def test_layout_equals_the_loop(seed, older):
    e, labels = random(23, 5, seed=seed), [(i * i) % 4 if i > 7 else i % 4 for i in range(23)]
    found = layout_tdi(e, labels, older)
    assert abs(found.value - loop(e, labels, older)) < 1e-10 and found.low < found.high


def test_layout_limits():
    e, labels = random(12, 5), [i // 3 for i in range(12)]
    value, one = layout_tdi(e, labels).value, random(4, 5).repeat_interleave(3, 0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    turned = e @ torch.linalg.qr(random(5, 5, seed=7))[0]
    assert layout_tdi(one, labels).value < 1e-7
    for same, names in ((e[order], [labels[i] for i in order]), (turned, labels),
                        (e * torch.rand(12, 1), labels)):
        assert abs(layout_tdi(same, names).value - value) < 1e-12
    with pytest.raises(Refusal, match="two classes"): layout_tdi(e, [0] * 12)
    with pytest.raises(Refusal, match="two members"): layout_tdi(e, list(range(12)))


def test_spread_and_distance_by_hand():
    e = torch.tensor([[0., 0.], [0., 2.], [3., 1.], [5., 1.]], dtype=torch.float64)
    spread, distance = spread_and_distance(e, ["a", "a", "b", "b"])
    assert spread.tolist() == [2., 2.] and distance[0, 1] == 4.


def test_change_is_the_ratio_of_the_two():
    a, b, labels = random(12, 5), random(12, 5, seed=2), [i // 3 for i in range(12)]
    want = layout_tdi(b, labels).value / layout_tdi(a, labels).value
    assert abs(tdi_change(a, b, labels).value - want) < 1e-12
    same = tdi_change(a, 5 * a, labels)
    assert abs(same.value - 1) < 1e-12 and abs(same.high - same.low) < 1e-12


def walked(model, ids, sigma, seed=0):
    "Clean and noisy states after each layer, one text at a time, noise put in as embeddings."
    table = model.get_input_embeddings().weight
    for t, noise in zip(ids, tdi._noise(ids, table.shape[1], sigma, seed)):
        x = table[t][None]
        yield [model(inputs_embeds=v, output_hidden_states=True).hidden_states[1:]
               for v in (x, x + noise)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_trajectory_and_path_equal_the_loop(batch_size):
    model, drift, size, bends = tiny_model("gpt2"), 0., 0., []
    with torch.no_grad():
        for clean, moved in walked(model, TEXTS, .05):
            drift = drift + torch.stack([(m - c).square().sum() for c, m in zip(clean, moved)])
            size = size + torch.stack([c.square().sum() for c in clean])
            a, b = (sum((y - x).norm() for x, y in zip(s, s[1:])) for s in (clean, moved))
            bends.append((b / a - 1)**2)
    trajectory = trajectory_tdi(model, TEXTS, .05, batch_size=batch_size).value
    path = path_tdi(model, TEXTS, .05, batch_size=batch_size).value
    assert abs(trajectory / (drift / size).mean() - 1) < 1e-9
    assert abs(path / (sum(bends) / len(bends)) - 1) < 1e-6
    assert trajectory_tdi(model, TEXTS, 0.).value == path_tdi(model, TEXTS, 0.).value == 0.


def test_relative_noise_does_not_see_the_scale_of_the_embeddings():
    "Llama norms its inputs: embeddings and what is added to them, times four, change nothing."
    a, b = tiny_model("llama"), tiny_model("llama")
    ends = ("o_proj.weight", "down_proj.weight")
    added = [w for n, w in b.named_parameters() if n.endswith(ends)]
    with torch.no_grad():
        for p in (b.get_input_embeddings().weight, *added): p *= 4
    one, four = (trajectory_tdi(m, TEXTS, .1, relative=True).value for m in (a, b))
    assert abs(one / four - 1) < 1e-3
    assert trajectory_tdi(b, TEXTS, .1).value < .5 * trajectory_tdi(a, TEXTS, .1).value


def test_semantic_equals_the_loop():
    a, b = random(7, 2, 5), random(9, 2, 5, seed=1)
    def drift(pairs): return sum(1 - F.cosine_similarity(*p, dim=0) for p in pairs) / len(pairs)
    found = semantic_tdi(a, b)
    assert abs(found.value - drift(a) / drift(b)) < 1e-12 and found.low < found.value < found.high
    assert abs(semantic_tdi(3 * a, b / 7).value - found.value) < 1e-12
    assert semantic_tdi(torch.stack([a[:, 0], a[:, 0]], 1), b).value < 1e-12


# ------------------------------------------------------------ the probe

@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_on_given_pairs(kind):
    pairs = [dict(prompt=f"say {i}", chosen=f"It is not {i}. The cat is big, and many dogs sat.")
             for i in range(3)]
    before, after = tiny_model(kind), tiny_model(kind, seed=1)
    found = probe(after, before, TOKENIZER, pairs=pairs, progress=False)
    ids, labels, styles = styled_ids(TOKENIZER, pairs)
    row = found["Style TDI (layout)"]
    for value, model in ((row.before, before), (row.after, after)):
        assert abs(value - layout_tdi(embed(model, ids), labels).value) < 1e-9
    assert len(found.rows) == 4 and f"{row.after / row.before:.2f} times" in found.words
    chat = [dict(prompt=[dict(role="user", content=p["prompt"])],
                 chosen=[dict(role="assistant", content=p["chosen"])]) for p in pairs]
    assert styled_ids(TOKENIZER, chat)[1:] == (labels, styles)


def test_its_interval_draws_contents_in_both_models_at_once():
    a, b, labels = random(12, 5), random(12, 5, seed=2), [i // 3 for i in range(12)]
    (old, n), (new, _) = layout_of(a, labels), layout_of(b, labels)
    w = torch.tensor([2., 1., 1., 0.], dtype=torch.float64)
    assert n == 4 and new(w).isfinite() and old(w).isfinite()
