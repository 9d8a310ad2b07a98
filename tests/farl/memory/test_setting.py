"""The batch and the settings that are predicted to fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from farl.config import TrainConfig
from farl.memory import (
    GB,
    MARGIN,
    choose_micro_batch,
    choose_setting,
    fits,
    largest_batch,
    memory_warning,
    predict_memory,
)
from farl.memory.__main__ import main
from farl.model import MODELS

MICRO = MODELS["farl-micro"]
TINY = MODELS["farl-tiny"]
CONFIG = TrainConfig(run_dir="runs/x", data="x", model="farl-tiny", steps=10, warmup=1, global_batch=512)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    capacity = 10 * GB
    for again in (False, True):
        pairs = largest_batch(TINY, capacity, checkpoint_activations=again)
        assert fits(predict_memory(TINY, pairs=pairs, checkpoint_activations=again), capacity)
        assert not fits(predict_memory(TINY, pairs=pairs + 1, checkpoint_activations=again), capacity)
    assert largest_batch(TINY, 1e6) == 0


def test_a_prediction_that_fits_leaves_the_margin() -> None:
    memory = predict_memory(TINY, pairs=8)
    assert fits(memory, memory.peak / (1 - MARGIN) + 1)
    assert not fits(memory, memory.peak)


def test_the_policy_keeps_then_splits_then_recomputes() -> None:
    whole, one = predict_memory(TINY, pairs=512).peak, predict_memory(TINY, pairs=1, global_batch=512).peak
    kept_all = choose_setting(TINY, 1.1 * whole, global_batch=512)
    assert kept_all is not None and kept_all.options == "--micro-batch 0"
    split = choose_setting(TINY, 0.6 * whole, global_batch=512)
    assert split is not None and 0 < split.micro_batch < 512 and not split.save_memory
    assert fits(split.memory, 0.6 * whole)
    assert choose_setting(TINY, 0.9 * one, global_batch=512) is None


def test_blocks_are_computed_again_where_single_pairs_do_not_fit_otherwise() -> None:
    # Images so large that their activations outweigh the weights.
    huge = replace(MICRO, vision=replace(MICRO.vision, image_size=1024, layers=12))
    capacity = predict_memory(huge, pairs=1, global_batch=4).peak
    found = choose_setting(huge, capacity, global_batch=4)
    assert found is not None and found.options == f"--micro-batch {found.micro_batch} --save-memory recompute"


def test_micro_batches_are_equal_parts_of_a_process_s_share() -> None:
    capacity = predict_memory(TINY, pairs=120, global_batch=1024, world_size=2).peak / (1 - MARGIN)
    found = choose_micro_batch(TINY, capacity, global_batch=1024, world_size=2)
    assert found is not None and found.micro_batch == 103  # 512 in five parts


def test_a_run_that_fits_gets_no_warning() -> None:
    assert memory_warning(CONFIG, TINY, world_size=1, bf16=True, capacity=80 * GB) is None


@pytest.mark.parametrize("micro_batch", [0, 400])
def test_a_run_that_does_not_fit_is_told_the_micro_batch_that_does(micro_batch: int) -> None:
    config = replace(CONFIG, micro_batch=micro_batch)
    line = memory_warning(config, TINY, world_size=1, bf16=True, capacity=1.2 * GB)
    assert line is not None and "\n" not in line
    advised = int(line.split("--micro-batch ")[1].split()[0])
    assert "--save-memory" not in line
    assert (
        memory_warning(replace(config, micro_batch=advised), TINY, world_size=1, bf16=True, capacity=1.2 * GB) is None
    )


def test_a_run_that_can_never_fit_is_told_so() -> None:
    line = memory_warning(CONFIG, TINY, world_size=1, bf16=True, capacity=1e6)
    assert line is not None and "smaller --model" in line


def test_sharing_out_is_advised_where_the_state_alone_is_too_much() -> None:
    sizes, capacity = MODELS["farl-h14"], 16 * GB
    found = choose_setting(sizes, capacity, global_batch=64, world_size=8)
    assert found is not None and found.save_memory == "shard"
    config = replace(CONFIG, model="farl-h14", global_batch=64)
    line = memory_warning(config, sizes, world_size=8, bf16=True, capacity=capacity)
    assert line is not None and f"{found.options} would take" in line
    assert choose_setting(sizes, capacity, global_batch=64) is None


def test_the_command_names_the_options_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    main(["farl-micro", "--gpu-memory", "80", "--world-size", "8", "--global-batch", "5120"])
    printed = capsys.readouterr().out
    assert "ESTIMATES" in printed and "--global-batch 5120 --micro-batch 0" in printed and "optimizer step" in printed
    with pytest.raises(ValueError, match="no model 'x'"):
        main(["x"])
    with pytest.raises(ValueError, match=r"--gpu-memory is 0\.0"):
        main(["--gpu-memory", "0"])
