"""What a model asks of a device: seconds of compute a second, and KV held, from what was asked in the last window.

Counted where it is asked, not where it is served: a model that gets half of what it needs still needs all of it.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from prism_sgl.schedulers.latency import LatencyEstimate, TokenRate

# Each answer counts for 1/16: about as many decide what an answer costs.
_NEW_PART = 1 / 16
_NUM_STEPS = 64


class LoadEstimate:
    """The demand of one model.

    An engine shares: passes that take several prompts, steps that decode for all. What is shared counts for the part
    of the time in which anybody needs it, 1 - exp(-rate x duration) if requests come by chance; what is not (tokens of
    prompts) adds up. A step counts for as much of the device as the TPOT SLO lets it take: one that takes 5 ms where
    50 are promised leaves nine tenths to others; so an answer takes as long as promised, however long it takes on the
    device where it is. What a model asks for is the same on all devices, or it would look smaller after each move.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self._requests = TokenRate(window_s)
        self._prompt_tokens = TokenRate(window_s)
        self._held_token_s = 0.0  # tokens of KV x seconds of an answer
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self._is_new = True

    def ask(self, prompt_tokens: int, now: float) -> None:
        self._requests.add(1, now)
        self._prompt_tokens.add(prompt_tokens, now)

    def answered(
        self, total_s: float, ttft_s: float, kv_tokens: int, answer_tokens: int, sharers: int
    ) -> None:
        """``kv_tokens`` were held for ``total_s``; ``sharers`` runtimes of the device had requests, this one too."""
        decode_s = max(0.0, total_s - ttft_s)
        part = 1.0 if self._is_new else _NEW_PART
        self._is_new = False
        self._held_token_s += part * (total_s * kv_tokens - self._held_token_s)
        if answer_tokens > 1 and decode_s > 0.0:
            # Engines that compute at once share the device: alone the step would be that much shorter.
            self._steps.append(decode_s / (answer_tokens - 1) / max(1, sharers))

    def noise(self, latency: LatencyEstimate, answer_tokens: int, tpot_s: float, now: float) -> float:
        """Relative standard error of ``compute``. What prompts' tokens ask for is as uncertain as those, of which
        a few long ones are most; the rest as the number of requests, in clumps or not: how long answers are is known of
        many."""
        by_tokens, by_requests = self._prompt_tokens.relative_error(now), self._requests.relative_error(now)
        if (total := self.compute(latency, answer_tokens, tpot_s, now)) <= 0.0:
            return max(by_tokens, by_requests)
        tokens = latency.uncached_tokens(round(self._prompt_tokens.per_s(now)))
        of_tokens = tokens * latency.s_per_token / total
        return of_tokens * by_tokens + (1.0 - of_tokens) * by_requests

    def compute(self, latency: LatencyEstimate, answer_tokens: int, tpot_s: float, now: float) -> float:
        """Seconds of one device that are asked for a second: prefill and decode. More than 1 is too much."""
        rate = self._requests.per_s(now)
        if rate <= 0.0:
            return 0.0
        tokens = latency.uncached_tokens(round(self._prompt_tokens.per_s(now)))
        prefill = _share(rate * latency.alpha_s) + tokens * latency.s_per_token
        step_s = median(self._steps) if self._steps else 0.0
        longest_s = max(step_s, tpot_s)
        return prefill + _share(rate * answer_tokens * longest_s) * step_s / longest_s

    def held_tokens(self, answer_tokens: int, tpot_s: float, now: float) -> float:
        """Tokens of KV that are held at a time, if answers take as long as they do; before the first one, as long as
        ``answer_tokens`` may take."""
        rate = self._requests.per_s(now)
        if not self._is_new or rate <= 0.0:
            return rate * self._held_token_s
        tokens = self._prompt_tokens.per_s(now) / rate + answer_tokens
        return rate * tokens * answer_tokens * tpot_s


def _share(busy: float) -> float:
    return 1.0 - math.exp(-busy)
