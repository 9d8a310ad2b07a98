"""Visual tokens computed once and kept in a folder, read by row as fast as memory is.

    manifest.json         what the tokens are of, and what made them (`Manifest`)
    tokens.bin            uint16 [samples, views, patches], uint32 past 65,536 tokens; little-endian, no header
    status.bin            uint8 [samples, views]: 0 not made yet, 1 made, 2 missing, because the sample is bad
    blocks.bin            uint64 [blocks, 4]: CRC-32 of a block's tokens, of its status, samples that could not be read,
                          and a hash of these three and the block's number
    codebook.safetensors  the codebook that made them; of a dVAE encoder the manifest keeps path and hash

A block is a range of samples with all their views. Its row of blocks.bin is written when its tokens are on the disk, so
whoever finds the row finds the tokens, whenever the writer was killed. Blocks do not know of processes: any number of
them may write, and another number may go on.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from farl.tokens.codebook import PatchCodebook
from farl.tokens.dalle import DalleEncoder
from farl.tokens.manifest import CODEBOOK, Manifest, tokenizer_hash
from farl.tokens.tokenizer import VisualTokenizer
from farl_engine.data.augment import Plan
from farl_engine.data.counter_rng import combine

NOT_MADE, MADE, MISSING = 0, 1, 2
_TOKENS, _STATUS, _BLOCKS = "tokens.bin", "status.bin", "blocks.bin"
# Smaller caches are checked in full when opened, larger ones by sizes and finished blocks, to keep opening fast.
_CHECK_BYTES = 64 << 20
_LOG_EVERY = 1000

logger = logging.getLogger("farl.tokens")


class _Files:
    """The three flat files of a cache, open and of the right sizes."""

    def __init__(self, folder: Path, manifest: Manifest, flags: int) -> None:
        self.folder, self.manifest = folder, manifest
        self.row_bytes = manifest.patches * manifest.dtype.itemsize
        rows = manifest.samples * manifest.views
        self.sizes = {_TOKENS: rows * self.row_bytes, _STATUS: rows, _BLOCKS: manifest.num_blocks * 32}
        self.fds: dict[str, int] = {}
        try:
            for name, size in self.sizes.items():
                self.fds[name] = os.open(folder / name, flags, 0o644)
                if flags & os.O_CREAT:
                    os.ftruncate(self.fds[name], size)
                found = os.fstat(self.fds[name]).st_size
                if found != size:
                    raise ValueError(
                        f"{folder / name} has {found:,} bytes instead of {size:,}: it was cut or is of another cache; "
                        f"delete {folder} and make the cache again with `{manifest.command}`"
                    )
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename} is gone: delete {folder} and make the cache again with `{manifest.command}`"
            ) from None

    def __del__(self) -> None:
        for fd in getattr(self, "fds", {}).values():
            os.close(fd)

    def records(self) -> NDArray[np.uint64]:
        """blocks.bin, uint64 [blocks, 4]."""
        return np.frombuffer(os.pread(self.fds[_BLOCKS], self.sizes[_BLOCKS], 0), "<u8").reshape(-1, 4)

    def finished(self) -> NDArray[np.bool_]:
        """Which blocks say that they are on the disk, bool [blocks]; one torn while written does not say so."""
        records = self.records()
        return records[:, 3] == _record_hash(np.arange(len(records)), records)

    def is_intact(self, block: int) -> bool:
        """Whether a finished block's tokens and status are those that were written."""
        first, last = (edge * self.manifest.views for edge in self.manifest.block_range(block))
        tokens = os.pread(self.fds[_TOKENS], (last - first) * self.row_bytes, first * self.row_bytes)
        status = os.pread(self.fds[_STATUS], last - first, first)
        record = np.frombuffer(os.pread(self.fds[_BLOCKS], 32, block * 32), "<u8")
        return (zlib.crc32(tokens), zlib.crc32(status)) == (int(record[0]), int(record[1]))


