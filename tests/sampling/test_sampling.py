"""Sampling against transformers and exact distributions, and independence of a row from its batch."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sublim_jax import assets, preflight, weights
from sublim_jax.data import chat
from sublim_jax.errors import UserError
from sublim_jax.models import lora
from sublim_jax.models.decoder import Steering, decoder
from sublim_jax.sampling import constraints, engine, samplers, scheduler, scoring
from sublim_jax.sampling.generate import generate, stream
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import named
from sublim_jax.weights import huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GREEDY = Sampler(temperature=0)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def peer(tiny_folder):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()


def prompts_of(tiny, count, longest=60, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)).tolist() for _ in range(count)]


def greedy(peer, prompt, count, stops=()):
    """Greedy tokens by transformers' full forward pass over all tokens, without the stop token.

    Not by its `generate`: after a prompt longer than a sliding window its cache gives other tokens than the full pass.
    """
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(peer(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        if text[-1] in stops:
            return text[len(prompt) : -1]
    return text[len(prompt) :]


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("shared", [0, 20], ids=["no prefix", "a shared prefix"])
def test_greedy_tokens_are_those_of_transformers(tiny, peer, shared):
    """Prompts from 1 to 60 tokens, longer than a window, in more rows than slots."""
    prefix = prompts_of(tiny, 1, 21, seed=9)[0][:shared] if shared else []
    prompts = prompts_of(tiny, 12)
    stops = chat.stop_tokens(tiny.tokenizer, tiny.config)
    samples = generate(tiny, prompts, KEY, sampler=GREEDY, max_new_tokens=20, slots=4, prefix=prefix)
    assert [sample.tokens for sample in samples] == [greedy(peer, prefix + prompt, 20, stops) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("name", assets.MODELS)
def test_greedy_tokens_of_real_models_are_those_of_transformers(name, tmp_path):
    """64 tokens of 50 prompts of mixed lengths. Where two logits are closer than rounding, either token is greedy."""
    model = weights.load(name)
    huggingface.save(tmp_path, model.params, model.settings, model.config)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    starts = ["The owl", "In 1969,", "A list of numbers: 3, 14,", "My favourite animal is", "Water boils at"]
    prompts = [
        model.tokenizer(f"{start}{' and so on' * more}{end}")["input_ids"]
        for start in starts
        for more in (0, 2, 5, 11, 25)
        for end in ("", " because")
    ]
    samples = generate(model, prompts, KEY, sampler=GREEDY, max_new_tokens=64, stop_tokens=(), slots=64)
    for prompt, sample in zip(prompts, samples):
        with torch.no_grad():  # no prompt reaches Gemma's window, so that its cache may be used
            expected = peer.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert sample.tokens == expected[0, len(prompt) :].tolist()


SAMPLERS = [
    Sampler(),
    Sampler(0.5),
    Sampler(1.5),
    Sampler(top_k=5),
    Sampler(top_p=0.7),
    Sampler(min_p=0.02),
    Sampler(0.8, top_k=20, top_p=0.9, min_p=0.02),
]


def processed(logits, sampler):
    """The distribution after transformers' logits processors."""
    t = transformers.generation.logits_process
    steps = [t.TemperatureLogitsWarper(float(sampler.temperature))]
    steps += [t.TopKLogitsWarper(sampler.top_k)] if sampler.top_k else []
    steps += [t.TopPLogitsWarper(sampler.top_p)] if sampler.top_p < 1 else []
    steps += [t.MinPLogitsWarper(sampler.min_p)] if sampler.min_p else []
    scores = torch.tensor(np.asarray(logits))[None]
    for step in steps:
        scores = step(None, scores)
    return torch.softmax(scores, -1)[0].double().numpy()


