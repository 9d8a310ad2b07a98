"""`farl.train --profile`: the parts of a FaRL update, and the least time that this machine needs for each.

The floor of a part is what its products would take at the rate of one large product, or its bytes at that of one large
copy, whichever is longer; both rates are measured before the run starts.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from farl.flops import count_flops, forward_flops
from farl.model import FaRL, ModelConfig
from farl_engine.profiler import Profiler, Recording

if TYPE_CHECKING:
    from farl.tokens import VisualTokenizer

# Each has a `part(...)` around it in the loop, the step or the model, but for the last three, which are what is left.
PARTS = {
    "data wait": "waiting for the loader's next batch",
    "copy to device": "handing the batch to the device",
    "masks": "drawing masks, counting them over the processes",
    "visual tokens": "targets of the masked patches by the tokenizer",
    "text tower": "captions to features",
    "image tower": "clean and masked images through the shared blocks",
    "masked blocks": "the masked branch's own blocks",
    "token loss": "visual tokens predicted at the masked patches, and their loss",
    "model": "what is between the towers; both towers as a whole where they are compiled into one graph",
    "contrastive loss": "features normalised, exchanged and compared",
    "gradients": "added to the parameters, sent to the other processes, and autograd between its ops",
    "clipping": "norm of the gradient",
    "optimizer": "AdamW",
    "evaluation": "retrieval on the held-out pairs",
    "checkpoint": "the state copied for writing",
    "other": "figures of the log, votes, the host between the parts",
    "other threads": "copies and decoding that the loader's threads start, where nothing else runs",
    "device idle": "nothing to run: the host was late",
}
_BLOCKS = ("text tower", "image tower", "masked blocks", "token loss")


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches with the dtype of the towers: one large product, one large copy (read + written)."""

    flop_per_second: float
    bytes_per_second: float
    dtype: str


@dataclass(frozen=True)
class Floor:
    """The least that a part has to do in an update on one process."""

    flop: float = 0.0
    bytes: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.flop / ceilings.flop_per_second, self.bytes / ceilings.bytes_per_second)

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.flop + other.flop, self.bytes + other.bytes)


def measure_ceilings(device: torch.device, dtype: torch.dtype, numbers: int, *, seconds: float = 0.4) -> Ceilings:
    """The best rates of a product in `dtype` and of a copy, tried for `seconds` each.

    The copy is of `numbers` floats (within bounds): as many as the model has, so that a cache which holds them all
    speeds it up as well.
    """
    size = 8192 if device.type == "cuda" else 1024
    numbers = min(max(numbers, 1 << 16), 1 << 28)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _best_seconds(lambda: torch.mm(a, b, out=out), device, seconds)
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device, seconds)
    return Ceilings(2 * size**3 / product, 2 * 4 * numbers / copy, str(dtype).removeprefix("torch."))


def _best_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    # Enough of them on a GPU that the host's start of the first one is nothing beside them.
    repeats = 10 if device.type == "cuda" else 1
    best, begun = float("inf"), time.perf_counter()
    call()
    while best == float("inf") or time.perf_counter() - begun < seconds:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


@dataclass(frozen=True)
class Work:
    """What one process does in an update, as far as its floors want to know.

    Attributes:
        pairs: image-text pairs of this process; `global_batch` those of all.
        masked: patches to predict in an image; 0 without the masked branch.
        parameters: trained numbers by part of `PARTS`.
        tokenizer_flop: of the visual tokens of one image; 0 where they are read from a cache, or not known.
    """

    sizes: ModelConfig
    pairs: int
    global_batch: int
    masked: int
    contrast: bool
    parameters: dict[str, int]
    tokenizer_flop: float = 0.0

    def floors(self, caption_tokens: float) -> dict[str, Floor]:
        """By part, forward and backward together; parts without a known floor are left out.

        Recomputed activations, the second pass of micro-batches and padding are no part of it.

        Args:
            caption_tokens: mean length of the captions.
        """
        sizes, trained = self.sizes, sum(self.parameters.values())
        flops = forward_flops(
            sizes, masked=self.masked, caption_tokens=max(1, round(caption_tokens)), contrast=self.contrast
        )
        head = 2 * self.masked * sizes.vision.width * sizes.mim.vocab_size if sizes.mim is not None else 0
        # Pixels need no gradient: the patch embedding takes two products, not three.
        flop = {
            "text tower": 3 * flops.text,
            "image tower": 3 * flops.trunk + 2 * flops.patches,
            "masked blocks": 3 * (flops.mim - head),
            "token loss": 3 * head,
        }
        # Weights are read, and their gradients written.
        found = {
            name: Floor(flop[name] * self.pairs, 2 * 4 * self.parameters.get(name, 0)) for name in _BLOCKS if flop[name]
        }
        if "text tower" in found:
            # Of the token table only some rows are read.
            found["text tower"] += Floor(bytes=-4 * sizes.text.vocab_size * sizes.text.width)
        if self.contrast:
            found["contrastive loss"] = Floor(6 * self.pairs * self.global_batch * sizes.embed_dim)
        if self.tokenizer_flop:
            found["visual tokens"] = Floor(self.tokenizer_flop * self.pairs)
        # The norm reads all gradients; AdamW reads weight, gradient and two moments, and writes all but the gradient.
        found["clipping"] = Floor(bytes=4 * trained)
        found["optimizer"] = Floor(bytes=7 * 4 * trained)
        return found


