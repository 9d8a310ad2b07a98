"""A profile of FaRL's own step: its parts, their floors, and the files for people."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from farl.flops import forward_flops, training_flops
from farl.model import MODELS, FaRL
from farl.profiling import PARTS, Ceilings, Work, make_profile, measure_ceilings, run_profiler, work_of
from farl.step import TrainStep, pack_parts
from farl_engine.data import Batch
from farl_engine.distributed import World
from farl_engine.profiler import Profiler, Recording, part
from farl_engine.trace import Breakdown, PartTime

PAIRS, MASKED, UPDATES = 8, 6, 2
SIZES = MODELS["farl-micro"]
CPU = torch.device("cpu")
CEILINGS = Ceilings(1e9, 1e8, "float32")
CAPTIONS = [f"a smiling face, number {i}" for i in range(PAIRS)]


class MeanTokens:
    """A stand-in tokenizer that takes one product."""

    vocab_size = 16
    token_image_size = None

    def __call__(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        assert positions is not None
        pixels = images.flatten(1).float()
        level = (pixels @ torch.ones(pixels.shape[1], 1)).long() % 16
        return level.expand(positions.shape).masked_fill(positions < 0, -1)


def work(*, contrast: bool = True, mim: bool = True) -> Work:
    torch.manual_seed(0)
    model = FaRL(SIZES if mim else replace(SIZES, mim=None))
    if not contrast:
        model.train_masked_branch_alone()
    return work_of(
        model,
        pairs=PAIRS,
        global_batch=4 * PAIRS,
        masked=MASKED if mim else 0,
        contrast=contrast,
        tokenizer=MeanTokens() if mim else None,
    )


@pytest.mark.parametrize(("contrast", "mim"), [(True, True), (True, False), (False, True)])
def test_floors_hold_the_products_of_the_cost_model(contrast: bool, mim: bool) -> None:
    found = work(contrast=contrast, mim=mim)
    floors = found.floors(caption_tokens=10)
    tokenizer = floors.pop("visual tokens").flop if mim else 0
    sizes = SIZES if mim else replace(SIZES, mim=None)
    wanted = training_flops(
        sizes, masked=MASKED, caption_tokens=10, contrast=contrast, global_batch=4 * PAIRS if contrast else 0
    )
    assert sum(floor.flop for floor in floors.values()) == pytest.approx(PAIRS * wanted)
    image = SIZES.vision.image_size
    assert tokenizer == (PAIRS * 2 * 3 * image**2 if mim else 0)
    names = {"image tower", "clipping", "optimizer"}
    names |= {"text tower", "contrastive loss"} if contrast else set()
    names |= {"masked blocks", "token loss"} if mim else set()
    assert floors.keys() == names


def test_floors_hold_the_bytes_of_weights_and_optimizer() -> None:
    found = work()
    floors = found.floors(caption_tokens=10)
    numbers = sum(parameter.numel() for parameter in FaRL(SIZES).parameters())
    table = SIZES.text.vocab_size * SIZES.text.width
    assert sum(found.parameters.values()) == numbers
    assert floors["optimizer"].bytes == 28 * numbers and floors["clipping"].bytes == 4 * numbers
    towers = sum(floors[name].bytes for name in ("text tower", "image tower", "masked blocks", "token loss"))
    assert towers == 8 * numbers - 4 * table
    assert SIZES.mim is not None
    assert found.parameters["token loss"] == (SIZES.vision.width + 1) * SIZES.mim.vocab_size
    floor = floors["optimizer"]
    assert floor.seconds(CEILINGS) == floor.bytes / 1e8
    assert floors["image tower"].seconds(CEILINGS) == floors["image tower"].flop / 1e9


def breakdown(*names: str) -> Recording:
    parts = {name: PartTime(0.01, 0.02, 0.03) for name in names}
    return Recording(Path("trace.json.gz"), 5, 0.0, Breakdown(3, 0.1, parts, [], None), {"caption tokens": 80.0})


def test_a_compiled_model_has_one_floor() -> None:
    ceilings = Ceilings(1e9, 1e12, "float32")
    apart = make_profile(breakdown("image tower", "text tower", "model"), work(), ceilings, device="", engine="fused")
    whole = make_profile(breakdown("optimizer", "model"), work(), ceilings, device="", engine="compile")
    assert [row.part for row in whole.rows] == ["model", "optimizer"]
    assert apart.rows[-1].part == "model" and apart.rows[-1].floor is None
    flop = 3 * sum(forward_flops(SIZES, masked=MASKED, caption_tokens=10)) * PAIRS
    assert whole.rows[0].floor == pytest.approx(flop / 1e9, rel=0.05)


def test_ceilings_are_those_of_a_machine() -> None:
    found = measure_ceilings(CPU, torch.float32, 1 << 20, seconds=0.05)
    assert 1e8 < found.flop_per_second < 1e14 and 1e8 < found.bytes_per_second < 1e13
    assert found.dtype == "float32"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a profiled run of the real step with a stand-in for the loop, and what the user was told."""
    run_dir, said = tmp_path_factory.mktemp("run"), []
    torch.manual_seed(0)
    model = FaRL(SIZES)
    step = TrainStep(
        model,
        World(rank=0, size=1, device=CPU, control=None),
        MeanTokens(),
        mim_weight=1.0,
        mask_ratio=MASKED / 16,
        seed=1,
        bf16=False,
    )
    images = torch.randint(0, 256, (PAIRS, 32, 32, 3), dtype=torch.uint8)
    ids, views = torch.arange(PAIRS), torch.zeros(PAIRS, dtype=torch.int64)
    batch = Batch(
        step=0,
        ids=ids,
        used_ids=ids,
        views=views,
        images=images,
        token_images=None,
        captions=CAPTIONS,
        text=pack_parts(CAPTIONS, 0),
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    options = {"updates": UPDATES, "device": CPU, "bf16": False, "engine": "fused", "say": said.append}
    with run_profiler(run_dir, work(), **options) as profiler:
        for number in range(Profiler.WARM_UP + UPDATES + 1):
            profiler.begin(number)
            step(batch)
            with part("clipping"):
                nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            with part("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
    return run_dir / "profile", said


def test_each_part_of_the_real_step_has_its_time_and_floor(files: tuple[Path, list[str]]) -> None:
    folder, _ = files
    found = json.loads((folder / "profile.json").read_text())
    parts = found["parts"]
    with_backward = {"text tower", "image tower", "masked blocks", "contrastive loss"}
    with_floor = {*with_backward, "token loss", "visual tokens", "clipping", "optimizer"}
    assert parts.keys() == {*with_floor, "masks", "model", "gradients", "other"}
    assert parts.keys() <= PARTS.keys()
    times = {name: row["forward"] + row["backward"] for name, row in parts.items()}
    assert sum(times.values()) == pytest.approx(found["seconds"], rel=0.05)
    for name, row in parts.items():
        assert row["forward"] > 0, name
        assert (row["floor"] is not None) == (name in with_floor), name
        if name in with_backward:
            assert row["backward"] > 0, name
        if name in with_floor:
            assert 0 < row["floor"] < times[name], name
    # The towers are what is left to do: little is between the parts.
    assert times["image tower"] > times["model"]
    assert found["notes"] == {"caption tokens": len(pack_parts(CAPTIONS, 0).parts[0].tokens)}
    assert found["updates"] == UPDATES and found["on_device"] is None


def test_the_page_and_the_picture_are_for_people(files: tuple[Path, list[str]]) -> None:
    folder, said = files
    assert sorted(path.name for path in folder.iterdir()) == [
        "profile.json",
        "profile.md",
        "profile.png",
        "trace.json.gz",
    ]
    page = (folder / "profile.md").read_text()
    for name in ("image tower", "optimizer", "**update**"):
        assert f"\n| {name} |" in page
    assert "times its floor" in page and "![" in page and "`aten::" in page and "100.0%" in page
    assert (folder / "profile.png").read_bytes()[:4] == b"\x89PNG"
    assert len(said) == 1 and said[0].startswith("profiled 2 updates of ") and "profile.md" in said[0]
