"""Contenders of the whole step and of the image tower: what they compute, what is told of them, which are chosen."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import ceilings, contest, step_contest, step_facts, step_training, test_image_tower, test_step
from bench.contest import NotMeasuredError
from bench.step_contest import Suite
from bench.step_training import PEER, Case, Training, farl, peer
from farl.flops import eliminated_flops, encoder_flops, training_flops
from farl.masking import mask_sizes
from farl.memory import fits, predict_memory
from farl.model import MODELS
from farl.profiling import Ceilings
from farl_kernels.activation.op import QUICK_GELU
from farl_kernels.dispatch import use_backend

MICRO = Case("micro", MODELS["farl-micro"], 6)
needs_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 against float32; the suite itself checks on a GPU"
)


def test_ops_without_triton_get_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUICK_GELU._backends, "triton", QUICK_GELU._backends["reference"])
    before = QUICK_GELU.names
    with step_training.without_triton():
        assert "triton" not in QUICK_GELU.names and QUICK_GELU.names
    assert QUICK_GELU.names == before


def reference(case: Case, micro_batch: int = 0) -> Training:
    return farl(case, lambda: use_backend("reference"), micro_batch=micro_batch)


def assert_same_step(training: Training, truth: Training) -> None:
    exact, exact_grads = truth.checked()
    loss, grads = training.checked()
    assert abs(loss / exact - 1) < 1e-5 and grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, exact_grads[name], rtol=1e-3, atol=1e-5, msg=name)


def plain_peer(case: Case) -> Training:
    pytest.importorskip("open_clip")
    return peer(case, compile_it=False)


@needs_cpu
@pytest.mark.parametrize("make", [farl, plain_peer, lambda case: reference(case, micro_batch=4)])
def test_contenders_compute_the_same_step(make: Callable[[Case], Training]) -> None:
    assert_same_step(make(MICRO), reference(MICRO))


@needs_cpu
def test_timm_computes_the_same_image_tower() -> None:
    pytest.importorskip("timm")
    case = test_image_tower.TowerCase("micro", MICRO.config, 3)
    assert_same_step(test_image_tower.timm(case, compile_it=False), test_image_tower.ours(case, "reference"))


def test_a_step_moves_the_weights() -> None:
    training = farl(MICRO)
    weight = training.model.get_parameter("visual.proj")
    before = weight.detach().clone()
    training()
    assert not torch.equal(before, weight)


def test_passes_alone_move_nothing() -> None:
    training = test_image_tower.ours(test_image_tower.TowerCase("micro", MICRO.config, 3))
    weight = training.model.get_parameter("proj")
    before = weight.detach().clone()
    training()
    assert torch.equal(before, weight) and weight.grad is None


@needs_cpu
def test_dead_work_of_the_peer_is_counted() -> None:
    """Ours takes what it needs; the peer pads captions and computes rows that nobody reads."""
    pytest.importorskip("open_clip")
    config, case = MICRO.config, replace(MICRO, pairs=64)
    assert step_facts.computed_flop(farl, case) == pytest.approx(case.flop, rel=0.03)
    padded = config.text.context_length
    masked = mask_sizes(config.vision.grid)[0]
    rows = eliminated_flops(config, masked=masked, caption_tokens=padded)
    # Its head and its patch embedding are those of the step that needs no more.
    dead = sum(flop for name, flop in rows.items() if name.startswith("last"))
    whole = training_flops(config, masked=masked, caption_tokens=padded) + dead
    assert step_facts.computed_flop(plain_peer, case) == pytest.approx(64 * whole, rel=0.03)


def test_tokens_made_in_the_step_count(monkeypatch: pytest.MonkeyPatch) -> None:
    online = replace(MICRO, online=True, config=replace(MICRO.config, mim=replace(MICRO.config.mim, vocab_size=40)))
    masked = mask_sizes(MICRO.config.vision.grid)[0]
    assert online.flop - replace(online, online=False).flop == 6 * encoder_flops(
        masked=masked, image_size=32, vocab_size=40
    )
    chosen: list[Any] = []
    small = lambda vocab, **sizes: chosen.append((vocab, sizes)) or encoder(vocab, hidden=8, **sizes)
    encoder = step_training.DalleEncoder
    monkeypatch.setattr(step_training, "DalleEncoder", small)
    loss, _ = farl(online).checked()
    assert chosen == [(40, {"token_image_size": 32})] and loss != farl(replace(online, online=False)).checked()[0]


@needs_cpu
def test_memory_of_a_step_is_what_it_allocates() -> None:
    case = replace(MICRO, pairs=64)
    training = farl(case)
    training()
    assert step_facts.step_bytes(training) == pytest.approx(step_facts.predicted_bytes(case), rel=0.1)


def test_a_text_tower_beside_the_image_tower_gives_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that only say who waits for whom."""
    told: list[str] = []

    class Stream:
        def __init__(self, name: str = "text") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("image"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: told.append("text runs") or contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: told.append(f"kept for {stream.name}"))
    assert_same_step(farl(MICRO, text_beside=True), farl(MICRO))
    assert told[:4] == ["text waits for image", "text runs", "text runs", "image waits for text"]
    assert set(told[4:]) == {"kept for image"}


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    enabled = True

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], object], *, rounds: int) -> None:
        begun = step_contest.CLOCK()
        for _ in range(rounds):
            target()
        seconds = (step_contest.CLOCK() - begun) / rounds
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=seconds, iqr=0.0))


