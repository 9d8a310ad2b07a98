"""What a training step sends on W GPUs, exactly, and how long it would take, estimated.

`step_collectives` lists every collective call of a step with its bytes: what `tests/integration/test_collectives.py`
counts in real runs. `estimate` puts times to it from planning numbers that nobody has measured on such machines: see
docs/scaling.md.

    python -m farl.scaling farl-b16 --plot scaling.png
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from farl import cli
from farl.flops import forward_flops, training_flops
from farl.initialize import part_of, shared_groups, without_storage
from farl.masking import mask_sizes
from farl.model import MODELS, FaRL, ModelConfig, PackedText
from farl.model.config import sizes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["all_reduce", "all_gather", "all_to_all", "reduce_scatter"]
# What a call runs beside. "nothing": the step waits for it.
Beside = Literal["nothing", "image forward", "the forward pass", "backward", "the next step"]

# DistributedDataParallel's own: the first bucket is small so that the network starts early.
FIRST_BUCKET_BYTES = 2**20
BUCKET_BYTES = 25 * 2**20
PAPER_PAIRS = 62_500 * 5_120


@dataclass(frozen=True)
class Collective:
    """One call: `bytes` is the size of the tensor that a process hands over."""

    what: str
    kind: Kind
    bytes: int
    beside: Beside = "nothing"

    def sent(self, world: int) -> float:
        """Bytes that a process sends on its way round a ring of `world` processes (all_to_all: to the others)."""
        if self.kind == "all_gather":
            return (world - 1) * self.bytes
        return (2 if self.kind == "all_reduce" else 1) * (world - 1) / world * self.bytes


def step_collectives(
    sizes: ModelConfig,
    *,
    world: int,
    pairs: int,
    contrast: bool = True,
    feature_bytes: int = 2,
    sharded: bool = False,
) -> list[Collective]:
    """The collective calls of one step from the third on, log step or not, in order; none for one process.

    In the first step DDP sends all gradients in one call, and before the second one it agrees on the buckets. A sharded
    step is like any other from the first on; those of its calls that are beside others may come in another order.

    Args:
        world: number of processes.
        pairs: image-text pairs a process.
        contrast: False where --contrastive-weight is 0.
        feature_bytes: of one number of a feature, 2 in bf16 and 4 in fp32.
        sharded: with --save-memory shard, and without micro-batches: each gathers the weights anew.
    """
    if world == 1:
        return []
    masked = sizes.mim is not None
    features = pairs * sizes.embed_dim * feature_bytes
    calls = []
    if masked:
        calls.append(Collective("number of masked patches", "all_reduce", 4))
    groups = _shared(sizes, world, contrast=contrast) if sharded else []
    calls += [Collective("weights, forward", "all_gather", group.part, "the forward pass") for group in groups]
    if contrast:
        calls += [
            Collective("shape of the text features", "all_gather", 3 * 8, "image forward"),
            Collective("text features", "all_gather", features, "image forward"),
            # float64: log-sum-exp and largest logit of each text among a process's images.
            Collective("column statistics", "all_to_all", 2 * 8 * world * pairs),
            # float64: weight and log-sum-exp of both directions.
            Collective("row statistics", "all_gather", 3 * 8 * pairs),
            Collective("text gradients", "reduce_scatter", world * features, "backward"),
        ]
    if sharded:
        # What belongs to no block is there from the forward pass, and its gradients go last.
        root, *blocks = groups
        calls += [Collective("weights, backward", "all_gather", group.part, "backward") for group in blocks]
        calls += [Collective("gradients", "reduce_scatter", group.gradients, "backward") for group in (*blocks, root)]
        calls.append(Collective("gradients of vectors", "all_reduce", _whole_gradients(sizes, contrast=contrast)))
        calls.append(Collective("gradient norm", "all_reduce", 4))
    else:
        buckets = bucket_sizes([4 * numbers for numbers in gradient_sizes(sizes, contrast=contrast)])
        calls += [Collective("gradients", "all_reduce", size, "backward") for size in buckets]
    # Three losses, bad samples, two accuracies of the contrast, one of the masked patches.
    figures = 4 + 2 * contrast + masked
    calls.append(Collective("figures of the log", "all_reduce", 4 * figures))
    calls.append(Collective("vote on stopping", "all_reduce", 8, "the next step"))
    return calls


class _Group(NamedTuple):
    """Bytes of weights gathered together: a process's part of them, and all their gradients; padded to equal parts."""

    part: int
    gradients: int


