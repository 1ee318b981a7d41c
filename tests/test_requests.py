"""Generation by options of each sequence, texts to stop at, and modules that draw."""

import math

import pytest
import torch
from test_generation import perturbed, written
from test_models import VOCAB, decoder, tokens_of

import tilewise
from tilewise.models import Request, complete, generate, requests
from tilewise.models import text as texts
from tilewise.nn import LogitsFilter, LogitsSampler, SampledGeneration, Sampler

pytestmark = pytest.mark.usefixtures("on_the_device")


def test_each_sequence_has_its_own_options():
    model, prompt = perturbed(decoder()), tokens_of(1, 4, 5)
    options = {
        "temperature": torch.tensor([0.0, 1.0, 2.0, 0.7]),
        "top_k": torch.tensor([0, 3, 0, 9]),
        "min_p": torch.tensor([0.0, 0.0, 0.2, 0.05]),
        "frequency_penalty": torch.tensor([0.5, 0.0, 2.0, -0.5]),
        "seed": torch.tensor([1, 2, 3, 2**40]),
    }
    together = written(generate(model, prompt, max_tokens=12, **options))
    for i in range(4):
        mine = {name: value[i : i + 1] for name, value in options.items()}
        alone = written(generate(model, prompt[i : i + 1], max_tokens=12, **mine))
        assert torch.equal(alone[0], together[i])


def test_penalties_count_the_prompt_and_what_was_drawn():
    model, prompt = perturbed(decoder()), tokens_of(2, 3, 6)
    options = {"repetition_penalty": 1.8, "presence_penalty": 0.4, "frequency_penalty": 0.6}
    drawn = written(generate(model, prompt, max_tokens=14, seed=4, **options))
    sequence = prompt
    for step in range(14):
        with torch.no_grad():
            logits = model(sequence)[:, -1]
        token = tilewise.sample(logits, **options, history=sequence, seed=4, offset=step)
        sequence = torch.cat([sequence, token[:, None]], 1)
    assert torch.equal(sequence[:, 6:], drawn)
    once = written(generate(model, prompt, max_tokens=14, seed=4, presence_penalty=1e6))
    assert all(len(set(row)) == 14 for row in once.tolist())


