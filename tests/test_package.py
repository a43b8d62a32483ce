"""The package as a whole: light to import, floors kept apart, no network."""

import json
import subprocess
import sys

import pytest

import adapmoe_lab as lab

HEAVY = ("torch", "transformers", "plotly", "ipywidgets", "anywidget", "lm_eval", "numpy")


def test_importing_it_loads_nothing_heavy_and_is_quick():
    code = (
        "import sys, time, json; start = time.perf_counter(); import adapmoe_lab; "
        "print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    seconds, modules = json.loads(output)
    assert seconds < 0.5
    assert not {name.split(".")[0] for name in modules} & set(HEAVY)


@pytest.mark.parametrize("name", lab.__all__)
def test_every_public_name_is_there_and_documented(name):
    public = getattr(lab, name)
    assert name in dir(lab)
    assert name.isupper() or (public.__doc__ and public.__name__.split(".")[-1] == name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        lab.no_such_thing  # noqa: B018
