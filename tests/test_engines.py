"""The transformers engine writes what plain transformers writes, whatever shares the batch, and loses no row to what breaks or does not fit."""

import threading

import pytest

from nli.data.pairs import read_examples
from nli.engines import interface as engines
from nli.engines.interface import Decoding, EngineSettings, Generation, Request, answer_all, choose_engine
from nli.runtime.errors import EngineDead, ModelError
from nli.task.parsing import parse_answer
from nli.task.prompts import render_completion, render_student_prompt
from tests.conftest import REPOSITORY, TINY_BASE
from tests.test_export import make_adapter

DECODING = Decoding(max_new_tokens=48)


def settings_of(**values) -> EngineSettings:
    defaults = {
        "base": TINY_BASE,
        "adapters": (),
        "precision": "fp32",
        "compute_dtype": "fp32",
        "decoding": DECODING,
        "batch_size": 8,
        "device": "cpu",
    }
    return EngineSettings(**(defaults | values))


@pytest.fixture
def build():
    """Builds engines, and closes them when the test ends."""
    from nli.engines.transformers.engine import TransformersEngine

    built = []

    def build_engine(**values) -> TransformersEngine:
        built.append(TransformersEngine(settings_of(**values)))
        return built[-1]

    yield build_engine
    for engine in built:
        engine.close()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [
        render_student_prompt(row["premise"], row["hypothesis"])
        for row in read_examples(REPOSITORY / "data/sample/test.csv")[:30]
    ]


@pytest.fixture(scope="module")
def requests(prompts) -> list[Request]:
    return [Request(prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def plain():
    """The tiny model in fp32 as transformers loads it, and its tokenizer."""
    from nli.models.load import load_base
    from nli.models.tokenizer import load_tokenizer

    return load_base(TINY_BASE, "none", "fp32", "cpu").eval(), load_tokenizer(TINY_BASE)


def generate(model, tokenizer, prompt: str, max_new_tokens: int) -> tuple[str, bool]:
    """transformers' own greedy answer to one prompt, alone."""
    from nli.models.tokenizer import encode_prompt
    from nli.training.watching import generate_greedily

    return generate_greedily(model, tokenizer, [encode_prompt(tokenizer, prompt)], max_new_tokens)[0]


def label_probability(model, tokenizer, prompt: str, text: str) -> float:
    """P(label 1) of a text that parses, by one forward pass over the whole of it in plain transformers."""
    import torch

    from nli.models.tokenizer import encode_example

    ids = [
        encode_example(tokenizer, prompt, text.replace(f"{label}}}", f"{other}}}")).input_ids
        for label in (0, 1)
        for other in (0, 1)
        if f"{label}}}" in text
    ]
    place = next(index for index, pair in enumerate(zip(*ids, strict=True)) if pair[0] != pair[1])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids[0][:place]])).logits[0, -1]
    return logits[[ids[0][place], ids[1][place]]].softmax(dim=-1)[1].item()


def texts(generations: list[Generation]) -> list[str | None]:
    return [generation.text for generation in generations]


def test_answers_are_those_of_plain_generate(build, plain, prompts, requests):
    generations = answer_all(build(), requests)
    for prompt, generation in zip(prompts, generations, strict=True):
        text, stopped = generate(*plain, prompt, 48)
        assert (generation.text, generation.finish_reason) == (text, "stop" if stopped else "length")
        assert len(plain[1].encode(prompt, add_special_tokens=False)) + 1 == generation.num_prompt_tokens
    assert {
        generation.finish_reason for generation in answer_all(build(decoding=Decoding(max_new_tokens=27)), requests)
    } == {"stop", "length"}


def test_neither_batch_size_nor_order_change_an_answer(build, requests):
    expected = answer_all(build(batch_size=30), requests)
    assert texts(answer_all(build(batch_size=1), requests)) == texts(expected)
    assert texts(answer_all(build(batch_size=7), requests[::-1]))[::-1] == texts(expected)
    engine = build(batch_size=7)
    engine.steps = 5  # as on a GPU: rows may write on after their end before anybody looks
    assert texts(answer_all(engine, requests)) == texts(expected)
    assert [one.probability for one in answer_all(engine, requests)] == pytest.approx(
        [one.probability for one in expected], abs=1e-4
    )


