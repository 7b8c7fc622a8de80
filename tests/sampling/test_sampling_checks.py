"""Sampling and scoring: valid tokens, texts of any length, and independence of the batch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from config_kit import config_of, random_model

from sublim_jax.errors import UserError
from sublim_jax.models.decoder import decoder
from sublim_jax.models.language import Model
from sublim_jax.sampling import constraints, samplers, scoring
from sublim_jax.sampling.generate import generate
from sublim_jax.sampling.samplers import Sampler
from sublim_jax.sharding import one_device
from sublim_jax.weights import huggingface

torch = pytest.importorskip("torch")

VOCAB, TURN = 97, 128
KEY = jax.random.key(0)
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": TURN,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
GROWING = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"original_max_position_embeddings": TURN, "rope_parameters": LONG}),
    "dynamic": ("llama", {"max_position_embeddings": TURN, "rope_parameters": GROWING}),
    "gpt2": ("gpt2", {"max_position_embeddings": 64}),
}


def tokenizer():
    """Writes every token as its number."""
    numbers = tokenizers.models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="0")
    raw = tokenizers.Tokenizer(numbers)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="2")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(our model, transformers' class, folder) by name."""
    made = {}

    def make(name):
        if name not in made:
            kind, changes = KINDS[name]
            peer = random_model(config_of(kind, {**changes, "attn_implementation": "eager"}))
            folder = tmp_path_factory.mktemp(kind)
            peer.save_pretrained(folder)
            settings, params = huggingface.load(folder)
            made[name] = (
                Model(settings, decoder(settings), params, tokenizer(), huggingface.load_config(folder), one_device()),
                type(peer),
                folder,
            )
        return made[name]

    return make


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


