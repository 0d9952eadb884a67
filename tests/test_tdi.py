"Style beyond the page: the rules on real replies, the four definitions against loops and limits, the penalty in both layouts, the trainer add-on."
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import PrinterCallback

from dpo_literate.logps import pad_rows
from dpo_literate.models import tiny_model
from dpo_literate.packing import pack_rows
from dpo_literate.probes.base import scored_states
from dpo_literate.probes.tdi import (STYLES, MatchedDPOTrainer, arm_factor, blocks_of, capped, clouds, content_of, embed, hidden_layers, layout_tdi, noise_like,
                                     path_tdi, reply_means, semantic_tdi, shaken, style_factor, style_penalty, styled_ids, tdi_change, tdi_probe,
                                     trajectory_tdi, variants)
from dpo_literate.results import Refusal, data_dir
from dpo_literate.rows import encode_pairs, tiny_tokenizer
from dpo_literate.trainer import DPOConfig, DPOTrainer

TOKENIZER = tiny_tokenizer()
TEXTS = [TOKENIZER(t)["input_ids"] for t in ("the cat sat on the mat", "yes", "the dog and the cat, and why", "please tell me")]
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}", rejected=f"and the dog {'sat ' * (i % 4)}{i}") for i in range(8)]
ROWS, _ = encode_pairs(PAIRS, TOKENIZER)
KINDS = ("llama", "qwen2", "gpt2", "gemma2")


def random(*shape, seed=0): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------ styles

def test_content_is_fixed_on_real_replies():
    if data_dir() is None: pytest.skip("no data")
    texts = [json.loads(line) for line in (data_dir() / "polite_pairs" / "pairs.jsonl").read_text().splitlines()]
    texts = [r[side] for r in texts for side in ("chosen", "rejected")]
    assert len(texts) > 2000
    for text in texts:
        for style, dressed in variants(text).items(): assert content_of(dressed) == content_of(text), (style, text)


@pytest.mark.parametrize("text", ["", "I CANNOT.", "It is \"quoted\" {and} <tagged>\n- listed", "Straße, naïve, 你好。", "don't do not", "A. B! C? D"])
def test_content_is_fixed_on_odd_text(text):
    for style, rule in STYLES.items(): assert content_of(rule(text)) == content_of(text), style


def test_a_style_that_changes_nothing_is_left_out():
    assert "lower" not in variants("all small here") and "contraction" not in variants("all small here")


# ------------------------------------------------------------ embeddings

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_embedding_is_the_same_alone_and_in_a_batch(kind, pooling):
    model = tiny_model(kind)
    for layer in (0, 1, -1):
        together = embed(model, TEXTS, layer, pooling, batch_size=3)
        alone = torch.cat([embed(model, [t], layer, pooling) for t in TEXTS])
        assert (together - alone).abs().max() < (1e-10 if kind == "gpt2" else 1e-4) * alone.abs().max()
    h = model(torch.tensor([TEXTS[0]]), output_hidden_states=True).hidden_states[-1][0]
    want = {"mean": h.mean(0), "last": h[-1], "first": h[0]}[pooling]
    assert (embed(model, TEXTS, pooling=pooling)[0] - want).abs().max() < 1e-4 * want.abs().max()


def test_unknown_pooling_is_refused():
    with pytest.raises(Refusal, match="pooling"): embed(tiny_model(), TEXTS, pooling="max")


# ------------------------------------------------------------ the four definitions

def loop(e, labels, older):
    if not older: e = [v / v.norm() for v in e]
    groups = [[v for v, l in zip(e, labels) if l == c] for c in dict.fromkeys(labels)]
    spread = []
    for vs in groups:
        d = [(a - b).norm() if older else (a - b).square().sum() for i, a in enumerate(vs) for b in vs[i + 1:]]
        spread.append(sum(d) / len(d) if older else (sum(d) / len(d)).sqrt())
    centres = [sum(vs) / len(vs) for vs in groups]
    apart = [(a - b).norm() for i, a in enumerate(centres) for b in centres[i + 1:]]
    return (sum(spread) / len(spread) / (sum(apart) / len(apart))).item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("older", [False, True])