def test_rows_leave_when_they_end_and_others_take_their_slots(build, requests):
    engine = build(batch_size=8)
    lengths = [generation.num_completion_tokens for generation in answer_all(engine, requests)]
    figures = engine.figures()
    assert len(set(lengths)) > 3
    assert figures["step_rows"] == sum(length - 1 for length in lengths)  # the first token comes of reading the prompt
    in_fixed_batches = sum(max(lengths[start : start + 8]) - 1 for start in range(0, 30, 8))
    assert max(lengths) - 1 <= figures["steps"] < in_fixed_batches
    assert (figures["rows"], figures["completion_tokens"], figures["batch_size"]) == (30, sum(lengths), 8)


def test_a_row_is_resolved_when_it_ends_and_not_when_its_batch_does(build, requests):
    engine = build(batch_size=2)
    ended = []
    futures = [engine.submit(Request(requests[0].prompt, num_tokens=count)) for count in (400, 3)]
    for name, future in zip(("long", "short"), futures, strict=True):
        future.add_done_callback(lambda _, name=name: ended.append(name))
    assert [future.result().num_completion_tokens for future in futures] == [400, 3]
    assert ended == ["short", "long"]


def test_the_probability_is_that_of_plain_transformers(build, plain, prompts, requests):
    generations = answer_all(build(), requests)
    assert all(parse_answer(generation.text).fields for generation in generations)
    for prompt, generation in zip(prompts, generations, strict=True):
        assert generation.probability == pytest.approx(label_probability(*plain, prompt, generation.text), abs=1e-3)
        assert (generation.probability > 0.5) == parse_answer(generation.text).fields["predicted_label"]
    assert {
        generation.probability
        for generation in answer_all(build(decoding=Decoding(label_probability=False)), requests[:2])
    } == {None}


def test_without_a_thought_only_the_label_is_read(build, plain, prompts, requests):
    engine = build(decoding=Decoding(no_cot=True))
    generations = answer_all(engine, requests)
    for prompt, generation in zip(prompts, generations, strict=True):
        probability = label_probability(*plain, prompt, render_completion("", 1))
        assert generation.probability == pytest.approx(probability, abs=1e-3)
        assert generation.text == render_completion("", int(probability > 0.5))
    assert engine.figures()["steps"] == 0
    assert (generations[0].label_forced, generations[0].finish_reason, generations[0].num_completion_tokens) == (
        True,
        "stop",
        1,
    )


def test_a_text_that_cannot_be_read_gets_the_likelier_label_after_its_thought(build, plain, prompts, requests):
    generations = answer_all(build(decoding=Decoding(max_new_tokens=12, force_label=True)), requests)
    assert [generation.label_forced for generation in generations] == [True] * 30
    for prompt, generation in zip(prompts, generations, strict=True):
        thought = parse_answer(generation.text).fields["thought_process"]
        cut, _ = generate(*plain, prompt, 12)
        assert cut == render_completion(thought, 0)[: len(cut)] and generation.finish_reason == "length"
        assert generation.probability == pytest.approx(label_probability(*plain, prompt, generation.text), abs=1e-3)
    assert not any(
        generation.label_forced
        for generation in answer_all(build(decoding=Decoding(max_new_tokens=48, force_label=True)), requests[:5])
    )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_text_of_a_model_of_chance_gets_a_label(build, requests, temperature):
    import torch

    engine = build(decoding=Decoding(max_new_tokens=40, force_label=True, temperature=temperature))
    torch.manual_seed(5)
    with torch.no_grad():
        engine.model.lm_head.weight.normal_(std=0.3)
    generations = answer_all(engine, [*requests, Request(render_student_prompt("dog " * 420, "cats."))])
    assert [generation.problem for generation in generations] == [""] * 31
    assert {parse_answer(generation.text, generation.finish_reason).status for generation in generations} == {"ok"}
    assert all(0 <= generation.probability <= 1 for generation in generations)
    assert len({parse_answer(generation.text).fields["thought_process"] for generation in generations}) > 20


def test_a_sample_depends_on_its_seed_and_not_on_what_shares_the_batch(build, prompts):
    sampled = Decoding(max_new_tokens=48, temperature=1.0)
    requests = [Request(prompt, seed=seed) for prompt in prompts[:6] for seed in range(5)]
    expected = texts(answer_all(build(decoding=sampled, batch_size=30), requests))
    assert texts(answer_all(build(decoding=sampled, batch_size=4), requests[::-1]))[::-1] == expected
    engine = build(decoding=sampled, batch_size=1)
    engine.steps = 3
    assert texts(answer_all(engine, requests[:10])) == expected[:10]
    assert any(len(set(expected[start : start + 5])) > 1 for start in range(0, 30, 5))