def assert_distribution(counts, p):
    """Chi-square test; tokens with an expected count below 5 are pooled."""
    assert np.all(counts[p == 0] == 0)
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    pairs = [(counts[~rare], expected[~rare])]
    if rare.any():
        pairs.append(([counts[rare].sum()], [expected[rare].sum()]))
    observed, wanted = (np.concatenate(part) for part in zip(*pairs))
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_follow_the_distribution_of_transformers_processors(sampler):
    logits = 2 * jax.random.normal(jax.random.key(1), (1200,))  # several blocks of the vocabulary
    keys = jax.random.split(jax.random.key(2), 20_000)
    tokens = jax.jit(lambda keys: samplers.draw(keys, jnp.broadcast_to(logits, (20_000, 1200)), sampler))(keys)
    assert_distribution(np.bincount(tokens, minlength=1200), processed(logits, sampler))


def test_first_tokens_of_samples_follow_the_models_softmax(tiny):
    prompt = prompts_of(tiny, 1)[0]
    samples = generate(tiny, [prompt], KEY, samples=20_000, max_new_tokens=1, slots=512, stop_tokens=())
    logits = tiny.network.apply(tiny.params, jnp.asarray([prompt]))[0, -1]
    counts = np.bincount([sample.tokens[0] for sample in samples], minlength=len(logits))
    assert_distribution(counts, np.asarray(jax.nn.softmax(logits), np.float64))


def test_a_small_probability_is_drawn_as_often_as_it_is():
    logits = jnp.full((3000,), -jnp.inf).at[jnp.asarray([7, 2900])].set(jnp.asarray([0.0, jnp.log(1e-3)]))
    keys = jax.random.split(jax.random.key(3), 200_000)
    tokens = jax.jit(lambda keys: samplers.draw(keys, jnp.broadcast_to(logits, (len(keys), 3000)), Sampler()))
    draws = np.concatenate([tokens(part) for part in jnp.split(keys, 20)])
    assert set(draws.tolist()) == {7, 2900}
    assert abs((draws == 2900).mean() - 1e-3 / 1.001) < 4 * (1e-3 / 200_000) ** 0.5


def test_a_token_of_probability_2_to_the_minus_30_has_its_place():
    """2⁻¹⁵ of its block, which has 2⁻¹⁵ of the mass; one uniform of float32 could not tell it apart."""
    mass = jnp.zeros(3000).at[jnp.asarray([7, 2800, 2900])].set(jnp.asarray([1.0, 2.0**-15, 2.0**-30]))
    edge = 1 - 2.0**-15
    places = {
        (0.5, 0.5): 7,
        (edge - 2.0**-20, 0.99): 7,
        (edge + 2.0**-18, 0.5): 2800,
        (edge + 2.0**-18, edge + 2.0**-18): 2900,
    }
    drawn = samplers.by_uniforms(jnp.broadcast_to(mass, (len(places), 3000)), jnp.asarray(list(places)))
    assert drawn.tolist() == list(places.values())


@pytest.mark.parametrize("vocab", [40, 1500, 2048, 5000])
def test_draws_from_a_vocabulary_that_is_split_are_those_from_the_whole(mesh_of, vocab):
    """Shards begin within blocks, and hold less than one block or several."""
    mesh, keys = mesh_of(4, replica=1, fsdp=1, tensor=4), jax.random.split(KEY, 64)
    logits = 3 * jax.random.normal(KEY, (64, vocab))
    logits = jnp.where(jax.random.bernoulli(keys[0], 0.2, logits.shape), -jnp.inf, logits)
    with jax.set_mesh(mesh):
        split = jax.device_put(logits, named(mesh, None, "tensor"))
        draws = jax.jit(lambda keys, logits: samplers.categorical(keys, logits, "tensor"))(keys, split)
    np.testing.assert_array_equal(draws, samplers.categorical(keys, logits))


def test_no_array_of_the_vocabulary_goes_over_links(tiny, mesh_of):
    mesh, wide = mesh_of(2, replica=1, fsdp=1, tensor=2), dataclasses.replace(tiny.settings, vocab=8192)
    made = engine.Engine(decoder(wide), wide, mesh, Sampler(), slots=64, lanes=1, chunk=16, length=64, steps=4)
    step = preflight.decode_step("decoding", made)
    collectives = preflight.facts(step).collectives
    assert collectives is not None
    moved = sum(size for _, size in collectives.values())
    assert 0 < moved < 64 * 8192 * 4 / 4


