"""Files and batch jobs of the benchmark's teacher, in the wire format that mistralai 3.7 speaks. Both outlive the clients that made them.

    POST /v1/files                       multipart: purpose=batch, file=@requests.jsonl  ->  {"id": "file-1", "num_lines": 3, …}
        {"custom_id": "3f…", "body": {"messages": [...], "max_tokens": 1024}}            one request a line
    POST /v1/batch/jobs                  {"endpoint", "input_files": ["file-1"], "model", "metadata", …}  ->  {"id": "job-1", "status": "QUEUED", …}
    GET  /v1/batch/jobs/job-1            QUEUED, then RUNNING, then how it ends: a job is looked at `polls` times before it has ended
    GET  /v1/files/file-2/content        {"id": "batch-job-1-0", "custom_id": "3f…", "response": {"status_code": 200, "body": {…completion…}}, "error": null}

A job's requests are billed when it ends, each once, at half the price. The results come in another order than the requests.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from benchmarks.delivery import reset
from benchmarks.replies import fraction_of, key_of, write_content

if TYPE_CHECKING:
    from benchmarks.teacher_server import TeacherServer

MOST_REQUESTS = 100_000
MOST_BYTES = 512 * 10**6
LIST_FILTERS = ("page", "page_size", "model", "agent_id", "created_after", "created_by_me", "status", "order_by")
ENDED = ("SUCCESS", "FAILED", "TIMEOUT_EXCEEDED", "CANCELLED")


@dataclass
class StoredFile:
    """A file that was uploaded, or written by a job."""

    id: str
    name: str
    data: bytes
    purpose: str = "batch"
    sample_type: str = "batch_request"
    source: str = "upload"
    is_expired: bool = False
    created_at: int = field(default_factory=lambda: int(time.time()))

    def describe(self) -> dict:
        """The file's card."""
        card = {
            "id": self.id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": self.purpose,
        }
        return card | {
            "sample_type": self.sample_type,
            "source": self.source,
            "num_lines": self.data.count(b"\n"),
            "deleted": False,
        }


@dataclass
class Job:
    """A batch job. `outcome` is how it will end."""

    id: str
    requests: list[dict]
    model: str
    metadata: Mapping[str, str]
    input_files: list[str]
    endpoint: str
    outcome: str
    status: str = "QUEUED"
    num_polls: int = 0
    output_file: str | None = None
    error_file: str | None = None
    num_succeeded: int = 0
    num_failed: int = 0
    created_at: int = field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None

    def describe(self) -> dict:
        """The job as the API shows it."""
        return {
            "id": self.id,
            "object": "batch",
            "input_files": self.input_files,
            "endpoint": self.endpoint,
            "model": self.model,
            "metadata": dict(self.metadata),
            "status": self.status,
            "errors": [{"message": "the job could not be run", "count": 1}] if self.status == "FAILED" else [],
            "output_file": self.output_file,
            "error_file": self.error_file,
            "created_at": self.created_at,
            "started_at": None if self.status == "QUEUED" else self.created_at,
            "completed_at": self.completed_at,
            "total_requests": len(self.requests),
            "completed_requests": self.num_succeeded + self.num_failed,
            "succeeded_requests": self.num_succeeded,
            "failed_requests": self.num_failed,
        }


