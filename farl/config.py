"""Settings of a pre-training run: one flat dataclass, and presets as plain functions that return it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from farl.masking import MASK_RATIO


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train FaRL on image-text shards: contrast and masked image modelling in one step.

    The same --run-dir resumes from its latest checkpoint by itself. Start with torchrun, or with plain python for one
    process.
    """

    run_dir: str
    """Folder of the run: config.json, metrics.jsonl, checkpoints/ and report/."""
    data: str
    """Training shards: paths, globs, braces like 'faces-{000000..000099}.tar' or URLs, in quotes, with spaces between.
    A weight before each, as in '3=a/*.tar 1=b/*.tar', mixes them in these proportions."""
    eval_data: str = ""
    """Held-out shards for retrieval during the run; none if empty. A preset's own go with its own --data alone."""
    shard_cache: str = ""
    """Folder on a local disk for copies of remote shards, DIR or DIR:SIZE such as /scratch/farl:500GB."""

    model: str = "farl-b16"
    """Sizes of the model: farl-tiny, farl-micro, farl-s16, farl-b16, farl-l16 or farl-h14."""
    init: str = ""
    """Run folder, checkpoint or released weights (CLIP or FaRL layout) to start from; random if empty."""
    visual_tokens: str = "codebook"
    """Targets of the masked patches: "codebook" (fitted on the run's own data), "dalle:FILE.safetensors", or
    "cache:DIR" of farl.data tokenize."""
    mim_weight: float = 1.0
    """Weight of the masked-image loss; 0 turns the masked branch off."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss; 0 trains masked image modelling alone and leaves the text tower as it is."""
    mask_ratio: float = MASK_RATIO
    """Largest share of patches to mask (block-wise sampling may mask fewer)."""
    crop_scale: float = 0.9
    """Smallest share of the image's area that a random crop takes."""
    face_boxes: str = ""
    """File of `farl.data laion faces` for this data: crops then keep the face; none if empty."""

    steps: int = 62_500
    """Length of the schedule, in updates."""
    stop_at: int = 0
    """Save and leave after this many updates without changing the schedule; 0 runs to the end."""
    global_batch: int = 5120
    """Pairs an update, over all processes."""
    micro_batch: int = 0
    """Pairs a process holds in memory at once; smaller than its share means two passes with exact gradients. 0: all."""
    seed: int = 0
    """Seed of weights, sample order, crops and masks."""

    lr: float = 1e-3
    """Peak learning rate."""
    lr_final: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup: int = 2_000
    """Updates of linear warm-up."""
    weight_decay: float = 0.05
    """AdamW's weight decay on matrices, the token table among them; vectors and position embeddings have none."""
    beta2: float = 0.98
    """AdamW's second beta."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: str = "auto"
    """Arithmetic of the towers: fp32, bf16, or auto (bf16 on a GPU, fp32 on a CPU). Weights stay fp32."""
    engine: str = "fused"
    """How the same step is computed: fused (the fastest op for each machine), graph (the same, recorded once and
    replayed, on one GPU; not yet tried on any), or plain ops, eager or through torch.compile, to compare it with; their
    memory grows with the square of a process's caption tokens."""
    save_memory: str = ""
    """Ways to need less memory, with commas between: "recompute" (activations of each block, in the backward pass),
    "shard" (weights, gradients and optimizer states shared out over the processes by FSDP2; DDP without it)."""

    device: str = "auto"
    """cpu, cuda, or auto."""
    decoder: str = "auto"
    """Decoder of JPEGs: dali, cpu, or auto (DALI on a GPU where it is installed). The samples are the same."""
    threads: int = 2
    """Loader threads a process, which read and decode, and DALI's own; 0 makes batches between the steps."""
    max_bad_fraction: float = 0.05
    """Stop when more than this share of samples is broken."""
    timeout: float = 300.0
    """Seconds a process waits for another one, or for a batch, before it gives up."""

    log_every: int = 50
    """Updates between two lines of the log."""
    eval_every: int = 2_000
    """Updates between two evaluations on --eval-data, and one at the end; 0 for none."""
    save_every: int = 1_000
    """Updates between two checkpoints; 0 for none."""
    save_minutes: float = 30.0
    """Minutes between two checkpoints; 0 for none."""
    keep_last: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    allow_mismatch: bool = False
    """Resume although the data, the global batch or the seed differ from the checkpoint's."""
    profile: int = 0
    """Record this many updates, after the first five, and write trace and times by part to RUN_DIR/profile; 0: none."""
    trackers: str = ""
    """Also log to "tensorboard", "wandb:PROJECT", or both with a comma between."""

    def __post_init__(self) -> None:
        positive = {"steps", "global_batch", "lr", "log_every", "timeout"}
        not_negative = {
            *("stop_at", "micro_batch", "lr_final", "warmup", "weight_decay", "clip_grad", "threads", "eval_every"),
            *("save_every", "save_minutes", "keep_last", "seed"),
            *("mim_weight", "contrastive_weight", "profile"),
        }
        for name in sorted(positive | not_negative):
            value = getattr(self, name)
            if not (value > 0 or (name in not_negative and value == 0)):
                want = "more than 0" if name in positive else "0 or more"
                raise ValueError(f"{_flag(name)} is {value}; it must be {want}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction is {self.max_bad_fraction}; it must be between 0 and 1")
        for name in ("crop_scale", "mask_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}; it must be more than 0 and at most 1")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--beta2 is {self.beta2}; it must be 0 or more and less than 1")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"--precision is {self.precision!r}; use auto, fp32 or bf16")
        if self.engine not in ("fused", "graph", "compile", "eager"):
            raise ValueError(f"--engine is {self.engine!r}; use fused, graph, compile or eager")
        for way in filter(None, self.save_memory.split(",")):
            if way not in ("recompute", "shard"):
                raise ValueError(f"--save-memory holds {way!r}; use recompute, shard, or both with a comma between")
        if self.shard and self.engine not in ("fused", "eager"):
            raise ValueError(
                f"--save-memory shard does not go with --engine {self.engine}: use fused or eager, or leave shard out"
            )
        if self.decoder not in ("auto", "dali", "cpu"):
            raise ValueError(f"--decoder is {self.decoder!r}; use auto, dali or cpu")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}; use auto, cpu or cuda")
        if self.mim_weight == self.contrastive_weight == 0:
            raise ValueError("--mim-weight and --contrastive-weight are both 0, so nothing is trained: raise one")
        if self.stop_at > self.steps:
            raise ValueError(f"--stop-at {self.stop_at} lies past --steps {self.steps}; lower it or leave it out")
        if self.warmup >= self.steps:
            raise ValueError(f"--warmup {self.warmup} leaves nothing of --steps {self.steps}; lower it")
        for tracker in filter(None, self.trackers.split(",")):
            if tracker != "tensorboard" and not tracker.startswith("wandb:"):
                raise ValueError(f"--trackers holds {tracker!r}; use tensorboard or wandb:PROJECT")
        kind, _, file = self.visual_tokens.partition(":")
        if self.visual_tokens != "codebook" and not (kind in ("dalle", "cache") and file):
            raise ValueError(
                f"--visual-tokens is {self.visual_tokens!r}; use codebook, dalle:FILE.safetensors or cache:DIR"
            )

    @property
    def recompute(self) -> bool:
        """Whether --save-memory has activations computed again."""
        return "recompute" in self.save_memory.split(",")

    @property
    def shard(self) -> bool:
        """Whether --save-memory has the state shared out."""
        return "shard" in self.save_memory.split(",")