def alone(loaded, name, prompt, completion):
    """transformers' log-probabilities of one completion by itself; a new model, because dynamic tables keep state."""
    _, kind, folder = loaded(name)
    with torch.no_grad():
        model = kind.from_pretrained(folder, attn_implementation="eager").eval()
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(len(completion)), completion].numpy()


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
@pytest.mark.parametrize("front", [0, 30], ids=["no prefix", "a prefix"])
def test_a_texts_scores_are_those_of_it_alone_whatever_is_scored_beside_it(name, front, loaded):
    model = loaded(name)[0]
    (prefix,) = texts(front, seed=1)
    prompts, completions = texts(10, 100, 120), texts(20, 110, 9, seed=2)
    together = scoring.completion_logprobs(model, prompts, completions, prefix=prefix)
    for prompt, completion, logprobs in zip(prompts, completions, together):
        np.testing.assert_allclose(logprobs[0], alone(loaded, name, prefix + prompt, completion), rtol=1e-4, atol=1e-4)
        by_itself = scoring.completion_logprobs(model, [prompt], [completion], prefix=prefix)
        np.testing.assert_allclose(logprobs, by_itself[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_what_comes_after_continuations_is_that_of_the_whole_texts(name, loaded):
    model = loaded(name)[0]
    prompts, after, tokens = texts(10, 120), [[], *texts(3, 40, seed=3)], [5, 9]
    log_p = scoring.continued_logprobs(model, prompts, after, tokens)
    whole = [prompt + continuation for prompt in prompts for continuation in after]
    expected = np.stack([scoring.next_logprobs(model, [text], tokens)[0, 0] for text in whole])
    np.testing.assert_allclose(log_p.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("front", [0, 20], ids=["no prefix", "a prefix"])
def test_samples_below_and_above_the_turn_are_each_scored_as_by_transformers(front, loaded):
    model = loaded("longrope")[0]
    (prefix,) = texts(front, seed=1)
    prompts = texts(10, 60, 200)
    options = {"max_new_tokens": 20, "slots": 4, "stop_tokens": (), "prefix": prefix}
    samples = generate(model, prompts, KEY, **options)
    for sample in samples:
        expected = alone(loaded, "longrope", prefix + prompts[sample.prompt], sample.tokens)
        np.testing.assert_allclose(sample.logprobs, expected, rtol=1e-4, atol=1e-4)
    (short,) = generate(model, prompts[:1], KEY, **options)
    assert short.tokens == samples[0].tokens


def test_rows_turn_by_the_lengths_that_are_told(loaded):
    model = loaded("longrope")[0]
    short, long = texts(40, 200)
    padded, lengths = jnp.asarray([short + [0] * 160, long]), jnp.asarray([40, 200])
    together = model.network.apply(model.params, padded, lengths=lengths)
    for row, text in zip(together, (short, long)):
        expected = model.network.apply(model.params, jnp.asarray([text]))[0]
        np.testing.assert_allclose(row[: len(text)], expected, rtol=1e-4, atol=1e-4)


def test_a_sample_that_may_cross_the_turn_is_refused(loaded):
    model = loaded("longrope")[0]
    with pytest.raises(UserError, match=r"prompt 1 has 110 tokens and may get 20 more, past the 128"):
        generate(model, texts(100, 110), KEY, max_new_tokens=20)
    generate(model, texts(109), KEY, max_new_tokens=20)  # the last token is sampled, but not fed to the model


# ------------------------------------------------------------------------------------------------------------- tokens

OUTSIDE = {
    "a prompt": lambda m, t: scoring.completion_logprobs(m, [[5], [5, t]], [[6], [6]]),
    "a completion": lambda m, t: scoring.completion_logprobs(m, [[5], [5]], [[6], [t]]),
    "a prefix": lambda m, t: scoring.completion_logprobs(m, [[5]], [[6]], prefix=[t]),
    "a prompt for the next token": lambda m, t: scoring.next_logprobs(m, [[t]], [6]),
    "the next token": lambda m, t: scoring.next_logprobs(m, [[5]], [6, t]),
    "a token of a set": lambda m, t: scoring.set_logprobs(m, [[5]], [[6], [t]]),
    "a continuation": lambda m, t: scoring.continued_logprobs(m, [[5]], [[t]], [6]),
    "what comes after it": lambda m, t: scoring.continued_logprobs(m, [[5]], [[]], [t]),
    "a prompt to sample from": lambda m, t: generate(m, [[5], [t]], KEY),
    "a prefix of samples": lambda m, t: generate(m, [[5]], KEY, prefix=[t]),
    "a stop token": lambda m, t: generate(m, [[5]], KEY, stop_tokens=[t]),
    "a stop token of a constraint": lambda m, t: constraints.over_tokens(constraints.choice(["a"]), ["a"] * VOCAB, [t]),
    "a token of the network": lambda m, t: m.network.apply(m.params, jnp.asarray([[5, t]])),
}


@pytest.mark.parametrize("what", OUTSIDE)
@pytest.mark.parametrize("token", [VOCAB, -1])
def test_a_token_outside_the_vocabulary_is_named_with_its_size(what, token, loaded):
    with pytest.raises(
        UserError, match=rf"vocabulary of {VOCAB}|{token} is outside the .*vocabulary of {VOCAB}"
    ) as error:
        OUTSIDE[what](loaded("gpt2")[0], token)
    assert re.search(rf"(?<!\d){token}(?!\d)", str(error.value))


TOO_LONG = {
    "a text to score": lambda m: scoring.completion_logprobs(m, [[5] * 60], [[6] * 5]),
    "behind a prefix": lambda m: scoring.completion_logprobs(m, [[5] * 40], [[6] * 5], prefix=[7] * 20),
    "a prompt": lambda m: scoring.next_logprobs(m, [[5] * 65], [6]),
    "a continuation": lambda m: scoring.continued_logprobs(m, [[5] * 60], [[6] * 5], [7]),
    "the network's": lambda m: m.network.apply(m.params, jnp.full((1, 65), 5)),
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_a_text_past_the_learned_positions_is_refused(what, loaded):
    with pytest.raises(UserError, match="65 tokens, and the model has 64 learned positions"):
        TOO_LONG[what](loaded("gpt2")[0])


def test_a_text_that_fills_the_learned_positions_is_scored(loaded):
    (prompt,), (completion,) = texts(60), texts(4, seed=1)
    logprobs = scoring.completion_logprobs(loaded("gpt2")[0], [prompt], [completion])
    np.testing.assert_allclose(logprobs[0][0], alone(loaded, "gpt2", prompt, completion), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_new_tokens": [1, 2]}, "1 prompts and max_new_tokens of 2"),
        ({"max_new_tokens": [0]}, "max_new_tokens=0; ask for 1 or more"),
        ({"samples": 0}, "samples=0; ask for 1 or more"),
        ({"slots": -1}, "slots=-1; ask for 0 or more"),
        ({"steps": -1}, "steps=-1; ask for 1 or more"),
        ({"alternatives": 98}, "alternatives=98"),
        ({"constraint": constraints.Constraint(jnp.ones((1, 5), bool), jnp.zeros((1, 5), int))}, "is over 5 tokens"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, words, loaded):
    with pytest.raises(UserError, match=re.escape(words)):
        generate(loaded("gpt2")[0], [[5]], KEY, **options)


def test_numbers_of_numpy_are_numbers(loaded):
    model = loaded("gpt2")[0]
    plain = generate(model, [[5, 6]], KEY, max_new_tokens=4, samples=2, slots=4, prefix=[4], stop_tokens=(7,))
    options: dict[str, Any] = {
        "max_new_tokens": np.int64(4),
        "samples": np.int32(2),
        "slots": np.int64(4),
        "steps": np.int8(4),
    }
    tokens: dict[str, Any] = {"prefix": np.asarray([4]), "stop_tokens": [np.int64(7)]}
    same = generate(model, np.asarray([[5, 6]]), KEY, **options, **tokens, sampler=Sampler(np.float32(1), np.int64(0)))
    limits = generate(model, [[np.int64(5), 6]], KEY, **{**options, "max_new_tokens": np.asarray([4])}, **tokens)
    assert [s.tokens for s in same] == [s.tokens for s in limits] == [s.tokens for s in plain]


# -------------------------------------------------------------------------------------------------------------- draws


def test_a_search_never_lands_on_a_weight_of_zero():
    """Also where the share is exactly a running sum: rounding in a parallel sum may let it grow at a zero weight."""
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(4000, 512)) * (rng.random((4000, 512)) < rng.choice([0.01, 0.1, 0.5], (4000, 1)))
    some = jnp.asarray(weights[weights.any(1)], jnp.float32)
    running = jnp.cumsum(some, -1)
    picked = jnp.asarray(rng.integers(0, 512, len(some)))
    at_a_sum = jnp.take_along_axis(running, picked[:, None], 1)[:, 0] / running[:, -1]
    below_one = jnp.float32(1 - 2**-24)
    for share in (jnp.asarray(rng.random(len(some)), jnp.float32), jnp.minimum(at_a_sum, below_one), below_one, 0.0):
        indices = samplers._first_above(some, jnp.broadcast_to(jnp.float32(share), len(some)))
        assert jnp.all(jnp.take_along_axis(some, indices[:, None], 1) > 0)


def test_a_search_finds_what_a_sum_in_order_finds():
    weights = jnp.asarray([[0.0, 1.0, 0.0, 2.0, 0.0, 1.0, 0.0]])
    shares = jnp.asarray([0.0, 0.2, 0.25, 0.5, 0.75, 0.99])
    indices = samplers._first_above(jnp.broadcast_to(weights, (6, 7)), shares)
    assert indices.tolist() == [1, 1, 3, 3, 5, 5]