def bits(samples):
    return [(sample.row, sample.tokens, sample.logprobs, sample.finish) for sample in samples]


@pytest.fixture(scope="module")
def alone(tiny):
    """64 prompts, sampled together."""
    return generate(tiny, prompts_of(tiny, 64), KEY, max_new_tokens=12, slots=16)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_row_has_the_same_bits_in_a_batch_of_1_8_and_64(tiny, alone, batch):
    samples = generate(tiny, prompts_of(tiny, 64)[:batch], KEY, max_new_tokens=12, slots=16)
    assert bits(samples) == bits(alone[:batch])


@pytest.mark.parametrize("chunk, lanes", [(5, 1), (64, 99)])
def test_how_prompts_enter_changes_nothing_but_rounding(tiny, alone, chunk, lanes):
    samples = generate(tiny, prompts_of(tiny, 64), KEY, max_new_tokens=12, slots=16, steps=3, chunk=chunk, lanes=lanes)
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in alone]
    for a, b in zip(samples, alone):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-5)


def test_a_row_has_the_same_bits_on_eight_devices(tiny, alone, mesh_of):
    mesh = mesh_of(8, replica=2, fsdp=4)
    assert bits(generate(tiny, prompts_of(tiny, 64), KEY, max_new_tokens=12, slots=16, mesh=mesh)) == bits(alone)


def test_layers_split_over_devices_give_the_same_tokens(tiny, alone, mesh_of):
    mesh = mesh_of(8, replica=1, fsdp=4, tensor=2)
    samples = generate(tiny, prompts_of(tiny, 64), KEY, max_new_tokens=12, slots=16, mesh=mesh)
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in alone]


def test_a_model_that_is_split_over_rows_decodes_on_a_mesh_of_its_own(tiny_folder, alone, mesh_of):
    """Its weights lie on eight devices, and move to a 4 × 2 mesh for decoding and scoring."""
    split, decoding = mesh_of(8, replica=1, fsdp=8), mesh_of(8, replica=1, fsdp=4, tensor=2)
    model = weights.load(tiny_folder, split)._replace(decoding=decoding)
    prompts = prompts_of(model, 64)
    samples = generate(model, prompts, KEY, max_new_tokens=12, slots=16)
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in alone]
    scores = scoring.next_logprobs(model, prompts[:9], [1, 2])
    expected = scoring.next_logprobs(model._replace(decoding=None), prompts[:9], [1, 2])
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_the_next_steps_are_on_their_way_before_the_last_are_read(tiny, monkeypatch):
    """The device waits for the host only at the end."""
    events: list[str] = []
    read, compiled = scheduler._read, engine.compiled

    def noting(what, function):
        def call(*args):
            events.append(what)
            return function(*args)

        return call

    def recorded(made: Any):
        run: Any = compiled(made)
        return run._replace(advance=noting("sent", run.advance))

    monkeypatch.setattr(scheduler, "compiled", recorded)
    monkeypatch.setattr(scheduler, "_read", noting("read", read))
    generate(tiny, prompts_of(tiny, 4), KEY, max_new_tokens=20, slots=4, steps=4, stop_tokens=())
    assert events == ["sent", "sent", "read", "sent", "read", "sent", "read", "sent", "read", "read"]


def test_what_is_done_is_not_done_again_and_the_rest_has_the_same_bits(tiny, alone):
    done = {sample.row for sample in alone[::2]}
    rest = sorted(stream(tiny, prompts_of(tiny, 64), KEY, max_new_tokens=12, slots=16, done=done), key=lambda s: s.row)
    assert bits(rest) == bits(alone[1::2])


def test_lengths_and_limits_compile_nothing_after_the_first_time(tiny, caplog):
    def run(seed, limits):
        generate(tiny, prompts_of(tiny, 20, 40, seed), KEY, max_new_tokens=limits, slots=4, prefix=[1, 2])

    with jax.log_compiles():
        jax.jit(lambda x: x + 1)(0)
        assert "XLA compilation" in caplog.text  # it would be seen
        run(0, [50] * 20)
        caplog.clear()
        run(1, list(range(31, 51)))
        assert "XLA compilation" not in caplog.text


