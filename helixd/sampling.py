"""What a client may ask of sampling, and what it gets back with each token. Shared by api, coordinator and engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one sequence are drawn.

    `temperature == 0` is greedy. The random numbers of a position depend on `(seed, choice, position)` only, so a
    position drawn again on another node gives the same token. `top_k == 0` and `min_p == 0` mean off.
    `repetition_penalty` counts prompt and output; `presence_penalty` and `frequency_penalty` count output only.
    `logprobs`: None for none, else how many alternatives to report beside the chosen token (0 to 20).
    """

    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken with no draw."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position: the chosen token's and the best alternatives', best first.

    They are of the model's own distribution (log softmax of the logits before temperature and penalties).
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
