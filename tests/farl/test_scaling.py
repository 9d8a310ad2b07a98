"""The model of a step on many GPUs: its counts against DDP's own arithmetic, its estimates against limits.

That real runs make the same calls is in tests/integration/test_collectives.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from farl import scaling
from farl.model import MODELS, FaRL
from farl.scaling import Collective, Machine, bucket_sizes, collective_seconds, estimate, gradient_sizes

DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize("name", ["farl-micro", "farl-b16"])
def test_buckets_are_those_of_ddp(name: str) -> None:
    gradients = [torch.empty(numbers) for numbers in gradient_sizes(MODELS[name])]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # DDP's bucket_cap_mb
    groups, _ = dist._compute_bucket_assignment_by_size(gradients, limits)
    assert bucket_sizes([x.nbytes for x in gradients]) == [sum(gradients[i].nbytes for i in group) for group in groups]


@pytest.mark.parametrize("mim", [True, False])
def test_every_parameter_is_in_one_gradient(mim: bool) -> None:
    config = MODELS["farl-tiny"] if mim else replace(MODELS["farl-tiny"], mim=None)
    with torch.device("meta"):
        parameters = list(FaRL(config).parameters())
    assert sorted(gradient_sizes(config)) == sorted(parameter.numel() for parameter in parameters)
    # The token table comes last, and nothing hides its bucket.
    assert gradient_sizes(config)[-1] == config.text.vocab_size * config.text.width


def test_a_ring_sends_what_it_must() -> None:
    """Simulated: each of W processes passes one of W parts on at every turn."""
    world, size = 4, 4 * 96
    turns = {"reduce_scatter": world - 1, "all_reduce": 2 * (world - 1), "all_to_all": world - 1}
    for kind, count in turns.items():
        assert Collective("", kind, size).sent(world) == count * size / world  # type: ignore[arg-type]
    assert Collective("", "all_gather", size).sent(world) == (world - 1) * size


def test_one_gpu_loses_nothing() -> None:
    alone = estimate(MODELS["farl-b16"], world=1, pairs=8)
    assert alone.step == alone.compute and alone.lost < 1e-3
    assert scaling.step_collectives(MODELS["farl-micro"], world=1, pairs=8) == []


def test_without_latency_failures_and_jitter_what_is_left_is_bandwidth() -> None:
    ideal = Machine(nvlink=1e30, infiniband=1e30, jitter=0.0, peer_latency=0.0, failure_hours=1e30)
    found = estimate(MODELS["farl-b16"], world=64, pairs=640, machine=ideal)
    latency = sum(
        collective_seconds(call, 64, ideal)
        for call in scaling.step_collectives(MODELS["farl-b16"], world=64, pairs=640)
    )
    assert found.compute < found.step < found.compute + latency
    # A network a thousand times slower hides behind nothing: all bytes are seen.
    slow = Machine(nvlink=350e6, infiniband=45e6)
    sent = sum(call.sent(64) for call in scaling.step_collectives(MODELS["farl-b16"], world=64, pairs=640))
    assert estimate(MODELS["farl-b16"], world=64, pairs=640, machine=slow).step > sent / 350e6 > found.step


def test_more_gpus_never_gain_efficiency_and_a_starved_loader_sets_the_pace() -> None:
    weak = scaling.weak_scaling("farl-l16", 256)
    kept = [scaling.efficiency(one, weak[0]) for one in weak]
    assert kept == sorted(kept, reverse=True) and kept[0] == 1.0
    starved = estimate(MODELS["farl-b16"], world=8, pairs=640, machine=Machine(loader=1_000.0, jitter=0.0))
    assert starved.step == pytest.approx(0.64)


def test_the_interval_between_checkpoints_is_the_best() -> None:
    found = estimate(MODELS["farl-b16"], world=256, pairs=640)
    machine = Machine()
    pause = 12 * sum(gradient_sizes(MODELS["farl-b16"])) / machine.copy_to_host
    between = machine.failure_hours * 3600 / 256

    def lost(interval: float) -> float:
        return pause / interval + (interval / 2 + machine.restart) / between

    assert found.lost == pytest.approx(lost(found.checkpoint_every))
    assert all(lost(factor * found.checkpoint_every) > found.lost for factor in (0.9, 1.1))


def test_the_slowest_of_many() -> None:
    """Blom's approximation against the mean of drawn maxima."""
    drawn = torch.randn(4_000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).amax(1).mean()
    found = estimate(MODELS["farl-micro"], world=64, pairs=8, machine=Machine(jitter=1.0))
    assert found.stragglers / found.compute == pytest.approx(float(drawn), rel=0.02)


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS.read_text()
    for name in ("farl-b16", "farl-l16"):
        scaling.main([name])
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(rows) > 20
        assert [row for row in rows if row not in page] == []


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    assert scaling.draw(tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["farl-x"], "use one of farl-micro"), (["farl-micro", "--pairs", "-1"], "--pairs is -1; it must be 0 or more")],
)
def test_wrong_options_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scaling.main(words)