def _shared(sizes: ModelConfig, world: int, *, contrast: bool) -> list[_Group]:
    """What belongs to no block, then each block that a step computes."""
    groups = shared_groups(without_storage(sizes, contrast=contrast))

    def part(parameters: list[Tensor]) -> int:
        return 4 * part_of(parameters, world)

    return [
        _Group(part(parameters), world * part([p for p in parameters if p.requires_grad]))
        for name, parameters in groups.items()
        if name != "whole" and (name == "" or parameters[0].requires_grad)
    ]


def _whole_gradients(sizes: ModelConfig, *, contrast: bool) -> int:
    """Bytes of the gradients of what is not shared out."""
    return sum(
        4 * p.numel() for p in shared_groups(without_storage(sizes, contrast=contrast))["whole"] if p.requires_grad
    )


def bucket_sizes(gradients: Sequence[int]) -> list[int]:
    """Bytes of DDP's buckets from those of the gradients, in the order in which the backward pass makes them.

    A bucket is closed by the gradient that fills it, so it may be larger than its limit.
    """
    buckets, size, limit = [], 0, FIRST_BUCKET_BYTES
    for gradient in gradients:
        size += gradient
        if size >= limit:
            buckets.append(size)
            size, limit = 0, BUCKET_BYTES
    return [*buckets, size] if size else buckets


@functools.cache
def gradient_sizes(sizes: ModelConfig, *, contrast: bool = True) -> tuple[int, ...]:
    """Numbers in each trained parameter, in the order in which the backward pass finishes their gradients.

    The order is that of a model of the same depth and next to no width on the CPU. The fused ops of a GPU may swap
    neighbours, which can move a boundary between buckets, not their sum.
    """
    thin = replace(
        sizes,
        embed_dim=2,
        vision=replace(sizes.vision, image_size=2, patch_size=1, width=2, heads=1),
        text=replace(sizes.text, width=2, heads=1, vocab_size=4),
        mim=None if sizes.mim is None else replace(sizes.mim, vocab_size=4),
    )
    model, order = FaRL(thin), []
    if not contrast:
        model.train_masked_branch_alone()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    branch = {}
    if sizes.mim is not None:
        position = torch.zeros(1, 1, dtype=torch.int64)
        mask = torch.tensor([[True, False, False, False]])
        branch = {"mask": mask, "masked_positions": position, "targets": position}
    text = PackedText(torch.tensor([1, 3]), torch.tensor([0, 2], dtype=torch.int32), 2) if contrast else None
    output = model(torch.zeros(1, 3, 2, 2), text, **branch)
    parts: list[Tensor | None] = [output.mim_loss_sum]
    if contrast:
        parts += [output.image_features, output.text_features, output.logit_scale]
    torch.stack([part.sum() for part in parts if part is not None]).sum().backward()
    shapes = dict(without_storage(sizes).named_parameters())
    return tuple(shapes[name].numel() for name in order)


@dataclass(frozen=True)
class Machine:
    """Planning numbers of a cluster of H200s. Rates are a GPU's, in FLOP/s, bytes/s and pairs/s; times in seconds.

    None of them was measured on such a cluster; docs/scaling.md says where each comes from.
    """

    gpus_per_node: int = 8
    # The target, 75 % of the 790 TFLOP/s of a large bf16 product.
    flops: float = 0.75 * 790e12
    nvlink: float = 350e9
    infiniband: float = 45e9
    peer_latency: float = 1e-6
    loader: float = 5_000.0
    # Standard deviation of a GPU's time for a step, of that time.
    jitter: float = 0.01
    failure_hours: float = 50_000.0
    restart: float = 420.0
    copy_to_host: float = 10e9


@dataclass(frozen=True)
class Protocol:
    """One way in which NCCL runs a collective: times in seconds, `bandwidth` a share of the link's."""

    tree: bool
    start: float
    nvlink_hop: float
    network_hop: float
    bandwidth: float


