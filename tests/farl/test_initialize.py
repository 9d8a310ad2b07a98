"""What a run starts from: --init in every layout, the masked branch kept or drawn, and mistakes in one line."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from farl.config import TrainConfig
from farl.export import export_model
from farl.initialize import build_model, build_optimizer, check_sources, fit_codebook, visual_tokenizer
from farl.model import MODELS, FaRL, load_pretrained
from farl.resume import snapshot
from farl.tokens import DalleEncoder, PatchCodebook
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import ShardIndex, ShardWriter
from farl_engine.distributed import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"), control=None)
MICRO = MODELS["farl-micro"]
MIM = ("visual.mask_token", "visual.lm_transformer.", "visual.ln_lm.", "visual.lm_head.")
HEAD = ("visual.lm_head.",)
DALLE = "dalle:encoder.safetensors"


class Tokens:
    """Stands for a visual tokenizer, of which building a model needs the number of tokens alone."""

    token_image_size = None

    def __init__(self, vocab_size: int = 16) -> None:
        self.vocab_size = vocab_size

    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def settings(**options: Any) -> TrainConfig:
    return replace(TrainConfig(run_dir="run", data="data", model="farl-micro"), **options)


@pytest.fixture(scope="module")
def given() -> FaRL:
    """Weights that a seed of 0 does not draw, biases included."""
    torch.manual_seed(5)
    model = FaRL(MICRO)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(given: FaRL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a run folder, in FaRL's layout, and in CLIP's."""
    folder = tmp_path_factory.mktemp("weights")
    state = {"model": given.state_dict(), "model_config": given.config.to_dict(), "optimizer": {"state": {}}}
    CheckpointStore(folder / "run" / "checkpoints").save(7, state)
    export_model(given, folder / "farl.safetensors", "openai-clip")
    torch.save({"state_dict": given.state_dict(), "epoch": 16}, folder / "farl.pth")
    export_model(given, folder / "clip.pt", "openai-clip", drop_mim=True)
    return folder


def split(model: FaRL, given: FaRL) -> tuple[set[str], set[str]]:
    """Names of parameters that are as given, and of the others."""
    state, wanted = model.state_dict(), given.state_dict()
    same = {name for name, value in state.items() if name in wanted and torch.equal(value, wanted[name])}
    return same, state.keys() - same


@pytest.mark.parametrize("source", ["run", "farl.safetensors", "farl.pth"])
def test_weights_with_the_masked_branch(source: str, given: FaRL, folder: Path) -> None:
    config = settings(init=str(folder / source), visual_tokens=DALLE)
    model = build_model(config, Tokens(), None)
    assert model.config == MICRO
    assert split(model, given) == (given.state_dict().keys(), set())


@pytest.mark.parametrize("source", ["run", "farl.safetensors"])
@pytest.mark.parametrize("options", [{"visual_tokens": "codebook"}, {"visual_tokens": DALLE, "vocab_size": 20}])
def test_the_head_is_drawn_anew_for_other_tokens(
    options: dict[str, Any], source: str, given: FaRL, folder: Path
) -> None:
    tokens = Tokens(options.get("vocab_size", 16))
    config = settings(init=str(folder / source), visual_tokens=options["visual_tokens"])
    model = build_model(config, tokens, None)
    assert model.visual.lm_head.out_features == tokens.vocab_size
    same, drawn = split(model, given)
    assert drawn == {name for name in model.state_dict() if name.startswith(HEAD)} and same
    # The same on every rank: from the seed alone.
    torch.rand(3)
    again = build_model(config, tokens, None)
    assert torch.equal(again.visual.lm_head.weight, model.visual.lm_head.weight)


def test_weights_without_the_masked_branch_get_one(given: FaRL, folder: Path) -> None:
    model = build_model(settings(init=str(folder / "clip.pt")), Tokens(), None)
    same, drawn = split(model, given)
    assert drawn == {name for name in model.state_dict() if name.startswith(MIM)}
    assert same == {name for name in model.state_dict() if not name.startswith(MIM)}
    # CLIP's LayerNorm goes with CLIP's weights.
    assert model.config == replace(MICRO, layer_norm_cast="after")


@pytest.mark.parametrize("source", ["run", "clip.pt"])
def test_contrast_alone_has_no_masked_branch(source: str, given: FaRL, folder: Path) -> None:
    model = build_model(settings(init=str(folder / source), mim_weight=0.0), None, None)
    assert model.config.mim is None
    assert split(model, given)[1] == set()


