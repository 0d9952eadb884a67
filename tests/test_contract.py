"""What a run must share with the one it goes on with is found here, not listed: every field of
`DPOConfig` is changed, and one that moves the weights must be in the identity of the run."""
import dataclasses
import json
import logging
import shutil

import pytest
import torch
import transformers

from dpo_literate import models
from dpo_literate.models import tiny_model, weights_hash
from dpo_literate.port import identity
from dpo_literate.results import Refusal
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.run_folder import disagreements
from dpo_literate.settings import DPOConfig
from dpo_literate.trainer import DPOTrainer

TOKENIZER = tiny_tokenizer()
PAIRS = [dict(prompt=f"dish {k} " + "and the dog " * (k % 3),
              chosen="the answer is yes " * (1 + k % 4), rejected="the answer is no, and why")
         for k in range(7)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    transformers.logging.set_verbosity_error()
    logging.getLogger("dpo_literate").setLevel(logging.ERROR)
    yield
    logging.getLogger("dpo_literate").setLevel(logging.NOTSET)


def policy(rate=.2):
    model = tiny_model()
    for layer in model.model.layers: layer.self_attn.attention_dropout = rate
    return model


def trainer(out, model=None, **settings):
    given = dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=4,
                 per_device_train_batch_size=2, gradient_accumulation_steps=2,
                 learning_rate=1e-2, save_strategy="no", logging_steps=1, warmup_steps=1,
                 max_grad_norm=.5, per_device_eval_batch_size=4)
    t = DPOTrainer(model or policy(), args=DPOConfig(str(out), **given | settings),
                   train_dataset=PAIRS, eval_dataset=PAIRS[:3], processing_class=TOKENIZER)
    t.remove_callback(transformers.PrinterCallback)
    return t


def described(t): return json.loads(json.dumps(identity(t), default=str))


def trained(out, **settings):
    t = trainer(out, **settings)
    t.train()
    return weights_hash(t.model)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    "Identity and weights of the run in which nothing was changed."
    t = trainer(tmp_path_factory.mktemp("usual"))
    found = described(t)
    t.train()
    return found, weights_hash(t.model)


# field -> another value, or the settings it takes to change it
MOVES = dict(
    per_device_train_batch_size=1, num_train_epochs=2., max_steps=3, learning_rate=2e-2,
    lr_scheduler_type="cosine", warmup_steps=2, optim="sgd", weight_decay=.1, adam_beta1=.5,
    adam_beta2=.9, adam_epsilon=1e-3, gradient_accumulation_steps=1, max_grad_norm=.1,
    bf16=True, fp16=True, tf32=None, seed=1, data_seed=7, max_length=12, layout="padded",
    capacity=64, disable_dropout=False, loss_type=["ipo"], loss_weights=[2.], beta=.3,
    label_smoothing=.2, f_divergence_type="js_divergence",
    f_alpha_divergence_coef=dict(f_divergence_type="alpha_divergence",
                                 f_alpha_divergence_coef=.3),
    discopop_tau=dict(loss_type=["discopop"], discopop_tau=.1),
    loss_kwargs=dict(loss_kwargs=dict(sigmoid=dict(label_smoothing=.3))), ld_alpha=.5,
    use_weighting=True, precompute_ref_log_probs=False, sync_ref_model=True,
    ref_model_mixup_alpha=dict(sync_ref_model=True, ref_model_mixup_alpha=.5),
    ref_model_sync_steps=dict(sync_ref_model=True, ref_model_sync_steps=2),
    lr_scheduler_kwargs=dict(lr_scheduler_type="cosine",
                             lr_scheduler_kwargs=dict(num_cycles=2)),
    optim_args=dict(optim="rmsprop", optim_args="momentum=0.9"),
    optim_target_modules=["q_proj"], train_sampling_strategy="sequential",
    dataloader_drop_last=True, ignore_data_skip=True,
    accelerator_config=dict(accelerator_config=dict(even_batches=False)),
    torch_compile_backend="eager", torch_compile_mode="default")