# The constants of NCCL's own model (src/graph/tuning.cc): the protocols LL and Simple, on a ring and on a tree.
PROTOCOLS = (
    Protocol(tree=False, start=3.6e-6, nvlink_hop=0.85e-6, network_hop=2.7e-6, bandwidth=1 / 4),
    Protocol(tree=False, start=8.4e-6, nvlink_hop=3.4e-6, network_hop=9.6e-6, bandwidth=1.0),
    Protocol(tree=True, start=4.4e-6, nvlink_hop=0.94e-6, network_hop=5.0e-6, bandwidth=0.9 / 3.8),
    Protocol(tree=True, start=0.0, nvlink_hop=28e-6, network_hop=50e-6, bandwidth=0.9),
)


def collective_seconds(call: Collective, world: int, machine: Machine) -> float:
    """Estimated time of a call by itself: the fastest of NCCL's ways, as its own model has them.

    A ring leaves a node by all its network adapters; all_to_all goes by each GPU's own.
    """
    local = min(world, machine.gpus_per_node)
    nodes = math.ceil(world / machine.gpus_per_node)
    if call.kind == "all_to_all":
        abroad = call.bytes * (world - local) / world / machine.infiniband
        return PROTOCOLS[1].start + world * machine.peer_latency + call.bytes / machine.nvlink + abroad
    link = machine.nvlink if nodes == 1 else min(machine.nvlink, local * machine.infiniband)
    rounds = 2 if call.kind == "all_reduce" else 1

    def seconds(way: Protocol) -> float:
        if way.tree:
            hops = (local - 1) * way.nvlink_hop + math.log2(nodes) * way.network_hop
        else:
            hops = (world - nodes) * way.nvlink_hop + (nodes - 1) * way.network_hop
        return way.start + rounds * hops + call.sent(world) / (link * way.bandwidth)

    return min(seconds(way) for way in PROTOCOLS if call.kind == "all_reduce" or not way.tree)


@dataclass(frozen=True)
class Estimate:
    """Estimated times of a step, in seconds. `exchange`, `gradients` and `agreement` (counts and figures) are the parts
    of communication that nothing hides, `loader` and `stragglers` waiting; `lost` is the share of all time that saving
    and failures take with a checkpoint every `checkpoint_every` seconds."""

    world: int
    pairs: int
    compute: float
    exchange: float
    gradients: float
    agreement: float
    loader: float
    stragglers: float
    lost: float
    checkpoint_every: float

    @property
    def step(self) -> float:
        parts = (self.compute, self.exchange, self.gradients, self.agreement, self.loader, self.stragglers)
        return sum(parts)

    @property
    def pairs_per_second(self) -> float:
        """Of all GPUs, failures included."""
        return self.world * self.pairs / self.step * (1 - self.lost)


def estimate(sizes: ModelConfig, *, world: int, pairs: int, machine: Machine = Machine()) -> Estimate:
    """Estimated times of a step of `pairs` pairs on each of `world` GPUs, in bf16, with cached visual tokens."""
    masked, _ = mask_sizes(sizes.vision.grid)
    forward = forward_flops(sizes, masked=masked)
    # The loss computes its logits once more in the backward pass: 8 instead of 6 FLOP a number of a feature.
    loss = pairs * 8 * world * pairs * sizes.embed_dim / machine.flops
    compute = pairs * training_flops(sizes, masked=masked) / machine.flops + loss
    image_forward = pairs * forward.image / machine.flops

    calls = step_collectives(sizes, world=world, pairs=pairs)
    seconds = [(call, collective_seconds(call, world, machine)) for call in calls]
    gather = sum(time for call, time in seconds if call.beside == "image forward")
    exposed = sum(time for call, time in seconds if call.what in ("column statistics", "row statistics"))
    agreement = sum(time for call, time in seconds if call.beside == "nothing") - exposed
    behind = [time for call, time in seconds if call.beside == "backward"]
    # The last bucket, with the token table in it, is full when the backward pass is over.
    gradients = max(behind[-1], sum(behind) - 2 / 3 * compute) if behind else 0.0
    exchange = max(0.0, gather - image_forward) + exposed

    step = compute + exchange + gradients + agreement
    loader = max(0.0, pairs / machine.loader - step)
    # Expected largest of `world` normal times (Blom 1958): everybody waits for the slowest.
    slowest = NormalDist().inv_cdf((world - 0.375) / (world + 0.25)) if world > 1 else 0.0
    stragglers = slowest * machine.jitter * compute

    # Master weights and two moments; the interval is Young's (1974), the first order of Daly's (2006).
    state = 12 * sum(gradient_sizes(sizes))
    pause, between = state / machine.copy_to_host, machine.failure_hours * 3600 / world
    interval = math.sqrt(2 * pause * between)
    lost = pause / interval + (interval / 2 + machine.restart) / between
    return Estimate(
        world, pairs, compute, exchange, gradients, agreement, loader, stragglers, lost, checkpoint_every=interval
    )