class CacheWriter:
    """Writes blocks, in any order and from any number of processes.

    Raises:
        ValueError: the folder's files are not those of `manifest`.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files = _Files(folder, manifest, os.O_RDWR)

    @staticmethod
    def create(folder: Path, manifest: Manifest, tokenizer: VisualTokenizer) -> None:
        """Makes the folder with empty files (they take space as blocks come); the manifest last, whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(tokenizer, PatchCodebook):
            tokenizer.save(folder / CODEBOOK)
        for name in (_TOKENS, _STATUS, _BLOCKS):
            # Left by a start that ended before its manifest: of unknown contents.
            (folder / name).unlink(missing_ok=True)
        _Files(folder, manifest, os.O_RDWR | os.O_CREAT)
        manifest.write(folder)

    def finished(self) -> NDArray[np.bool_]:
        """Which blocks are on the disk, bool [blocks]."""
        return self._files.finished()

    def is_intact(self, block: int) -> bool:
        """Whether a finished block's tokens and status are those that were written; reads them all."""
        return self._files.is_intact(block)

    def unreadable(self) -> NDArray[np.int64]:
        """Reads that failed in each finished block, int64 [blocks]: worth another try."""
        return np.where(self.finished(), self._files.records()[:, 2].astype(np.int64), 0)

    def write(self, block: int, tokens: NDArray[Any], status: NDArray[np.uint8], unreadable: int = 0) -> None:
        """Puts a block on the disk; when this returns, it survives a crash of the machine.

        Args:
            tokens: integers [n * K, P], of the samples of `block_range(block)` with their views side by side.
            status: MADE or MISSING, uint8 [n * K].
            unreadable: reads that failed although the sample may be good.

        Raises:
            ValueError: a token outside the vocabulary.
        """
        first, last = self.manifest.block_range(block)
        rows, vocab_size = (last - first) * self.manifest.views, self.manifest.tokenizer["vocab_size"]
        assert tokens.shape == (rows, self.manifest.patches) and status.shape == (rows,)
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            raise ValueError(f"tokens: wanted 0..{vocab_size - 1}, got {int(tokens.min())}..{int(tokens.max())}")
        fds = self._files.fds
        if any(os.pread(fds[_BLOCKS], 32, block * 32)):
            # A block written before no longer counts while it is replaced.
            _write_at(fds[_BLOCKS], bytes(32), block * 32)
            os.fsync(fds[_BLOCKS])
        content, states = tokens.astype(self.manifest.dtype).tobytes(), status.tobytes()
        _write_at(fds[_TOKENS], content, first * self.manifest.views * self._files.row_bytes)
        _write_at(fds[_STATUS], states, first * self.manifest.views)
        os.fsync(fds[_TOKENS])
        os.fsync(fds[_STATUS])
        record = np.array([[zlib.crc32(content), zlib.crc32(states), unreadable, 0]], "<u8")
        record[:, 3] = _record_hash(np.array([block]), record)
        _write_at(fds[_BLOCKS], record.tobytes(), block * 32)
        os.fsync(fds[_BLOCKS])


