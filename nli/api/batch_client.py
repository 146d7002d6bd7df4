"""The calls to Mistral's file and batch endpoints, through the official client: what may be repeated is, what may not be is said to be unanswered.

    client = BatchClient("https://api.mistral.ai", key)
    file_id = client.upload(Path("nli-5c0f.requests.jsonl"))
    job_id = client.create_job(file_id, "ministral-8b-2512", "5c0f…", timeout_hours=24)        raises Unanswered: the job may be there all the same
    client.find_job("5c0f…", since=1_760_000_000.0)                                            the job that was made for this batch, or None
    client.get_job(job_id).status                                                              QUEUED, RUNNING, SUCCESS, …

Every error is a TeacherError that says what to do, or Unanswered.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from nli.api.chat import KEY_VARIABLE
from nli.runtime.errors import TeacherError
from nli.runtime.files import write_atomic

if TYPE_CHECKING:
    from mistralai.client.models import BatchJob

METADATA_KEY = "nli_batch"
ENDPOINT = "/v1/chat/completions"
ORPHAN_WAITS = (0.0, 1.0, 3.0)  # seconds before each look for a job whose making was interrupted: a list may lag behind
PAGE_SIZE = 100
CALL_SECONDS = 600  # for one call; uploads and downloads are large
RETRY_SECONDS = 0.5  # before the first repetition, doubled for each further one
LONGEST_RETRY_SECONDS = 60.0
MOST_TRIES = 6
MOST_POLLS = (
    15  # tries of one look at a job, some ten minutes: a job runs for hours, and an outage is no reason to give up
)


class Unanswered(Exception):
    """No usable answer came to a call that must not be repeated blindly."""


class JobRefused(TeacherError):
    """The server will not make this job."""


class BatchClient:
    """One account's files and jobs. Not thread-safe."""

    def __init__(self, base_url: str, api_key: str) -> None:
        from mistralai.client import Mistral

        self.server = base_url.rstrip("/").removesuffix("/v1")
        self._key = api_key
        self._client = Mistral(api_key=api_key, server_url=self.server, timeout_ms=1000 * CALL_SECONDS)

    def upload(self, path: Path) -> str:
        """The id of the file at the server; one that is there already, from an upload whose answer was lost, is taken."""

        def find() -> str | None:
            found = self._client.files.list(search=path.name, purpose="batch").data
            return next(
                (file.id for file in found if file.filename == path.name and file.size_bytes == path.stat().st_size),
                None,
            )

        def send() -> str:
            with open(path, "rb") as file:
                return self._client.files.upload(file={"file_name": path.name, "content": file}, purpose="batch").id

        return self._try(find) or self._try(send)

    def create_job(self, file_id: str, model: str, batch_id: str, timeout_hours: int) -> str:
        """Make a job, with one call. Raises Unanswered, or JobRefused if there is none for sure."""
        values = {"model": model, "metadata": {METADATA_KEY: batch_id}, "timeout_hours": timeout_hours}
        try:
            return self._client.batch.jobs.create(endpoint=ENDPOINT, input_files=[file_id], **values).id
        except _failures() as error:
            if _status_of(error) in (400, 404, 413, 422):
                raise JobRefused(
                    f"{self.server} refuses the batch job ({self._describe(error)}). Check --model; replies are kept."
                ) from None
            self._raise_if_hopeless(error)
            raise Unanswered(self._describe(error)) from None

    def find_job(self, batch_id: str, since: float) -> str | None:
        """The job that carries a batch's id. The client's filter by metadata is no documented parameter of the API, so all jobs since then are looked at."""
        after = datetime.fromtimestamp(since, UTC) - timedelta(days=1)  # the server's clock is another
        for wait in ORPHAN_WAITS:
            time.sleep(wait)
            page, found = 0, [None] * PAGE_SIZE
            while len(found) == PAGE_SIZE:
                found = (
                    self._try(
                        lambda page=page: (
                            self._client.batch.jobs.list(page=page, page_size=PAGE_SIZE, created_after=after).data
                        )
                    )
                    or []
                )
                for job in found:
                    if isinstance(job.metadata, dict) and job.metadata.get(METADATA_KEY) == batch_id:
                        return job.id
                page += 1
        return None

    def get_job(self, job_id: str) -> "BatchJob | None":
        """How a job stands; None if the server does not know it any more."""
        return self._try(lambda: self._unless_gone(lambda: self._client.batch.jobs.get(job_id=job_id)), MOST_POLLS)

    def download(self, file_id: str, path: Path) -> bool:
        """Copy a file of results to `path`; False if the server has it no more."""

        def copy() -> bool:
            response = self._unless_gone(lambda: self._client.files.download(file_id=file_id))
            if response is None:
                return False

            def write(aside: Path) -> None:
                with open(aside, "wb") as file:
                    file.writelines(response.iter_bytes())

            write_atomic(path, write)
            return True

        return self._try(copy)

    @staticmethod
    def _unless_gone(call: Callable[[], object]) -> object:
        try:
            return call()
        except _failures() as error:
            if _status_of(error) in (404, 410):
                return None
            raise

    def _try(self, call: Callable[[], object], most_tries: int = MOST_TRIES) -> object:
        """The result of a call that may be repeated. Raises TeacherError when it keeps failing or cannot succeed."""
        attempt = 1
        while True:
            try:
                return call()
            except _failures() as error:
                self._raise_if_hopeless(error)
                if attempt == most_tries:
                    reason = f"{self.server} does not answer in {attempt} tries ({self._describe(error)})"
                    raise TeacherError(
                        f"{reason}. Nothing is lost; the same command goes on with its batch jobs."
                    ) from None
            pause(attempt)
            attempt += 1

    def _raise_if_hopeless(self, error: Exception) -> None:
        status = _status_of(error)
        if status in (401, 403):
            raise TeacherError(
                f"{self.server} refuses the API key (HTTP {status}). Check {KEY_VARIABLE}; batch jobs and replies are kept."
            ) from None
        if status in range(400, 500) and status not in (408, 425, 429):
            raise TeacherError(
                f"{self.server} refuses the call ({self._describe(error)}). Batch jobs and replies are kept."
            ) from None

    def _describe(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return text.replace(self._key, "***")[:300]


def pause(attempt: int) -> None:
    """Wait before another try."""
    time.sleep(min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2**attempt))


def _status_of(error: Exception) -> int | None:
    return getattr(error, "status_code", None)


def _failures() -> tuple[type[Exception], ...]:
    """What the official client raises when a call fails: a status, a reply that it cannot read, or its HTTP library's errors."""
    import httpx2
    from mistralai.client.errors import MistralError, NoResponseError

    return MistralError, NoResponseError, httpx2.RequestError
