"The reward model beyond the page: families, layouts, adapters, accumulation, saving, refusals."
import copy, math
import pytest, torch
from torch import nn
from dpo_literate.logps import pad_rows
from dpo_literate.models import tiny_model, weights_hash, write_folder
from dpo_literate.packing import pack_rows
from dpo_literate.results import Refusal
from dpo_literate.reward_model import (RewardConfig, RewardTrainer, accuracy, calibration, end_positions, load_reward_model, main_reward_train,
                                       pair_scores, reward_scores, score_texts, standardise, with_score_head)
from dpo_literate.rows import encode_pairs, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {'so ' * (i % 4)}{i}", rejected=f"and the dog {'no ' * (i % 2)}{i}") for i in range(7)]
ROWS, _ = encode_pairs(PAIRS, TOKENIZER)


def scorer(kind="llama", seed=0):
    model = with_score_head(tiny_model(kind))
    nn.init.normal_(model.score.weight, std=.2, generator=torch.Generator().manual_seed(seed))
    return model


def trained(path, model, data=PAIRS, **settings):
    given = dict(use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=2, max_grad_norm=0.,
                 per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant")
    peft_config = settings.pop("peft_config", None)
    t = RewardTrainer(model, RewardConfig(str(path), **(given | settings)), data, processing_class=TOKENIZER, peft_config=peft_config)
    t.train()
    return t


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
@torch.no_grad()
def test_a_score_depends_on_its_own_text_alone(kind):
    model = scorer(kind)
    alone = torch.stack([reward_scores(model, pad_rows([r])) for r in ROWS])            # (7,2)
    torch.testing.assert_close(reward_scores(model, pad_rows(ROWS)).view(2, -1).T, alone, rtol=0, atol=1e-10)
    batches = pack_rows(ROWS, capacity=60)
    assert len(batches) > 1
    for b in batches:
        rows = [ROWS.index(r) for r in b.rows]
        torch.testing.assert_close(reward_scores(model, b).view(2, -1).T, alone[rows], rtol=0, atol=1e-10)


def test_the_end_is_the_end_token_even_where_it_pads():
    for batch in [pad_rows(ROWS, pad_id=TOKENIZER.eos_token_id), *pack_rows(ROWS)]:
        assert (batch.input_ids.flatten()[end_positions(batch)] == TOKENIZER.eos_token_id).all()
    at = end_positions(pad_rows(ROWS, pad_id=TOKENIZER.eos_token_id))
    T = pad_rows(ROWS).input_ids.shape[1]
    assert (at - torch.arange(14) * T == torch.tensor([len(r.prompt_ids) + len(r.chosen_ids) - 1 for r in ROWS] + [len(r.prompt_ids) + len(r.rejected_ids) - 1 for r in ROWS])).all()


@torch.no_grad()
def test_texts_and_rows_agree():
    model = scorer()
    chosen, rejected = pair_scores(model, ROWS)
    prompts = [p["prompt"] for p in PAIRS]
    torch.testing.assert_close(score_texts(model, TOKENIZER, prompts, [p["chosen"] for p in PAIRS], 3), chosen, rtol=0, atol=1e-10)
    standardise(model, torch.cat([chosen, rejected])); standardise(model, score_texts(model, TOKENIZER, prompts, [p["chosen"] for p in PAIRS]))
    again = score_texts(model, TOKENIZER, prompts, [p["chosen"] for p in PAIRS])
    assert abs(again.mean()) < 1e-9 and abs(again.std() - 1) < 1e-9
    with pytest.raises(Refusal, match="same score"): standardise(model, torch.ones(4))


def distance(a, b): return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("batch,steps,layout", [(1, 4, "packed"), (2, 2, "padded"), (4, 1, "padded")])
def test_any_cut_of_a_step_gives_the_same_weights(tmp_path, batch, steps, layout):
    plain = dict(optim="sgd", learning_rate=1e-2)   # Adam would blow rounding up where a gradient is zero
    whole = trained(tmp_path / "a", scorer(), **plain)
    cut = trained(tmp_path / "b", scorer(), **plain, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, layout=layout)
    assert distance(whole.model, cut.model) < (1e-12 if layout == "packed" else 1e-8)  # Llama's norm rounds to float32 whatever the dtype


def test_first_loss_and_centring(tmp_path):
    t = trained(tmp_path, with_score_head(tiny_model()), num_train_epochs=1, learning_rate=1e-9)
    assert abs(t.state.log_history[0]["loss"] - math.log(2)) < 1e-12
    level = {c: torch.cat(pair_scores(trained(tmp_path, scorer(), num_train_epochs=20, centring=c).model, ROWS)).mean().abs().item() for c in (0., 1.)}
    assert level[1.] < level[0.]


def test_an_adapter_trains_itself_and_the_head_only(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_score_head(tiny_model())
    before = weights_hash(model.base_model)
    body = copy.deepcopy(model.base_model.state_dict())
    t = trained(tmp_path, model, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    after = {k.replace("base_layer.", ""): v for k, v in t.model.get_base_model().base_model.state_dict().items() if "lora" not in k}
    assert before and all(torch.equal(v, after[k]) for k, v in body.items())
    assert any(p.abs().max() > 0 for n, p in t.model.named_parameters() if "lora_B" in n)
    scores = pair_scores(t.model, ROWS)
    assert (scores[0] - scores[1]).mean() > 0
    merged = t.model.merge_and_unload()
    torch.testing.assert_close(pair_scores(merged, ROWS)[0], scores[0], rtol=0, atol=1e-9)


def test_saved_and_loaded_it_scores_the_same(tmp_path):
    model = scorer()
    standardise(model, pair_scores(model, ROWS)[0])
    write_folder(tmp_path / "rm", model, TOKENIZER)
    again = load_reward_model(tmp_path / "rm", "float64")
    a, b = (score_texts(m, TOKENIZER, ["the cat"], ["on the mat"]) for m in (model, again))
    assert torch.equal(a, b)
    write_folder(tmp_path / "lm", tiny_model(), TOKENIZER)
    fresh = load_reward_model(tmp_path / "lm", "float64")
    assert not fresh.score.weight.any()


def test_a_language_model_is_not_changed_by_lending_its_body():
    lm = tiny_model()
    before = weights_hash(lm)
    model = with_score_head(lm)
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    assert weights_hash(lm) == before and lm.config.num_labels != 1


def test_calibration_counts_and_ties():
    w, l = torch.tensor([3., 1., 0., 2.]), torch.tensor([0., 2., 0., 0.])
    c = calibration(w, l, groups=2)
    assert c.n == [2, 2] and c.right == [.25, 1.]          # |m| = 0 (tie), 1 (wrong) | 2, 3 (right)
    assert accuracy(w, l).value == pytest.approx(.625)
    perfect = calibration(torch.full((10,), 50.), torch.zeros(10))
    assert perfect.error < 1e-12


@pytest.mark.parametrize("setting,word", [(dict(centring=-1.), "centring"), (dict(layout="flat"), "packed")])
def test_bad_settings_are_refused(tmp_path, setting, word):
    with pytest.raises(Refusal, match=word): RewardConfig(str(tmp_path), **setting)


def test_refusals_in_one_sentence(tmp_path):
    with pytest.raises(Refusal, match="train_dataset"): RewardTrainer(scorer(), RewardConfig(str(tmp_path), use_cpu=True), processing_class=TOKENIZER)
    with pytest.raises(Refusal, match="no head"): trained(tmp_path, tiny_model())
    two = copy.deepcopy(scorer().config); two.num_labels = 3
    from transformers import AutoModelForSequenceClassification
    AutoModelForSequenceClassification.from_config(two).save_pretrained(tmp_path / "three")
    with pytest.raises(Refusal, match="3 labels"): load_reward_model(tmp_path / "three")
    model = scorer()
    with torch.no_grad(): model.base_model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    before = weights_hash(model)
    with pytest.raises(Refusal, match="not finite") as e: trained(tmp_path, model)
    assert e.value.code == 3 and weights_hash(model) == before


def test_the_command_writes_a_model_and_a_report(tmp_path):
    import argparse, json
    write_folder(tmp_path / "lm", tiny_model().float(), TOKENIZER)
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(p) for p in PAIRS))
    args = argparse.Namespace(model=str(tmp_path / "lm"), data=str(tmp_path / "pairs.jsonl"), eval=str(tmp_path / "pairs.jsonl"), output=str(tmp_path / "out"),
                              epochs=2, lr=1e-3, rank=4, batch=4, max_length=64, seed=0)
    assert main_reward_train(args) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["values"]["accuracy"]["n"] == 7 and report["values"]["held_out"] and (tmp_path / "out" / "report.png").stat().st_size > 1000
    saved = load_reward_model(tmp_path / "out" / "model")
    assert saved.config.reward_scale > 0 and score_texts(saved, TOKENIZER, ["the cat"], ["sat"]).isfinite().all()
    with pytest.raises(Refusal, match="out is not empty"): main_reward_train(args)