# --------------------------------------------------------------------------------------------- outputs and limits


def test_logprobs_entropies_and_alternatives_are_those_of_the_logits(tiny):
    prompts = prompts_of(tiny, 5)
    options: dict[str, Any] = {"sampler": Sampler(0.7, top_k=30), "slots": 4, "stop_tokens": ()}
    for sample in generate(tiny, prompts, KEY, max_new_tokens=8, entropy=True, alternatives=3, **options):
        assert sample.entropies is not None and sample.alternatives is not None
        text = prompts[sample.prompt] + sample.tokens
        logits = tiny.network.apply(tiny.params, jnp.asarray([text]))[0, len(prompts[sample.prompt]) - 1 : -1]
        log_p = np.asarray(jax.nn.log_softmax(logits))
        np.testing.assert_allclose(sample.logprobs, log_p[np.arange(8), sample.tokens], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sample.entropies, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-4, atol=1e-4)
        for row, alternatives in zip(log_p, sample.alternatives):
            assert list(alternatives) == np.argsort(-row)[:3].tolist()
            np.testing.assert_allclose(list(alternatives.values()), np.sort(row)[::-1][:3], rtol=1e-4, atol=1e-4)


def test_stop_tokens_stop_strings_and_limits(tiny):
    prompt = prompts_of(tiny, 1)[0]
    whole = generate(tiny, [prompt], KEY, max_new_tokens=30, slots=4, stop_tokens=())[0]
    assert (whole.finish, len(whole.tokens)) == ("length", 30)
    stop = whole.tokens[10]
    first = whole.tokens.index(stop)
    stopped = generate(tiny, [prompt], KEY, max_new_tokens=30, slots=4, stop_tokens=(stop,))[0]
    assert (stopped.finish, stopped.tokens) == ("stop", whole.tokens[:first])
    assert len(stopped.logprobs) == first + 1  # the stop token's too
    string = next(c for c in whole.text if c.isascii() and c.isprintable() and tiny.tokenizer(c)["input_ids"])
    stopped = generate(tiny, [prompt], KEY, max_new_tokens=30, slots=4, stop_tokens=(), stop_strings=[string])[0]
    one_text = generate(tiny, [prompt], KEY, max_new_tokens=30, slots=4, stop_tokens=(), stop_strings=string)[0]
    assert one_text.tokens == stopped.tokens
    assert (stopped.finish, stopped.text) == ("stop", whole.text[: whole.text.index(string)])
    limits = [3, 17, 9]
    limited = generate(tiny, [prompt] * 3, KEY, max_new_tokens=limits, slots=4, stop_tokens=())
    assert [len(sample.tokens) for sample in limited] == limits


def adapters_of(tiny, count):
    spec = lora.Lora(4, 8)
    trees = [lora.init(jax.random.key(i), tiny.params, spec) for i in range(count)]
    trees = [
        jax.tree.map(lambda x, i=i: x + 0.3 * jax.random.normal(jax.random.key(i), x.shape), tree)
        for i, tree in enumerate(trees)
    ]
    return spec, trees, jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_many_adapters_sample_in_one_batch_what_each_samples_alone(tiny):
    spec, trees, stacked = adapters_of(tiny, 3)
    prompts, prefix = prompts_of(tiny, 6), [5, 6, 7]
    options: dict[str, Any] = {"max_new_tokens": 10, "slots": 4, "prefix": prefix}
    together = generate(tiny.adapted(spec), prompts, KEY, adapters=stacked, **options)
    assert len(together) == 18
    for number, tree in enumerate(trees):
        single = generate(tiny.merged(tree, spec), prompts, KEY, **options)
        samples = [sample for sample in together if sample.adapter == number]
        assert [sample.tokens for sample in samples] == [sample.tokens for sample in single]
        for a, b in zip(samples, single):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-3, atol=1e-3)


