"""Every function that takes texts, names or counts takes them alike."""

import numpy as np
import pytest
from traces import make_sensitivity, make_trace

import adapmoe_lab as lab

LINK = "mixtral-8x7b-int4/pcie4-x16"


def tuned(model, texts, **arguments):
    """Tune by a made-up trace and sensitivity of the model, verified on texts."""
    trace, sensitivity = make_trace(model.spec), make_sensitivity(model.spec)
    return lab.tune(trace, sensitivity, model=model, texts=texts, **arguments)


TAKERS = {
    "profile": lab.profile,
    "sensitivity": lab.sensitivity,
    "sensitivities": lab.sensitivities,
    "evaluate_loss": lambda model, texts: lab.evaluate_loss(model, None, texts),
    "measure_latency": lambda model, texts: lab.measure_latency(model, None, texts),
    "tune": tuned,
    "fit_surrogates": lab.fit_surrogates,
    "fit_predictors": lab.fit_predictors,
    "run_bench": lambda model, texts: lab.run_bench(model, texts=texts),
    "verify": lambda model, texts: lab.verify(model, None, texts),
}


@pytest.fixture
def idle(load_tiny, tmp_path, monkeypatch):
    """Give a model that must not be run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    model = load_tiny()

    def run(*_, **__):
        raise AssertionError("the model was run")

    hook = model.hf.register_forward_pre_hook(run)
    yield model
    hook.remove()


@pytest.mark.parametrize("name", TAKERS)
def test_one_string_is_never_taken_letter_by_letter(idle, name):
    with pytest.raises(ValueError, match=r"must be several texts, got one string, 'Once upon'"):
        TAKERS[name](idle, "Once upon")


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("wrong", [None, 5, b"bytes", ["nested"]])
def test_what_is_no_text_is_refused_with_its_place(idle, name, wrong):
    with pytest.raises(ValueError, match=r"(texts|prompts)\[1\] must be one string, got"):
        TAKERS[name](idle, ["Once upon", wrong])


@pytest.mark.parametrize(
    "taken",
    [
        lambda model, texts: lab.profile(model, texts).n_tokens,
        lambda model, texts: lab.evaluate_loss(model, None, texts).n_predicted.sum() + 2,
        lambda model, texts: lab.sensitivity(model, texts, anchored=False).n_tokens,
    ],
)
def test_a_generator_is_as_good_as_a_list(load_tiny, tmp_path, monkeypatch, taken):
    monkeypatch.chdir(tmp_path)
    texts = ["Once upon", "a time"]
    assert taken(load_tiny(), (text for text in texts)) == sum(map(len, texts))


def test_tune_goes_through_a_generator_more_than_once(load_tiny):
    config = tuned(load_tiny(), (text for text in ["Once upon", "a time"]))
    assert config.evidence["measured"]["n_tokens"] == len("Once upon") + len("a time") - 2


COUNTS = {
    "max_tokens": (
        (lab.profile, lab.sensitivity, lab.fit_surrogates, lab.fit_predictors, lab.evaluate_loss),
        (0, -4, 2.5, "8", float("nan")),
    ),
    "new_tokens": ((lab.measure_latency, lab.run_bench, lab.verify), (1, -1, 4.0)),
    "repeats": ((lab.measure_latency, lab.verify), (0, -1, None)),
    "rounds": ((lab.run_bench,), (0, -1, True)),
    "slots_per_layer": ((lab.run_bench,), (-1, 1.5)),
    "n_candidates": ((lab.profile,), (0, 5, 1.5)),
    "rank": ((lab.fit_surrogates,), (-1, 33, 1.5)),
    "max_distance": ((lab.fit_predictors,), (-1, 1.5)),
}


@pytest.mark.parametrize(
    ("takes", "name", "value"),
    [
        pytest.param(takes, name, value, id=f"{takes.__name__}-{name}-{value}")
        for name, (takers, values) in COUNTS.items()
        for takes in takers
        for value in values
    ],
)
def test_a_count_that_is_none_is_refused_before_the_work(idle, takes, name, value):
    texts = {"prompts" if takes is lab.measure_latency else "texts": ["Once upon", "a time"]}
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number (of at least|in) "):
        takes(idle, **texts, **{name: value})


def test_numpys_integers_are_counts(load_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, texts = load_tiny(), ["Once upon", "a time"]
    assert lab.profile(model, texts, max_tokens=np.int64(4)).n_tokens == 8
    assert lab.evaluate_loss(model, None, texts, max_tokens=np.int32(4)).n_predicted.sum() == 6
    report = lab.measure_latency(model, None, texts, new_tokens=np.int64(2), repeats=np.int64(1))
    assert len(report.decode.samples) == 2
    assert lab.fit_surrogates(model, texts, rank=np.int64(1)).ranks == (1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "rope"}, "link='rope' is unknown"),
        ({"targets": [LINK, 5]}, r"targets\[1\] must be one string, got 5"),
        ({"skipped_fractions": (0.1, 0.9)}, r"skipped_fraction must lie in 0\.\.0\.5"),
        ({"skipped_fractions": float("nan")}, "skipped_fraction must be a finite number, got nan"),
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"texts": ["x"]}, "text 0 is shorter"),
        ({"texts": []}, "there is none"),
        ({"slots_per_layer": 9}, r"slots_per_layer must lie in 0\.\.4"),
    ],
)
def test_a_bench_that_cannot_end_does_not_begin(idle, arguments, message):
    told = []
    with pytest.raises(ValueError, match=message):
        lab.run_bench(idle, **arguments, say=told.append)
    assert not told


def test_one_estimator_may_be_named_alone(load_tiny):
    assert list(lab.sensitivities(load_tiny(), ["Once"], "fisher", anchored=False)) == ["fisher"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skipped_fraction": 0.9}, r"skipped_fraction must lie in 0\.\.0\.5"),
        ({"skipped_fraction": float("nan")}, "skipped_fraction must be a finite number, got nan"),
        (
            {"max_loss_increase_nats": float("nan")},
            "must be a finite number of at least 0, got nan",
        ),
        ({"max_loss_increase_nats": -1}, "must be a finite number of at least 0, got -1"),
    ],
)
def test_tune_refuses_what_it_cannot_keep(idle, arguments, message):
    with pytest.raises(ValueError, match=message):
        tuned(idle, ["Once upon"], **arguments)


SAID = "{{ messages[0].content }}"
HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt": ["Once", "upon"]},
            r"prompt\[0\] must be a message such as {'role': 'user', .*, got 'Once' \(str\)",
        ),
        ({"prompt": None}, r"prompt must be one text or messages such as \[{'role': .*, got None"),
        ({"prompt": {"role": "user"}}, "prompt must be one text or messages .*, got {'role': 'u"),
        ({"prompt": [HELLO], "chat_template": 5}, "chat_template must be one string, got 5"),
        ({"prompt": [HELLO], "chat_template": ""}, "The prompt is empty"),
        (
            {"prompt": [HELLO], "chat_template": "{{ messages[0].content + 5 }}"},
            "The chat template does not take these messages: can only concatenate str",
        ),
        (
            {"prompt": [{"role": "user", "content": "a\ud800"}], "chat_template": SAID},
            "holds .* half of a surrogate pair",
        ),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] must be a message .*, got {'role': 'user'}"),
        ({"prompt": []}, "The prompt is empty"),
        (
            {"prompt": [HELLO]},
            "has no chat template: .* Give one text to continue, or a template as chat_template",
        ),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be a finite number in 0\.\.1, got 1\.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, .* got 0"),
        ({"stop": ["end", ""]}, "stop holds an empty string"),
        ({"stop": 5}, "stop must be a string or several, got 5"),
        ({"prompt": "x\ud800"}, r"prompt holds '\\ud800' at position 1, half of a surrogate pair"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"max_new_tokens": -3}, "max_new_tokens must be a whole number of at least 0, got -3"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a whole number of at least 0, got 2\.5"),
        ({"temperature": -1.0}, r"temperature must be a finite number of at least 0, got -1\.0"),
        (
            {"temperature": float("nan")},
            "temperature must be a finite number of at least 0, got nan",
        ),
        (
            {"temperature": float("inf")},
            "temperature must be a finite number of at least 0, got inf",
        ),
        ({"seed": 0.5}, r"seed must be a whole number in .*, got 0\.5"),
        ({"seed": 2**64}, "seed must be a whole number in .*, got 18446744073709551616"),
    ],
)
def test_generate_refuses_in_words(idle, arguments, message):
    with pytest.raises(ValueError, match=message):
        idle.generate(**{"prompt": "Once upon", **arguments})


def test_generate_takes_numpys_numbers(load_tiny):
    model = load_tiny()
    plain = model.generate("Once", max_new_tokens=6, temperature=0.5, seed=3)
    numbers = {"max_new_tokens": np.int64(6), "temperature": np.float32(0.5), "seed": np.int64(3)}
    assert model.generate("Once", **numbers) == plain
    assert model.generate("Once", max_new_tokens=0) == "Once"
    assert model.generate("Once", max_new_tokens=6, temperature=1, seed=-1).startswith("Once")


def test_only_text_is_encoded(load_tiny):
    with pytest.raises(ValueError, match="text must be one string, got 5"):
        load_tiny().encode(5)
