"""A step in bfloat16 with float32 parameters and no autocast: dtypes at its borders, and how exact its gradients are.

Eager bfloat16 is the measure: the plain reference of each op under autocast, against float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import farl.step
from farl.model import MODELS, FaRL, MimConfig, ModelConfig, TextConfig, VisionConfig
from farl.step import TrainStep, pack_parts
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_kernels import use_backend

PAIRS = 8
CPU = torch.device("cpu")
DEEPER = ModelConfig(
    embed_dim=64,
    vision=VisionConfig(image_size=64, patch_size=16, width=96, layers=8, heads=3),
    text=TextConfig(width=96, layers=4, heads=3),
    mim=MimConfig(layers=2, vocab_size=64),
)
CONFIGS = {"micro": MODELS["farl-micro"], "deeper": DEEPER}


class GivenTokens:
    """The batches bring their visual tokens."""

    vocab_size = 16
    token_image_size = None

    def __call__(self, *_: object) -> Tensor:
        raise AssertionError


def batch_of(config: ModelConfig, seed: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side, patches = config.vision.image_size, config.vision.num_patches
    captions = [
        ("a face", "a woman with glasses", "an old man outdoors")[i % 3] + f", number {i}" for i in range(PAIRS)
    ]
    return Batch(
        step=0,
        ids=torch.arange(PAIRS) + seed * PAIRS,
        used_ids=torch.arange(PAIRS),
        views=torch.zeros(PAIRS, dtype=torch.int64),
        images=torch.randint(0, 256, (PAIRS, side, side, 3), dtype=torch.uint8, generator=generator),
        token_images=None,
        captions=[],
        text=pack_parts(captions, 0),
        visual_tokens=torch.randint(0, 16, (PAIRS, patches), generator=generator).to(torch.int32),
    ).to(device)


def model_of(config: ModelConfig, device: torch.device = CPU) -> FaRL:
    torch.manual_seed(0)
    return FaRL(config).to(device)


def step_of(model: FaRL, device: torch.device = CPU, **options: Any) -> TrainStep:
    world = World(rank=0, size=1, device=device, control=None)
    return TrainStep(model, world, GivenTokens(), mim_weight=1.0, mask_ratio=0.4, seed=1, **options)


def gradients(step: TrainStep, model: FaRL, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    step(batch)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def relative_errors(got: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of each parameter over all batches together: that of a single number in one batch is luck."""

    def norm(name: str, of: Callable[[Tensor, Tensor], Tensor]) -> float:
        pairs = zip(got, truth, strict=True)
        return sum(float(of(a[name].double(), b[name].double()).square().sum()) for a, b in pairs) ** 0.5

    return {name: norm(name, lambda a, b: a - b) / norm(name, lambda _, b: b) for name in truth[0]}


def check_gradients(config: ModelConfig, device: torch.device, batches: int) -> None:
    """Each parameter's gradient is at most twice as far from the truth as eager bfloat16's own is."""
    model = model_of(config, device)
    exact = copy.deepcopy(model).double()
    truth, eager, found = [], [], []
    for seed in range(batches):
        batch = batch_of(config, seed, device)
        with use_backend("reference"):
            truth.append(gradients(step_of(exact, device, bf16=False), exact, batch))
            with torch.autocast(device.type, torch.bfloat16):
                eager.append(gradients(step_of(model, device, bf16=False), model, batch))
        found.append(gradients(step_of(model, device, bf16=True), model, batch))
    assert all(gradient.dtype == torch.float32 for some in found for gradient in some.values())
    errors, allowed = relative_errors(found, truth), relative_errors(eager, truth)
    assert min(allowed.values()) > 1e-4, "eager is not in bfloat16"
    assert not {name: (error, allowed[name]) for name, error in errors.items() if error > 2 * allowed[name]}


@pytest.mark.parametrize("name", ["micro", pytest.param("deeper", marks=pytest.mark.slow)])
def test_gradients_are_as_exact_as_those_of_eager_bfloat16(name: str) -> None:
    check_gradients(CONFIGS[name], CPU, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_as_exact_as_those_of_eager_bfloat16_on_a_gpu(name: str) -> None:
    check_gradients(CONFIGS[name], torch.device("cuda"), 16)


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_products_and_features_are_bfloat16_without_autocast(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And beside them what is wider: parameters, the captions' residual stream, losses."""
    model = model_of(MODELS["farl-micro"])
    dtypes: dict[str, set[torch.dtype]] = {}

    def see(what: str, *tensors: Tensor) -> None:
        assert not torch.is_autocast_enabled("cpu")
        dtypes.setdefault(what, set()).update(x.dtype for x in tensors)

    def watch(tower: str, block: Any) -> None:
        def hook(_: object, inputs: Any, output: Any) -> None:
            see(tower, inputs[0].x, output[0])
            see(f"{tower} residual", output[1])

        block.ln_2.register_forward_hook(hook)

    for block in model.visual.transformer.resblocks:
        watch("image", block)
    for block in model.transformer.resblocks:
        watch("text", block)
    unit, loss = farl.step._unit, farl.step.contrastive_loss
    monkeypatch.setattr(farl.step, "_unit", lambda features: (see("features", features), unit(features))[1])
    monkeypatch.setattr(
        farl.step, "contrastive_loss", lambda *args, **options: (see("contrast", args[0]), loss(*args, **options))[1]
    )
    figures = step_of(model, bf16=True, engine=engine)(batch_of(MODELS["farl-micro"], 0, CPU))
    wide = dtypes.pop("text residual")
    assert wide == {torch.float32} and set(dtypes) == {"image", "image residual", "text", "features", "contrast"}
    assert set.union(*dtypes.values()) == {torch.bfloat16}
    assert figures["loss"].dtype == figures["loss_mim"].dtype == torch.float32
    # What else uses the model, such as an evaluation, computes as it likes.
    assert model.compute_dtype is None


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_recomputed_activations_are_those_of_the_first_time(micro_batch: int) -> None:
    """The backward pass runs after the forward pass's dtype is forgotten."""
    config = MODELS["farl-micro"]
    model, batch = model_of(config), batch_of(config, 0, CPU)
    captions = [f"a face, number {i}" for i in range(PAIRS)]
    batch.text = pack_parts(captions, micro_batch)
    kept = gradients(step_of(model, bf16=True), model, batch)
    again = model_of(config)
    again.checkpoint_activations = True
    recomputed = gradients(step_of(again, bf16=True), again, batch)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_a_model_s_own_compute_dtype_is_kept() -> None:
    """A training loop of one's own sets it once."""
    model, pixels = model_of(MODELS["farl-micro"]), torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert model.compute_dtype is None and model.encode_image(pixels).dtype == torch.float32
    model.compute_dtype = torch.bfloat16
    step_of(model, bf16=False)(batch_of(MODELS["farl-micro"], 0, CPU))
    assert model.compute_dtype == torch.bfloat16
    assert model.encode_image(pixels).dtype == torch.bfloat16
    assert model.encode_text(torch.tensor([[1, 49407]])).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.slow
def test_compiled_it_gives_what_eager_gives() -> None:
    config = MODELS["farl-micro"]
    batch = batch_of(config, 0, CPU)
    results = []
    for engine in ("eager", "compile"):
        model = model_of(config)
        step = step_of(model, bf16=True, engine=engine)
        if engine == "compile":
            torch._dynamo.reset()
            model.compile(backend="aot_eager", fullgraph=True)  # the same graph, without minutes of a C++ compiler
        results.append(gradients(step, model, batch))
    assert max(relative_errors([results[1]], [results[0]]).values()) < 0.02
