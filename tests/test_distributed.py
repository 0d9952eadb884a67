"Two processes against one (T62, T33): the same weights, the same log, every row once, one writer. And the recipes for accelerate launch."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import two_processes
from dpo_literate.checkpoints import load_state, verify
from dpo_literate.models import load_model
from test_trainer import double_softmax, ranked  # noqa: F401

HERE = Path(__file__).parent
RECIPES = sorted((HERE.parent / "benchmarks" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def two(request, tmp_path_factory):
    "Both processes' results, by case."
    folder = tmp_path_factory.mktemp(request.param)
    shards = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_RESHARD_AFTER_FORWARD="true")
    env = {**os.environ, **(shards if request.param == "fsdp2" else {}), "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "two_processes.py"), str(folder), request.param],
                          env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    names = [*two_processes.CASES, *(two_processes.COPIES if request.param == "ddp" else {})]
    return request.param, folder, {n: [torch.load(folder / f"{n}.{r}.pt", weights_only=True) for r in (0, 1)] for n in names}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The same cases in one process, made when asked for."
    folder, found = tmp_path_factory.mktemp("one"), {}
    def of(name):
        if name not in found:
            case = (two_processes.CASES | two_processes.COPIES)[name]
            if name == "ranked":
                with ranked(): found[name] = two_processes.run(folder, name, case, 1)
            else: found[name] = two_processes.run(folder, name, case, 1)
        return found[name]
    return of


def test_two_processes_are_one(two, alone):
    mode, folder, found = two
    for name, (a, b) in found.items():
        one, n = alone(name), (two_processes.CASES | two_processes.COPIES)[name][0]
        assert a["world"] == 2 and one["world"] == 1 and a["kind"].startswith("FSDP" if mode == "fsdp2" else "DistributedDataParallel")
        for mine in (a, b):
            assert max((mine["weights"][k] - v).abs().max().item() for k, v in one["weights"].items()) <= 1e-10, name
            for here, there in zip(mine["log"], one["log"], strict=True):
                gone = {"num_tokens", "tokens_read", "padding_share"} if mode == "fsdp2" or n % 2 else set()   # fillers are read too
                assert all(here[k] == pytest.approx(there[k], abs=1e-10) for k in there if k not in gone), name
            assert all(mine["metrics"][k] == pytest.approx(v, abs=1e-10) for k, v in one["metrics"].items()), name
            assert mine["running"] == pytest.approx(one["running"], abs=1e-10) and bool(one["running"]) == (name in ("bco", "beta_dpo"))
        read = sorted(a["rows"] + b["rows"])
        assert read == sorted(str(i) for i in range(n) for _ in range(2)), name
        assert a["writes"] and not b["writes"]
        assert a["layout"] == b["layout"] == one["layout"]


def test_metrics_of_ones_own_see_every_row_in_its_order(two, tmp_path):
    mode, folder, _ = two
    there = [json.loads((folder / f"told.{r}.json").read_text()) for r in (0, 1)]
    if mode == "fsdp2": assert all("this model is in shards" in said for said in there)
    else:
        one = two_processes.told(tmp_path)
        assert one["rows"] == 10 and all(found == pytest.approx(one, abs=1e-9) for found in there)


def test_all_processes_stop_at_a_bad_row(two):
    mode, folder, _ = two
    said = [json.loads((folder / f"nan.{r}.json").read_text()) for r in (0, 1)]
    if mode != "ddp": pytest.skip("a sharded run reads its reference in shards: no row of a table to spoil")
    assert all(s.startswith("3 step 1") and "not finite" in s for s in said) and "the loss of row" in said[0], said


def test_the_saved_model_is_whole(two, alone):
    _, folder, _ = two
    saved = dict(load_model(folder / "odd" / "model", "float64").named_parameters())
    assert max((saved[k] - v).abs().max().item() for k, v in alone("odd")["weights"].items()) <= 1e-10


@pytest.mark.parametrize("kind", ["full", "tuned"])
def test_a_run_goes_on_to_the_bit(two, kind):
    "Checkpoints of shards too: the same files as one process writes, and the run that goes on from them ends where the other did."
    _, folder, _ = two
    saved = folder / kind / "twice" / "checkpoint-2"
    for found in (torch.load(folder / f"{kind}.{r}.pt", weights_only=True) for r in (0, 1)):
        assert found["steps"] == [2, 4] and all(torch.equal(found["twice"][k], v) for k, v in found["once"].items())
        assert any(not torch.equal(found["half"][k], v) for k, v in found["once"].items())
    if kind == "full": assert all(torch.equal(p, found["half"][k]) for k, p in load_model(saved, "float64").named_parameters())
    verify(saved)
    assert not [p.name for p in saved.iterdir() if p.suffix not in (".json", ".safetensors", ".jinja", ".md")]
    assert load_state(saved, "optimizer")["state"] and load_state(saved, "state")["rng"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_what_accelerate_reads(path, monkeypatch):
    from accelerate.commands.config import load_config_from_file
    from accelerate.utils import DistributedType
    config = load_config_from_file(str(path))
    assert config.distributed_type == {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}[path.stem]
    assert config.num_processes >= 2 and config.mixed_precision == "bf16"
    if path.stem == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin
        for k, v in config.fsdp_config.items(): monkeypatch.setenv(k.upper(), str(v))   # as accelerate launch hands them on
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and not plugin.cpu_ram_efficient_loading


def test_there_are_recipes(): assert [p.stem for p in RECIPES] == ["ddp", "fsdp2", "zero3"]