# changed all at once, these leave the weights as they were
RESTS = dict(
    logging_strategy="epoch", logging_steps=2, logging_first_step=True, log_on_each_node=False,
    logging_nan_inf_filter=True, include_num_input_tokens_seen="all", log_level="error",
    log_level_replica="error", disable_tqdm=False, run_name="x", project="x",
    trackio_space_id="x", eval_strategy="steps", eval_steps=1, eval_delay=1,
    per_device_eval_batch_size=2, prediction_loss_only=True, eval_on_start=True,
    eval_do_concat_batches=False, eval_use_gather_object=True, eval_accumulation_steps=1,
    include_for_metrics=["loss"], batch_eval_metrics=True, token_metrics=True,
    generate_samples=1, generate_tokens=4, bf16_full_eval=True)
RESTS_TOO = dict(
    save_strategy="steps", save_steps=1, save_only_model=True, save_on_each_node=True,
    save_total_limit=2, enable_jit_checkpoint=True, greater_is_better=True,
    metric_for_best_model="loss", restore_callback_states_from_checkpoint=True,
    full_determinism=True, use_cpu=False, average_tokens_across_devices=False,
    gradient_checkpointing=True, activation_checkpointing=True, use_cache=True,
    gradient_checkpointing_kwargs=dict(use_reentrant=True),
    activation_checkpointing_kwargs=dict(use_reentrant=True), torch_empty_cache_steps=1,
    dataloader_num_workers=1, dataloader_pin_memory=True, dataloader_persistent_workers=True,
    dataloader_prefetch_factor=2, dataloader_multiprocessing_context="fork",
    dataloader_in_order=False, remove_unused_columns=False, label_names=["x"],
    length_column_name="x", ddp_find_unused_parameters=True, ddp_bucket_cap_mb=1,
    ddp_broadcast_buffers=True, ddp_static_graph=True, ddp_timeout=5, do_train=True,
    do_eval=True, do_predict=True, hub_model_id="x", hub_strategy="end", hub_always_push=True,
    hub_revision="x", hub_private_repo=True, other_reference=True, score_tail=True,
    truncation_mode="keep_end", identical="refuse", dataset_num_proc=2,
    pad_to_multiple_of=8, activation_offloading=True, auto_find_batch_size=True,
    use_liger_kernel=True, liger_kernel_config=dict(rope=False), torch_compile=True,
    precompute_ref_batch_size=2, padding_free=True, skip_memory_metrics=False, fp16_full_eval=True)
NOT_HERE = {
    "where it writes, and where from it goes on": "output_dir resume_from_checkpoint",
    "how many processes: the identity has their number": "local_rank parallelism_config fsdp "
        "fsdp_config deepspeed ddp_backend",
    "a service": "push_to_hub hub_token report_to trackio_bucket_id trackio_static_space_id",
    "the choice at the end, not the path to it": "load_best_model_at_end",
    "refused": "trust_remote_code neftune_noise_alpha label_smoothing_factor",
    "only of single replies: `losses` of the identity has them": "desirable_weight "
        "undesirable_weight",
    "of a model given by name: `policy` of the identity": "model_init_kwargs",
    "of models with routers": "router_aux_loss_coef",
    "part of the tokenizer, whose hash the identity holds": "pad_token",
    "which rows are refused; the data's hash has those that are kept": "allow control_text",
    "stops or reports": "debug"}


def test_every_field_is_tried_or_excused():
    excused = {name for names in NOT_HERE.values() for name in names.split()}
    fields = {f.name for f in dataclasses.fields(DPOConfig)}
    tried = [*MOVES, *RESTS, *RESTS_TOO, *excused]
    assert fields - set(tried) == set() and sorted(tried) == sorted(set(tried) & fields)