class TokenCache:
    """A finished cache, mapped into memory; safe to share between threads.

    Attributes:
        folder: where it is. manifest: what it holds.
        unreadable_reads: reads that failed while it was made, of shards that may have come back since.

    Raises:
        ValueError: there is no cache, it is not finished (naming the command that finishes it), or damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = manifest = Manifest.read(self.folder)
        files = _Files(self.folder, manifest, os.O_RDONLY)
        finished = files.finished()
        self.unreadable_reads = int(files.records()[finished, 2].sum())
        if not finished.all():
            raise ValueError(
                f"the token cache {self.folder} has {int(finished.sum()):,} of {len(finished):,} blocks: "
                f"finish it with `{manifest.command}`"
            )
        if files.sizes[_TOKENS] <= _CHECK_BYTES:
            damaged = [block for block in range(manifest.num_blocks) if not files.is_intact(block)]
            if damaged:
                raise self._damaged(f"in {len(damaged)} of {len(finished)} blocks")
        self._tokens = _map(files, _TOKENS, manifest.dtype).reshape(-1, manifest.patches)
        self._status = _map(files, _STATUS, np.dtype(np.uint8))
        self._lock = threading.Lock()
        self._missing = 0

    def missing_rows(self) -> int:
        """Rows without tokens, of bad samples; looks through all."""
        return int(np.count_nonzero(self._status == MISSING))

    def rows(self, ids: NDArray[np.int64], views: NDArray[np.int64]) -> torch.Tensor:
        """Tokens of samples and views, int32 [n, P]; -1 in the rows of samples that were bad when they were made.

        Args:
            ids: int64 [n], those that were used in place of bad ones.
            views: int64 [n], counted modulo the K views of the cache.

        Raises:
            IndexError: no such sample.
            ValueError: what is read cannot have been written.
        """
        rows = ids * self.manifest.views + views % self.manifest.views
        status, tokens = self._status[rows], self._tokens.take(rows, axis=0)
        made = status == MADE
        if not made.all():
            tokens[~made] = 0
            self._note_missing(ids[~made], status[~made])
        if tokens.size and int(tokens.max()) >= self.manifest.tokenizer["vocab_size"]:
            raise self._damaged(f"near sample {int(ids[tokens.max(axis=1).argmax()])}")
        result = tokens.astype(np.int32)
        result[~made] = -1
        return torch.from_numpy(result)

    def tokenizer(self, device: torch.device | str = "cpu") -> VisualTokenizer:
        """What made the tokens; of a dVAE encoder a stand-in that loads its file when it is called."""
        facts = self.manifest.tokenizer
        if facts["kind"] == "codebook":
            with contextlib.suppress(ValueError):
                codebook = PatchCodebook.from_file(self.folder / CODEBOOK)
                if tokenizer_hash(codebook) == facts["hash"]:
                    return codebook.to(device)
            raise ValueError(
                f"the token cache {self.folder} is damaged in {CODEBOOK}: put the one back that made it "
                f"({facts['hash'][:12]}), or delete the folder and make the cache again with `{self.manifest.command}`"
            )
        return StoredEncoder(Path(facts["file"]), facts["hash"], facts["vocab_size"], facts["token_image_size"])

    def _note_missing(self, ids: NDArray[np.int64], status: NDArray[np.uint8]) -> None:
        if (status != MISSING).any():
            raise self._damaged(f"near sample {int(ids[status != MISSING][0])}")
        with self._lock:
            before, self._missing = self._missing, self._missing + len(ids)
            if before == 0 or before // _LOG_EVERY != self._missing // _LOG_EVERY:
                logger.warning(
                    "sample no. %d without visual tokens (such as %d): it was bad when %s was made, and is no target "
                    "of the masked branch",
                    self._missing,
                    int(ids[0]),
                    self.folder,
                )

    def _damaged(self, where: str) -> ValueError:
        return ValueError(
            f"the token cache {self.folder} is damaged {where}: mend it with `{self.manifest.command}`, which checks "
            "every block and makes the damaged ones again"
        )


class StoredEncoder:
    """A `DalleEncoder` in a file, loaded when it is first called: training from a cache does without.

    Raises:
        ValueError: (when called) the file is gone, or holds other weights than those that made the cache.
    """

    def __init__(self, path: Path, weights_hash: str, vocab_size: int, token_image_size: int) -> None:
        self.path, self.vocab_size = path, vocab_size
        self.token_image_size: int | None = token_image_size
        self.weights_hash = weights_hash
        self._encoder: DalleEncoder | None = None

    def __call__(self, images: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """As `DalleEncoder` does, on the images' device."""
        return self.load(images.device)(images, positions)

    def usable(self, device: torch.device | str) -> bool:
        """Whether the file is there and holds the right weights."""
        try:
            self.load(device)
        except ValueError:
            return False
        return True

    def load(self, device: torch.device | str) -> DalleEncoder:
        """The encoder itself on a device."""
        if self._encoder is None:
            assert self.token_image_size is not None
            encoder = DalleEncoder.from_file(self.path, token_image_size=self.token_image_size)
            if tokenizer_hash(encoder) != self.weights_hash:
                raise ValueError(f"{self.path} holds other weights than those that made the token cache")
            self._encoder = encoder
        return self._encoder.to(device)


class RepeatedCrops:
    """A crop plan whose views count modulo K: the crops of a cache of K views come again every K epochs.

    In the plan and not in the order, so that masks go on changing with every epoch.
    """

    def __init__(self, plan: Plan, views: int) -> None:
        self._plan, self._views = plan, views

    def parameters(self, seed: int, ids: ArrayLike, views: ArrayLike) -> NDArray[np.float64]:
        """As the plan's, for the view that the cache has."""
        return self._plan.parameters(seed, ids, np.asarray(views) % self._views)

    def box(self, parameters: ArrayLike | None, width: int, height: int) -> tuple[int, int, int, int]:
        """The plan's own."""
        return self._plan.box(parameters, width, height)

    def flips(self, parameters: ArrayLike | None) -> bool:
        """The plan's own."""
        return self._plan.flips(parameters)

    def jitter(self, parameters: ArrayLike | None) -> tuple[float, float, float] | None:
        """The plan's own."""
        return self._plan.jitter(parameters)


def _record_hash(blocks: NDArray[np.int64], records: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # Never 0 in practice, so an empty row is no finished block.
    return combine(blocks, *(records[:, column].astype(np.int64) for column in range(3)))


def _map(files: _Files, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    mapped = mmap.mmap(files.fds[name], files.sizes[name], access=mmap.ACCESS_READ)
    # Rows are read in random order: reading ahead would fetch a hundred times what is asked for.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _write_at(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