def test_samples_are_drawn_as_often_as_the_softmax_says():
    import torch

    from nli.engines.transformers.rows import choose_tokens

    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    draws = torch.rand(20_000, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    tokens, _ = choose_tokens(logits, torch.arange(4), 0.7, draws)
    assert (torch.bincount(tokens, minlength=4) / 20_000).tolist() == pytest.approx(
        (logits[0] / 0.7).softmax(dim=0).tolist(), abs=0.01
    )
    for number, token in ((0.0, 0), (1 - 1e-17, 3)):
        assert (
            choose_tokens(logits[:1], torch.arange(4), 0.7, torch.tensor([number], dtype=torch.double))[0].item()
            == token
        )


def test_an_adapters_answers_are_those_of_plain_peft(build, prompts, requests, tmp_path):
    from nli.models.load import load_adapter, load_base
    from nli.models.tokenizer import load_tokenizer

    folder = str(make_adapter(tmp_path / "adapter", "none", 0.05))
    plain = load_adapter(load_base(TINY_BASE, "none", "fp32", "cpu"), folder).eval(), load_tokenizer(TINY_BASE)
    generations = answer_all(build(adapters=(folder,)), [Request(one.prompt, folder) for one in requests[:12]])
    for prompt, generation in zip(prompts, generations, strict=False):
        assert generation.text == generate(*plain, prompt, 48)[0]
        if parse_answer(generation.text).fields:
            assert generation.probability == pytest.approx(label_probability(*plain, prompt, generation.text), abs=1e-3)


def test_one_engine_serves_several_adapters_and_the_base(build, requests, tmp_path):
    folders = [str(make_adapter(tmp_path / str(scale), "none", scale)) for scale in (0.02, 0.1)]
    alone = [
        texts(answer_all(build(adapters=(folder,)), [Request(one.prompt, folder) for one in requests]))
        for folder in folders
    ]
    alone.append(texts(answer_all(build(), requests)))
    assert alone[0] != alone[1] != alone[2]
    mixed = [Request(one.prompt, adapter) for one in requests for adapter in (*folders, None)]
    together = texts(answer_all(build(adapters=tuple(folders)), mixed))
    assert [together[start::3] for start in range(3)] == alone


def test_out_of_memory_halves_the_batch_and_loses_no_row(build, requests, capsys, monkeypatch):
    import torch

    expected = texts(answer_all(build(batch_size=16), requests))
    engine = build(batch_size=16)
    forward = engine.model.forward

    def forward_of_little_room(input_ids, **values):
        if len(input_ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(input_ids=input_ids, **values)

    monkeypatch.setattr(engine.model, "forward", forward_of_little_room)
    assert texts(answer_all(engine, requests)) == expected
    assert engine.figures()["batch_size"] == 4
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("inference")] == [
        "inference: out of memory with 16 rows at once; going on with 8",
        "inference: out of memory with 8 rows at once; going on with 4",
    ]


@pytest.mark.parametrize("room", ["for half", "for none", "to move none"])
def test_out_of_memory_while_writing_keeps_what_still_fits(build, requests, monkeypatch, room):
    import torch

    decoding = Decoding(max_new_tokens=48, temperature=1.0)
    expected = texts(answer_all(build(decoding=decoding, batch_size=16), requests))
    engine = build(decoding=decoding, batch_size=16)
    engine.steps = 4
    step, calls = engine.slots.step, []

    def step_that_fails_once(tokens):
        calls.append(len(tokens))
        if len(calls) == 7:  # within four steps between two looks
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(tokens)

    def fail(*_):
        monkeypatch.undo()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine.slots, "step", step_that_fails_once)
    if room != "for half":
        monkeypatch.setattr(engine.slots, "fit" if room == "for none" else "keep", fail)
    assert texts(answer_all(engine, requests)) == expected
    assert engine.figures()["batch_size"] == 8
    assert room != "for half" or (calls[5:8] == [16, 16, 8] and max(calls[8:]) == 8)


def test_one_row_that_does_not_fit_alone_is_told(build, requests, monkeypatch):
    import torch

    engine = build()
    forward = engine.model.forward

    def forward_of_short_rows(input_ids, **values):
        if input_ids.shape[1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, **values)

    monkeypatch.setattr(engine.model, "forward", forward_of_short_rows)
    long = Request(render_student_prompt("dog " * 100, "cats."))
    generations = answer_all(engine, [*requests[:4], long, *requests[4:8]])
    assert generations[4].text is None and "does not fit into memory" in generations[4].problem
    assert [generation.problem for index, generation in enumerate(generations) if index != 4] == [""] * 8


