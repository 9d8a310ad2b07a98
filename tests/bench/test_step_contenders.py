"""The contenders of the whole step: the switch for Triton, and the peer that must compute the same loss."""

from __future__ import annotations

import contextlib

import pytest
import torch

from bench import test_step as suite
from farl.model import MODELS
from farl_kernels.activation.op import QUICK_GELU
from farl_kernels.dispatch import use_backend


def test_ops_without_triton_get_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUICK_GELU._backends, "triton", QUICK_GELU._backends["reference"])
    before = QUICK_GELU.names
    with suite.without_triton():
        assert "triton" not in QUICK_GELU.names and QUICK_GELU.names
    assert QUICK_GELU.names == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 against float32; the suite itself checks on a GPU")
def test_the_peer_computes_the_same_step() -> None:
    pytest.importorskip("open_clip")
    config = MODELS["farl-micro"]
    exact, exact_grads = suite.farl(config, 6, False, lambda: use_backend("reference")).checked()
    for training in (
        suite.farl(config, 6, False, contextlib.nullcontext),
        suite.peer(config, 6, False, compile_it=False),
    ):
        loss, grads = training.checked()
        assert abs(loss / exact - 1) < 1e-5 and grads.keys() == exact_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, exact_grads[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_step_moves_the_weights() -> None:
    training = suite.farl(MODELS["farl-micro"], 4, False, contextlib.nullcontext)
    weight = training.model.get_parameter("visual.proj")
    before = weight.detach().clone()
    training()
    assert not torch.equal(before, weight) and training.flop_per_pair > 0