@pytest.fixture
def tried() -> list[Case]:
    """Cases for which the absent contender was asked."""
    return []


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tried: list[Case]) -> Suite:
    """Ours, one that is wrong and one that cannot run, with ceilings that need no measuring."""
    top = {"bytes_per_second": 1e9, "flop_per_second": 1e9}
    monkeypatch.setattr(ceilings, "measured", lambda: top)
    monkeypatch.setattr(step_facts, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9, "float32"))
    missing: list[dict[str, str]] = []
    monkeypatch.setattr(step_contest, "NOT_MEASURED", missing)
    monkeypatch.setattr(contest, "NOT_MEASURED", missing)

    def wrong(case: Case) -> Training:
        training = farl(case)
        whole = training.loss
        training.loss = lambda: whole() * 1.01
        return training

    def absent(case: Case) -> Training:
        tried.append(case)
        raise NotMeasuredError("is not installed")

    makers = {"farl": farl, "farl, wrong": wrong, "peer, wrong": wrong, "peer, absent": absent}
    return Suite("step", makers, reference, "pairs_per_second", dict.fromkeys(list(makers)[1:], "farl"), parted=True)


@needs_cpu
def test_a_contest_tells_what_is_right_and_why_others_are_not(suite: Suite, tried: list[Case]) -> None:
    items = [
        types.SimpleNamespace(callspec=types.SimpleNamespace(params={"case": MICRO, "name": name}))
        for name in suite.contenders
    ]
    request: Any = types.SimpleNamespace(session=types.SimpleNamespace(items=[*items, object()]))
    benchmark = Benchmark()
    step_contest.run(suite, benchmark, request, MICRO, "farl")
    info = benchmark.extra_info
    assert info["pairs_per_second"] == 6 / info["seconds"] and info["flop"] == MICRO.flop
    assert info["flop_computed"] == pytest.approx(MICRO.flop, rel=0.1) and info["timed"] == "7 rounds in turns"
    assert info["peak_bytes"] > 0 and info["times_ours"] == [1.0, 1.0, 1.0]
    parts = {part["part"]: part["forward"] + part["backward"] for part in info["parts"]}
    assert {"text tower", "image tower", "token loss", "contrastive loss", "clipping", "optimizer"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(info["parts_seconds"], rel=0.02) and parts["image tower"] > 0
    with pytest.raises(AssertionError, match="relative error of the loss is 0"):
        step_contest.run(suite, Benchmark(), request, MICRO, "farl, wrong")
    for name, reason in (("peer, wrong", "wrong result"), ("peer, absent", "is not installed")):
        with pytest.raises(pytest.skip.Exception, match=reason):
            step_contest.run(suite, Benchmark(), request, MICRO, name)
    assert [left["contender"] for left in step_contest.NOT_MEASURED] == ["farl, wrong", "peer, wrong", "peer, absent"]
    # All in one go, not once a contender.
    assert tried == [MICRO]


@pytest.mark.parametrize("capacity", [24e9, 80e9, 141e9])
def test_batches_on_a_gpu_fit_it(capacity: float) -> None:
    found = test_step.cases(capacity)
    assert len(found) == 7 and {case.model for case in found} == {"farl-b16", "farl-s16", "farl-l16"}
    for case, names in found.items():
        assert fits(predict_memory(case.config, pairs=case.pairs, caption_tokens=17), capacity)
        assert names[0] == "farl" and set(names) <= step_training.CONTENDERS.keys()
        assert (step_training.COMPILED_ENCODER in names) == case.online
    first, *_ = found
    assert first.model == "farl-b16" and f"{PEER}, torch.compile" in found[first]


def test_a_step_of_a_cpu_has_its_compiled_peer_beside_it() -> None:
    for case, names in test_step.cases_on_a_cpu().items():
        assert {"farl", PEER, f"{PEER}, torch.compile"} <= set(names), case
