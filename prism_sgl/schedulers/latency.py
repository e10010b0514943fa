"""What is learned of each model: how long a prefill takes, how long answers get, and how many tokens a second it is
asked for.

The paper has e = p / c (section 6.2). Measured on real engines the line has an intercept that is larger than the
slope's part for the usual short prompt, so here e = alpha + p / c, where p is the part of the prompt that the prefix
cache does not have.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

# Until something is measured: the rate that Prism's prototype assumes for every model (2048 tokens/s).
_FIRST_ALPHA_S = 0.02
_FIRST_S_PER_TOKEN = 1 / 2048
# 24 samples give 276 slopes: 60 us every fourth sample. More would remember a machine that has changed since.
_NUM_SAMPLES = 24
_FIT_EVERY = 4
# Prompts of one length say nothing about the slope.
_LEAST_SPREAD = 2.0
# Each answer's tokens count for 5 %: about the last 20 answers decide the hit ratio.
_FORGET = 0.95
_MOST_HITS = 0.99  # the last token of a prompt is always computed
# Until an answer has been seen: the median of Arena-Chat is 211 (the paper's trace).
_FIRST_ANSWER_TOKENS = 256
_NUM_ANSWERS = 64


class LatencyEstimate:
    """Seconds of prefill by prompt length, from the last answers.

    Theil-Sen: the median of the slopes between all pairs, then the median of what the slope leaves. Up to 29 % of
    the samples may be wild (a pass that waited for memory, a first call that compiled) without effect, however wild.
    """

    def __init__(self) -> None:
        self.alpha_s = _FIRST_ALPHA_S
        self.s_per_token = _FIRST_S_PER_TOKEN
        self._samples: deque[tuple[float, float]] = deque(maxlen=_NUM_SAMPLES)
        self._until_fit = 1
        self._prompt_tokens = 0.0
        self._cached_tokens = 0.0

    @property
    def is_new(self) -> bool:
        """So few samples that a rough one is better than none."""
        return len(self._samples) < _FIT_EVERY

    @property
    def hit_ratio(self) -> float:
        """The part of a prompt's tokens that the prefix cache is expected to have."""
        if self._prompt_tokens <= 0.0:
            return 0.0
        return min(_MOST_HITS, self._cached_tokens / self._prompt_tokens)

    def uncached_tokens(self, prompt_tokens: int) -> float:
        return prompt_tokens * (1.0 - self.hit_ratio)

    def estimate_s(self, prompt_tokens: int) -> float:
        return self.uncached_s(self.uncached_tokens(prompt_tokens))

    def uncached_s(self, tokens: float) -> float:
        """Of a prompt of which the prefix cache has nothing."""
        return self.alpha_s + self.s_per_token * tokens

    def observe_hits(self, prompt_tokens: int, cached_tokens: int) -> None:
        """From an answer's usage."""
        self._prompt_tokens = self._prompt_tokens * _FORGET + prompt_tokens
        self._cached_tokens = self._cached_tokens * _FORGET + min(cached_tokens, prompt_tokens)

    def observe(self, computed_tokens: float, prefill_s: float) -> None:
        """So many tokens, those in the cache left out, took so long."""
        if prefill_s < 0:
            return
        self._samples.append((computed_tokens, prefill_s))
        self._until_fit -= 1
        if self._until_fit <= 0:
            self._until_fit = _FIT_EVERY if len(self._samples) >= _FIT_EVERY else 1
            self._fit()

    def _fit(self) -> None:
        samples = sorted(self._samples)
        shortest, longest = samples[0][0], samples[-1][0]
        if longest > _LEAST_SPREAD * max(shortest, 1):
            slopes = [
                (t2 - t1) / (p2 - p1)
                for i, (p1, t1) in enumerate(samples)
                for p2, t2 in samples[i + 1 :]
                if p2 > p1
            ]
            self.s_per_token = max(0.0, median(slopes))
        typical_s = median(t for _, t in samples)
        # Never more than what is seen: a slope learned from long prompts must not make alpha negative.
        self.s_per_token = min(self.s_per_token, typical_s / max(1.0, median(p for p, _ in samples)))
        self.alpha_s = max(0.0, median(t - self.s_per_token * p for p, t in samples))


class AnswerLength:
    """How long an answer is expected to get: the mean of the last ones, because memory adds up."""

    def __init__(self) -> None:
        self._tokens: deque[int] = deque(maxlen=_NUM_ANSWERS)
        self._total = 0

    @property
    def typical(self) -> int:
        return round(self._total / len(self._tokens)) if self._tokens else _FIRST_ANSWER_TOKENS

    def expect(self, max_new_tokens: int) -> int:
        """``max_new_tokens`` 0: not said."""
        return min(self.typical, max_new_tokens) if max_new_tokens > 0 else self.typical

    def observe(self, completion_tokens: int) -> None:
        if len(self._tokens) == _NUM_ANSWERS:
            self._total -= self._tokens[0]
        self._tokens.append(completion_tokens)
        self._total += completion_tokens


class TokenRate:
    """Tokens a second over a sliding window, in twelve buckets: bounded memory whatever the rate.

    The paper's choice is 60 s, prompt tokens of admitted requests plus decoded tokens (P App. A.4).
    """

    _NUM_BUCKETS = 12

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._bucket_s = window_s / self._NUM_BUCKETS
        self._buckets: deque[tuple[int, int]] = deque()  # (number of the bucket, tokens)
        self._total = 0

    def add(self, tokens: int, now: float) -> None:
        number = int(now / self._bucket_s)
        self._forget(number)
        if self._buckets and self._buckets[-1][0] == number:
            self._buckets[-1] = (number, self._buckets[-1][1] + tokens)
        else:
            self._buckets.append((number, tokens))
        self._total += tokens

    def per_s(self, now: float) -> float:
        self._forget(int(now / self._bucket_s))
        return self._total / self._window_s

    def relative_error(self, now: float) -> float:
        """Standard error of the rate over the rate, by batch means: what differs between buckets is chance. 1 if all
        came in one of them, so what has just begun is uncertain until it has lasted."""
        self._forget(int(now / self._bucket_s))
        if not self._total:
            return 0.0
        num = self._NUM_BUCKETS
        squares = sum(tokens * tokens for _, tokens in self._buckets)
        return math.sqrt(max(0.0, num * squares / self._total**2 - 1) / (num - 1))

    def _forget(self, number: int) -> None:
        while self._buckets and self._buckets[0][0] <= number - self._NUM_BUCKETS:
            self._total -= self._buckets.popleft()[1]
