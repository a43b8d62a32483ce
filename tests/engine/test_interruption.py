"""A generation stopped anywhere leaves the engine able to run the next one exactly."""

import pytest
import torch
from runs import PROMPT, decode, half_cached, reference_text

from adapmoe_lab.engine.generation.tokens import generate_tokens
from adapmoe_lab.engine.host_driven import combine


class Stop(BaseException):
    """Stands for the interrupt that a kernel's stop button raises."""


class FailingLink:
    """A link that breaks at its nth call, before or after the copy was made."""

    def __init__(self, link, at, method):
        self.link, self.left, self.method = link, at, method
        self.name = link.name

    def copy(self, source, destination):
        if self.method == "copy":
            self._count()
        return self.link.copy(source, destination)

    def wait(self, arrival):
        if self.method == "wait":
            self._count()
        self.link.wait(arrival)

    def without_link_delay(self):
        return self.link.without_link_delay()

    def _count(self):
        self.left -= 1
        if self.left == 0:
            raise Stop


@pytest.mark.parametrize("method", ["copy", "wait"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13])
def test_a_broken_transfer(load_tiny, at, method):
    model = half_cached(load_tiny())
    expected = reference_text(load_tiny)
    whole = model.engine._cached._link
    model.engine._cached._link = FailingLink(whole, at, method)
    with pytest.raises(Stop):
        decode(model.hf, model.encode(PROMPT), 24)
    model.engine._cached._link = whole
    assert decode(model.hf, model.encode(PROMPT), 24) == expected


@pytest.mark.parametrize("at_step", [0, 1, 7])
def test_an_interrupt_between_tokens(load_tiny, at_step):
    model = half_cached(load_tiny())
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 the interrupt comes between two tokens
        for step, _ in enumerate(generate_tokens(model.decoder(), model.encode(PROMPT), 24)):
            if step == at_step:
                raise KeyboardInterrupt
    assert decode(model.hf, model.encode(PROMPT), 24) == reference_text(load_tiny)


@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_exception_while_an_expert_computes(load_tiny, monkeypatch, at):
    model, calls, run = half_cached(load_tiny()), [], combine.run_expert

    def run_or_fail(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise MemoryError("no room")
        return run(*arguments)

    monkeypatch.setattr(combine, "run_expert", run_or_fail)
    with pytest.raises(MemoryError):
        decode(model.hf, model.encode(PROMPT), 24)
    assert decode(model.hf, model.encode(PROMPT), 24) == reference_text(load_tiny)


def test_a_config_is_restored_when_its_block_fails(load_tiny):
    model = half_cached(load_tiny())
    before = model.config
    with pytest.raises(Stop), model.running():
        raise Stop
    assert model.config is before
    with pytest.raises(Stop), model.engine.reading_store(), torch.no_grad():
        raise Stop
    assert model.engine._source is model.engine._cached
