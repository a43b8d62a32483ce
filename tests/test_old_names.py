"""Copies of the notebooks of version 0.1 still run: their imports and what is new about them."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import adapmoe_lab as lab

IMPORTS = {
    "00_tour": ["import adapmoe_lab as lab", "from adapmoe_lab.views import figures"],
    "03_gating": [
        "import adapmoe_lab as lab",
        "from adapmoe_lab.policies.thresholds import RULES, largest_skipped_fraction",
        "from adapmoe_lab.views import figures",
        "figures.plot_stand_ins, figures.stand_ins_info",
    ],
    "04_cache_plan": [
        "import adapmoe_lab as lab",
        "from adapmoe_lab.policies.allocation import adapmoe_loads, budget_bytes, uniform_plan",
        "from adapmoe_lab.records import CachePlan",
        "from adapmoe_lab.simulation.residency import residencies, slot_divisions",
        "from adapmoe_lab.views import figures",
        "figures.plot_slot_worth, figures.slot_worth_info",
    ],
    "05_prefetch": [
        "import adapmoe_lab as lab",
        "from adapmoe_lab.policies.allocation import budget_bytes, slots_plan, uniform_plan",
        "from adapmoe_lab.simulation.predictability import with_baselines",
        "from adapmoe_lab.simulation.prefetch_tables import best_prefetch, buffer_slots, "
        "prefetch_choices",
        "from adapmoe_lab.views import figures",
    ],
}
"""The lines as they were; 01 and 02 import what 00 does."""

MOVED = {
    "adapmoe_lab.policies.thresholds": ["RULES", "largest_skipped_fraction"],
    "adapmoe_lab.simulation.predictability": ["with_baselines"],
    "adapmoe_lab.simulation.prefetch_tables": ["buffer_slots"],
    "adapmoe_lab.simulation.residency": [("residencies", "cache_choices"), "slot_divisions"],
    "adapmoe_lab.views.figures": [
        ("plot_slot_worth", "figures.plot_marginal_benefit"),
        ("plot_stand_ins", "figures.plot_surrogates"),
        ("slot_worth_info", "figures.marginal_benefit_info"),
        ("stand_ins_info", "figures.surrogates_info"),
    ],
}
PAIRS = [
    (module, *(name if isinstance(name, tuple) else (name, name)))
    for module, names in MOVED.items()
    for name in names
]


@pytest.mark.parametrize("notebook", IMPORTS)
def test_its_imports_run_and_warn_where_they_are_made(notebook):
    """A kernel shows warnings of deprecated names only where its own cells use them."""
    lines = "\n".join(IMPORTS[notebook])
    shown = subprocess.run(
        [sys.executable, "-c", lines], capture_output=True, text=True, check=True
    ).stderr
    moved = [name for names in MOVED.values() for name in names]
    old = [name[0] if isinstance(name, tuple) else name for name in moved]
    used = {name for name in old if re.search(rf"\b{name}\b", lines)}
    warned = set(re.findall(r"\.(\w+) is now lab\.", shown))
    assert used <= warned
    assert all(name in lines for name in warned)


@pytest.mark.parametrize(("module", "old", "new"), PAIRS)
def test_an_old_name_is_the_new_one_and_says_so(module, old, new):
    scope = {}
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now lab\.{new},"):
        exec(f"from {module} import {old} as found", scope)  # noqa: S102
    expected = lab
    for part in new.split("."):
        expected = getattr(expected, part)
    assert scope["found"] is expected


def test_names_that_never_were_are_attribute_errors():
    for module in MOVED:
        with pytest.raises(ImportError, match="no_such_thing"):
            exec(f"from {module} import no_such_thing")  # noqa: S102


def test_what_moved_within_a_package_needs_no_warning():
    from adapmoe_lab.policies import allocation

    assert allocation.uniform_plan is lab.uniform_plan
    assert allocation.slots_plan is lab.slots_plan


def test_choices_of_prefetch_keep_their_old_names_at_the_old_place(monkeypatch):
    from adapmoe_lab.simulation import prefetch_tables
    from adapmoe_lab.simulation.search import prefetch_search

    choices = {"none": None, "the next layer": SimpleNamespace(), "all": SimpleNamespace()}
    monkeypatch.setattr(prefetch_search, "prefetch_choices", lambda *_, **__: choices)
    monkeypatch.setattr(
        prefetch_search, "best_prefetch", lambda *_, **__: (choices["all"], {"none": 2, "all": 1})
    )
    with pytest.warns(DeprecationWarning, match="now lab.prefetch_choices"):
        found = prefetch_tables.prefetch_choices(1, 2)
    assert found == {
        "nobody": None, "the next layer": choices["the next layer"], "everybody": choices["all"],
    }  # fmt: skip
    with pytest.warns(DeprecationWarning, match="now lab.best_prefetch"):
        assert prefetch_tables.best_prefetch(1) == (choices["all"], {"nobody": 2, "everybody": 1})
