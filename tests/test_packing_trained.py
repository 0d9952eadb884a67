"""Packed is padded after training too, to float64's rounding, once the norm is taken in float64:
transformers takes RMSNorm, and Gemma's softmax, in float32 whatever the model's type."""
import types

import pytest
import torch
import transformers

from dpo_literate.models import tiny_model
from dpo_literate.rows import tiny_tokenizer
from dpo_literate.settings import DPOConfig
from dpo_literate.trainer import DPOTrainer

PAIRS = [dict(prompt=f"dish {k} " + "and the dog " * (k % 3),
              chosen="the answer is yes " * (1 + k % 4), rejected="the answer is no, and why")
         for k in range(12)]


def in_float64(model, monkeypatch):
    "Norms by their formula, and a softmax in the type of its input."
    for m in model.modules():
        if not type(m).__name__.endswith("RMSNorm"): continue
        one = float("Gemma" in type(m).__name__)
        eps = getattr(m, "variance_epsilon", getattr(m, "eps", None))
        def forward(self, x, one=one, eps=eps):
            return (one + self.weight) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        m.forward = types.MethodType(forward, m)
    real = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax",
                        lambda x, dim=-1, dtype=None: real(x, dim=dim))
    return model


def trained(out, model, layout):
    transformers.logging.set_verbosity_error()
    args = DPOConfig(str(out), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
                     max_steps=10, per_device_train_batch_size=4, learning_rate=1e-3,
                     save_strategy="no", logging_steps=1, layout=layout)
    t = DPOTrainer(model, args=args, train_dataset=PAIRS, processing_class=tiny_tokenizer())
    t.remove_callback(transformers.PrinterCallback)
    t.train()
    assert t.step.layout.kind == layout, t.step.layout.why_padded
    losses = torch.tensor([h["loss"] for h in t.state.log_history if "loss" in h])
    return torch.cat([p.detach().flatten() for p in t.model.parameters()]), losses


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_packed_is_padded_after_training(kind, tmp_path, monkeypatch):
    def gaps(make):
        packed, padded = (trained(tmp_path / layout, make(), layout)
                          for layout in ("packed", "padded"))
        return [(a - b).abs().max().item() for a, b in zip(packed, padded)]
    weights, loss = gaps(lambda: tiny_model(kind))
    assert weights < 1e-3 and loss < 1e-4            # float32 rounding, steps of 1e-3
    weights, loss = gaps(lambda: in_float64(tiny_model(kind), monkeypatch))
    # Gemma's norms behind each layer leave some weights a gradient of rounding alone, and
    # Adam makes steps of that; the loss does not see them
    near = 1e-6 if kind == "gemma2" else 1e-11
    assert weights < near and loss < 1e-12, (weights, loss)