def test_layout_equals_the_loop(seed, older):
    e, labels = random(23, 5, seed=seed), [(i * i) % 4 if i > 7 else i % 4 for i in range(23)]
    found = layout_tdi(e, labels, older)
    assert abs(found.value - loop(e, labels, older)) < 1e-10 and found.low < found.high


def test_layout_limits():
    e, labels = random(12, 5), [i // 3 for i in range(12)]
    one = random(4, 5).repeat_interleave(3, 0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert layout_tdi(one, labels).value < 1e-7
    assert abs(layout_tdi(e[order], [labels[i] for i in order]).value - layout_tdi(e, labels).value) < 1e-12
    assert abs(layout_tdi(e * torch.rand(12, 1), labels).value - layout_tdi(e, labels).value) < 1e-12
    Q = torch.linalg.qr(random(5, 5, seed=7))[0]
    assert abs(layout_tdi(e @ Q, labels).value - layout_tdi(e, labels).value) < 1e-12
    with pytest.raises(Refusal, match="two classes"): layout_tdi(e, [0] * 12)
    with pytest.raises(Refusal, match="two members"): layout_tdi(e, list(range(12)))


def test_change_is_the_ratio_of_the_two():
    a, b, labels = random(12, 5), random(12, 5, seed=2), [i // 3 for i in range(12)]
    assert abs(tdi_change(a, b, labels).value - layout_tdi(b, labels).value / layout_tdi(a, labels).value) < 1e-12
    same = tdi_change(a, 5 * a, labels)
    assert abs(same.value - 1) < 1e-12 and abs(same.high - same.low) < 1e-12


def walked(model, ids, sigma, seed=0):
    "Clean and noisy states after each layer, one text at a time, noise put in as embeddings."
    table = model.get_input_embeddings().weight
    for t, noise in zip(ids, noise_like(ids, table.shape[1], sigma, seed)):
        yield [model(inputs_embeds=v, output_hidden_states=True).hidden_states[1:] for v in (table[t][None], table[t][None] + noise)]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_trajectory_and_path_equal_the_loop(batch_size):
    model = tiny_model("gpt2")
    drift = size = 0.
    bends = []
    with torch.no_grad():
        for clean, moved in walked(model, TEXTS, .05):
            drift = drift + torch.stack([(m - c).square().sum() for c, m in zip(clean, moved)])
            size = size + torch.stack([c.square().sum() for c in clean])
            a, b = (sum((y - x).norm() for x, y in zip(s, s[1:])) for s in (clean, moved))
            bends.append((b / a - 1)**2)
    assert abs(trajectory_tdi(model, TEXTS, .05, batch_size=batch_size).value / (drift / size).mean() - 1) < 1e-9
    assert abs(path_tdi(model, TEXTS, .05, batch_size=batch_size).value / (sum(bends) / len(bends)) - 1) < 1e-6
    assert trajectory_tdi(model, TEXTS, 0.).value == path_tdi(model, TEXTS, 0.).value == 0.


def test_relative_noise_does_not_see_the_scale_of_the_embeddings():
    "Llama norms its inputs, so embeddings, positions none, scaled by a factor leave the relative form where it was."
    a, b = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for p in (b.get_input_embeddings().weight, *(w for n, w in b.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight")))): p *= 4
    one, four = (trajectory_tdi(m, TEXTS, .1, relative=True).value for m in (a, b))
    assert abs(one / four - 1) < 1e-3
    assert trajectory_tdi(b, TEXTS, .1).value < .5 * trajectory_tdi(a, TEXTS, .1).value


def test_semantic_equals_the_loop():
    a, b = random(7, 2, 5), random(9, 2, 5, seed=1)
    def drift(pairs): return sum(1 - F.cosine_similarity(p[0], p[1], dim=0) for p in pairs) / len(pairs)
    found = semantic_tdi(a, b)
    assert abs(found.value - drift(a) / drift(b)) < 1e-12 and found.low < found.value < found.high
    assert abs(semantic_tdi(3 * a, b / 7).value - found.value) < 1e-12
    assert semantic_tdi(torch.stack([a[:, 0], a[:, 0]], 1), b).value < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_runs_on_every_family(kind):
    pairs = [dict(prompt=f"say {i}", chosen=f"It is not {i}. The cat is big, and many dogs sat.") for i in range(3)]
    found = tdi_probe(tiny_model(kind, seed=1), tiny_model(kind), TOKENIZER, pairs)
    assert len(found.readings) == 9 and found.figure is not None and "3 contents" in found.notes[0]
    ids, labels, styles = styled_ids(TOKENIZER, pairs)
    e = embed(tiny_model(kind), ids)
    assert abs(found["Style TDI before"].value - layout_tdi(e, labels).value) < 1e-9
    ratio = found["Style TDI after"].value / found["Style TDI before"].value
    assert abs(found["Style TDI, after over before"].value - ratio) < 1e-9
    chat = [dict(prompt=[dict(role="user", content=p["prompt"])], chosen=[dict(role="assistant", content=p["chosen"])]) for p in pairs]
    assert styled_ids(TOKENIZER, chat)[1:] == (labels, styles)


# ------------------------------------------------------------ the penalty

@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_shaken_and_left_as_it_was(kind):
    model = tiny_model(kind)
    assert len(blocks_of(model)) == 2
    still, mask = hidden_layers(model, TEXTS)
    with shaken(model, 1, random(32)): moved, _ = hidden_layers(model, TEXTS)
    assert (still[0] - moved[0]).abs().max() == 0 and (still[-1] - moved[-1]).abs().max() > 1e-3
    again, _ = hidden_layers(model, TEXTS)
    assert (still[-1] - again[-1]).abs().max() == 0


@pytest.mark.parametrize("kind,tolerance", [("gpt2", 1e-9), ("llama", 1e-3), ("qwen2", 1e-3)])
def test_penalty_is_the_same_padded_and_packed(kind, tolerance):
    model, L, z = tiny_model(kind), random(32, 3) * .01, random(2, 8, 3, seed=1)
    a, b = (style_penalty(model, batch, L, 1, z) for batch in (pad_rows(ROWS), pack_rows(ROWS)[0]))
    assert (a / b - 1).abs().max() < tolerance


def test_penalty_equals_a_loop_over_pairs():
    model, L, z = tiny_model("gpt2"), random(32, 3) * .05, random(2, 8, 3, seed=1)
    got = style_penalty(model, pad_rows(ROWS), L, 1, z)
    size = reply_means(scored_states(model, pad_rows(ROWS)), pad_rows(ROWS)).square().sum(-1).mean()
    for i, row in enumerate(ROWS):
        total = 0.
        for reply in (row.chosen_ids, row.rejected_ids):
            ids, at = torch.tensor([row.prompt_ids + reply]), slice(len(row.prompt_ids) - 1, -1)
            def mean(): return model.base_model(ids).last_hidden_state[0, at].mean(0)
            clean = mean()
            for probe in z[:, i]:
                with shaken(model, 1, L @ probe): total = total + (mean() - clean).square().sum()
        assert abs(got[i] / (total / 4 / size) - 1) < 1e-9


def test_penalty_is_the_trace_of_the_jacobian():
    "Small noise, many probes: the mean is Tr(J Σ Jᵀ), with J by finite differences along the columns of L."
    model, L, row = tiny_model("gpt2"), random(32, 2) * 1e-4, ROWS[:1]
    batch = pad_rows(row)
    z = random(400, 1, 2, seed=1)
    with torch.no_grad():
        got = style_penalty(model, batch, L, 1, z)[0]
        columns = sum(style_penalty(model, batch, L[:, [k]], 1, torch.ones(1, 1, 1, dtype=torch.float64))[0] for k in range(2))
    assert abs(got / columns - 1) < .25


def test_cap_limits_and_keeps_the_direction():
    loss, p = torch.tensor([.6, .8]), torch.tensor([5., 7.], requires_grad=True)
    out = capped(p, loss, .3)
    assert abs(out.mean().item() - .3 * .7) < 1e-6 and torch.autograd.grad(out.sum(), p)[0].min() > 0
    small = torch.tensor([.01, .02])
    assert torch.equal(capped(small, loss), small) and capped(torch.zeros(2), loss).isfinite().all()


def test_factors():
    delta, contents = random(50, 4) @ random(4, 12, seed=1), random(30, 12, seed=2)
    L = style_factor(delta, shrinkage=0.)
    assert L.shape == (12, 4) and (L @ L.T - torch.cov(delta.T)).abs().max() < 1e-10
    assert style_factor(delta, rank=2).shape == (12, 2)
    assert abs(style_factor(delta).square().sum() / L.square().sum() - 1) < 1e-12
    arms = {arm: arm_factor(arm, L, contents, seed=5) for arm in ("matched", "isotropic", "wrong", "signal")}
    for F_ in arms.values(): assert abs(F_.square().sum() / L.square().sum() - 1) < 1e-9
    iso = arms["isotropic"] @ arms["isotropic"].T
    assert (iso - torch.eye(12, dtype=torch.float64) * iso[0, 0]).abs().max() < 1e-12
    assert (arms["wrong"].T @ arms["wrong"] - torch.diag(L.norm(dim=0)**2)).abs().max() < 1e-9
    with pytest.raises(Refusal, match="arm"): arm_factor("best", L, contents)


def trained(tmp_path, cls=DPOTrainer, layout="packed", accumulate=1, checkpointing=False, kind="gpt2", **more):
    args = DPOConfig(str(tmp_path), use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=2, max_grad_norm=0.,
                     per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate, learning_rate=1e-3, lr_scheduler_type="constant", layout=layout,
                     gradient_checkpointing=checkpointing)
    trainer = cls(tiny_model(kind), args=args, train_dataset=PAIRS, processing_class=TOKENIZER, **more)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def apart(a, b): return max((p - q).abs().max().item() for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_the_add_on(tmp_path):
    L = random(32, 3) * .01
    plain = trained(tmp_path / "a")
    assert apart(plain, trained(tmp_path / "b", MatchedDPOTrainer, factor=L, block=1, weight=0., warmup=0)) == 0.
    assert apart(plain, trained(tmp_path / "c", MatchedDPOTrainer, factor=L, block=1, warmup=99)) == 0.
    packed, padded = (trained(tmp_path / layout, MatchedDPOTrainer, layout, factor=L, block=1, warmup=0) for layout in ("packed", "padded"))
    assert apart(plain, packed) > 1e-4 and apart(packed, padded) < 1e-6
    first = packed.state.log_history[0]
    assert first["loss"] == plain.state.log_history[0]["loss"] and abs(first["loss"] - math.log(2)) < 1e-12
    assert 0 < first["style_penalty"] <= .7 * .3 * first["loss"] + 1e-9
    again = trained(tmp_path / "d", MatchedDPOTrainer, factor=L, block=1, warmup=0)
    assert apart(packed, again) == 0.


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("block", [0, 1])
def test_recomputed_layers_see_the_same_noise(tmp_path, kind, block):
    "Gradient checkpointing runs a layer again when the noise is gone; the weights must not notice."
    more = dict(cls=MatchedDPOTrainer, kind=kind, factor=random(32, 3) * .01, block=block, warmup=0)
    a, b = trained(tmp_path / "a", **more), trained(tmp_path / "b", checkpointing=True, **more)
    assert apart(a, b) < (1e-9 if kind == "gpt2" else 1e-5)


def test_the_add_on_with_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    def lora(): return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    L = random(32, 3) * .01
    off, on = (trained(tmp_path / str(w), MatchedDPOTrainer, kind="llama", peft_config=lora(), factor=L, block=1, warmup=0, weight=w) for w in (0., 5.))
    adapters = [[p for n, p in t.model.named_parameters() if "lora_B" in n] for t in (off, on)]
    assert adapters[0] and max((a - b).abs().max() for a, b in zip(*adapters)) > 1e-5


def test_evaluation_is_dpo(tmp_path):
    trainer = trained(tmp_path, MatchedDPOTrainer, factor=random(32, 3) * .01, block=1, warmup=0)
    plain = DPOTrainer.evaluate(trainer, list(ROWS), metric_key_prefix="plain")["plain_loss"]
    assert trainer.evaluate(list(ROWS))["eval_loss"] == plain


def test_clouds_by_hand():
    e = torch.tensor([[0., 0.], [0., 2.], [3., 1.], [5., 1.]], dtype=torch.float64)
    spread, distance = clouds(e, ["a", "a", "b", "b"])
    assert spread.tolist() == [2., 2.] and distance[0, 1] == 4.
