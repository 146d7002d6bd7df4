"""The batch and file endpoints of the benchmark's teacher, through the official client."""

import json

import pytest

from benchmarks.teacher_server import start_teacher_server

MODEL = "ministral-8b-2512"
ENDPOINT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def calm():
    with start_teacher_server(batch_polls=2) as server:
        yield server


@pytest.fixture
def server(calm):
    # Jobs stay for the server's life, so that the script's list of outcomes counts them from the first: this makes the next one the first.
    calm.change(faults={})
    calm.forget_batches()
    calm.reset_bill()
    return calm


@pytest.fixture
def client(server):
    from mistralai.client import Mistral

    with Mistral(api_key="any", server_url=server.base_url) as client:
        yield client


def _upload(client, ids, name="requests.jsonl"):
    bodies = [
        {"messages": [{"role": "user", "content": f"Premise: {name}\nHypothesis: it holds"}], "max_tokens": 256}
        for name in ids
    ]
    lines = [json.dumps({"custom_id": name, "body": body}) for name, body in zip(ids, bodies, strict=True)]
    return client.files.upload(file={"file_name": name, "content": "\n".join(lines).encode()}, purpose="batch")


def _create(client, file_id, **metadata):
    return client.batch.jobs.create(
        endpoint=ENDPOINT, input_files=[file_id], model=MODEL, metadata=metadata, timeout_hours=24
    )


def _finish(client, job):
    seen = [job.status]
    while job.status in ("QUEUED", "RUNNING"):
        job = client.batch.jobs.get(job_id=job.id)
        seen.append(job.status)
    return job, seen


def _read(client, file_id):
    return (
        {
            line["custom_id"]: line["response"]
            for line in map(json.loads, client.files.download(file_id=file_id).read().splitlines())
        }
        if file_id
        else {}
    )


def test_a_job_goes_through_its_states_and_its_results_are_billed_once_at_half_the_price(server, client):
    ids = [f"{number:02}" for number in range(30)]
    job = _create(client, _upload(client, ids).id, nli_batch="a")
    job, seen = _finish(client, job)
    assert seen == ["QUEUED", "RUNNING", "SUCCESS"]
    results = _read(client, job.output_file)
    assert (sorted(results), list(results) != ids, job.error_file) == (ids, True, None)
    assert {result["status_code"] for result in results.values()} == {200}
    assert json.loads(results["07"]["body"]["choices"][0]["message"]["content"])["predicted_label"] in (0, 1)
    _read(client, job.output_file)  # a second look costs nothing
    bill = server.bill()
    used = sum(result["body"]["usage"]["total_tokens"] for result in results.values())
    assert (bill["billed"], bill["distinct"], bill["requests"], bill["half_price_tokens"], bill["total_tokens"]) == (
        30,
        30,
        0,
        used,
        used,
    )
    assert bill["nanodollars"] == used * 75  # half of $0.15 a million
    assert (job.total_requests, job.succeeded_requests, job.failed_requests) == (30, 30, 0)


def test_some_requests_fail_the_first_time_that_they_are_asked(server, client):
    server.change(faults={"batch_rate": 0.3})
    ids = [f"{number:02}" for number in range(40)]
    job, _ = _finish(client, _create(client, _upload(client, ids).id))
    good, bad = _read(client, job.output_file), _read(client, job.error_file)
    assert good.keys() | bad.keys() == set(ids)
    assert not good.keys() & bad.keys()
    assert 4 <= len(bad) <= 20
    assert {response["status_code"] for response in bad.values()} == {500}
    again, _ = _finish(client, _create(client, _upload(client, sorted(bad)).id))
    assert (_read(client, again.output_file).keys(), again.error_file) == (bad.keys(), None)
    assert (server.bill()["billed"], server.bill()["repeated"]) == (40, 0)


def test_jobs_end_as_scripted_and_only_what_was_answered_is_billed(server, client):
    server.change(faults={"batch_jobs": ["FAILED", "TIMEOUT_EXCEEDED", "EXPIRED"]})
    from mistralai.client.errors import SDKError

    ids = [f"{number:02}" for number in range(20)]
    file_id = _upload(client, ids).id
    failed, _ = _finish(client, _create(client, file_id))
    assert (failed.status, failed.output_file, failed.errors[0].message) == ("FAILED", None, "the job could not be run")
    assert server.bill()["billed"] == 0
    late, _ = _finish(client, _create(client, file_id))
    num_late = len(_read(client, late.output_file))
    assert (late.status, 0 < num_late < 20, server.bill()["billed"]) == ("TIMEOUT_EXCEEDED", True, num_late)
    expired, _ = _finish(client, _create(client, file_id))
    assert (expired.status, server.bill()["billed"]) == ("SUCCESS", num_late + 20)
    with pytest.raises(SDKError) as caught:
        client.files.download(file_id=expired.output_file)
    assert caught.value.status_code == 404
    assert _finish(client, _create(client, file_id))[0].output_file


def test_jobs_and_files_are_found_again_by_a_client_that_did_not_make_them(server, client):
    from mistralai.client import Mistral

    file = _upload(client, ["1"], name="nli-x.jsonl")
    jobs = [_create(client, file.id, nli_batch=name) for name in ("a", "b")]
    with Mistral(api_key="any", server_url=server.base_url) as other:
        assert [job.id for job in other.batch.jobs.list().data] == [jobs[1].id, jobs[0].id]
        assert [job.id for job in other.batch.jobs.list(metadata={"nli_batch": "a"}).data] == [jobs[0].id]
        assert [job.id for job in other.batch.jobs.list(page=1, page_size=1).data] == [jobs[0].id]
        assert other.batch.jobs.list(status=["SUCCESS"]).data == []
        found = other.files.list(search="nli-x", purpose="batch").data
        assert [(card.id, card.size_bytes) for card in found] == [(file.id, file.size_bytes)]
        assert other.files.retrieve(file_id=file.id).num_lines == 0  # its only line has no line end
        assert other.batch.jobs.cancel(job_id=jobs[0].id).status == "CANCELLED"
        assert other.files.delete(file_id=file.id).deleted
        assert other.files.list().data == []


def test_a_job_without_its_input_or_with_a_repeated_id_is_refused(server, client):
    from mistralai.client.errors import SDKError

    with pytest.raises(SDKError, match="missing"):
        _create(client, "file-none")
    file_id = _upload(client, ["1", "1"]).id
    with pytest.raises(SDKError, match="custom_id of its own"):
        _create(client, file_id)
    assert server.bill()["batch"]["jobs"] == []
