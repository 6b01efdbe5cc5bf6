"""A model in memory in, its results by the tasks of lmms-eval out; nothing is saved or loaded between candidates.

lmms-eval takes a live object in the place of a model's name. This one answers with whatever weights the VLM holds when
it is asked, so a `Merge` is set to the next mixture and evaluated again: its tasks, 2,000 of which take half a minute
to index, are read once for all candidates of a process.

    merge, tasks = open_merge(base, experts), LmmsTasks(["chartqa"])
    for weight_K in candidates:
        results = tasks.evaluate(merge.set(weight_K))

Traps. lmms-eval's response cache knows a live model by nothing: it would answer the second candidate with the words of
the first. It is off, or lies in a folder of each mixture's own. Its multiple-choice tasks take the smallest number for
the likeliest choice, because its models return losses where the interface speaks of log-likelihoods; so does this one.
Answers are greedy: a task that wants to sample is refused. Some tasks switch on Pillow's LOAD_TRUNCATED_IMAGES for the
whole process, by which half a picture passes for a whole one; it is off where pictures are read here, and put back
behind every evaluation. Against a CPU build of torch, torchvision from PyPI does not
load, and lmms-eval, which does not need it, dies on importing it: uninstall it there.
"""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageFile
import torch

from datalloy.errors import DataError, EnvironmentFault, RecipeError
from datalloy.run import digest
from datalloy.sample import Origin, Part, Sample, Turn
from datalloy.vlm import VLM

BATCH_SIZE = 32
MAX_NEW_TOKENS = 1024  # where the task does not say, as in lmms-eval's own models
SAMPLING = {"do_sample": (None, False), "temperature": (None, 0, 0.0), "num_beams": (None, 1)}  # what greedy allows


class LmmsTasks:
    """Tasks of lmms-eval, indexed once.

    Args:
        tasks: names, as `lmms-eval tasks` lists them, or those of YAML files under `folder`.
        folder: of the user's own tasks; `own_only` leaves out the 2,000 that come with lmms-eval, to start at once.
        limit: only so many items of each task.

    Raises EnvironmentFault where lmms-eval is not installed, RecipeError for a task that it does not know.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        folder: Path | None = None,
        own_only: bool = False,
        batch_size: int = BATCH_SIZE,
        limit: int | None = None,
    ) -> None:
        with _truncated_images(None):
            _check_installed()
            from lmms_eval.tasks import TaskManager

            self._manager = TaskManager(include_path=folder and str(folder), include_defaults=not own_only)
        if unknown := sorted(set(tasks) - set(self._manager.all_tasks)):
            raise RecipeError(f"lmms-eval has no task {unknown[0]}; `lmms-eval tasks list` names what there is")
        self._tasks, self._batch_size, self._limit = list(tasks), batch_size, limit

    def evaluate(
        self, vlm: VLM, *, weights: Mapping[str, float] | None = None, response_cache: Path | None = None
    ) -> dict[str, Any]:
        """What `simple_evaluate` returns, samples included; `harness.read_aggregated` makes rows of the table of it.

        Args:
            response_cache: a folder for one set of experts. `weights`, the mixture that `vlm` holds, must then be
                given: each mixture has a cache of its own inside.
        """
        if response_cache is not None and weights is None:
            raise RecipeError("a response cache needs the weights of the mixture, by which its entries are told apart")
        used = response_cache and str(response_cache / digest(dict(weights or {}))[:16])
        with _truncated_images(None):
            from lmms_eval.evaluator import simple_evaluate

            return simple_evaluate(
                _live_class()(vlm, self._batch_size, is_cached=used is not None),
                tasks=self._tasks,
                task_manager=self._manager,
                use_cache=used,
                limit=self._limit,
                batch_size=self._batch_size,
            )


@contextmanager
def _truncated_images(allowed: bool | None) -> Iterator[None]:
    """Pillow's switch, for the whole process, set for a while, or with None left alone; afterwards as it was."""
    before = PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        if allowed is not None:
            PIL.ImageFile.LOAD_TRUNCATED_IMAGES = allowed
        yield
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = before


def _check_installed() -> None:
    try:
        import lmms_eval.api.model  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault(f"lmms-eval cannot be imported ({error}); pip install 'datalloy[lmms-eval]'") from error
    except RuntimeError as error:  # the PyPI wheel of torchvision beside another build of torch
        raise EnvironmentFault(
            f"lmms-eval cannot be imported: {error}. If this is about torchvision, it does not fit this build of "
            "torch: pip uninstall torchvision"
        ) from error


