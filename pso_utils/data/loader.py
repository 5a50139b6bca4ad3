"""In which order each process sees the records of a source: one minibatch of them for each optimizer step."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from itertools import groupby, islice
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.data import DataLoader

from pso_utils.data.images import Augmentation, BrokenImage, decode_image, draw_augmentation, transform_pair
from pso_utils.data.pairs import Stream, Table, only_ties
from pso_utils.data.readers import describe
from pso_utils.errors import UserError


class PairBatch(NamedTuple):
    """b records of this process's part of a minibatch; b is 0 where it has none, or all are broken."""

    target_pixels: Tensor  # [b, 3, H, W], float32 in [-1, 1]
    reference_pixels: Tensor | None  # likewise; None for targets alone
    captions: list[str]
    original_sizes: Tensor  # [b, 2], of the targets: height and width
    crop_top_lefts: Tensor  # [b, 2], of both: top and left, in the resized and flipped image
    flipped: Tensor  # [b], bool: whether the pair is mirrored
    ids: list[str]  # of the records in the source
    num_broken: int  # records that were left out because an image is broken


class RecordBatch(NamedTuple):
    """b records of this process's part of a minibatch, without their images; b is 0 where it has none."""

    ids: list[str]
    captions: list[str]
    flipped: Tensor  # [b], bool: whether the pair is mirrored


class Minibatch(NamedTuple):
    """The records of one optimizer step.

    size: on all processes (of a stream that several share, on this one), broken ones included. end: how many records
    of the epoch are done after this minibatch, where a resumed run starts. microbatches: those of this process, in
    order, one at least; to be read before the next minibatch.
    """

    size: int
    end: int
    microbatches: Iterator[PairBatch] | Iterator[RecordBatch]


class _Job(NamedTuple):
    """What a microbatch is made of: items of the source. `size` and `end` are those of its minibatch."""

    size: int
    end: int
    items: list