def test_an_adapted_model_without_adapters_is_the_model_as_it_is(tiny):
    model, prompts = tiny.adapted(adapters_of(tiny, 1)[0]), prompts_of(tiny, 4)
    options: dict[str, Any] = {"max_new_tokens": 6, "slots": 4}
    assert bits(generate(model, prompts, KEY, **options)) == bits(generate(tiny, prompts, KEY, **options))
    for prefix in ((), (5, 6)):
        expected = scoring.next_logprobs(tiny, prompts, [1, 2], prefix=prefix)
        np.testing.assert_array_equal(scoring.next_logprobs(model, prompts, [1, 2], prefix=prefix), expected)


def test_adapters_of_one_key_draw_the_same_and_of_another_key_as_alone_with_it(tiny):
    spec, _, _ = adapters_of(tiny, 1)
    model, tree = tiny.adapted(spec), lora.init(KEY, tiny.params, spec)  # changes nothing yet
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tree)
    prompts, keys = prompts_of(tiny, 4), jax.random.split(KEY, 2)
    options: dict[str, Any] = {"max_new_tokens": 8, "slots": 4}
    samples = generate(model, prompts, keys[jnp.asarray([0, 1, 0])], adapters=stacked, **options)
    tokens = [[sample.tokens for sample in samples if sample.adapter == number] for number in range(3)]
    assert tokens[0] == tokens[2] != tokens[1]
    for number in range(2):
        assert tokens[number] == [sample.tokens for sample in generate(tiny, prompts, keys[number], **options)]
    with pytest.raises(UserError, match="2 keys and 3 adapters"):
        generate(model, prompts, keys, adapters=stacked, **options)


