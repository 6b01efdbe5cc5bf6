"""Samples in, the verdicts of a model behind an HTTP address out: LLM-as-a-Judge.

Any server that speaks OpenAI's chat completions with pictures, or `transformers serve` with its probabilities of
levels. Verdicts are kept by content, model, prompt and parameters (judge_store.py), so an answer is paid for once, also
when the run is killed. What could not be judged has a state word and no number, and is not ranked:

- judge_unparsable: `judge.tries` replies held no verdict;
- judge_refused: the server did not take this request; judge_failed: it gave no answer as often as may be tried;
- image_unreadable.

Price: one request a sample; `account` counts its tokens. Trap: scores of text that strangers wrote are no security
boundary (judge_prompt.py); what seems to speak to the judge is flagged in `judge.parquet`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datalloy.config import Judge
from datalloy.display import shown
from datalloy.run import digest
from datalloy.sample import Sample
from datalloy.scorers.judge_client import ApiKey, CallError, JudgeClient
from datalloy.scorers.judge_prompt import UnreadableImageError, chat_request, is_suspect, levels_request
from datalloy.scorers.judge_reply import NoVerdictError, Reply, Usage, read_reply, read_verdict
from datalloy.scorers.judge_store import VERDICT, Answer, AnswerStore
from datalloy.scorers.rating import Ratings
from datalloy.scores import write_table

log = logging.getLogger(__name__)

PROMPT_VERSION = 1  # of the words in judge_prompt.py: other words are another question
TABLE_VERSION = 1
# Settings that an answer depends on, beside the sample.
ASKED = ("url", "model", "mode", "rubric", "levels", "structured", "parameters", "image_side", "top_logprobs")


class JudgeRater:
    """Asks the judge of `settings`, and keeps what it answers in the file `store`.

    `run`: what an answer that was drawn at random (a temperature other than 0) belongs to; it is data of that run and
    no other run reuses it.
    """

    def __init__(self, settings: Judge, store: Path, *, run: str) -> None:
        self.settings, self._store = settings, store
        self._run = "" if settings.parameters.get("temperature") == 0 else run
        self._key = ApiKey.from_environment(settings.api_key_env)

    def rate(self, samples: Sequence[Sample]) -> Ratings:
        by_key = {self.key(sample): sample for sample in samples}  # copies are asked for once
        with AnswerStore(self._store) as store:
            states = _run_to_end(self._judge_all(by_key, store))
            verdicts = {key: _verdict(store.answers(key)) for key in by_key}
        keys = [self.key(sample) for sample in samples]
        rating_N = np.array([np.nan if (v := verdicts[key]) is None else v.score for key in keys], dtype=float)
        state_N = np.array(["ok" if verdicts[key] else states[key] for key in keys], dtype=object)
        return Ratings(rating_N, state_N)

    def key(self, sample: Sample) -> str:
        """What an answer is kept by: the sample's content and everything that is asked about it."""
        settings = self.settings.model_dump(mode="json", include=set(ASKED))
        return digest([PROMPT_VERSION, self._run, settings, sample.content_hash])

    def account(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What the answers about these samples cost and how they came out, tries without a verdict included.

        Tokens are as the server counts them; `uncounted` answers came without a count. `cost` is in the currency of
        `judge.prices`.
        """
        keys = {self.key(sample) for sample in samples}
        with AnswerStore(self._store) as store:
            answers = [answer for key in keys for answer in store.answers(key)]
            without = sum(_verdict(store.answers(key)) is None for key in keys)
        if without:
            log.warning("%d of %d samples have no verdict of the judge and are not ranked", without, len(keys))
        tokens = {name: sum(getattr(a, name) or 0 for a in answers) for name in ("prompt_tokens", "completion_tokens")}
        served_by = dict(sorted(Counter(answer.served_by for answer in answers).items()))
        if len(served_by) > 1:
            log.warning("the judge was served by %d models or builds: %s", len(served_by), served_by)
        account = {
            "answers": len(answers),
            "outcomes": dict(sorted(Counter(answer.outcome for answer in answers).items())),
            **tokens,
            "uncounted": sum(answer.prompt_tokens is None for answer in answers),
            "flagged": sum(map(is_suspect, samples)),
            "served_by": served_by,
        }
        prices = self.settings.prices
        if prices is None:
            return account
        cost = tokens["prompt_tokens"] * prices.prompt + tokens["completion_tokens"] * prices.completion
        return account | {"cost": cost / 1e6}

    def write_details(self, path: Path, samples: Sequence[Sample]) -> None:
        """One row a sample: its score and the levels' probabilities, whether it is flagged, what the judge wrote."""
        rows = []
        with AnswerStore(self._store) as store:
            for sample in samples:
                answers = store.answers(self.key(sample))
                verdict = _verdict(answers)
                last = verdict or (answers[-1] if answers else None)
                rows.append(
                    {
                        "id": sample.id,
                        "domain": sample.domain,
                        "score": verdict.score if verdict else None,
                        "probabilities": verdict.probability_L if verdict else None,
                        "outcome": last.outcome if last else "not_answered",
                        "answers": len(answers),
                        "flagged": is_suspect(sample),
                        "text": last.text if last else None,
                    }
                )
        schema = pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("domain", pa.string(), nullable=False),
                pa.field("score", pa.float64()),
                pa.field("probabilities", pa.list_(pa.float64())),
                pa.field("outcome", pa.string(), nullable=False),
                pa.field("answers", pa.int64(), nullable=False),
                pa.field("flagged", pa.bool_(), nullable=False),
                pa.field("text", pa.string()),
            ]
        )
        table = pa.Table.from_pylist(rows, schema=schema)
        write_table(path, table, kind="judge answers", version=TABLE_VERSION, metadata={"levels": self.settings.levels})

    async def _judge_all(self, by_key: dict[str, Sample], store: AnswerStore) -> dict[str, str]:
        """Ask for what is not in the store yet, `max_concurrency` at a time. The state words of what has no verdict."""
        states = dict.fromkeys(by_key, "judge_unparsable")
        waiting = (key for key in by_key if _verdict(store.answers(key)) is None)
        async with JudgeClient(self.settings, self._key) as client:
            slots = [self._slot(waiting, by_key, states, store, client) for _ in range(self.settings.max_concurrency)]
            # a slot that is stopped does not stop the others: what they asked for is being paid for, and is awaited
            ends = await asyncio.gather(*slots, return_exceptions=True)
        for end in ends:
            if end is not None:
                raise end
        return states

    async def _slot(
        self,
        waiting: Iterator[str],
        by_key: dict[str, Sample],
        states: dict[str, str],
        store: AnswerStore,
        client: JudgeClient,
    ) -> None:
        for key in waiting:
            try:
                await self._judge(key, by_key[key], store, client)
            except CallError as error:
                states[key] = error.state
                log.warning("sample %s of %s is not judged: %s", shown(by_key[key].id), by_key[key].domain, error)
            except UnreadableImageError as error:
                states[key] = "image_unreadable"
                log.warning("sample %s of %s is not judged: %s", shown(by_key[key].id), by_key[key].domain, error)
            except BaseException as error:
                client.stop(error)  # what cannot be kept is not asked for
                raise

    async def _judge(self, key: str, sample: Sample, store: AnswerStore, client: JudgeClient) -> None:
        """Ask until there is a verdict or no try is left. Each answer is on disk before anything else is asked."""
        tried = len(store.answers(key))
        if tried >= self.settings.tries:
            return
        build = levels_request if self.settings.mode == "systemone" else chat_request
        body = await asyncio.to_thread(build, sample, self.settings)
        for number in range(tried, self.settings.tries):
            answer = self._read(await client.ask(body, f"{key}-{number}"))
            store.add(key, answer)
            if answer.outcome == VERDICT:
                return

    def _read(self, data: bytes) -> Answer:
        """A reply as it is kept, with a verdict or the word for why there is none."""
        reply, verdict, outcome = Reply({}, Usage(), "", ""), None, VERDICT
        try:
            reply = read_reply(data)
            verdict = read_verdict(reply, self.settings.mode, len(self.settings.levels))
        except NoVerdictError as error:
            outcome = error.reason
        return Answer(
            outcome=outcome,
            score=verdict.score if verdict else None,
            probability_L=verdict.probability_L if verdict else None,
            text=verdict.text if verdict else reply.excerpt,
            served_by=reply.served_by,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
        )


def _verdict(answers: Sequence[Answer]) -> Answer | None:
    """The first answer with a verdict: a later one was not wanted, and changes nothing."""
    return next((answer for answer in answers if answer.outcome == VERDICT), None)


def _run_to_end(work: Coroutine[Any, Any, dict[str, str]]) -> dict[str, str]:
    """The result of asynchronous work, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