def efficiency(several: Estimate, alone: Estimate) -> float:
    """Pairs/s a GPU against that of `alone`, one GPU."""
    return several.pairs_per_second / several.world / alone.pairs_per_second


WORLDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
# Pairs a GPU; ViT-B/16's makes the paper's 5,120 on one node.
PAIRS = dict.fromkeys(("farl-micro", "farl-tiny", "farl-s16", "farl-b16"), 640) | {"farl-l16": 256, "farl-h14": 256}
LARGE_BATCH = 32_768
# Mean size of a picture of LAION-Face with its caption.
PAIR_BYTES = 40e3


def weak_scaling(name: str, pairs: int) -> list[Estimate]:
    """`pairs` a GPU whatever their number: the batch grows."""
    return [estimate(MODELS[name], world=world, pairs=pairs) for world in WORLDS]


def strong_scaling(name: str, pairs: int, global_batch: int = LARGE_BATCH) -> list[Estimate]:
    """One batch divided among the GPUs, from where a GPU's share is no more than `pairs`."""
    worlds = [world for world in WORLDS if global_batch <= world * pairs]
    return [estimate(MODELS[name], world=world, pairs=global_batch // world) for world in worlds]


def table(found: Sequence[Estimate], alone: Estimate) -> str:
    """Estimates as a Markdown table; efficiency is against `alone`."""
    head = ["GPUs", "pairs a GPU", "global batch", "step, ms", "compute", "exchange", "gradients", "counts"]
    head += ["stragglers", "lost to failures", "checkpoint every", "pairs/s", "shards read", "efficiency"]
    head += ["320 M pairs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for one in found:
        times = (one.step, one.compute, one.exchange, one.gradients, one.agreement, one.stragglers)
        rate = one.pairs_per_second
        cells = [f"{one.world:,}", f"{one.pairs:,}", f"{one.world * one.pairs:,}"]
        cells += [f"{1e3 * time:.1f}" for time in times]
        cells += [f"{one.lost:.2%}", f"{one.checkpoint_every / 60:.0f} min", f"{rate:,.0f}"]
        cells += [f"{rate * PAIR_BYTES / 1e9:.1f} GB/s", f"{efficiency(one, alone):.1%}"]
        cells += [f"{PAPER_PAIRS / rate / 60:,.0f} min"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def collectives_table(name: str, world: int, pairs: int) -> str:
    """The calls of a step, calls of one thing together, as a Markdown table."""
    lines = ["| what | call | calls | bytes handed over | beside |", "|---|---|---:|---:|---|"]
    calls = step_collectives(MODELS[name], world=world, pairs=pairs)
    for what in dict.fromkeys(call.what for call in calls):
        same = [call for call in calls if call.what == what]
        size = sum(call.bytes for call in same)
        lines.append(f"| {what} | {same[0].kind} | {len(same)} | {size:,} | {same[0].beside} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class ScalingOptions:
    model: Annotated[Positional[str], arg(metavar="MODEL")] = "farl-b16"
    """Sizes of the model, as for farl.train."""
    pairs: int = 0
    """Pairs a GPU; 0: 640 up to farl-b16, 256 for larger models."""
    plot: str = ""
    """Also draw ViT-B/16 and ViT-L/16 to this PNG file."""


def main(argv: list[str] | None = None) -> None:
    options = cli.parse(
        ScalingOptions,
        argv,
        prog="farl.scaling",
        description="Collective calls of a training step, and estimates of its time on many GPUs.",
    )
    sizes_of(options.model)
    if options.pairs < 0:
        raise ValueError(f"--pairs is {options.pairs}; it must be 0 or more")
    name, pairs = options.model, options.pairs or PAIRS[options.model]
    weak = weak_scaling(name, pairs)
    print(f"Calls of a step of {name} on 8 GPUs with {pairs} pairs each: exact.\n")
    print(collectives_table(name, 8, pairs))
    print(f"\nTimes of {name}: ESTIMATES from planning numbers, not measured.\n")
    print(f"{pairs} pairs a GPU:\n\n{table(weak, weak[0])}")
    print(f"\n{LARGE_BATCH:,} pairs in all:\n\n{table(strong_scaling(name, pairs), weak[0])}")
    if options.plot:
        print(f"\n{draw(Path(options.plot))}")


def draw(path: Path) -> Path:
    """A PNG of the estimates for ViT-B/16 and ViT-L/16: efficiency, what a step loses, and time for the paper's run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    from farl.report import style

    models = {"farl-b16": ("ViT-B/16", style.BLUE), "farl-l16": ("ViT-L/16", style.ORANGE)}
    with style.look():
        figure = Figure(figsize=(13, 4.6), layout="constrained")
        figure.suptitle(
            "Estimates from planning numbers, not measured", x=0.005, ha="left", fontsize=10, color=style.MUTED
        )
        rate, loss, hours = figure.subplots(1, 3)
        for name, (label, color) in models.items():
            weak, strong = weak_scaling(name, PAIRS[name]), strong_scaling(name, PAIRS[name])
            for found, line, what in (
                (weak, "-", f"{PAIRS[name]} pairs a GPU"),
                (strong, "--", f"{LARGE_BATCH:,} pairs in all"),
            ):
                worlds = [one.world for one in found]
                named = f"{label}, {what}"
                rate.plot(
                    worlds, [efficiency(one, weak[0]) for one in found], line, color=color, marker=".", label=named
                )
                time = [PAPER_PAIRS / one.pairs_per_second / 3600 for one in found]
                hours.plot(worlds, time, line, color=color, marker=".", label=named)
        rate.set(title="Efficiency a GPU, one GPU = 100 %", ylim=(0.4, 1.02))
        rate.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        hours.set(title="Hours for the 320 M pairs of 62,500 x 5,120", yscale="log")
        hours.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axes in (rate, hours):
            axes.set_xscale("log", base=2)
            axes.set_xticks(WORLDS, [f"{world:,}" for world in WORLDS], fontsize=8)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("GPUs, 8 a node")
        rate.legend(loc="lower left")
        _draw_losses(loss, models)
        return style.save(figure, path)


def _draw_losses(axes: Axes, models: dict[str, tuple[str, str]]) -> None:
    """Stacked bars: what a step takes beyond one GPU's, for both models side by side."""
    from farl.report import style

    parts: dict[str, tuple[str, Callable[[Estimate, Estimate], float]]] = {
        "waiting for the slowest GPU": (style.ORANGE, lambda one, _: one.stragglers),
        "logits of a larger batch": (style.VIOLET, lambda one, alone: one.compute - alone.compute),
        "exchange of the contrastive loss": (style.BLUE, lambda one, _: one.exchange),
        "gradients not hidden": (style.GREEN, lambda one, _: one.gradients),
        "counts and figures": (style.MUTED, lambda one, _: one.agreement),
        "failures and checkpoints": (style.RED, lambda one, _: one.step * one.lost),
    }
    worlds, width = (8, 64, 256, 1024), 0.36
    for shift, name in zip((-0.2, 0.2), models, strict=True):
        alone, *_ = weak = weak_scaling(name, PAIRS[name])
        found = [one for one in weak if one.world in worlds]
        places = [place + shift for place in range(len(worlds))]
        bottom = [0.0] * len(worlds)
        for what, (color, seconds) in parts.items():
            heights = [100 * seconds(one, alone) / alone.step for one in found]
            label = what if shift < 0 else None
            axes.bar(places, heights, width, bottom, color=color, label=label, edgecolor=style.PAPER, linewidth=0.5)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for place, top in zip(places, bottom, strict=True):
            axes.text(
                place, top + 0.1, models[name][0].removeprefix("ViT-"), ha="center", fontsize=8, color=style.MUTED
            )
    axes.set_xticks(range(len(worlds)), [f"{world:,}" for world in worlds])
    axes.grid(axis="x", visible=False)
    axes.set(title="What a step takes more than on one GPU, %", xlabel="GPUs, 640 (B/16) and 256 (L/16) pairs each")
    axes.legend(loc="upper left", reverse=True)


if __name__ == "__main__":
    cli.run(main, "farl.scaling")