def test_a_label_for_which_there_is_no_room_beside_a_row_is_read_when_that_has_ended(build, requests, monkeypatch):
    import torch

    engine = build(batch_size=1, decoding=Decoding(max_new_tokens=12, force_label=True))
    forward = engine.model.forward

    def forward_of_one(input_ids, use_cache, **values):
        if len(input_ids) + (0 if use_cache else len(engine.active)) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, use_cache=use_cache, **values)

    monkeypatch.setattr(engine.model, "forward", forward_of_one)
    futures = [engine.submit(request) for request in requests[:4]]
    assert [future.result(timeout=60).label_forced for future in futures] == [True] * 4


def test_no_more_labels_are_read_at_once_than_the_batch_has_rows(build, requests, monkeypatch):
    engine = build(batch_size=4, decoding=Decoding(no_cot=True))
    read, sizes = engine.slots.read, []
    monkeypatch.setattr(engine.slots, "read", lambda prompts, *rest: sizes.append(len(prompts)) or read(prompts, *rest))
    answer_all(engine, requests)
    assert max(sizes) == 4 and sum(sizes) == 30


def test_a_group_with_a_row_that_breaks_is_tried_before_new_rows_come_in(build, requests, monkeypatch):
    engine = build(batch_size=4)
    forward = engine.model.forward
    order: list[int] = []

    def forward_that_breaks(input_ids, **values):
        if input_ids.shape[1] > 100:
            raise ValueError("a row that nobody can read")
        return forward(input_ids=input_ids, **values)

    monkeypatch.setattr(engine.model, "forward", forward_that_breaks)
    first = engine.submit(Request(requests[0].prompt, num_tokens=30))
    while not (engine.active or first.done()):
        pass
    futures = [
        engine.submit(request) for request in (Request(render_student_prompt("dog " * 100, "cats.")), *requests[2:])
    ]
    for index, future in enumerate(futures, 1):
        future.add_done_callback(lambda _, index=index: order.append(index))
    texts_of_all = [future.result(timeout=60).text for future in futures]
    assert first.result().text and texts_of_all[0] is None and None not in texts_of_all[1:]
    assert order.index(1) < 8


@pytest.mark.parametrize("where", ["reading", "writing"])
def test_a_row_that_breaks_the_forward_pass_fails_alone(build, requests, where, monkeypatch):
    expected = texts(answer_all(build(), requests))
    engine = build(batch_size=16)
    poison = engine.tokenizer.encode(requests[11].prompt, add_special_tokens=False)
    forward = engine.model.forward

    def forward_that_breaks(input_ids, **values):
        if where == "reading" and any(row[1 : len(poison) + 1] == poison for row in input_ids.tolist()):
            raise ValueError("a row that nobody can read\nmore about it")
        if where == "writing" and any(row.request is requests[11] and len(row.tokens) > 5 for row in engine.active):
            raise ValueError("a row that nobody can read\nmore about it")
        return forward(input_ids=input_ids, **values)

    monkeypatch.setattr(engine.model, "forward", forward_that_breaks)
    generations = answer_all(engine, requests)
    failed = {index for index, generation in enumerate(generations) if generation.text is None}
    assert failed == {11}
    assert {generations[index].problem for index in failed} == {"ValueError: a row that nobody can read"}
    assert all(
        generation.text == text
        for index, (generation, text) in enumerate(zip(generations, expected, strict=True))
        if index not in failed
    )


def test_a_label_that_breaks_or_is_no_number_fails_alone(build, requests, monkeypatch):
    engine = build(decoding=Decoding(no_cot=True))
    read = engine.slots.read

    def read_that_breaks(prompts, *rest):
        if any(len(ids) > 100 for ids in prompts):
            raise ValueError("too long")
        logits = read(prompts, *rest)
        logits[[len(ids) > 60 for ids in prompts]] = float("nan")
        return logits

    monkeypatch.setattr(engine.slots, "read", read_that_breaks)
    longer = [Request(render_student_prompt("dog " * count, "cats.")) for count in (60, 150)]
    generations = answer_all(engine, [*longer, *requests[:9]])
    assert [generation.problem for generation in generations] == [
        "the model's logits are not finite numbers",
        "ValueError: too long",
    ] + [""] * 9