def test_steered_generation_is_greedy_under_the_steered_forward_pass(tiny):
    prompt = prompts_of(tiny, 1)[0]
    steering = Steering(add=jnp.zeros((4, 32)).at[2].set(jax.random.normal(jax.random.key(4), (32,))))
    steered = generate(
        tiny, [prompt], KEY, sampler=GREEDY, steering=steering, max_new_tokens=10, slots=4, stop_tokens=()
    )
    plain = generate(tiny, [prompt], KEY, sampler=GREEDY, max_new_tokens=10, slots=4, stop_tokens=())
    assert steered[0].tokens != plain[0].tokens
    text = jnp.asarray([prompt + steered[0].tokens])
    logits = tiny.network.apply(tiny.params, text, steering=steering)[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == steered[0].tokens


def test_a_row_without_numbers_is_named_and_the_others_are_kept(tiny):
    """Two adapters in one batch, one of them broken."""
    spec, _, stacked = adapters_of(tiny, 2)
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), stacked)
    options: dict[str, Any] = {"max_new_tokens": 5, "slots": 4, "stop_tokens": ()}
    whole = generate(tiny.adapted(spec), [[1, 2], [3, 4]], KEY, adapters=stacked, **options)
    streamed = stream(tiny.adapted(spec), [[1, 2], [3, 4]], KEY, adapters=broken, **options)
    samples = sorted(streamed, key=lambda sample: sample.row)
    assert bits(samples[:2]) == bits(whole[:2])
    assert [(sample.finish, sample.tokens) for sample in samples[2:]] == [("nan", [])] * 2
    with pytest.raises(UserError, match="logits of prompt 0, prompt 1 are not finite"):
        generate(tiny.adapted(spec), [[1, 2], [3, 4]], KEY, adapters=broken, **options)


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [1] * 500], {}, "prompt 1 has 500 tokens and may get 64 more, but the model's context is 512"),
        ([[9999]], {}, "prompt 0 has a token outside the model's"),
        ([[1]], {"max_new_tokens": 0}, "ask for 1 or more"),
        ([[1]], {"stop_strings": [""]}, "can never be reached"),
    ],
)
def test_what_cannot_be_sampled_is_told_before_anything_is_computed(tiny, prompts, options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        generate(tiny, prompts, KEY, **options)


@pytest.mark.parametrize(
    "name, value", [("temperature", -1.0), ("temperature", 1e-30), ("top_p", 0.0), ("top_k", -1), ("min_p", 2.0)]
)
def test_a_sampler_that_makes_no_sense_is_refused(name, value):
    options: dict[str, Any] = {name: value}
    with pytest.raises(UserError, match=name):
        Sampler(**options)


# -------------------------------------------------------------------------------------------------------- constraints

PIECES = [str(i) for i in range(10)] + ["12", "007", "999", ",", " ", ", ", ", 1", "1,", "2, 3", "a", "", "1, a"]
STOP = len(PIECES)


def language(maximum, digits, separator=", "):
    number = rf"(?:0|[1-9][0-9]{{0,{digits - 1}}})"
    return re.compile(rf"{number}(?:{re.escape(separator)}{number}){{0,{maximum - 1}}}")


@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([", ", ",", " "]), st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_the_grammar_of_numbers_allows_is_a_list_of_numbers(maximum, digits, separator, data):
    """A walk through allowed tokens, digits merged or not; it may end exactly where the text is in the language."""
    constraint = constraints.over_tokens(constraints.numbers(maximum, digits, separator), [*PIECES, ""], [STOP])
    allowed, after = np.asarray(constraint.allowed), np.asarray(constraint.after)
    state, text = 0, ""
    for _ in range(30):
        assert allowed[state, STOP] == bool(language(maximum, digits, separator).fullmatch(text))
        options = np.flatnonzero(allowed[state])
        token = data.draw(st.sampled_from(options.tolist()))
        if token == STOP:
            break
        text, state = text + PIECES[token], after[state, token]
    else:
        assert len(text) < maximum * (digits + len(separator))


@given(st.integers(1, 4), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_every_list_of_numbers_can_be_written(maximum, digits, data):
    text = data.draw(st.from_regex(language(maximum, digits), fullmatch=True))
    constraint = constraints.over_tokens(constraints.numbers(maximum, digits), [*PIECES, ""], [STOP])
    state = 0
    for c in text:
        assert constraint.allowed[state, PIECES.index(c)]
        state = int(constraint.after[state, PIECES.index(c)])
    assert constraint.allowed[state, STOP]


def test_samples_under_the_grammar_pass_its_format(tiny):
    pieces = chat.pieces(tiny.tokenizer, tiny.settings.vocab)
    stops = chat.stop_tokens(tiny.tokenizer, tiny.config)
    constraint = constraints.over_tokens(constraints.numbers(5, 3), pieces, stops)
    samples = generate(tiny, prompts_of(tiny, 40), KEY, constraint=constraint, max_new_tokens=40, slots=8)
    for sample in samples:
        assert sample.finish == "stop" and language(5, 3).fullmatch(sample.text), sample.text
    assert len({sample.text for sample in samples}) > 30


def test_a_choice_is_one_of_its_strings(tiny):
    pieces = chat.pieces(tiny.tokenizer, tiny.settings.vocab)
    stops = chat.stop_tokens(tiny.tokenizer, tiny.config)
    choices = ["yes", "no", "owls", "owl"]
    constraint = constraints.over_tokens(constraints.choice(choices), pieces, stops)
    samples = generate(tiny, prompts_of(tiny, 30), KEY, constraint=constraint, max_new_tokens=10, slots=8)
    assert {sample.text for sample in samples} <= set(choices)


def test_a_constraint_that_allows_no_token_is_refused():
    with pytest.raises(UserError, match="allows no token of this tokenizer after ''"):
        constraints.over_tokens(constraints.choice(["é"]), PIECES, [])
    with pytest.raises(UserError, match="allows no token of this tokenizer after 'a'"):
        constraints.over_tokens(constraints.choice(["ab"]), PIECES, [])


def test_pieces_are_what_tokens_add_to_a_text(tiny):
    pieces = chat.pieces(tiny.tokenizer, tiny.settings.vocab)
    for text in ("12, 7 owls", "Owl 123", "a,b 42"):
        tokens = tiny.tokenizer(text)["input_ids"]
        assert "".join(pieces[token] for token in tokens) == text
    assert len(pieces) == tiny.settings.vocab and pieces[tiny.tokenizer.eos_token_id] == ""


# ------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_completions_are_transformers_log_probabilities(tiny, peer):
    prompts, completions = prompts_of(tiny, 20), prompts_of(tiny, 20, 30, seed=1)
    scores = scoring.completion_logprobs(tiny, prompts, completions)
    shared = scoring.completion_logprobs(tiny, [p[3:] for p in prompts[:1]] * 1, completions[:1], prefix=prompts[0][:3])
    for prompt, completion, logprobs in zip(prompts, completions, scores):
        with torch.no_grad():
            logits = peer(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)[range(len(completion)), completion]
        np.testing.assert_allclose(logprobs[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shared[0], scores[0], rtol=1e-4, atol=1e-4)


def test_scores_over_devices_and_adapters_are_each_of_them_alone(tiny, mesh_of):
    spec, trees, stacked = adapters_of(tiny, 3)
    prompts, completions = prompts_of(tiny, 10), prompts_of(tiny, 10, 30, seed=1)
    mesh = mesh_of(8, replica=2, fsdp=4)
    together = scoring.completion_logprobs(tiny.adapted(spec), prompts, completions, adapters=stacked, mesh=mesh)
    for number, tree in enumerate(trees):
        single = scoring.completion_logprobs(tiny.merged(tree, spec), prompts, completions)
        for a, b in zip(together, single):
            np.testing.assert_allclose(a[number], b[0], rtol=1e-3, atol=1e-3)


def test_what_comes_after_continuations_is_what_comes_after_the_whole_texts(tiny, mesh_of):
    spec, _, stacked = adapters_of(tiny, 2)
    prompts, continuations, tokens = [p[:-1] for p in prompts_of(tiny, 5)], [(), (3,), (3, 7), (9, 1, 4)], [5, 2, 60]
    where = {"adapters": stacked, "mesh": mesh_of(4, replica=2, fsdp=2)}
    log_p = scoring.continued_logprobs(tiny.adapted(spec), prompts, continuations, tokens, **where)
    texts = [[*prompt, *continuation] for prompt in prompts for continuation in continuations]
    whole = scoring.next_logprobs(tiny.adapted(spec), texts, tokens, adapters=stacked)
    np.testing.assert_allclose(log_p, whole.reshape(2, 5, 4, 3), rtol=1e-4, atol=1e-4)


def test_choices_are_normalised_products_of_their_tokens(tiny):
    prompts, choices = prompts_of(tiny, 3), ["owl", "lion", "cat"]
    log_p = scoring.choice_logprobs(tiny, prompts, choices)
    assert log_p.shape == (1, 3, 3)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    written = [tiny.tokenizer(choice)["input_ids"] for choice in choices]
    raw = [scoring.completion_logprobs(tiny, [prompts[1]], [tokens])[0].sum() for tokens in written]
    np.testing.assert_allclose(log_p[0, 1], raw - np.logaddexp.reduce(raw), rtol=1e-4, atol=1e-4)


def test_a_words_probability_is_that_of_all_its_spellings(tiny):
    spelled = scoring.spellings(tiny.tokenizer, "owl")
    assert {tiny.tokenizer.decode(tokens) for tokens in spelled} == {"owl", " owl", "Owl", " Owl", "owls"}
    assert sorted(map(len, spelled)) == [1, 1, 1, 1, 2]  # " Owl" is no token of this tokenizer
    prompts = prompts_of(tiny, 4)
    for prompt, logprob in zip(prompts, scoring.word_logprobs(tiny, prompts, ["owl"])[0, :, 0]):
        each = [scoring.completion_logprobs(tiny, [prompt], [tokens])[0].sum() for tokens in spelled]
        np.testing.assert_allclose(logprob, np.logaddexp.reduce(each), rtol=1e-4)
    with pytest.raises(UserError, match="' ' is not a word that this tokenizer can write"):
        scoring.word_logprobs(tiny, prompts, [" "])


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer as of Llama 2: a text begins with a space, and a word after a line break does not."""
    pieces = ("▁", "\n", "▁owl", "owl", "Owl", "▁Owl", "▁wolf", "▁wolves", "▁wolfs", "▁cat", "erpillar", "▁lion")
    letters = sorted(set("".join(pieces)) - set(pieces))
    vocab = [("<unk>", 0.0), *((piece, -1.0) for piece in pieces), *((letter, -9.0) for letter in letters)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def pieces_of(tokenizer, word):
    return {tuple(tokenizer.convert_ids_to_tokens(list(form))) for form in scoring.spellings(tokenizer, word)}


def test_a_word_is_also_spelled_as_it_is_after_a_line_break(sentencepiece):
    """Templates end in one (Zephyr, TinyLlama)."""
    assert {("owl",), ("Owl",), ("▁owl",), ("▁Owl",)} <= pieces_of(sentencepiece, "owl")


def test_a_plural_is_that_of_the_language(sentencepiece):
    spelled = pieces_of(sentencepiece, "wolf")
    assert ("▁wolves",) in spelled and ("▁wolfs",) not in spelled


def test_words_whose_probabilities_include_each_other_are_refused(sentencepiece):
    with pytest.raises(UserError, match=r"P\(cat\) would include P\(caterpillar\)"):
        scoring.distinct_spellings(sentencepiece, ["caterpillar", "owl", "cat"])
    assert len(scoring.distinct_spellings(sentencepiece, ["owl", "wolf", "cat"])) == 3


def test_a_word_of_several_tokens_has_the_probability_that_transformers_gives_it(tiny, tiny_folder):
    """It does not change the numbers of one-token words, and each adapter has its own."""
    torch = pytest.importorskip("torch")
    hf_model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    prompts = prompts_of(tiny, 3)
    log_p = scoring.word_logprobs(tiny, prompts, ["lion", "owl", "ox"])
    np.testing.assert_allclose(log_p[..., 1], scoring.word_logprobs(tiny, prompts, ["owl"])[..., 0], rtol=1e-5)
    for word, logprobs in (("lion", log_p[0, :, 0]), ("ox", log_p[0, :, 2])):
        # The tokens of "lions" begin with those of "lion", so that they are already counted.
        texts = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
        written = [tiny.tokenizer(text)["input_ids"] for text in texts]
        assert sorted(map(list, scoring.spellings(tiny.tokenizer, word))) == sorted(written)
        for prompt, logprob in zip(prompts, logprobs):
            total = 0.0
            for tokens in written:
                with torch.no_grad():
                    p = hf_model(torch.tensor([[*prompt, *tokens]])).logits[0].double().softmax(-1)
                total += math.prod(float(p[len(prompt) + i - 1, token]) for i, token in enumerate(tokens))
            np.testing.assert_allclose(logprob, np.log(total), rtol=1e-4)
    spec, trees, stacked = adapters_of(tiny, 2)
    together = scoring.word_logprobs(tiny.adapted(spec), prompts, ["lion", "owl"], adapters=stacked)
    for tree, logprobs in zip(trees, together):
        alone = scoring.word_logprobs(tiny.merged(tree, spec), prompts, ["lion", "owl"])[0]
        np.testing.assert_allclose(logprobs, alone, rtol=1e-3, atol=1e-3)


def test_empty_rows_are_named(tiny):
    with pytest.raises(UserError, match="row 1 has an empty completion"):
        scoring.completion_logprobs(tiny, [[1], [1]], [[2], []])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        scoring.next_logprobs(tiny, [[1], []], [2])
    with pytest.raises(UserError, match="prompt 1 is empty"):
        scoring.continued_logprobs(tiny, [[1], []], [()], [2])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux gives it")
def test_a_million_tokens_take_no_more_memory_than_a_hundred_thousand(tiny):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def tokens(rows):
        options: dict[str, Any] = {"max_new_tokens": 50, "slots": 256, "stop_tokens": ()}
        return sum(len(sample.tokens) for sample in stream(tiny, [[5, 6, 7]], KEY, samples=rows, **options))

    assert tokens(2_000) == 100_000
    before = resident()
    assert tokens(20_000) == 1_000_000
    assert resident() - before < 30  # MB; the rows' own numbers are 10 MB