@cache
def _live_class() -> type:
    """The subclass that lmms-eval asks for; made when lmms-eval is there."""
    from lmms_eval.api.model import lmms

    class LiveModel(lmms):
        """Answers requests with the weights that a VLM holds at that moment."""

        is_simple = True

        def __init__(self, vlm: VLM, batch_size: int, *, is_cached: bool) -> None:
            super().__init__()
            self._vlm, self._batch_size, self._is_cached = vlm, batch_size, is_cached

        @property
        def device(self) -> torch.device:
            return self._vlm.device

        def clean(self) -> None:
            """Keep the weights: the next candidate is made of them."""

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [_asked(request.args, self.task_dict) for request in requests]
            by_length: dict[int, list[int]] = defaultdict(list)
            for i, one in enumerate(asked):
                by_length[one.max_new_tokens].append(i)
            answers = [""] * len(asked)
            for length, rows in by_length.items():
                samples = [asked[i].sample for i in rows]
                with _truncated_images(False):
                    written = self._vlm.generate(samples, max_new_tokens=length, batch_size=self._batch_size)
                for i, text in zip(rows, written, strict=True):
                    answers[i] = _cut(text, asked[i].until)
            return answers

        def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
            """Loss per token of each continuation, and whether the model would write just that."""
            from lmms_eval.api.instance import GenerationResult

            if self._is_cached:
                raise RecipeError(
                    f"{requests[0].task_name} scores choices, which lmms-eval's response cache cannot keep; evaluate "
                    "it without response_cache"
                )
            samples = [_continued(request.args, self.task_dict) for request in requests]
            with _truncated_images(False):
                encoded = [self._vlm.encode(sample) for sample in samples]
            losses: list[float] = []
            with torch.no_grad():
                for start in range(0, len(encoded), self._batch_size):
                    batch = self._vlm.collate(encoded[start : start + self._batch_size])
                    losses += self._vlm.losses(batch).tolist()
            longest = max(item.supervised_tokens for item in encoded)
            with _truncated_images(False):
                written = self._vlm.generate(samples, max_new_tokens=longest, batch_size=self._batch_size)
            is_greedy = [text == sample.answer for text, sample in zip(written, samples, strict=True)]
            # wrapped, because lmms-eval 0.7.3 makes text of any other pair and then cannot read it
            return [GenerationResult(pair) for pair in zip(losses, is_greedy, strict=True)]

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise DataError(
                f"{requests[0].task_name} asks in several rounds, which a live merge does not; write the merge with "
                "`datalloy merge` and evaluate that"
            )

    return LiveModel


@dataclass(frozen=True)
class _Picture:
    """A picture that a task holds in memory."""

    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class _Asked:
    """One request: what is asked, how long the answer may be, and what ends it."""

    sample: Sample
    max_new_tokens: int
    until: tuple[str, ...]


def _asked(args: tuple[Any, ...], documents: Mapping[str, Any]) -> _Asked:
    """From either form: (text, settings, visuals, ...), or (text, messages, settings, ...) of chat models."""
    text, *middle, doc_id, task, split = args
    settings, told = (middle[0], middle[1]) if isinstance(middle[0], Mapping) else (middle[1], middle[0])
    _refuse_sampling(task, settings)
    found = told(documents[task][split][doc_id])
    is_chat = not isinstance(middle[0], Mapping)
    turns = [_turn(m, task) for m in found] if is_chat else [Turn("user", (*_pictures(found, task), text))]
    until = settings.get("until") or ()
    return _Asked(
        _sample((*turns, Turn("assistant", ("",))), task, doc_id),
        int(settings.get("max_new_tokens") or MAX_NEW_TOKENS),
        (until,) if isinstance(until, str) else tuple(until),
    )


def _continued(args: tuple[Any, ...], documents: Mapping[str, Any]) -> Sample:
    text, target, visuals, doc_id, task, split = args
    document = documents[task][split][doc_id]
    answer = target if isinstance(target, str) else str(target(document))
    turns = (Turn("user", (*_pictures(visuals(document), task), text)), Turn("assistant", (answer.strip(),)))
    return _sample(turns, task, doc_id)


def _sample(turns: tuple[Turn, ...], task: str, doc_id: int) -> Sample:
    return Sample(f"{task}-{doc_id}", task, turns, Origin(Path(task), doc_id), "")


def _turn(message: Mapping[str, Any], task: str) -> Turn:
    parts: list[Part] = []
    content = message["content"]
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        parts += [block["text"]] if block["type"] == "text" else _pictures([block.get("url")], task)
    return Turn(message["role"], tuple(parts))


def _pictures(visuals: Sequence[Any] | None, task: str) -> list[_Picture]:
    pictures = []
    for visual in visuals or ():
        if isinstance(visual, str | Path) and Path(visual).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
            pictures.append(_Picture(Path(visual).read_bytes()))
        elif isinstance(visual, PIL.Image.Image):
            file = io.BytesIO()
            visual.save(file, "PNG")
            pictures.append(_Picture(file.getvalue()))
        else:
            raise DataError(f"{task} shows {type(visual).__name__} {visual!s:.60}; read are texts and pictures")
    return pictures


def _refuse_sampling(task: str, settings: Mapping[str, Any]) -> None:
    for key, allowed in SAMPLING.items():
        if settings.get(key) not in allowed:
            raise RecipeError(
                f"{task} asks for {key}: {settings[key]}; a live merge answers greedily, so that candidates differ by "
                "their weights alone. Set it otherwise in the task's generation_kwargs"
            )


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