def quickstart() -> TrainConfig:
    """A small FaRL that visibly learns the embedded faces in about two minutes on a laptop's CPU."""
    return TrainConfig(
        run_dir="runs/quickstart",
        data="data/quickstart/train-*.tar",
        eval_data="data/quickstart/val-*.tar",
        model="farl-tiny",
        steps=260,
        global_batch=64,
        warmup=20,
        lr=1e-3,
        log_every=10,
        eval_every=50,
        save_every=50,
    )


def farl_b16() -> TrainConfig:
    """FaRL's paper model: ViT-B/16, 20 M pairs, 16 epochs.

    The released files prove the sizes. Batch, learning rate and weight decay are as remembered from the paper, not
    verified against it (see docs/recipe.md).
    """
    return TrainConfig(run_dir="runs/farl-b16", data="laion-face/split_*/*.tar", lr_final=9e-4, warmup=3_906)


def farl_b16_ep64() -> TrainConfig:
    """As farl-b16, for the 64 epochs of FaRL's second release."""
    return replace(farl_b16(), run_dir="runs/farl-b16-ep64", steps=250_000)


def farl_s16() -> TrainConfig:
    """ViT-S/16: a cheaper model for trials on one GPU."""
    return replace(farl_b16(), run_dir="runs/farl-s16", model="farl-s16")


def farl_l16() -> TrainConfig:
    """ViT-L/16, the "large" of FaRL's released code (its weights were never released).

    The micro-batch is the one that `farl.memory` predicts to fit a GPU of 80 GB.
    """
    return replace(farl_b16(), run_dir="runs/farl-l16", model="farl-l16", micro_batch=160)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    "farl-b16": farl_b16,
    "farl-b16-ep64": farl_b16_ep64,
    "farl-s16": farl_s16,
    "farl-l16": farl_l16,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
