"""Requests in, the bytes of replies out, over a network that fails in every way that networks do.

One request is tried again after what may pass (no connection, timeouts, cut bodies, 408, 409, 425, 429, 5xx), with
pauses that double and are drawn at random, at least as long as the server asks for. It has a total deadline, whatever
drips in meanwhile. A request that the server refuses for itself (400, 413, 422 ...) is not repeated. What concerns all
requests stops at once: a wrong key, a wrong address, a redirect, which is never followed, and a row of failures without
one success (the circuit breaker), so that an outage costs minutes and not a pool of samples without a score.

The key goes into one header and nowhere else. Proxies and credentials of the environment are not used.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from typing import Any, NoReturn

from datalloy.config import Judge
from datalloy.display import HIDDEN, shown
from datalloy.errors import EnvironmentFault, RecipeError
from datalloy.scorers.judge_reply import MAX_REPLY_BYTES

MAY_PASS = {408, 409, 425, 429}  # and every status from 500
CONCERNS_ALL = {401, 402, 403, 404, 405, 407, 410}
LONGEST_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
SHOWN_BYTES = 2000  # of a refusal that are looked at


class CallError(Exception):
    """One request came to nothing: refused by the server, or failed as often as it may. `state` is a state word."""

    def __init__(self, state: str, what: str) -> None:
        super().__init__(what)
        self.state = state


class MayPassError(Exception):
    """A status that another try may not meet."""


class ApiKey:
    """A key that shows itself to nobody."""

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def from_environment(cls, name: str | None) -> "ApiKey | None":
        """The key in the environment variable `name`. Raises RecipeError, without the value."""
        if name is None:
            return None
        value = os.environ.get(name, "").strip()
        if not value:
            raise RecipeError(f"judge.api_key_env names the environment variable {name}, which is not set")
        if not (value.isascii() and value.isprintable()):
            raise RecipeError(f"the environment variable {name} holds no key: it has characters that no key has")
        return cls(value)

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._value}"}

    def hidden_in(self, text: str) -> str:
        return text.replace(self._value, HIDDEN)

    def __repr__(self) -> str:
        return HIDDEN

    def __reduce__(self) -> Any:
        raise TypeError("a key is not written anywhere")


class JudgeClient:
    """Use it as an asynchronous context manager, inside one event loop."""

    def __init__(self, settings: Judge, key: ApiKey | None) -> None:
        self._settings, self._key = settings, key
        path = "systemone" if settings.mode == "systemone" else "chat/completions"
        self._url = f"{settings.url.rstrip('/')}/{path}"
        self._failures = 0  # in a row, of all slots together
        self._not_before = 0.0  # the server asked for a pause until then, on the monotonic clock
        self._stopped: BaseException | None = None

    async def __aenter__(self) -> "JudgeClient":
        try:
            import httpx2
        except ImportError:
            raise RecipeError("the judge needs an HTTP client; pip install 'datalloy[judge]'") from None
        self._transport_error = httpx2.TransportError
        self._http = httpx2.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            timeout=self._settings.timeout_seconds,
            limits=httpx2.Limits(max_connections=self._settings.max_concurrency),
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "datalloy"}
            | (self._key.headers() if self._key else {}),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, body: dict[str, Any], name: str) -> bytes:
        """The bytes of the reply to a request, at most one more than MAX_REPLY_BYTES.

        `name` is the same whenever the same request is tried again: servers that know idempotency keys bill it once.
        Raises CallError for this request, EnvironmentFault where no request can succeed.
        """
        content = json.dumps(body, ensure_ascii=True, allow_nan=False).encode()
        deadline = time.monotonic() + self._settings.deadline_seconds
        what = ""
        for attempt in range(self._settings.retries + 1):
            await self._pause(attempt, deadline, what)
            left = min(self._settings.timeout_seconds, deadline - time.monotonic())
            try:
                async with asyncio.timeout(left):
                    reply = await self._send(content, name)
            except MayPassError as error:
                what = str(error)
            except (TimeoutError, self._transport_error) as error:
                what = f"{type(error).__name__} within {left:.3g} s"
            else:
                self._failures = 0
                return reply
            self._count_failure(what)
        raise CallError("judge_failed", f"{self._settings.retries + 1} tries failed, the last by {what}")

    async def _pause(self, attempt: int, deadline: float, what: str) -> None:
        """Wait for what the server asked for, and longer with every try. Raises where the deadline comes first."""
        pause = 0.0
        if attempt:
            longest = min(self._settings.retry_seconds * 2 ** (attempt - 1), LONGEST_PAUSE)
            pause = random.uniform(longest / 2, longest)
        until = max(time.monotonic() + pause, self._not_before)
        if until >= deadline:
            raise CallError("judge_failed", f"no answer before judge.deadline_seconds; the last try ended by {what}")
        await asyncio.sleep(max(0.0, until - time.monotonic()))
        if self._stopped is not None:
            raise self._stopped

    async def _send(self, content: bytes, name: str) -> bytes:
        """One try."""
        async with self._http.stream("POST", self._url, content=content, headers={"Idempotency-Key": name}) as response:
            status = response.status_code
            limit = MAX_REPLY_BYTES if 200 <= status < 300 else SHOWN_BYTES
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > limit:
                    break
        if 200 <= status < 300:
            return bytes(data[: limit + 1])
        if 300 <= status < 400:
            self._stop(f"answers by {status}, a redirect, and none is followed; put the final address into judge.url")
        if status in CONCERNS_ALL:
            self._stop(f"answers by {status}: {self._excerpt(data)}. Check judge.url, judge.model and the key")
        if status not in MAY_PASS and status < 500:
            raise CallError("judge_refused", f"{status}: {self._excerpt(data)}")
        wanted = retry_after(response.headers.get("Retry-After"), time.time())
        self._not_before = max(self._not_before, time.monotonic() + wanted)
        raise MayPassError(f"status {status}")

    def _count_failure(self, what: str) -> None:
        self._failures += 1
        if self._failures >= self._settings.breaker_failures:
            self._stop(f"failed {self._failures} times in a row, the last time by {what}")

    def stop(self, error: BaseException) -> None:
        """All slots end, with this error, when they would send next."""
        self._stopped = self._stopped or error

    def _stop(self, what: str) -> NoReturn:
        raise EnvironmentFault(f"the judge at {self._settings.url} {what}. Answers so far are kept; run again to go on")

    def _excerpt(self, data: bytearray) -> str:
        text = bytes(data).decode("utf-8", "replace")
        return shown(self._key.hidden_in(text) if self._key else text)


def retry_after(value: str | None, now: float) -> float:
    """Seconds that the header Retry-After asks for, given in seconds or as a date; 0 for anything else."""
    if value is None:
        return 0.0
    if value.strip().isascii() and value.strip().isdigit() and len(value.strip()) < 10:
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
