"""A pre-training run from its settings: parts, resume, loop, report."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from farl import report
from farl.cached_tokens import check_token_cache, open_token_cache
from farl.config import TrainConfig
from farl.evaluation import evaluate_retrieval
from farl.flops import training_flops
from farl.initialize import (
    build_model,
    build_optimizer,
    check_engine,
    check_sources,
    crop_plan,
    share_out,
    visual_tokenizer,
)
from farl.masking import mask_sizes
from farl.memory import memory_warning
from farl.model import FaRL
from farl.profiling import run_profiler, work_of
from farl.resume import check_resumable, check_same_encoder, snapshot
from farl.shards import describe_mix, open_shards, sample_order
from farl.step import TrainStep, clamp_logit_scale, pack_parts
from farl.tokenizer import pack
from farl.tokens.cache import RepeatedCrops, StoredEncoder
from farl_engine import distributed
from farl_engine.checkpoint import CheckpointStore
from farl_engine.data import Batch, CpuDecoder, Loader, choose_decoder
from farl_engine.data.shard_cache import ShardCache
from farl_engine.distributed import say
from farl_engine.graphs import CudaRecorder
from farl_engine.loop import Run, Schedule, train
from farl_engine.metrics import MetricsLog, Progress
from farl_engine.optim import warmup_cosine
from farl_engine.profiler import part
from farl_engine.sharding import average_gradients, gathered, unsharded

EVALUATION_PAIRS = 5_000
LR_START = 1e-6


def pretrain(config: TrainConfig) -> None:
    """Run `config` to its end, or to a stop signal, going on from the run folder's latest checkpoint if it has one.

    Raises:
        ValueError: settings that do not fit each other, the machine, the data or the checkpoint.
        BadDataError, NonFiniteError, CheckpointError: see `farl_engine.loop.train`.
    """
    world = distributed.start(config.device, config.timeout)
    if config.global_batch % world.size:
        below = config.global_batch // world.size * world.size
        raise ValueError(
            f"--global-batch {config.global_batch} is not divisible by {world.size} processes: "
            f"use {below or world.size} or {below + world.size}"
        )
    check_engine(config, world)
    run_dir = Path(config.run_dir)
    say(world, f"{config.model} on {world.size} x {world.device}, run folder {run_dir}")
    store = CheckpointStore(run_dir / "checkpoints", keep_last=config.keep_last)
    saved = store.load() if store.latest() is not None else None
    check_sources(config, saved)
    cache = open_token_cache(config)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    shard_cache = ShardCache(config.shard_cache) if config.shard_cache else None
    index = open_shards("--data", config.data, world, config.max_bad_fraction, shard_cache)
    plan = crop_plan(config, index)
    held_out = None
    if config.eval_data:
        if describe_mix(config.eval_data) != "none":
            raise ValueError("--eval-data takes no weights: each held-out pair counts once")
        held_out = open_shards("--eval-data", config.eval_data, world, config.max_bad_fraction, shard_cache)
    if saved is not None:
        check_resumable(saved, config, index, cache)
    start_step: int = saved["step"] if saved is not None else 0
    stop_at = config.stop_at or config.steps
    if start_step >= stop_at:
        say(world, f"nothing to do: the checkpoint in {run_dir} is after step {start_step} of {stop_at}")
        distributed.finish(world)
        return

    tokenizer = visual_tokenizer(config, index, world, saved, cache)
    if saved is not None:
        check_same_encoder(saved, config, tokenizer)
    model = build_model(config, tokenizer, saved)
    model.checkpoint_activations = config.recompute
    sharded = config.shard and world.size > 1
    if sharded:
        share_out(model, world)
    else:
        model.to(world.device)
        if config.shard:
            say(world, "--save-memory shard has nothing to share out over one process")
    optimizer = build_optimizer(config, model, saved)
    if saved is not None:
        say(world, f"going on after step {start_step}")
    del saved

    alone = world.size == 1 or sharded
    network = model if alone else DistributedDataParallel(model, gradient_as_bucket_view=True)
    max_masked, _ = mask_sizes(model.config.vision.grid, config.mask_ratio)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda")
    if world.device.type == "cuda" and config.engine in ("fused", "graph"):
        capacity = torch.cuda.get_device_properties(world.device).total_memory
        problem = memory_warning(config, model.config, world_size=world.size, bf16=bf16, capacity=capacity)
        if problem is not None:
            say(world, problem)
    token_size = tokenizer.token_image_size if tokenizer else None
    decoder = choose_decoder(
        config.decoder,
        model.config.vision.image_size,
        token_size if cache is None else None,
        world.device,
        threads=max(1, config.threads),
    )
    if not isinstance(decoder, CpuDecoder):
        say(world, f"JPEGs are decoded by DALI on {decoder.device}")
    if cache is not None:
        check_token_cache(config, cache, index, plan, decoder, world)
    if held_out is not None and not config.contrastive_weight:
        say(world, "no retrieval on --eval-data: --contrastive-weight 0 trains no text tower")
    log = None
    if world.is_main:
        log = MetricsLog(run_dir, resume_step=start_step, trackers=config.trackers)
        (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    def evaluate(step: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        # The ranks have different numbers of batches to encode.
        with unsharded(model):
            return evaluate_retrieval(
                model,
                held_out,
                pack,
                world.device,
                rank=world.rank,
                world_size=world.size,
                group=world.control,
                should_stop=should_stop,
                max_pairs=EVALUATION_PAIRS,
                threads=config.threads,
                autocast=torch.bfloat16 if bf16 else None,
            )

    loader = Loader(
        index,
        sample_order(config.data, index, config.global_batch, config.seed),
        decoder=decoder,
        plan=plan if cache is None else RepeatedCrops(plan, cache.manifest.views),
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        text_transform=partial(pack_parts, micro_batch=config.micro_batch, pad=config.engine == "graph"),
        visual_tokens=cache.rows if cache is not None else None,
        threads=config.threads,
        max_bad_fraction=config.max_bad_fraction,
        device=world.device,
        start_step=start_step,
        end_step=stop_at,
        # Sooner than the other processes give up waiting, so that the stacks of the one that hangs are seen.
        stall_timeout=config.timeout / 2,
    )
    profiler = None
    if config.profile and world.is_main:
        work = work_of(
            model,
            pairs=config.global_batch // world.size,
            global_batch=config.global_batch,
            masked=max_masked if tokenizer is not None else 0,
            contrast=config.contrastive_weight > 0,
            tokenizer=tokenizer if cache is None else None,
        )
        profiler = run_profiler(
            run_dir,
            work,
            updates=config.profile,
            device=world.device,
            bf16=bf16,
            engine=config.engine,
            say=partial(say, world),
        )
    training_step = TrainStep(
        network,
        world,
        tokenizer,
        mim_weight=config.mim_weight,
        contrastive_weight=config.contrastive_weight,
        mask_ratio=config.mask_ratio,
        seed=config.seed,
        bf16=bf16,
        engine=config.engine,
    )
    run = Run(
        world=world,
        model=model,
        optimizer=optimizer,
        loader=loader,
        forward_backward=averaging(training_step, model) if sharded else training_step,
        after_update=lambda: clamp_logit_scale(model) if config.contrastive_weight else {},
        snapshot=lambda step: snapshot(step, config, model, optimizer, tokenizer, index),
        evaluate=evaluate if held_out is not None and config.contrastive_weight else None,
        store=store,
        log=log,
        progress=Progress(start=start_step, total=stop_at, enabled=world.is_main),
        schedule=schedule(config, stop_at),
        global_batch=config.global_batch,
        flops_per_sample=training_flops(model.config, masked=max_masked, contrast=config.contrastive_weight > 0),
        start_step=start_step,
        profiler=profiler,
        recorder=CudaRecorder(world.device) if config.engine == "graph" else None,
    )
    with loader, profiler or nullcontext():
        step, stopped_by = train(run)
    if log is not None:
        log.close()
    if sharded and step == config.steps and stopped_by is None:
        weights = gathered(model.state_dict())
        model = FaRL(model.config)
        if world.is_main:
            model.load_state_dict(weights)
            model.to(world.device)
    # The report is drawn by rank 0 alone: the others need not wait for it.
    distributed.finish(world)
    if stopped_by is not None:
        say(world, f"stopped by {stopped_by} after step {step}; the same command goes on from there")
    elif step < config.steps:
        say(world, f"left after step {step} as --stop-at asks; the same command without it goes on from there")
    elif world.is_main:
        if isinstance(tokenizer, StoredEncoder) and not tokenizer.usable(world.device):
            say(world, f"no picture of the masked branch: {tokenizer.path} is gone, or not what made the cache")
            tokenizer = None
        with_tokens = CpuDecoder(model.config.vision.image_size, token_size=token_size)
        page = report.report_run(
            run_dir, model, held_out or index, with_tokens, tokenizer, mask_ratio=config.mask_ratio, seed=config.seed
        )
        say(world, f"done after step {step}: see {page}")


def averaging(step: Callable[[Batch], dict[str, Tensor]], model: FaRL) -> Callable[[Batch], dict[str, Tensor]]:
    """`step`, then the averages of those gradients that FSDP leaves to each process."""
    parameters = list(model.parameters())

    def forward_backward(batch: Batch) -> dict[str, Tensor]:
        figures = step(batch)
        with part("gradients"):
            average_gradients(parameters)
        return figures

    return forward_backward


def schedule(config: TrainConfig, stop_at: int) -> Schedule:
    """When the loop logs, evaluates, saves and ends, and the learning rate of each update."""
    return Schedule(
        steps=config.steps,
        stop_at=stop_at,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        save_minutes=config.save_minutes,
        clip_norm=config.clip_grad,
        learning_rate=lambda step: warmup_cosine(
            step,
            steps=config.steps,
            warmup=config.warmup,
            peak=config.lr,
            start=LR_START,
            final=config.lr_final,
        ),
    )