def test_the_masked_branch_alone_trains_nothing_else(given: FaRL, folder: Path) -> None:
    config = settings(init=str(folder / "run"), visual_tokens=DALLE, contrastive_weight=0.0)
    saved = {"model": given.state_dict(), "model_config": given.config.to_dict()}
    for model in (build_model(config, Tokens(), None), build_model(config, Tokens(), saved)):
        assert split(model, given)[1] == set()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        left = {name for name in given.state_dict() if not name.startswith("visual.")}
        left |= {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
        assert trained == given.state_dict().keys() - left
        groups = build_optimizer(config, model, None).param_groups
        assert sum(len(group["params"]) for group in groups) == len(trained)


def test_a_run_of_the_masked_branch_alone_starts_others(tmp_path: Path) -> None:
    config = settings(contrastive_weight=0.0)
    before = build_model(config, Tokens(), None)
    state = snapshot(1, config, before, build_optimizer(config, before, None), None, write_faces(tmp_path, 1))
    CheckpointStore(tmp_path / "checkpoints").save(1, state)
    for model in (load_pretrained(tmp_path), build_model(settings(init=str(tmp_path)), Tokens(), None)):
        same, drawn = split(model, before)
        assert {name for name in drawn if not name.startswith(HEAD)} == set() and same
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_a_run_folder_says_of_its_model_is_kept(tmp_path: Path) -> None:
    config = replace(MICRO, activation="gelu", layer_norm_cast="after")
    state = {"model": FaRL(config).state_dict(), "model_config": config.to_dict()}
    CheckpointStore(tmp_path / "checkpoints").save(1, state)
    assert build_model(settings(init=str(tmp_path)), Tokens(), None).config == config


def test_a_checkpoint_comes_before_init(given: FaRL) -> None:
    saved = {"model": given.state_dict(), "model_config": given.config.to_dict()}
    model = build_model(settings(init="gone.pt"), Tokens(), saved)
    assert split(model, given)[1] == set()


def test_new_weights_come_from_the_seed() -> None:
    one, same, other = (build_model(settings(seed=seed), Tokens(), None) for seed in (3, 3, 4))
    assert split(one, same)[1] == set()
    assert "visual.proj" in split(one, other)[1]


def test_other_sizes_name_the_model_that_fits(folder: Path, tmp_path: Path) -> None:
    config = settings(model="farl-tiny", init=str(folder / "clip.pt"))
    with pytest.raises(ValueError, match=r"holds other sizes than --model farl-tiny: use --model farl-micro$"):
        build_model(config, Tokens(), None)
    sizes = replace(MICRO, embed_dim=24)
    export_model(FaRL(sizes), tmp_path / "other.pt", "openai-clip")
    with pytest.raises(ValueError, match=r"it fits none of farl-micro, farl-tiny, "):
        build_model(settings(init=str(tmp_path / "other.pt")), Tokens(), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "farl-b61"}, "--model is 'farl-b61'; use one of farl-micro, "),
        ({"run_dir": __file__}, "is a file: name a folder"),
        ({"init": "gone.pt"}, "--init names gone.pt, which does not exist"),
        ({"visual_tokens": "dalle:gone.safetensors"}, "--visual-tokens names gone.safetensors, which does not exist"),
    ],
)
def test_wrong_names_are_found_before_the_shards_are_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sources(settings(**options), None)


def test_names_that_are_not_used_need_not_exist() -> None:
    check_sources(settings(), None)
    check_sources(settings(visual_tokens="dalle:gone.safetensors", mim_weight=0.0), None)
    check_sources(settings(init="gone.pt"), {"step": 3})


def write_faces(folder: Path, count: int) -> ShardIndex:
    generator = np.random.default_rng(0)
    with ShardWriter(folder / "faces-%02d.tar", samples_per_shard=100) as writer:
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.write(f"{number:03d}", {"png": buffer.getvalue(), "txt": "a face"})
    return ShardIndex.build(folder)


def test_a_codebook_is_fitted_once_and_then_comes_from_the_checkpoint(tmp_path: Path) -> None:
    index = write_faces(tmp_path, 5)
    fitted = visual_tokenizer(settings(), index, WORLD, None)
    assert isinstance(fitted, PatchCodebook) and fitted.vocab_size == 16 and fitted.patch_size == 8
    saved = {"visual_tokens": fitted.state_dict()}
    resumed = visual_tokenizer(settings(seed=9), index, WORLD, saved)
    assert isinstance(resumed, PatchCodebook)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in fitted.state_dict().items())
    assert visual_tokenizer(settings(mim_weight=0.0), index, WORLD, saved) is None


def test_an_encoder_is_loaded_for_the_grid_of_the_model(tmp_path: Path) -> None:
    encoder = DalleEncoder(20, hidden=8, blocks_per_group=1)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    config = settings(visual_tokens=f"dalle:{tmp_path / 'encoder.safetensors'}")
    loaded = visual_tokenizer(config, write_faces(tmp_path, 1), WORLD, None)
    assert loaded is not None and (loaded.vocab_size, loaded.token_image_size) == (20, 32)
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(loaded(images), encoder(images)) and loaded(images).shape == (2, MICRO.vision.num_patches)
    mim = build_model(config, loaded, None).config.mim
    assert mim is not None and mim.vocab_size == 20


def test_too_few_images_for_a_codebook_are_said_so(tmp_path: Path) -> None:
    index = write_faces(tmp_path, 3)
    message = r"3 readable images in --data have 192 patches, fewer than farl-tiny has visual tokens \(512\): give"
    with pytest.raises(ValueError, match=message):
        fit_codebook(settings(model="farl-tiny"), index, WORLD)
