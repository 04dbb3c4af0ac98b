"""A synthesis run: the images that a folder lacks, call by call, into shards.

The unit of commit is a shard of whole groups. Its bytes follow from (identity, seed), the call size, the thread count
and the machine, so that a run that was killed is finished by making the shards that are not there, and several
processes that share the shards out write the bytes of one. The folder records call size, threads and engines, and a run
that continues it goes by these.

Of a method that learns from its own calls (`Synthesizer.state_dict`) a call is one group, the groups are made in turn,
and its state is kept beside the shards (carried.py).
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from dfkd.config import GenerateConfig, LoggingConfig, plain
from dfkd.config.synthesis import SHARD_IMAGES
from dfkd.data import MANIFEST, ShardFolder, ShardPool, open_folder, read_manifest, require_space
from dfkd.errors import UsageError
from dfkd.extension import described
from dfkd.logs import Logs, check_logs
from dfkd.runtime import Rank, cpu_threads, own_rank
from dfkd.synthesis.batching import ShortMemory, calling, release
from dfkd.synthesis.carried import Carried, learns, require_one_process
from dfkd.synthesis.plan import Plan, make_plan
from dfkd.synthesis.synthesizer import Around, Sample, Synthesizer, images_of_call, innermost, trajectories
from dfkd.synthesis.watch import Progress, ShardLog, Watch
from dfkd.teachers import Classifier

Say = Callable[[str], object]


def generate(
    synthesizer: Synthesizer,
    out: Path | str,
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
    config: GenerateConfig | None = None,
    say: Say | None = None,
    rank: Rank | None = None,
    logging: LoggingConfig | None = None,
) -> ShardPool:
    """Make `count` images into shards in the folder `out`; returns its images.

    Started again it makes what is missing or damaged and nothing else. Processes that torchrun started share the shards
    out, and each returns when all are there.

    progress: called with (images done, images of this process) before the first call and after each, and within one
    after every step of a method that tells (`Synthesizer`), then with fractions of images. config: batch, threads and
    how shards are stored; the synthesizer's own `config` where not given. say: gets lines for people, in the first
    process. rank: this process among several; by torchrun's environment where not given. logging: where the numbers of
    every shard go beside OUT/log.jsonl. OUT/preview.png shows the newest images, by class.

    Raises UsageError: the folder holds images of another identity, cannot be written or is in use, the disk is too
    small, a log's package is absent, or the smallest call runs out of memory.
    """
    check_logs(logging or LoggingConfig())
    require_around(synthesizer)
    with open_run(synthesizer, Path(out), count, seed, config, say, rank) as run:
        run.write(progress, logging)
    return open_folder(Path(out))


@dataclass(frozen=True)
class Written:
    """The images and shards that a run made, and the seconds that it took.

    images, shards: written now, by all processes. before: shards that were whole already. seconds: of this process,
    the wait for the others included.
    """

    images: int = 0
    shards: int = 0
    before: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Written") -> "Written":
        """What two parts of a run wrote together."""
        shards, before = self.shards + other.shards, self.before + other.before
        return Written(self.images + other.images, shards, before, self.seconds + other.seconds)


def require_around(synthesizer: Synthesizer) -> None:
    """Raise UsageError where a synthesizer's own settings ask for something around it that `make_method` would put
    there."""
    names, inner = set(), synthesizer
    while isinstance(inner, Around):
        names.add(type(inner).__name__)
        inner = inner.inner
    config = getattr(inner, "config", None)
    if not isinstance(config, GenerateConfig) or not hasattr(inner, "pack"):
        return
    asked = {"Intermediates": config.sampling.keep_intermediates, "Candidates": config.candidates.count - 1}
    flags = {"Intermediates": "--keep-intermediates", "Candidates": "--candidates", "Filter": "--filter-views"}
    for name, given in (*asked.items(), ("Filter", config.filter.views)):
        if given and name not in names:
            why = f"a {type(inner).__name__} alone does not go by it"
            raise UsageError(f"{flags[name]} cannot act", why, "make the synthesizer by dfkd.make_method")


@contextmanager
def open_run(
    synthesizer: Synthesizer,
    out: Path,
    count: int,
    seed: int = 0,
    config: GenerateConfig | None = None,
    say: Say | None = None,
    rank: Rank | None = None,
    also: Mapping[str, Any] | None = None,
    part: int = 0,
) -> Iterator["Run"]:
    """A run on its folder, which is locked, begun or taken up inside; nothing is made yet.

    Arguments and errors as of `generate`. also: what else the images follow from, in JSON's types. part: a shard ends
    where each part of so many images does; 0: the run is one part.
    """
    config, rank = config or getattr(synthesizer, "config", None) or GenerateConfig(), rank or own_rank()
    require_one_process(synthesizer, rank)
    if (available := getattr(synthesizer, "available", None)) is not None and count > available:
        raise UsageError(f"{count} images of method {synthesizer.name}", f"there are {available}", "lower --count")
    before = run_on_record(out)
    if not before and hasattr(synthesizer, "choose_engines"):
        synthesizer.choose_engines()  # refuses before anything is measured
    plan = None if before else make_plan(synthesizer, config, rank.neighbours)
    call_size = plan.call_size if plan else int(before["call_size"])
    facts = {"call_size": call_size, "threads": before.get("threads") or cpu_threads(config.compute.threads)}
    if (prior := getattr(synthesizer, "prior", None)) is not None:
        facts["prior"] = str(getattr(prior, "source", ""))  # for people: the images follow from its digests
    if hasattr(synthesizer, "call_size"):
        synthesizer.call_size = call_size
    with threads(int(facts["threads"])):
        if hasattr(synthesizer, "use_engines"):  # with the run's threads, which an engine takes over as it is loaded
            facts["engines"] = dict(synthesizer.use_engines(before.get("engines") if before else None))
        folder = ShardFolder.create_or_open(
            out,
            {**identity_of(synthesizer, seed), **(also or {})},
            synthesizer.class_names,
            synthesizer.image_size,
            config.shards.image_format,
            count,
            shard_size(synthesizer, config, out, call_size, part),
            rank,
            facts,
        )
        with folder, threads(int(folder.run["threads"])):
            said = say if say is not None and rank.first else _silent
            prepared = _prepare(synthesizer, folder, seed, said)
            yield Run(synthesizer, seed, folder, plan, said, prepared)


def _prepare(synthesizer: Synthesizer, folder: ShardFolder, seed: int, say: Say) -> float:
    """Have a synthesizer find out what it needs to know before its first image, or take it up where the folder has it
    on record; returns the seconds that this took."""
    started, wanted = time.perf_counter(), getattr(synthesizer, "prepares", ())
    if not wanted:
        return 0.0
    if not folder.rank.first:
        folder.wait_for_record(wanted)
    found = synthesizer.prepare(folder.path, folder.run, seed, say)  # type: ignore[attr-defined]
    seconds = time.perf_counter() - started
    if found:
        spent = float(folder.run.get("prepared_seconds", 0))
        folder.record(**found, prepared_seconds=round(spent + seconds, 3))
    return seconds


class Run:
    """The images that a folder lacks, and how they get there.

    plan: of a new folder, None of one that is continued. own: this process's shards that are to be made, and whole:
    images of its others; missing: shards of all processes, where this is the first. call_size: images per call, fewer
    once memory was short. prepared: seconds spent before the first image.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        seed: int,
        folder: ShardFolder,
        plan: Plan | None,
        say: Say,
        prepared: float = 0.0,
    ) -> None:
        self.synthesizer, self.seed, self.folder, self.plan, self.say = synthesizer, seed, folder, plan, say
        self._prepared = prepared
        self.call_size = int(folder.run["call_size"])
        self.carried = Carried(synthesizer, folder) if learns(synthesizer) else None
        self.own = folder.missing() if self.carried is None else self.carried.to_make(folder.missing())
        self._taken_up = self.carried is None or not self.own
        self.whole = self.images([i for i in range(folder.layout.shard_count()) if folder.rank.owns(i)])
        self.whole -= self.images(self.own)
        self.missing = self.own + (folder.missing_of_others() if folder.rank.first else [])
        self._student: str | None = None

    def images(self, shards: list[int]) -> int:
        """Images that the shards hold."""
        return sum(len(self.folder.layout.ids(index)) for index in shards)

    def update(self, student: Classifier | None, first: int) -> None:
        """Make images from the id `first` on against this student, whom their shards have on record.

        Raises AttributeError where the synthesizer takes none.
        """
        if self.own and self.folder.layout.ids(self.own[0]).start == first:
            self._take_up()  # the state before these images is of the student before
        self.synthesizer.update(student)  # type: ignore[attr-defined]
        self._student = None if student is None else student.digest()[:16]

    def write(
        self, progress: Progress | None = None, logging: LoggingConfig | None = None, part: range | None = None
    ) -> Written:
        """Make this process's missing shards, then wait for the others'. Arguments and errors as of `generate`.

        part: the ids whose shards are to be made now, the next of the folder. Raises UsageError where some of them are
        there that were made against another student than that of `update`.
        """
        layout, rank = self.folder.layout, self.folder.rank
        part = part or range(layout.count)
        own = [index for index in self.own if layout.ids(index).start in part]
        self._require_student(part)
        require_space(self.folder.path, self.images(self.missing), layout.image_size, layout.image_format)
        if part.start == 0:
            if self.plan and self.plan.needs:
                self.say(self.plan.describe())
            self.say(self._begins())
        started, watch = time.perf_counter(), Watch(self.images(own), progress)
        out, tells = self.folder.path, rank.first and bool(own)
        facts = {} if self._student is None else {"student": self._student}
        with Logs(out, self.whole, logging or LoggingConfig(), layout.settings, tells) as logs:
            shards = ShardLog(out, layout.class_names, logs)
            for index in own:
                self._take_up()
                begun, samples = time.perf_counter(), []
                for sample in self._samples(layout.ids(index), watch.part):
                    samples.append(sample)
                    watch.add(len(sample))
                images = torch.cat([sample.images for sample in samples])
                records = [record for sample in samples for record in sample.records]
                seconds = time.perf_counter() - begun
                pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
                learned = self.carried.save(index) if self.carried else {}
                self.folder.write(index, pixels, records, seconds, {**facts, **learned})
                if self.carried:
                    self.carried.forget_before(index)
                if rank.first:
                    shards.add(self.whole + watch.done, images, records, seconds)
        self.own, self.whole = [index for index in self.own if index not in own], self.whole + self.images(own)
        if rank.count > 1:
            self.folder.wait_for_others()
        made = [index for index in self.missing if layout.ids(index).start in part]
        whole = -(-len(part) // layout.shard_size) - len(made)
        seconds, self._prepared = time.perf_counter() - started + self._prepared, 0.0
        return Written(self.images(made), len(made), whole, seconds)

    def _take_up(self) -> None:
        """Put a method that learns into the state before the first shard to be made, once."""
        if not self._taken_up and self.carried is not None:
            self.carried.take_up(self.own[0])
        self._taken_up = True

    def _require_student(self, part: range) -> None:
        """Raise UsageError where a shard of these ids that is there is of another student."""
        for index in range(self.folder.layout.shard_count()):
            entry = self.folder.entry(index)
            there = bool(entry) and index not in self.missing and entry["first_id"] in part
            if there and entry.get("student") != self._student:
                what = f"{self.folder.path / entry['file']} was made against the student {entry.get('student')}"
                raise UsageError(what, f"that of these images is {self._student} now", "choose another --out")

    def _begins(self) -> str:
        layout, rank = self.folder.layout, self.folder.rank
        size, group = layout.image_size, self.synthesizer.group
        groups = f", groups of {group}" if group > 1 else ""
        begun = "" if self.plan else ", as the folder was begun"
        shared = f"; {rank.count} processes, {self.images(self.own)} images of the first" if rank.count > 1 else ""
        return (
            f"{layout.count} images of {size}x{size}, {self.images(self.missing)} to make: calls of {self.call_size}"
            f"{groups}, {self.folder.run['threads']} threads{begun}{shared}"
        )

    def _samples(self, ids: range, watch: Callable[[float], object]) -> Iterator[Sample]:
        """The images of a shard: calls of whole groups, the last one smaller where the shard ends.

        watch: gets the images of a call that are done, in parts, as far as the method tells.
        """
        group, start = self.synthesizer.group, ids.start
        while start < ids.stop:
            images = group if self.carried else images_of_call(self.synthesizer, self.call_size)
            sample = self._sampled(range(start, min(start + images, ids.stop)), watch)
            if sample is not None:
                start += len(sample)
                yield sample

    def _sampled(self, ids: range, watch: Callable[[float], object]) -> Sample | None:
        """The images of a call; None where memory was short, and the next call is to be smaller."""
        if hasattr(self.synthesizer, "call_size"):
            self.synthesizer.call_size = self.call_size
        if hasattr(self.synthesizer, "on_progress"):
            self.synthesizer.on_progress = lambda share: watch(share * len(ids))
        before = self.carried.copy() if self.carried else None
        try:
            with calling(self.synthesizer.name):
                return self.synthesizer(ids, seed=self.seed)
        except ShortMemory as error:
            network, why = error.network, error.why
        finally:
            if hasattr(self.synthesizer, "on_progress"):
                self.synthesizer.on_progress = None
        # here the error is gone, and with it the frames that hold the failed call's tensors
        release(getattr(self.synthesizer, "device", torch.device("cpu")))
        if self.carried is not None and before is not None:
            self.carried.restore(before)
        self._halve(network, why)
        return None

    def _halve(self, network: str, why: str) -> None:
        """Half the call size, in whole groups; a synthesizer with a call size of its own cuts groups too."""
        group = trajectories(self.synthesizer)
        least = 1 if hasattr(self.synthesizer, "call_size") else group
        if self.call_size <= least:
            what = f"a call of {network} runs out of memory with {least} image{'s' * (least > 1)}"
            todo = "take a lower --size, --dtype bf16 or fp16, a smaller --group, or a device with more memory"
            raise UsageError(what, why, todo)
        half = self.call_size // 2
        half = max(half - half % group if half > group else half, least)
        self.say(f"{network}: out of memory in calls of {self.call_size} images ({why}); again with {half}, recorded")
        self.call_size = half
        self.folder.record(call_size=min(half, int(self.folder.run["call_size"])))


def identity_of(synthesizer: Synthesizer, seed: int) -> dict[str, Any]:
    """What the images of a run follow from, in JSON's types: a folder takes no others.

    A synthesizer in a file of the user's own is told by its source too, and by its plain fields where it is a
    dataclass, so that a changed line or setting makes another run.
    """
    method = innermost(synthesizer)
    cls, found = type(method), {"method": method.name}
    if cls.__module__.partition(".")[0] != "dfkd":
        if is_dataclass(method):
            values = {field.name: getattr(method, field.name) for field in fields(method)}
            found |= {name: v for name, v in values.items() if v is None or isinstance(v, int | float | str | tuple)}
        found["source"] = described(cls)["source"]
        found |= {"settings": given} if (given := getattr(method, "method_settings", None)) else {}
    identity: dict[str, Any] = plain({**found, **synthesizer.identity(), "seed": seed})
    return identity


def run_on_record(out: Path) -> dict[str, Any]:
    """Call size, threads and engines that a folder has on record; {} of a new folder. Raises UsageError: damaged."""
    return dict(read_manifest(out)[0].run) if (out / MANIFEST).exists() else {}


def shard_size(synthesizer: Synthesizer, config: GenerateConfig, out: Path, call_size: int, part: int = 0) -> int:
    """Images a shard: as asked, as the folder has it, or about SHARD_IMAGES in whole calls of whole groups; with parts
    the most up to SHARD_IMAGES that they divide into.

    Raises UsageError: what is asked, or a part, is no multiple of the group; what is asked does not divide the parts.
    """
    group, asked = synthesizer.group, config.shards.shard_size
    if asked % group:
        why = f"{synthesizer.name} makes images in groups of {group}, and a shard holds whole ones"
        raise UsageError(f"--shard-size {asked} cannot be used", why, f"give a multiple of {group}")
    if part % group:
        why = f"{synthesizer.name} makes images in groups of {group}, and those of one are made against one student"
        raise UsageError(f"phases of {part} images cannot be used", why, "give a --group that divides a phase")
    if asked and part % asked:
        why = f"each phase has {part} images, and ends a shard"
        raise UsageError(f"--shard-size {asked} cannot be used", why, f"give a divisor of {part}, or leave it out")
    if not asked and (out / MANIFEST).exists():
        there = int(read_manifest(out)[0].shard_size)
        if part % there:
            what, why = f"{out} was begun with shards of {there} images", f"each phase has {part}, and ends a shard"
            raise UsageError(what, why, "go on with the rounds that it was begun with, or choose another --out")
        return there
    if part and not asked:
        sizes = (part // n for n in itertools.count(1) if part % (n * group) == 0)
        return next(size for size in sizes if size <= max(SHARD_IMAGES, group))
    unit = images_of_call(synthesizer, call_size)
    return asked or unit * -(-SHARD_IMAGES // unit)


def _silent(text: str) -> None:
    pass


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads on the CPU inside: their number decides the last bits of a sum.

    It is set also where it is the same: having it set keeps MKL from taking fewer by itself.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