def test_a_model_whose_weights_are_no_numbers_gives_rows_with_a_problem(build, requests):
    import torch

    engine = build()
    with torch.no_grad():
        engine.model.lm_head.weight.fill_(float("nan"))
    assert {generation.problem for generation in answer_all(engine, requests[:9])} == {
        "the model's logits are not finite numbers"
    }


def test_a_prompt_that_cannot_be_read_is_told_and_others_are_answered(build, requests):
    engine = build()
    strange = [
        Request(render_student_prompt("Two </s> dogs.", "No.")),
        Request(render_student_prompt("dog " * 600, "cats.")),
        Request("\ud800"),
        Request(requests[0].prompt, adapter="models/none"),
    ]
    generations = answer_all(engine, [*strange, requests[0]])
    assert [generation.text for generation in generations[:4]] == [None] * 4
    assert (
        "control token" in generations[0].problem
        and "no room for an answer within the model's 512 positions" in generations[1].problem
    )
    assert generations[2].problem and "models/none" in generations[3].problem
    assert parse_answer(generations[4].text).fields


def test_exactly_so_many_tokens_are_written_and_never_more_than_the_model_has_positions_for(build, requests):
    engine = build(batch_size=4)
    engine.steps = 8
    counts = [1, 2, 7, 50, 100, 3, 64]
    generations = answer_all(
        engine, [Request(one.prompt, num_tokens=count) for one, count in zip(requests, counts, strict=False)]
    )
    assert [(generation.num_completion_tokens, generation.finish_reason) for generation in generations] == [
        (count, "length") for count in counts
    ]
    generation = answer_all(engine, [Request(requests[0].prompt, num_tokens=600)])[0]
    assert generation.num_prompt_tokens + generation.num_completion_tokens == 512


def test_requests_from_many_threads_are_all_answered(build, requests):
    engine = build(batch_size=8)
    expected = texts(answer_all(engine, requests))
    found: dict[int, list] = {}

    def ask(start: int) -> None:
        found[start] = texts(answer_all(engine, requests[start::6]))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: expected[start::6] for start in range(6)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nf4_weights_multiplied_out_are_what_bitsandbytes_computes_with(dtype):
    """Its packed form for CPUs, which rounds anew, is left out: see `keep_weights_in_evaluations`."""
    import torch

    from nli.models.load import keep_weights_in_evaluations, load_base, multiply_out

    quantised, plain = (
        load_base(TINY_BASE, "nf4", dtype, "cpu", "sdpa").eval(),
        multiply_out(load_base(TINY_BASE, "nf4", dtype, "cpu", "sdpa"), "cpu").eval(),
    )
    keep_weights_in_evaluations(quantised)
    assert not any(type(module).__name__ == "Linear4bit" for module in plain.modules())
    for name, module in quantised.named_modules():
        if type(module).__name__ == "Linear4bit":
            x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(2)).to(quantised.dtype)
            with torch.inference_mode():
                assert torch.equal(module(x), plain.get_submodule(name)(x))
    ids = torch.arange(60).reshape(2, 30) + 100
    with torch.inference_mode():
        assert torch.equal(quantised(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_nf4_weights_stay_as_they_are_where_a_gpu_has_no_room(monkeypatch, capsys):
    import torch

    from nli.models.load import load_base, multiply_out

    quantised = load_base(TINY_BASE, "nf4", "bf16", "cpu", "sdpa")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 80 * 2**30))
    assert multiply_out(quantised, "cuda:0") is quantised
    assert any(type(module).__name__ == "Linear4bit" for module in quantised.modules())
    assert "weights stay in NF4" in capsys.readouterr().out


@pytest.mark.parametrize(("precision", "dtype"), [("nf4", "fp32"), ("nf4", "bf16"), ("bf16", "bf16")])
def test_other_precisions_answer_too(build, requests, precision, dtype):
    engine = build(precision=precision, compute_dtype=dtype)
    assert all(generation.problem == "" and generation.text for generation in answer_all(engine, requests[:8]))
    assert str(engine.model.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]


