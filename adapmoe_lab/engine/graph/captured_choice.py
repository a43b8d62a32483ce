"""The choice of the next token as CUDA graphs, one of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adapmoe_lab.engine.graph.recording import Graph, recorded
from adapmoe_lab.engine.sampling import Choice, Sampler, Sampling, SamplingData


class CapturedChoice:
    """Chooses tokens by the logits that a captured step leaves, text by text.

    Temperature, seed and all that a `Sampling` holds are data: another captures nothing again, but
    the first of its kind.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        """Choose by logits [V] where they lie."""
        self._logits = logits
        self._data = SamplingData(len(logits), logits.device)
        self._graphs: dict[Choice, tuple[Graph, torch.Tensor]] = {}

    def begin(self, sampling: Sampling, text: torch.Tensor) -> None:
        """Sample what follows a text, int64 [T], from now on."""
        self._data.begin(sampling, text)

    @torch.inference_mode(False)  # what is captured outlives the caller's mode
    def next_token(self, logits: torch.Tensor, choice: Choice) -> int:
        """Return the token that follows, by logits [V]; it belongs to the text from now on."""
        if logits.data_ptr() != self._logits.data_ptr():
            self._logits.copy_(logits)
        with torch.cuda.device_of(self._logits):
            if choice not in self._graphs:
                self._graphs[choice] = self._recorded(choice)
            graph, token = self._graphs[choice]
            graph.replay()
        return int(token)

    def _recorded(self, choice: Choice) -> tuple[Graph, torch.Tensor]:
        position, is_in_text = self._data.position.clone(), self._data.is_in_text.clone()

        def undo() -> None:
            self._data.position.copy_(position)
            self._data.is_in_text.copy_(is_in_text)

        return recorded(lambda: self._data.next_token(self._logits, choice), undo)


class ReplayedSampler:
    """Chooses the tokens of one text by what was captured, once something was."""

    def __init__(
        self,
        captured: Callable[[], CapturedChoice | None],
        sampling: Sampling,
        text: torch.Tensor,
    ) -> None:
        """Begin after a text, int64 [T]; `captured` returns what chooses by the present step."""
        self._captured = captured
        self._begun: CapturedChoice | None = None
        self._uncaptured = Sampler(sampling, text)
        self._sampling = sampling
        self._text = text.tolist()

    def choose(self, logits: torch.Tensor) -> int:
        """Return the token that follows, by logits [V]; it belongs to the text from now on."""
        captured = self._captured()
        if captured is None:
            if self._begun is not None:  # it was given up in the midst of a text
                text = torch.tensor(self._text)
                self._uncaptured, self._begun = Sampler(self._sampling, text), None
            token = self._uncaptured.choose(logits)
        else:
            if captured is not self._begun:
                captured.begin(self._sampling, torch.tensor(self._text))
                self._begun = captured
            token = captured.next_token(logits, self._sampling.choice)
        self._text.append(token)
        return token