def test_a_bias_and_a_mask_forbid_tokens():
    model, prompt = perturbed(decoder()), tokens_of(2, 2, 6)
    bias = torch.zeros(VOCAB)
    bias[: VOCAB // 2] = -math.inf
    drawn = written(generate(model, prompt, max_tokens=14, temperature=5.0, logit_bias=bias))
    assert (drawn >= VOCAB // 2).all()
    mask = torch.zeros(2, -(-VOCAB // 32), dtype=torch.int32)
    mask[:, 0] = 0b1010
    drawn = written(generate(model, prompt, max_tokens=14, temperature=5.0, mask=mask))
    assert set(drawn.flatten().tolist()) == {1, 3}


def story():
    tokenizer = texts.train_tokenizer(["the cat sat on the mat " * 9], 270)
    return perturbed(decoder(vocab_size=270)), tokenizer


def completed(model, tokenizer, requests):
    pieces = ["" for _ in requests]
    for number, piece in complete(model, tokenizer, requests):
        assert piece
        pieces[number] += piece
    return pieces


REQUESTS = [
    Request("the cat", max_tokens=6, temperature=0.0),
    Request("the", max_tokens=9, temperature=1.2, seed=3, top_k=40),
    Request("mat sat", max_tokens=12, seed=5, frequency_penalty=0.9, min_p=0.01),
    Request("", max_tokens=8, seed=2**60, repetition_penalty=1.4, top_p=0.95),
    Request("the mat", max_tokens=0),
    Request("cat the", max_tokens=7, seed=9, logit_bias=tuple((j, -math.inf) for j in range(250))),
]


def test_requests_are_completed_as_if_alone():
    model, tokenizer = story()
    together = completed(model, tokenizer, REQUESTS)
    for request, text in zip(REQUESTS, together, strict=True):
        assert completed(model, tokenizer, [request]) == [text]
    assert together[4] == ""
    assert len({*together}) == len(together)
    prompt = torch.tensor([texts.encode(tokenizer, "the cat")])
    greedy = [int(t) for t in generate(model, prompt, max_tokens=6, temperature=0.0)]
    assert together[0] == "".join(texts.stream_text(tokenizer, greedy))


def test_prompts_of_all_lengths_are_drawn_together(monkeypatch):
    model, tokenizer = story()
    batches = []

    def counted(model, tokens, **options):
        batches.append(tokens.shape)
        return generate(model, tokens, **options)

    monkeypatch.setattr(requests, "generate", counted)
    asked = [Request("cat " * 5, max_tokens=3, seed=8), *REQUESTS]
    whole = completed(model, tokenizer, asked)
    longest = max(len(texts.encode(tokenizer, r.prompt)) for r in asked)
    assert batches == [(7, longest)]
    batches.clear()
    pieces = ["" for _ in asked]
    for number, piece in complete(model, tokenizer, asked, together=4):
        pieces[number] += piece
    assert pieces == whole
    assert [rows for rows, _ in batches] == [4, 3] and batches[0][1] < batches[1][1] == longest
    with pytest.raises(ValueError, match=r"^complete: together must be at least 1, got 0$"):
        list(complete(model, tokenizer, asked, together=0))


def test_a_token_that_the_tokenizer_has_not_is_no_text():
    """A model's vocabulary may be padded."""
    model, tokenizer = story()
    spare = tokenizer.get_vocab_size()
    bias = tuple((j, -math.inf) for j in range(270) if j != spare)
    pieces = completed(model, tokenizer, [Request("the", max_tokens=3, logit_bias=bias)])
    assert spare < 270 and pieces == [""]
    assert "".join(texts.stream_text(tokenizer, [260, spare, 261])) == tokenizer.decode([260, 261])


def test_a_full_context_ends_one_request_and_not_the_others():
    model, tokenizer = story()
    options = {"max_tokens": 99, "temperature": 3.0, "stop": ("not to be found",)}
    prompts = ["the", "the cat sat on the mat the cat the mat on", "cat " * 5]
    asked = [Request(p, seed=i, **options) for i, p in enumerate(prompts)]
    together = completed(model, tokenizer, asked)
    assert together == [completed(model, tokenizer, [r])[0] for r in asked]
    assert len({len(texts.encode(tokenizer, p)) for p in prompts}) == 3


def test_a_request_ends_before_a_text():
    model, tokenizer = story()
    request = Request("the", max_tokens=15, temperature=3.0, seed=7)
    (whole,) = completed(model, tokenizer, [request])
    for cut in (whole[0], whole[3:5], whole[-2:], "not to be found"):
        stopped = Request("the", max_tokens=15, temperature=3.0, seed=7, stop=(cut, "neither"))
        assert completed(model, tokenizer, [stopped, request]) == [whole.split(cut)[0], whole]


def test_requests_fill_the_context_and_no_more():
    model, tokenizer = story()
    request = Request("the", max_tokens=99, temperature=3.0, seed=7, stop=("not to be found",))
    (text,) = completed(model, tokenizer, [request])
    prompt = torch.tensor([texts.encode(tokenizer, "the")])
    seed = torch.tensor([7])
    drawn = [int(t) for t in generate(model, prompt, max_tokens=99, temperature=3.0, seed=seed)]
    assert text == "".join(texts.stream_text(tokenizer, drawn))
    assert list(complete(model, tokenizer, [])) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_p": 1.5}, "sample: top_p must be from 0 to 1, got 1.5"),
        ({"temperature": -1.0}, "sample: temperature must be at least 0 and finite, got -1.0"),
        ({"top_k": -2}, "sample: top_k must be at least 0, got -2"),
        ({"logit_bias": ((270, 1.0),)}, "logit_bias: must be of tokens from 0 to 269, got 270"),
        ({"stop": ("",)}, "stop: must be texts of a letter at least, got an empty one"),
        ({"max_tokens": -1}, "generate: max_tokens must be at least 0, got -1"),
    ],
)
def test_requests_refuse(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        list(complete(*story(), [Request("the", **options)]))


def test_sampler_is_sample():
    logits = tokens_of(3, 4, 50).float() / 5
    history = tokens_of(4, 4, 6, high=50)
    sampler = Sampler(temperature=1.3, top_p=0.9, presence_penalty=0.5)
    drawn = sampler(logits, history, seed=3, offset=1)
    expected = tilewise.sample(logits, **sampler.options, history=history, seed=3, offset=1)
    assert torch.equal(drawn, expected)
    assert repr(sampler) == "Sampler(temperature=1.3, top_p=0.9, presence_penalty=0.5)"
    plain = Sampler(top_k=3)
    assert torch.equal(plain(logits, history, seed=3), tilewise.sample(logits, top_k=3, seed=3))


def test_filter_is_a_processor_of_logits():
    scores = (tokens_of(3, 4, 50).float() / 5).requires_grad_()
    tokens = tokens_of(4, 4, 6, high=50)
    filtered = LogitsFilter(top_k=5, repetition_penalty=1.5)(tokens, scores)
    expected = tilewise.filter_logits(
        scores.detach(), top_k=5, repetition_penalty=1.5, history=tokens
    )
    assert torch.equal(filtered, expected) and not filtered.requires_grad
    plain = LogitsFilter(temperature=0.5)(tokens, scores)
    assert torch.equal(plain, scores / 0.5)


def test_a_processor_that_draws_leaves_the_token():
    scores, tokens = tokens_of(3, 4, 50).float() / 5, tokens_of(4, 4, 6, high=50)
    options = {"temperature": 1.5, "presence_penalty": 0.7}
    left = LogitsSampler(seed=5, **options)(tokens, scores)
    drawn = tilewise.sample(scores, **options, history=tokens, seed=5, offset=6)
    assert torch.equal(left.argmax(1), drawn) and (left > -math.inf).sum() == 4
    nothing = torch.full_like(scores, -math.inf)
    assert torch.equal(LogitsSampler()(tokens, nothing), nothing)


@pytest.fixture
def hugging_face():
    """A tiny model with random weights of another library's."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=90, n_positions=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return model


def test_hugging_face_calls_the_filter(hugging_face):
    prompt = tokens_of(1, 2, 4, high=90)
    options = {"do_sample": True, "max_new_tokens": 8, "top_k": 0, "min_new_tokens": 8}
    for one in (LogitsFilter(top_k=1), LogitsFilter(temperature=1e-4)):
        drawn = hugging_face.generate(prompt, logits_processor=[one], **options)
        greedy = hugging_face.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        assert torch.equal(drawn, greedy)


def test_hugging_face_generates_by_sample(hugging_face):
    prompt = tokens_of(1, 2, 4, high=90)
    options = {"max_new_tokens": 12, "do_sample": False}
    greedy = hugging_face.generate(prompt, **options)
    ours = SampledGeneration(temperature=0.0)
    assert torch.equal(hugging_face.generate(prompt, custom_generate=ours, **options), greedy)
    runs = [
        hugging_face.generate(
            prompt, custom_generate=SampledGeneration(seed=seed, temperature=2.0), **options
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and runs[0].tolist() != runs[2].tolist()
    sequence = prompt
    for place in range(4, runs[0].shape[1]):
        logits = hugging_face(sequence).logits[:, -1].detach()
        token = tilewise.sample(logits, temperature=2.0, seed=1, offset=place)
        over = (sequence[:, 4:] == 1).any(1)
        sequence = torch.cat([sequence, token.masked_fill(over, 2)[:, None]], 1)
    assert torch.equal(sequence, runs[0])
    processor = LogitsSampler(seed=1, temperature=2.0)
    processed = hugging_face.generate(prompt, logits_processor=[processor], **options)
    assert torch.equal(processed, runs[0])