class BatchEndpoints:
    """The files and jobs of one server."""

    def __init__(self, server: "TeacherServer", polls: int) -> None:
        self._server = server
        self._polls = polls
        self.forget()

    def forget(self) -> None:
        """Start with no file and no job."""
        self.files: dict[str, StoredFile] = {}
        self.jobs: dict[str, Job] = {}
        self._num_files = 0
        self._asked: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    def summarise(self) -> dict:
        """Jobs in order with how they stand, and the uploads."""
        jobs = [
            {"id": job.id, "status": job.status, "requests": len(job.requests), "metadata": dict(job.metadata)}
            for job in self.jobs.values()
        ]
        return {
            "jobs": jobs,
            "uploads": sum(file.source == "upload" for file in self.files.values()),
            "calls": dict(self._calls),
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Everything below /v1 but chat completions."""
        parts = request.path.strip("/").split("/")[1:]
        method = request.method
        self._calls[
            f"{method} {'/'.join(part if part in ('files', 'batch', 'jobs', 'content', 'cancel') else '*' for part in parts)}"
        ] += 1
        if parts == ["files"] and method == "POST":
            return await self._upload(request)
        if parts == ["files"] and method == "GET":
            return self._list_files(request)
        if parts[0] == "files" and len(parts) > 1:
            return self._handle_file(parts[1], method, parts[2:])
        if parts == ["batch", "jobs"]:
            return await self._create(request) if method == "POST" else self._list_jobs(request)
        if parts[:2] == ["batch", "jobs"] and len(parts) > 2:
            return self._handle_job(parts[2], method, parts[3:])
        return self._server.refuse(404, {"message": "no Route matched with those values"})

    async def _upload(self, request: web.BaseRequest) -> web.Response:
        form = {}
        async for part in await request.multipart():
            form[part.name] = (part.filename, bytes(await part.read()))
        if "file" not in form:
            return self._server.refuse(
                422, {"detail": [{"type": "missing", "loc": ["body", "file"], "msg": "Field required"}]}
            )
        name, data = form["file"]
        if len(data) > MOST_BYTES:
            return self._server.refuse(413, {"message": "the file is too large"})
        purpose = form.get("purpose", ("", b"fine-tune"))[1].decode()
        return web.json_response(self._store(name, data, purpose=purpose).describe())

    def _store(self, name: str, data: bytes, **values: str) -> StoredFile:
        self._num_files += 1
        file = StoredFile(f"file-{self._num_files}", name, data, **values)
        self.files[file.id] = file
        return file

    def _list_files(self, request: web.BaseRequest) -> web.Response:
        query = request.query
        found = [
            file
            for file in reversed(self.files.values())
            if query.get("search", "") in file.name and query.get("purpose", file.purpose) == file.purpose
        ]
        page, size = int(query.get("page", 0)), int(query.get("page_size", 100))
        cards = [file.describe() for file in found[page * size : (page + 1) * size]]
        return web.json_response({"data": cards, "object": "list", "total": len(found)})

    def _handle_file(self, file_id: str, method: str, rest: list[str]) -> web.Response:
        file = self.files.get(file_id)
        if file is None or (file.is_expired and rest == ["content"]):
            return self._server.refuse(404, {"message": f"File {file_id} not found"})
        if rest == ["content"] and method == "GET":
            return web.Response(body=file.data, content_type="application/octet-stream")
        if method == "DELETE":
            del self.files[file_id]
            return web.json_response({"id": file_id, "object": "file", "deleted": True})
        return web.json_response(file.describe())

    async def _create(self, request: web.BaseRequest) -> web.Response:
        body = await request.json()
        missing = [file_id for file_id in body.get("input_files") or [] if file_id not in self.files]
        if (
            missing
            or not body.get("input_files")
            or not body.get("model")
            or body.get("endpoint") != "/v1/chat/completions"
        ):
            return self._server.refuse(
                422,
                {
                    "detail": f"a job needs a model, /v1/chat/completions and input files that exist (missing: {missing})"
                },
            )
        try:
            requests = [
                json.loads(line)
                for file_id in body["input_files"]
                for line in self.files[file_id].data.splitlines()
                if line.strip()
            ]
        except ValueError as error:
            return self._server.refuse(422, {"detail": f"a line of the input is not JSON: {error}"})
        ids = {request.get("custom_id") for request in requests}
        if len(requests) > MOST_REQUESTS or len(ids) != len(requests) or None in ids:
            return self._server.refuse(
                422, {"detail": f"a job has at most {MOST_REQUESTS} requests, each with a custom_id of its own"}
            )
        outcomes = self._server.settings.faults.batch_jobs
        outcome = outcomes[len(self.jobs)] if len(self.jobs) < len(outcomes) else "SUCCESS"
        job = Job(
            f"job-{len(self.jobs) + 1}",
            requests,
            body["model"],
            body.get("metadata") or {},
            body["input_files"],
            body["endpoint"],
            outcome,
        )
        self.jobs[job.id] = job
        if len(self.jobs) <= self._server.settings.faults.batch_lost_creates:
            return reset(request)
        return web.json_response(job.describe())

    def _list_jobs(self, request: web.BaseRequest) -> web.Response:
        """mistralai 3.7 sends a filter by metadata as one query parameter for each of its keys."""
        query = request.query
        wanted = {name: value for name, value in query.items() if name not in LIST_FILTERS}
        found = [job for job in reversed(self.jobs.values()) if wanted.items() <= job.metadata.items()]
        found = [job for job in found if "status" not in query or job.status in query.getall("status")]
        page, size = int(query.get("page", 0)), int(query.get("page_size", 100))
        return web.json_response(
            {
                "data": [job.describe() for job in found[page * size : (page + 1) * size]],
                "object": "list",
                "total": len(found),
            }
        )

    def _handle_job(self, job_id: str, method: str, rest: list[str]) -> web.Response:
        job = self.jobs.get(job_id)
        if job is None:
            return self._server.refuse(404, {"message": f"Job {job_id} not found"})
        if rest == ["cancel"] and method == "POST":
            if job.status not in ENDED:
                job.status, job.completed_at = "CANCELLED", int(time.time())
        elif job.status not in ENDED:
            job.num_polls += 1
            job.status = "RUNNING" if job.num_polls >= self._polls / 2 else "QUEUED"
            if job.num_polls >= self._polls:
                self._finish(job)
        return web.json_response(job.describe())

    def _finish(self, job: Job) -> None:
        """Answer a job's requests, as far as its outcome lets it, and bill them."""
        job.completed_at = int(time.time())
        job.status = "SUCCESS" if job.outcome == "EXPIRED" else job.outcome
        if job.status == "FAILED":
            return
        share = 1.0 if job.status == "SUCCESS" else 0.5
        lines: dict[str, list[str]] = {"output": [], "error": []}
        for number, request in sorted(
            enumerate(job.requests), key=lambda item: fraction_of("order", item[1]["custom_id"])
        ):
            custom_id = request["custom_id"]
            if share < 1 and fraction_of("reached", custom_id) >= share:
                continue
            self._asked[custom_id] += 1
            line = {"id": f"batch-{job.id}-{number}", "custom_id": custom_id, "response": None, "error": None}
            if self._server.settings.faults.fails_in_batch(custom_id, self._asked[custom_id]):
                message = {
                    "object": "error",
                    "message": "Service unavailable",
                    "type": "internal_server_error",
                    "code": "3000",
                }
                lines["error"].append(json.dumps(line | {"response": {"status_code": 500, "body": message}}))
                continue
            body = request["body"] | {"model": job.model}
            reply = self._server.charge(
                self._server.bill, None, key_of(body), body, write_content(body), half_price=True
            )
            lines["output"].append(json.dumps(line | {"response": {"status_code": 200, "body": json.loads(reply)}}))
        job.num_succeeded, job.num_failed = len(lines["output"]), len(lines["error"])
        for kind, sample_type in (("output", "batch_result"), ("error", "batch_error")):
            if lines[kind]:
                data = "".join(line + "\n" for line in lines[kind]).encode()
                file = self._store(f"{job.id}_{kind}.jsonl", data, sample_type=sample_type, source="mistral")
                file.is_expired = job.outcome == "EXPIRED"
                setattr(job, f"{kind}_file", file.id)
