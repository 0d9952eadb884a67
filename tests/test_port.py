"""The contract with `transformers.Trainer`: the private names the port overrides and the ones it reads exist,
and take what they are called with, in the installed version and in the recorded ones (the lowest and the newest).

    python tests/test_port.py     add the installed version to tests/port_contract.json
"""
import ast
import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path

import pytest
import transformers
from transformers import Trainer

RECORD = Path(__file__).parent / "port_contract.json"
# what the port and its functions read or call of a Trainer, beside its public methods
BORROWED = ("_get_output_dir", "_push_from_checkpoint")
ATTRIBUTES = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
PUBLIC = ("train", "evaluate", "evaluation_loop", "training_step", "get_batch_samples", "log", "save_model",
          "create_model_card", "floating_point_ops", "store_flos", "add_callback", "pop_callback")


def overrides():
    "The private methods of `Trainer` that the port replaces."
    from dpo_literate.port import TransformersPort
    return sorted(n for n in vars(TransformersPort) if n.startswith("_") and not n.startswith("__") and hasattr(Trainer, n))


def contract():
    "Signatures of what is overridden or called, and which attributes the loop sets."
    names = [*overrides(), *BORROWED, *PUBLIC]
    source = inspect.getsource(Trainer)
    return dict(signatures={n: str(inspect.signature(getattr(Trainer, n))) for n in names if hasattr(Trainer, n)},
                attributes=[a for a in ATTRIBUTES if f"self.{a}" in source],
                calls={n: source.count(f"self.{n}(") for n in overrides()})


def parameters(signature):
    "Names of a recorded signature, annotations and defaults left aside."
    function = ast.parse(f"def f{signature.partition(' ->')[0] if ')' in signature else signature}: pass".replace("<", "'").replace(">", "'")).body[0]
    return [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]


def accepts(ours, theirs):
    "Can our method be called with every parameter of theirs?"
    kinds = [p.kind for p in ours.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds: return True
    if inspect.Parameter.VAR_KEYWORD in kinds: return True   # create_model_card: Trainer calls it by name
    return list(ours)[:len(theirs)] == theirs


@pytest.fixture(params=["installed", *json.loads(RECORD.read_text())])
def found(request): return contract() if request.param == "installed" else json.loads(RECORD.read_text())[request.param]


def test_every_borrowed_name_is_there(found):
    assert set(overrides()) | set(BORROWED) | set(PUBLIC) == set(found["signatures"]) and found["attributes"] == list(ATTRIBUTES)
    assert all(found["calls"][n] > 0 for n in overrides() if n not in ("_get_train_sampler",)), "Trainer no longer calls a method that the port overrides"


def test_our_methods_take_what_they_are_called_with(found):
    from dpo_literate.trainer import PreferenceTrainer
    for name, signature in found["signatures"].items():
        ours = inspect.signature(getattr(PreferenceTrainer, name)).parameters
        assert accepts(ours, parameters(signature)), (name, signature, list(ours))


def test_the_record_spans_the_allowed_versions():
    from configparser import ConfigParser
    settings = ConfigParser(); settings.read(RECORD.parents[1] / "settings.ini")
    lowest = next(r.partition(">=")[2] for r in settings["DEFAULT"]["requirements"].split() if r.startswith("transformers"))
    versions = sorted(json.loads(RECORD.read_text()), key=lambda v: tuple(map(int, v.split("."))))
    assert versions[0].startswith(lowest) and tuple(map(int, versions[-1].split("."))) >= tuple(map(int, transformers.__version__.split(".")[:3]))


def test_one_class_holds_the_private_overrides():
    "At most nine, all in the port; no class of ours deeper than three; no attribute written in two classes."
    from dpo_literate.port import TransformersPort
    from dpo_literate.trainer import DPOTrainer
    modules = [importlib.import_module(f"dpo_literate.{m}") for m in ("trainer", "trl", "reward_model", "gw_dpo")]
    ours = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and issubclass(c, TransformersPort)]
    def private(c): return {n for n in vars(c) if n.startswith("_") and not n.startswith("__") and hasattr(Trainer, n)}
    assert len(private(TransformersPort)) <= 9 and not any(private(c) for c in ours if c is not TransformersPort)
    assert all(sum(b.__module__.startswith("dpo_literate") for b in c.__mro__[1:]) <= 3 for c in ours)
    def written(c):
        tree = ast.parse(inspect.getsource(c))
        return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
                and getattr(n.value, "id", "") == "self"}
    chain = [c for c in DPOTrainer.__mro__ if c.__module__.startswith("dpo_literate")]
    seen = [a for c in chain for a in written(c)]
    assert len(seen) == len(set(seen)), sorted(a for a in set(seen) if seen.count(a) > 1)


def test_no_class_of_ours_is_deeper_than_three():
    "Any class of the package, not only the trainers."
    import dpo_literate
    names = [m.name for m in pkgutil.walk_packages(dpo_literate.__path__, "dpo_literate.") if not m.name.rpartition(".")[2].startswith("_")]
    classes = {c for n in names for c in vars(importlib.import_module(n)).values() if inspect.isclass(c) and c.__module__.startswith("dpo_literate")}
    deep = {c for c in classes if sum(b.__module__.startswith("dpo_literate") for b in c.__mro__[1:]) > 3}
    assert len(classes) > 100 and not deep


def test_no_function_writes_what_a_trainer_keeps():
    "An attribute of the trainer is written in its class, or it is one of the three that `Trainer`'s own loop keeps."
    for name in ("trainer", "port", "monitor"):
        tree = ast.parse(inspect.getsource(importlib.import_module(f"dpo_literate.{name}")))
        found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and getattr(n.value, "id", "") == "trainer"}
        assert found <= set(ATTRIBUTES), (name, found)


def test_help_is_short():
    "`help(DPOTrainer)`: what is ours fits in 150 lines."
    from dpo_literate.trainer import DPOTrainer
    chain = [c for c in DPOTrainer.__mro__ if c.__module__.startswith("dpo_literate")]
    lines = [line for c in chain for n, v in vars(c).items() if callable(v) and (not n.startswith("_") or n == "__init__")
             for line in [n, *(inspect.getdoc(v) or "").splitlines()]]
    assert len(lines) < 150


if __name__ == "__main__":
    sys.path.insert(0, str(RECORD.parents[1]))
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known[transformers.__version__] = contract()
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