def work_of(
    model: FaRL, *, pairs: int, global_batch: int, masked: int, contrast: bool, tokenizer: VisualTokenizer | None
) -> Work:
    """The work of training `model`; `tokenizer` makes visual tokens in the step (None: it does not)."""
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = _part_of_parameter(name)
            parameters[part] = parameters.get(part, 0) + parameter.numel()
    masked = masked if model.config.mim is not None else 0
    flop = 0.0
    if tokenizer is not None and masked:
        side = tokenizer.token_image_size or model.config.vision.image_size
        place = next(model.parameters()).device
        image = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=place)
        positions = torch.arange(masked, dtype=torch.int32, device=place)[None]
        flop = float(count_flops(lambda: tokenizer(image, positions)))
    return Work(model.config, pairs, global_batch, masked, contrast, parameters, flop)


def _part_of_parameter(name: str) -> str:
    if not name.startswith("visual."):
        return "text tower"
    if name.startswith("visual.lm_head"):
        return "token loss"
    return "masked blocks" if name.startswith(("visual.lm_", "visual.ln_lm")) else "image tower"


@dataclass(frozen=True)
class Row:
    """One part of the table: seconds an update, and its floor (None: it has none)."""

    part: str
    forward: float
    backward: float
    host: float
    floor: float | None

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Profile:
    """What --profile found: rows in the order of `PARTS`."""

    recording: Recording
    rows: list[Row]
    ceilings: Ceilings
    pairs: int
    device: str
    engine: str

    @property
    def seconds(self) -> float:
        return self.recording.breakdown.seconds

    @property
    def floor(self) -> float:
        """Seconds that all floors take together."""
        return sum(row.floor for row in self.rows if row.floor is not None)

    def as_json(self) -> dict[str, object]:
        """All figures, in seconds an update."""
        found = self.recording
        return {
            "device": self.device,
            "engine": self.engine,
            "pairs_per_process": self.pairs,
            "first_step": found.first_step,
            "updates": found.breakdown.updates,
            "seconds": self.seconds,
            "seconds_without_profiler": found.plain_seconds,
            "floor_seconds": self.floor,
            "ceilings": dataclasses.asdict(self.ceilings),
            "parts": {row.part: dataclasses.asdict(row) for row in self.rows},
            "ops": [dataclasses.asdict(op) for op in found.breakdown.ops],
            "on_device": dataclasses.asdict(found.breakdown.device) if found.breakdown.device else None,
            "notes": found.notes,
        }


def make_profile(recording: Recording, work: Work, ceilings: Ceilings, *, device: str, engine: str) -> Profile:
    """Times and floors side by side."""
    times = recording.breakdown.parts
    floors = work.floors(recording.notes.get("caption tokens", 0.0) / work.pairs)
    if "image tower" not in times and "model" in times:
        # One compiled graph has no ranges inside.
        whole = [floors.pop(name) for name in _BLOCKS if name in floors]
        floors["model"] = sum(whole, Floor())
    rows = []
    for name in sorted(times, key=lambda name: list(PARTS).index(name) if name in PARTS else len(PARTS)):
        floor = floors[name].seconds(ceilings) if name in floors else None
        rows.append(Row(name, times[name].forward, times[name].backward, times[name].host, floor))
    return Profile(recording, rows, ceilings, work.pairs, device, engine)


def run_profiler(
    run_dir: Path,
    work: Work,
    *,
    updates: int,
    device: torch.device,
    bf16: bool,
    engine: str,
    say: Callable[[str], None],
) -> Profiler:
    """What records a run for --profile, and writes trace, table and picture into RUN_DIR/profile."""
    folder = run_dir / "profile"
    ceilings = measure_ceilings(device, torch.bfloat16 if bf16 else torch.float32, sum(work.parameters.values()))
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)

    def report(recording: Recording) -> None:
        from farl.report.profile import draw_profile, profile_table

        profile = make_profile(recording, work, ceilings, device=name, engine=engine)
        (folder / "profile.json").write_text(json.dumps(profile.as_json(), indent=2) + "\n")
        draw_profile(profile, folder / "profile.png")
        table = folder / "profile.md"
        table.write_text(profile_table(profile))
        slower = f", {profile.seconds / profile.floor:.1f} times its floor" if profile.floor else ""
        say(f"profiled {recording.breakdown.updates} updates of {1e3 * profile.seconds:,.1f} ms{slower}: see {table}")

    return Profiler(folder, updates=updates, device=device, report=report, say=say)
