"""Files in, samples that a model can be trained on out; what is refused stands in a file with its reason.

Samples are gone through once, and seventeen bytes of each are noted: where it stands, how long it is, and what tells
whether another may say the same. Leaks and duplicates are looked for among the few that this marks.
"""

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datalloy import accounts, leakage, readers
from datalloy.errors import DataError, LeakageError
from datalloy.progress import track
from datalloy.readers import Reject, Samples
from datalloy.run import Run, write_atomically, write_json
from datalloy.sample import Sample, has_further_frames
from datalloy.scores import read_table, write_table
from datalloy.vlm import VLM, EncodeError, TokenCounts

log = logging.getLogger(__name__)

LENGTHS = "lengths.parquet"
MIN_TARGET_ITEMS = 8


class Checked(NamedTuple):
    counts: dict[str, Any]  # what `check.json` says
    pool: Samples  # all usable samples, sorted by domain and id
    targets: dict[str, Samples]
    evaluation: dict[str, Samples]


class _LookedAt:
    """What `check` sees of the samples of one set while it goes through them: seventeen bytes of each."""

    def __init__(self, sieve: leakage.Sieve) -> None:
        self.sieve = sieve
        self.positions = array("I")
        self.further_frames = 0  # samples that show pictures with further frames or pages, which nobody will see
        self._tokens = array("I")
        self._is_kept_N: np.ndarray | slice = slice(None)

    def add(self, position: int, sample: Sample, counts: TokenCounts) -> None:
        self.positions.append(position)
        self._tokens.extend(counts)
        self.sieve.add(sample)
        self.further_frames += any(map(has_further_frames, sample.images))

    def keep(self, is_kept_N: np.ndarray) -> None:
        """Leave the others out of what is told from now on."""
        self._is_kept_N = is_kept_N

    @property
    def tokens_N2(self) -> np.ndarray:
        """Supervised tokens and all tokens of each sample."""
        return np.array(self._tokens, dtype=np.int64).reshape(-1, 2)[self._is_kept_N]

    @property
    def key_N(self) -> np.ndarray:
        return self.sieve.key_N[self._is_kept_N]