@pytest.mark.parametrize("group", ["RESTS", "RESTS_TOO"])
def test_what_is_not_in_the_identity_does_not_move_the_weights(group, usual, tmp_path):
    changes = globals()[group]
    found = described(trainer(tmp_path / "all", **changes))
    assert not disagreements(usual[0], found)
    if trained(tmp_path / "all", **changes) == usual[1]: return
    halves = list(changes.items())       # name the culprit
    while len(halves) > 1:
        half = dict(halves[:len(halves) // 2])
        try: same = trained(tmp_path / f"{len(halves)}", **half) == usual[1]
        except ValueError: same = True   # one setting needs another
        halves = halves[len(half):] if same else list(half.items())
    raise AssertionError(f"{halves[0]} moves the weights and is not in the identity")


def change_of(field):
    value = MOVES[field]
    return value if isinstance(value, dict) else {field: value}


def before(field):
    "The same settings without the field itself."
    return {k: v for k, v in change_of(field).items() if k != field}


@pytest.mark.parametrize("field", MOVES)
def test_what_moves_the_weights_is_in_the_identity(field, usual, tmp_path):
    was = described(trainer(tmp_path / "was", **before(field))) if before(field) else usual[0]
    now = described(trainer(tmp_path / "now", **change_of(field)))
    if disagreements(was, now): return
    assert change_of(field) == {field: None} or (
        trained(tmp_path / "a", **before(field)) == trained(tmp_path / "b", **change_of(field)))


NEW = ("lr_scheduler_kwargs", "optim_args", "train_sampling_strategy", "dataloader_drop_last",
       "disable_dropout")


@pytest.mark.parametrize("field", NEW)
def test_it_does_move_them_and_a_run_is_not_continued_with_it(field, tmp_path):
    moved = {trained(tmp_path / f"{k}", **s) for k, s in enumerate((before(field),
                                                                    change_of(field)))}
    assert len(moved) == 2
    saving = dict(save_strategy="steps", save_steps=2)
    trained(tmp_path / "run", **before(field) | saving)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    other = trainer(tmp_path / "run", **change_of(field) | saving)
    with pytest.raises(Refusal, match="cannot be continued") as no:
        other.train(resume_from_checkpoint=True)
    key = {"disable_dropout": "dropout"}.get(field, field)
    assert no.value.code == 6 and key in str(no.value)
    if field == "optim_args": return     # lives in the saved optimizer: never allowed
    # without dropout the policy's own configuration says so as well
    other.allow_change = [key] if key != "dropout" else ["dropout", "policy", "reference"]
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 4


def test_dropout_of_an_adapter_is_part_of_the_contract(tmp_path):
    from peft import LoraConfig, get_peft_model
    def with_lora(out, rate, alpha=4):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, lora_alpha=alpha, lora_dropout=rate, target_modules=["q_proj"])
        return trainer(out, get_peft_model(tiny_model(), lora), disable_dropout=False,
                       save_strategy="steps", save_steps=2)
    first = with_lora(tmp_path, 0.)
    first.train()
    for other in ((.3,), (0., 8)):
        with pytest.raises(Refusal, match="dropout|lora_alpha"):
            with_lora(tmp_path, *other).train(resume_from_checkpoint=True)


def test_a_reference_table_belongs_to_its_checkpoint(tmp_path):
    "Other numbers under the same name, whole in themselves, are not those it was trained against."
    saving = dict(save_strategy="steps", save_steps=2)
    first = trainer(tmp_path, **saving)
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    path, = (tmp_path / "reference").glob("*.safetensors")
    context = first.keeper.table.context
    whole = models.load_table(path, context)
    moved = {k: (a + 1e-9, b) for k, (a, b) in whole.items()}
    models.save_table(path, moved, context)
    with pytest.raises(Refusal, match="reference.table was") as no:
        trainer(tmp_path, **saving).train(resume_from_checkpoint=True)
    assert no.value.code == 6 and len(str(no.value)) < 400
    path.unlink()                        # read again, it is what it was
    trainer(tmp_path, **saving).train(resume_from_checkpoint=True)


def test_a_table_of_another_context_is_read_again(tmp_path):
    a, b = dict(beta=.1), dict(beta=.2)
    models.save_table(tmp_path / "t.safetensors", {"00" * 32: (1., 2.)}, a)
    assert models.load_table(tmp_path / "t.safetensors", a) == {"00" * 32: (1., 2.)}
    assert models.load_table(tmp_path / "t.safetensors", b) == {}
