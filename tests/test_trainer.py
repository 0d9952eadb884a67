"The trainer beyond the page: its settings against TRL, LoRA, evaluation, refusals, the reference on disk."
import dataclasses, json, math
import pytest, torch
from dpo_literate.models import tiny_model
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.trainer import DPOConfig, DPOTrainer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"the cat {'sat ' * (i % 3)}", chosen=f"on the mat {i}", rejected=f"and the dog {i}") for i in range(7)]


def config(path, **settings):
    given = dict(use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, num_train_epochs=1,
                 per_device_train_batch_size=4, learning_rate=1e-3, lr_scheduler_type="constant")
    return DPOConfig(str(path), **(given | settings))


def trainer(path, model=None, data=PAIRS, **settings):
    more = {k: settings.pop(k) for k in ("eval_dataset", "peft_config", "ref_model") if k in settings}
    return DPOTrainer(tiny_model() if model is None else model, args=config(path, **settings), train_dataset=data, processing_class=TOKENIZER, **more)


def losses(t): return [h["loss"] for h in t.state.log_history if "loss" in h]


def test_every_trl_field_exists():
    trl = pytest.importorskip("trl")
    ours = {f.name for f in dataclasses.fields(DPOConfig)}
    theirs = {f.name for f in dataclasses.fields(trl.DPOConfig)}
    assert len(theirs) > 20 and theirs <= ours, theirs - ours


@pytest.mark.parametrize("setting,word", [
    (dict(beta=0), "beta"), (dict(loss_type="sigmiod"), "sigmoid"), (dict(trust_remote_code=True), "never"), (dict(pad_token="x"), "pad_token"),
    (dict(layout="flat"), "packed"), (dict(ld_alpha=2.), "ld_alpha"), (dict(loss_weights=[1., 2.]), "loss_weights"), (dict(sync_ref_model=True), "reference")])
def test_bad_settings_are_refused(tmp_path, setting, word):
    with pytest.raises(Refusal, match=word): config(tmp_path, **setting)


def test_capacity_smaller_than_a_pair(tmp_path):
    with pytest.raises(Refusal, match="capacity"): trainer(tmp_path, capacity=5)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("init", [True, "pissa", "olora", False])
def test_lora_starts_at_ln2(tmp_path, init):
    peft = pytest.importorskip("peft")
    model = tiny_model().float() if init in ("pissa", "olora") else tiny_model()
    t = trainer(tmp_path, model=model, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init))
    t.train()
    assert abs(losses(t)[0] - math.log(2)) < 1e-5
    assert losses(t)[-1] < losses(t)[0]


def test_adapter_on_the_head_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(Refusal, match="head"):
        trainer(tmp_path, peft_config=peft.LoraConfig(r=4, target_modules=["lm_head"]))


def test_evaluation_reads_each_row_once(tmp_path):
    t = trainer(tmp_path, eval_dataset={"a": PAIRS, "b": PAIRS[:3]}, per_device_eval_batch_size=4)
    first = t.evaluate()
    assert abs(first["eval_a_loss"] - math.log(2)) < 1e-12 and first["eval_b_rewards/accuracies"] == .5
    t.train()
    assert t.evaluate()["eval_a_loss"] < math.log(2)


def test_reference_is_read_once(tmp_path, monkeypatch):
    first = trainer(tmp_path); first.train()
    import dpo_literate.trainer as module
    seen = []
    real = module.read_reference
    monkeypatch.setattr(module, "read_reference", lambda model, rows, *rest: (seen.append(len(rows)), real(model, rows, *rest))[1])
    again = trainer(tmp_path, data=list(reversed(PAIRS))); again.train()
    trainer(tmp_path, model=tiny_model(seed=1)).train()
    assert seen == [0, 7]


def test_nan_stops_before_the_step(tmp_path):
    t = trainer(tmp_path)
    t.prepare_reference()
    before = [p.clone() for p in t.model.parameters()]
    t.cached.table = {k: (float("nan"), 0.) for k in t.cached.table}
    t.checked = True
    with pytest.raises(Refusal, match="not finite") as why: t.train()
    assert why.value.code == 3
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))


def test_run_card_counts_rows(tmp_path):
    trainer(tmp_path).train()
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert card["rows"]["train"]["rows_in"] == 7 and card["layout"] == "packed" and len(card["weights"]) == 64