class Checking:
    """The first stage of one run, done when its outcome is first asked for.

    `load_proxy` gives the model that counts tokens; it is not asked where the run has a record of this stage. Raises
    DataError over the error budget or where a set is too small, LeakageError when a target or evaluation item is in the
    pool.
    """

    def __init__(self, run: Run, load_proxy: Callable[[], VLM]) -> None:
        self.run, self.recipe, self._load_proxy = run, run.recipe, load_proxy

    def lengths(self) -> pa.Table:
        """Of each sample of the pool: id, domain, supervised_tokens, length_tokens."""
        _ = self.outcome  # done now, if it was not
        return read_table(self.run.path(LENGTHS), kind="lengths", version=1)[0]

    @cached_property
    def outcome(self) -> Checked:
        sets, rejects = self._read_all()
        read = {key: len(sets[key]) + len(rejects[key]) for key in sets}
        done = self.run.finished("check")
        if done is None:
            looked_at = self._refuse_unusable(sets, rejects)
            self._refuse_leaks(sets, rejects, looked_at)
            rejected_at = {key: [[str(reject.path), reject.row] for reject in bad] for key, bad in rejects.items()}
            lines = [
                json.dumps({"set": key, **asdict(reject), "path": str(reject.path)}) + "\n"
                for key, bad in rejects.items()
                for reject in bad
            ]
            write_atomically(self.run.path("rejected.jsonl"), "".join(lines).encode())
        else:
            sets = _without(sets, done["rejected_at"])
        digest = _digest(sets.values())
        if done is None:
            further_frames = {key: looked.further_frames for key, looked in looked_at.items()}
            counts = self._count(sets, rejects, read, looked_at) | {"first_frame_only": further_frames}
            write_json(self.run.path("check.json"), counts)
            self._refuse_over_budget(counts)
            self._write_lengths(sets, looked_at)
            files = [self.run.path(name) for name in ("check.json", "rejected.jsonl", LENGTHS)]
            done = self.run.commit("check", files, {"counts": counts, "digest": digest, "rejected_at": rejected_at})
        kept = self._by_section(sets)
        self._refuse_changed(done["digest"], digest)
        pool = Samples.joined(kept["domains"][name].by_id() for name in sorted(kept["domains"]))
        return Checked(done["counts"], pool, kept["targets"], kept["evaluation"])

    def _refuse_changed(self, before: str, now: str) -> None:
        if before != now:
            raise DataError(
                f"the pictures or texts of {self.recipe.name} changed since {self.run.folder} was started, under the "
                "same file names; put them back, or start a new run with --run"
            )

    def verify_inputs(self) -> None:
        """Raise RunError or DataError where data, pictures or models are not what the run was computed from."""
        self.run.verify_inputs()
        done = self.run.finished("check") or {}
        kept = _without(self._read_all()[0], done["rejected_at"])
        self._refuse_changed(done["digest"], _digest(kept.values()))

    def _read_all(self) -> tuple[dict[str, Samples], dict[str, list[Reject]]]:
        """Samples and rejects by set: `SECTION.NAME`, because a target may have the name of a domain."""
        samples, rejects = {}, {}
        for section in accounts.SECTIONS:
            for name, source in getattr(self.recipe, section).items():
                key = f"{section}.{name}"
                samples[key], rejects[key] = readers.read_stored(source, name)
        return samples, rejects

    def _by_section(self, sets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What is known by set, by section and name."""
        return {
            section: {name: sets[f"{section}.{name}"] for name in getattr(self.recipe, section)}
            for section in accounts.SECTIONS
        }

    def _refuse_unusable(self, sets: dict[str, Samples], rejects: dict[str, list[Reject]]) -> dict[str, _LookedAt]:
        """Move what the model cannot be given from `sets` to `rejects`: too long, a picture that is none, ...

        Returns what was seen of the samples that are left.
        """
        guarded = {key: group for key, group in sets.items() if not key.startswith("domains.")}
        looked_at = {key: _LookedAt(leakage.Sieve({} if key in guarded else guarded)) for key in sets}
        total = sum(len(group) for group in sets.values())
        for key, position, sample, counts in track(self._token_counts(sets), "check", total):
            if isinstance(counts, EncodeError):
                rejects[key].append(_reject(sample, counts.reason, str(counts)))
            else:
                looked_at[key].add(position, sample, counts)
        for key, looked in looked_at.items():
            sets[key] = sets[key].take(np.array(looked.positions, dtype=np.int64))
            if looked.further_frames:
                log.warning(
                    "%s: of %d samples' animations and documents only the first frame is seen",
                    key,
                    looked.further_frames,
                )
        return looked_at

    def _token_counts(
        self, sets: Mapping[str, Samples]
    ) -> Iterator[tuple[str, int, Sample, TokenCounts | EncodeError]]:
        limit = self.recipe.train.max_tokens
        for key, group in sets.items():
            counted = self._load_proxy().count_tokens(group, max_tokens=limit)
            for position, (sample, counts) in enumerate(zip(group, counted, strict=True)):
                yield key, position, sample, counts

    def _write_lengths(self, sets: Mapping[str, Samples], looked_at: Mapping[str, _LookedAt]) -> None:
        """Keep the lengths of the pool, so that no sample is encoded a second time only to be counted."""
        keys = [f"domains.{name}" for name in self.recipe.domains]
        pool = Samples.joined(sets[key] for key in keys)
        tokens_N2 = np.concatenate([looked_at[key].tokens_N2 for key in keys])
        columns = {
            "id": pool.ids().cast(pa.string()),
            "domain": pool.domains().cast(pa.string()),
            "supervised_tokens": tokens_N2[:, 0],
            "length_tokens": tokens_N2[:, 1],
        }
        write_table(self.run.path(LENGTHS), pa.table(columns), kind="lengths", version=1, metadata={})

    def _refuse_leaks(
        self, sets: dict[str, Samples], rejects: dict[str, list[Reject]], looked_at: Mapping[str, _LookedAt]
    ) -> None:
        """Move leaked samples of the pool from `sets` to `rejects`. Raises LeakageError where the recipe says so."""
        kept = self._by_section(sets)
        leaked: dict[str, set[str]] = {}
        suspects = [s for key, looked in looked_at.items() for s in sets[key].take(looked.sieve.is_suspect_N)]
        for sample, reject in self._leaks(suspects, kept["targets"], kept["evaluation"]):
            key = f"domains.{sample.domain}"
            leaked.setdefault(key, set()).add(sample.id)
            rejects[key].append(reject)
        for key, ids in leaked.items():
            is_kept_N = np.fromiter((sample.id not in ids for sample in sets[key]), bool, len(sets[key]))
            sets[key] = sets[key].take(is_kept_N)
            looked_at[key].keep(is_kept_N)

    def _leaks(
        self, samples: Sequence[Sample], targets: Mapping[str, Samples], evaluation: Mapping[str, Samples]
    ) -> list[tuple[Sample, Reject]]:
        guarded = {
            **{f"targets.{k}": v for k, v in targets.items()},
            **{f"evaluation.{k}": v for k, v in evaluation.items()},
        }
        distance = self.recipe.leakage.image_distance
        leaks = leakage.find_leaks(samples, guarded, image_distance=distance)
        shared = leakage.find_leaks([s for g in targets.values() for s in g], evaluation, image_distance=distance)
        if not leaks and not shared:
            return []
        policy = self.recipe.leakage.on_leak
        if policy == "error":
            raise LeakageError(
                f"{leakage.describe([*leaks, *shared])}\n"
                "A sample that is also a target gets the highest utility and every figure after it is worthless. "
                "Remove these rows, or set leakage.on_leak: drop to leave out the pool's copies"
            )
        log.warning("%s", leakage.describe([*leaks, *shared]))
        if policy == "allow":
            return []
        # an evaluation item that is also a target stays: what to drop would be the user's choice of sets
        found = {(leak.pool_domain, leak.pool_id): leak for leak in leaks}
        return [
            (s, _reject(s, "leak", f"also in {found[s.domain, s.id].set_name}"))
            for s in samples
            if (s.domain, s.id) in found
        ]

    def _count(
        self,
        sets: Mapping[str, Samples],
        rejects: Mapping[str, list[Reject]],
        read: Mapping[str, int],
        looked_at: Mapping[str, _LookedAt],
    ) -> dict[str, Any]:
        kept = self._by_section(sets)
        books = {
            key: {"read": read[key], "accepted": len(group), "rejected": len(rejects[key])}
            for key, group in sets.items()
        }
        reasons = Counter(reject.reason for bad in rejects.values() for reject in bad)
        return {
            **{section: {name: len(group) for name, group in groups.items()} for section, groups in kept.items()},
            "rejected": reasons.total(),
            "rejected_by_reason": dict(sorted(reasons.items())),
            "sets": self._by_section(books),
            "duplicates": leakage.count_duplicates(
                self._repeated(kept["domains"], looked_at), image_distance=self.recipe.leakage.image_distance
            ),
        }

    def _repeated(self, domains: Mapping[str, Samples], looked_at: Mapping[str, _LookedAt]) -> list[Sample]:
        """Samples of the pool that may say what another says."""
        keys = [looked_at[f"domains.{name}"].key_N for name in domains]
        pool = Samples.joined(domains.values())
        return list(pool.take(leakage.is_repeated(np.concatenate(keys))))

    def _refuse_over_budget(self, counts: dict[str, Any]) -> None:
        allowed = self.recipe.max_rejected_fraction
        for section in accounts.SECTIONS:
            for name, source in getattr(self.recipe, section).items():
                kept, bad = counts[section][name], counts["sets"][section][name]["rejected"]
                if kept == 0:
                    raise DataError(
                        f"{section}.{name} ({source.path}) has no usable sample; see {self.run.path('rejected.jsonl')}"
                    )
                if bad > allowed * (kept + bad):
                    raise DataError(
                        f"{section}.{name} ({source.path}): {bad} of {kept + bad} records were rejected, "
                        f"max_rejected_fraction is {allowed}. Reasons: {counts['rejected_by_reason']}; every record "
                        f"is in {self.run.path('rejected.jsonl')}"
                    )
        for name in self.recipe.targets:
            if counts["targets"][name] < MIN_TARGET_ITEMS:
                raise DataError(
                    f"targets.{name} has {counts['targets'][name]} items, at least {MIN_TARGET_ITEMS} are needed to "
                    "tell a utility from noise; about 100 are recommended"
                )


def _without(sets: Mapping[str, Samples], rejected_at: Mapping[str, list[list[Any]]]) -> dict[str, Samples]:
    """The samples of every set that do not stand at the rejected rows of the set's files."""
    left = {}
    for key, group in sets.items():
        bad = {(path, row) for path, row in rejected_at[key]}
        origins = (sample.origin for sample in group)
        is_left_N = np.fromiter(((str(o.path), o.row) not in bad for o in origins), bool, len(group)) if bad else None
        left[key] = group if is_left_N is None else group.take(is_left_N)
    return left


def _reject(sample: Sample, reason: str, detail: str) -> Reject:
    origin = sample.origin
    return Reject(origin.path, origin.row, origin.line, sample.id, reason, detail)


def _digest(sets: Iterable[Samples]) -> str:
    """One hash over the content of all samples, in the order of set name, id and content."""
    digest = hashlib.sha256()
    by_name: dict[str, list[Samples]] = {}
    for group in sets:
        if len(group):
            by_name.setdefault(group[0].domain, []).append(group)
    for name in sorted(by_name):
        group = Samples.joined(by_name[name])
        hashes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(group), [None, pa.py_buffer(group.hashes())])
        keys = pa.table({"id": group.ids(), "content": hashes})
        for s in group.take(pc.sort_indices(keys, [("id", "ascending"), ("content", "ascending")]).to_numpy()):
            digest.update(f"{name} {s.id} {s.content_hash}\n".encode())
    return digest.hexdigest()