@dataclass(frozen=True)
class PairLoader:
    """Deals out a source: each epoch is an order of all records, cut into minibatches of `minibatch_size` (the last may
    be smaller); process r of P takes the r-th of P contiguous parts of each, in microbatches of `train_batch_size`.

    A stream that several processes share is split among them instead (`Stream.order`). Where one's part ends before the
    others', it goes on with empty minibatches until all have ended, and `Minibatch.end` counts whole minibatches.

    A record's crop and flip are a function of (seed, epoch, record): neither the processes, nor the workers, nor
    where the run was resumed change what is seen.

    Attributes:
        resolution: height and width of the pixels.
        num_workers: subprocesses that decode images; 0: the main process.
        skip_broken_images: leave out, and count, records with a broken image, instead of an error.
    """

    source: Table | Stream
    _: KW_ONLY
    resolution: int
    train_batch_size: int
    minibatch_size: int
    seed: int = 0
    num_processes: int = 1
    process_index: int = 0
    num_workers: int = 0
    center_crop: bool = False
    random_flip: bool = False
    skip_broken_images: bool = False

    def minibatches(self, epoch: int, start: int = 0) -> Iterator[Minibatch]:
        """The minibatches of an epoch, of `PairBatch`, from its record `start` on (`Minibatch.end` of the last one that
        was done).

        A stream is replayed and skipped to get there, without decoding an image: its state leaves the shuffle buffer
        out.

        Raises:
            UserError: a broken image without `skip_broken_images`, a caption that is no string, an unreadable file.
        """
        augment = partial(self._augmentation, epoch)
        minibatches = _joined(self._read(self._jobs(epoch, start), augment))
        return self._in_step(minibatches, start, self._pair_batch([], augment)) if self._is_split else minibatches

    def record_minibatches(self, epoch: int, start: int = 0) -> Iterator[Minibatch]:
        """The same minibatches, of `RecordBatch`, for a run that has all latents: of a table no image is read, so that
        broken ones are not noticed, and none is left out."""
        batches = ((job.size, job.end, self._record_batch(job.items, epoch)) for job in self._jobs(epoch, start))
        minibatches = _joined(batches)
        return self._in_step(minibatches, start, self._record_batch([], epoch)) if self._is_split else minibatches

    def stored_order(
        self, *, flip: bool, is_done: Callable[[list[str]], bool]
    ) -> Iterator[tuple[list[str], PairBatch | None]]:
        """This process's part of all records of a table as they are stored, in microbatches, cropped at the centre and
        all of them mirrored or none: (ids, images), or None for the images of those ids that are done already. For
        filling a cache; which records are in a microbatch does not depend on what is done."""
        part = contiguous_part(range(len(self.source)), self.num_processes, self.process_index)
        microbatches = [
            part[first : first + self.train_batch_size] for first in range(0, len(part), self.train_batch_size)
        ]
        ids = [self.source.ids(items) for items in microbatches]
        is_missing = [not is_done(own) for own in ids]
        jobs = [_Job(number, 0, items) for number, items in enumerate(microbatches) if is_missing[number]]
        results = self._read(jobs, lambda record_id: Augmentation(flip))
        batches = (batch for minibatch in _joined(results) for batch in minibatch.microbatches)
        for own, missing in zip(ids, is_missing):
            yield own, next(batches) if missing else None

    def _read(self, jobs: Iterable[_Job], augment: Callable[[str], Augmentation]) -> DataLoader:
        """The pairs of some jobs, read by `num_workers`."""
        return DataLoader(
            _PairReader(self, augment),
            batch_size=None,  # a job is a batch already
            sampler=jobs,
            num_workers=self.num_workers,
            collate_fn=tuple,  # leaves a result as it is
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # it draws a seed for the workers; the global generator is the script's
        )

    @cached_property
    def _is_split(self) -> bool:
        return isinstance(self.source, Stream) and self.num_processes > 1

    def _jobs(self, epoch: int, start: int) -> Iterator[_Job]:
        if self._is_split:
            yield from self._own_jobs(epoch, start)
            return
        items = islice(self.source.order(seed=self.seed, epoch=epoch), start, None)
        while minibatch := list(islice(items, self.minibatch_size)):
            start += len(minibatch)
            part = contiguous_part(minibatch, self.num_processes, self.process_index)
            for first in range(0, max(len(part), 1), self.train_batch_size):
                yield _Job(len(minibatch), start, part[first : first + self.train_batch_size])

    def _own_jobs(self, epoch: int, start: int) -> Iterator[_Job]:
        """Those of this process's part of a split stream, whose minibatches have its part of `minibatch_size`."""
        size = len(contiguous_part(range(self.minibatch_size), self.num_processes, self.process_index))
        ranks = {"num_processes": self.num_processes, "process_index": self.process_index}
        items = self.source.order(seed=self.seed, epoch=epoch, **ranks)
        items = islice(items, start // self.minibatch_size * size, None)
        while part := list(islice(items, size)):
            start += self.minibatch_size
            for first in range(0, len(part), self.train_batch_size):
                yield _Job(len(part), start, part[first : first + self.train_batch_size])

    def _in_step(self, minibatches: Iterator[Minibatch], start: int, empty: PairBatch | RecordBatch):
        """A split stream's minibatches, followed by empty ones while other processes still have some."""
        end = start
        while on_any_process((minibatch := next(minibatches, None)) is not None):
            end += self.minibatch_size
            yield Minibatch(0, end, iter([empty])) if minibatch is None else minibatch
        if end == 0:
            raise only_ties(self.source.name, self.source.num_ties)

    def _augmentation(self, epoch: int, record_id: str) -> Augmentation:
        settings = {"center_crop": self.center_crop, "random_flip": self.random_flip}
        return draw_augmentation(record_id, seed=self.seed, epoch=epoch, **settings)

    def _record_batch(self, items: list, epoch: int) -> RecordBatch:
        ids = self.source.ids(items)
        flipped = torch.tensor([self._augmentation(epoch, record_id).flip for record_id in ids], dtype=torch.bool)
        return RecordBatch(ids, self.source.captions(items), flipped)

    def _pair_batch(self, items: list, augment: Callable[[str], Augmentation]) -> PairBatch:
        source = self.source
        pairs, flipped, records, num_broken = [], [], [], 0
        for record in map(source.record, items):
            try:
                target = decode_image(record.target, source.folders)
                reference = decode_image(record.reference, source.folders) if source.has_references else None
            except BrokenImage as error:
                if not self.skip_broken_images:
                    raise UserError(
                        f"{describe(record.id)} of {source.name} has a broken image: {error}; mend it, or pass"
                        " --skip_broken_images"
                    ) from error
                num_broken += 1
                continue
            augmentation = augment(record.id)
            pairs.append(transform_pair(target, reference, resolution=self.resolution, augmentation=augmentation))
            flipped.append(augmentation.flip)
            records.append(record)

        def stack(pixels: list[Tensor]) -> Tensor:
            return torch.stack(pixels) if pixels else torch.empty(0, 3, self.resolution, self.resolution)

        return PairBatch(
            stack([pair.target for pair in pairs]),
            stack([pair.reference for pair in pairs]) if source.has_references else None,
            [record.caption for record in records],
            torch.tensor([pair.original_size for pair in pairs], dtype=torch.long).view(-1, 2),
            torch.tensor([pair.crop_top_left for pair in pairs], dtype=torch.long).view(-1, 2),
            torch.tensor(flipped, dtype=torch.bool),
            [record.id for record in records],
            num_broken,
        )


def on_any_process(flag: bool) -> bool:
    """Whether `flag` is set on any process; all of them ask together."""
    return bool(reduce(torch.tensor(float(flag), device=PartialState().device), "sum") > 0)


def contiguous_part(items: Sequence, num_parts: int, index: int) -> Sequence:
    """Part `index` of `items`, as torch.tensor_split cuts them: sizes differ by one at most, the larger come first."""
    size, larger = divmod(len(items), num_parts)
    start = index * size + min(index, larger)
    return items[start : start + size + (index < larger)]


def _leave_signals_to_the_parent(worker: int):
    """A batch system or a terminal signals all processes; the parent finishes its step, and then ends the workers. It
    does so by SIGTERM, too, so a worker may not ignore that: it goes on for 15 seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *args: signal.alarm(15))


class _PairReader:
    """A map-style data set for DataLoader, whose indices are jobs; it runs in the workers."""

    def __init__(self, loader: PairLoader, augment: Callable[[str], Augmentation]):
        self.loader, self.augment = loader, augment

    def __getitem__(self, job: _Job) -> tuple[int, int, PairBatch | UserError]:
        try:
            return job.size, job.end, self.loader._pair_batch(job.items, self.augment)
        except UserError as error:  # a value, since DataLoader would put the worker's traceback into the message
            return job.size, job.end, error


def _joined(results: Iterable[tuple]) -> Iterator[Minibatch]:
    """Minibatches from (size, end, microbatch or error) of each microbatch."""

    def microbatches(results: Iterable[tuple]):
        for _, _, microbatch in results:
            if isinstance(microbatch, UserError):
                raise microbatch
            yield microbatch

    for (size, end), group in groupby(results, key=lambda result: result[:2]):
        yield Minibatch(size, end, microbatches(group))