def test_logits_of_a_bf16_model_are_not_rounded_to_bf16():
    """They lie between 16 and 32 often, where bf16 has steps of 0.125: two labels a step apart would be told as 0.53 to 0.47, or as equals."""
    import torch

    from nli.engines.transformers.kv_slots import Slots
    from nli.models.load import load_base

    model = load_base(TINY_BASE, "none", "bf16", "cpu", "sdpa").eval()
    ids = torch.arange(30)[None] + 100
    slots = Slots(model, None)
    with torch.inference_mode():
        hidden = model.model(input_ids=ids).last_hidden_state[:, -1].float()
        exact = hidden @ model.lm_head.weight.float().T
        told = [slots.read(ids.tolist()), slots.prefill(ids.tolist()), slots.step(exact.argmax(-1))]
        assert torch.allclose(told[0], exact, atol=1e-4) and torch.allclose(told[1], exact, atol=1e-4)
    for logits in told:
        assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    slots.close()
    with torch.inference_mode():
        assert model(input_ids=ids).logits.dtype == torch.bfloat16


def test_a_gpu_that_cannot_compute_any_more_is_no_fault_of_a_row(monkeypatch):
    import torch

    from nli.models.out_of_memory import attempt

    freed = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    failure = attempt(lambda: 1 / 0, "cuda:0")[1]
    assert (failure.out_of_memory, failure.problem, freed) == (False, "ZeroDivisionError: division by zero", [True])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: 1 / 0)
    with pytest.raises(EngineDead, match="The GPU failed: ZeroDivisionError"):
        attempt(lambda: 1 / 0, "cuda:0")


def test_what_ends_the_engine_is_raised_out_of_every_future(build, requests, monkeypatch):
    engine = build(batch_size=2)
    monkeypatch.setattr(
        engine, "_mend", lambda failure, rows: (_ for _ in ()).throw(EngineDead("The GPU failed: an illegal address"))
    )
    monkeypatch.setattr(engine.slots, "step", lambda tokens: 1 / 0)
    futures = [engine.submit(request) for request in requests]
    for future in futures:
        with pytest.raises(EngineDead, match="illegal address"):
            future.result(timeout=60)
    with pytest.raises(EngineDead, match="illegal address"):
        engine.submit(requests[0]).result(timeout=60)


def test_a_closed_engine_answers_nobody_and_leaves_nobody_waiting(build, requests):
    engine = build(batch_size=1)
    futures = [engine.submit(Request(requests[0].prompt, num_tokens=400)) for _ in range(5)]
    engine.close()
    for future in [*futures, engine.submit(requests[0])]:
        with pytest.raises(EngineDead, match="closed"):
            future.result(timeout=60)


def test_vllm_is_chosen_where_it_is_installed_and_the_device_is_a_gpu(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    assert choose_engine("auto", "nf4", "cuda:0") == choose_engine("auto", "bf16", "cpu") == "transformers"
    with pytest.raises(ModelError, match="fp8 needs engine vllm"):
        choose_engine("auto", "fp8", "cuda:0")
    with pytest.raises(ModelError, match="vllm is not installed"):
        choose_engine("vllm", "bf16", "cuda:0")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    assert choose_engine("auto", "fp8", "cuda:0") == choose_engine("vllm", "nf4", "cuda:0") == "vllm"
    assert choose_engine("auto", "nf4", "cuda:0", kv_cache_dtype="fp8") == "vllm"
    with pytest.raises(ModelError, match="KV cache in fp8 needs engine vllm"):
        choose_engine("auto", "nf4", "cpu", kv_cache_dtype="fp8")
    assert (
        choose_engine("auto", "fp32", "cuda:0")
        == choose_engine("auto", "nf4", "cpu")
        == choose_engine("transformers", "nf4", "cuda:0")
        == "transformers"
    )
    assert choose_engine("auto", "nf4", "cuda:0", "fp32") == "transformers"
    for name, precision in (("vllm", "nf4"), ("auto", "fp8")):
        with pytest.raises(ModelError, match="vllm computes in bf16, not in fp32"):
            choose_engine(name, precision, "cuda:0", "fp32")
    with pytest.raises(ModelError, match="needs a GPU"):
        choose_engine("vllm", "nf4", "cpu")
    with pytest.raises(ModelError, match="fp32 is for engine transformers"):
        choose_engine("vllm", "fp32", "cuda:0")


def test_fp8_and_a_base_that_is_not_there_are_refused():
    with pytest.raises(ModelError, match="fp8 needs engine vllm"):
        engines.build_engine("transformers", settings_of(precision="fp8"))
    with pytest.raises(ModelError, match="no tokenizer"):
        engines.build_engine("transformers", settings_of(base="models/not-there"))
