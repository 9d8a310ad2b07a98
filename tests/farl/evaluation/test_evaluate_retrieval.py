"""Retrieval from shards: what is left out, what is restored, when it stops, and that ranks do not change it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from farl.evaluation import evaluate_retrieval, extract_features
from farl.evaluation.features import spread_positions
from farl.model import MODELS, FaRL
from farl.tokenizer import pack
from farl_engine.data import ShardIndex, ShardWriter

WORDS = ("red", "green", "blue", "pale", "dark", "warm", "cold")


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40, 36)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_pairs(folder: Path, count: int = 53) -> ShardIndex:
    """Pairs with repeated captions, among them two images that are none."""
    with ShardWriter(folder / "faces-%02d.tar", samples_per_shard=20) as writer:
        for i in range(count):
            image = b"<html>" if i in (11, 30) else jpeg(i)
            caption = f"a {WORDS[i % 7]} face" + (" again" if i % 3 else "")
            writer.write(f"{i:05d}", {"jpg": image, "txt": caption.upper() if i % 2 else caption})
    return ShardIndex.build(folder / "faces-*.tar", cache=False)


def make_model() -> FaRL:
    torch.manual_seed(0)
    return FaRL(MODELS["farl-micro"])


def figures_of_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    index = ShardIndex.build(Path(folder) / "faces-*.tar", cache=False)
    asked = torch.zeros(1)

    def should_stop() -> bool:
        # Collective: it hangs unless all ranks ask equally often.
        votes = torch.ones(1)
        dist.all_reduce(votes)
        asked.add_(1)
        return False

    figures = evaluate_retrieval(
        make_model(), index, pack, "cpu", rank=rank, world_size=world_size, should_stop=should_stop, batch_size=8
    )
    torch.save({"figures": figures, "asked": int(asked)}, f"{folder}/figures-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    index = write_pairs(tmp_path)
    model = make_model().train()
    alone = evaluate_retrieval(model, index, pack, "cpu", batch_size=8)
    assert alone is not None
    assert model.training
    assert (alone["pairs"], alone["distinct_captions"], alone["bad"]) == (51, 14, {"not_an_image": 2})

    context = mp.spawn(figures_of_rank, args=(2, str(tmp_path)), nprocs=2, join=False)
    while not context.join(timeout=60):
        pass
    for rank in range(2):
        result: dict[str, Any] = torch.load(tmp_path / f"figures-{rank}.pt", weights_only=True)
        assert result["figures"] == alone
        assert result["asked"] == 5  # 7 batches over 2 ranks, and once more before the features are gathered


def test_figures_match_features_taken_one_by_one(tmp_path: Path) -> None:
    """Order of the pairs, normalisation and pairing: as the model gives them for single pairs."""
    index = write_pairs(tmp_path, 20)
    model = make_model()
    together = extract_features(model, index, device="cpu", tokenizer=pack, batch_size=7, threads=3)
    assert together is not None and together.text is not None
    assert together.positions.tolist() == [i for i in range(20) if i != 11]
    for row in (0, 6, 12, 18):
        position = together.positions[row : row + 1]
        single = extract_features(model, index, device="cpu", positions=position, tokenizer=pack)
        assert single is not None and single.text is not None
        torch.testing.assert_close(single.image[0], together.image[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(single.text[0], together.text[row], atol=1e-5, rtol=1e-5)


def test_stops_between_batches_when_told(tmp_path: Path) -> None:
    index = write_pairs(tmp_path)
    answers = iter([False, False, True])
    assert evaluate_retrieval(make_model(), index, pack, "cpu", batch_size=8, should_stop=lambda: next(answers)) is None


def test_a_limit_takes_pairs_at_equal_distances(tmp_path: Path) -> None:
    assert spread_positions(10, None).tolist() == list(range(10))
    assert spread_positions(10, 4).tolist() == [0, 2, 5, 7]
    assert spread_positions(3, 4).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="max_pairs is 0"):
        spread_positions(3, 0)
    figures = evaluate_retrieval(make_model(), write_pairs(tmp_path), pack, "cpu", max_pairs=10)
    assert figures is not None and figures["pairs"] == 10
