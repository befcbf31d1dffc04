"""What `prepare_for_generation` may be told, and the sizes to which calls are rounded up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mixq_compile.errors import OptionError, unknown_name
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.options import MixqOptions

INDUCTOR, MIXQ = "inductor", "mixq"
TAKE_MODES = (INDUCTOR, MIXQ)
"""Backends that have `torch.compile`'s modes."""
LONGEST_BY_DEFAULT = 4096
"""Tokens of one sequence; a model's context may be far longer than what anybody asks for."""
SMALLEST_CACHE = 256
LARGEST_BATCH = 64
SHORTEST_PROMPT = 2
"""A prompt of one token would be compiled as a step of decoding is."""
SHORTEST_BUCKET = 16


@dataclass(frozen=True)
class GenerationOptions:
    """Options of `mixq_compile.prepare_for_generation`."""

    max_length: int | None = None
    """Most tokens of one sequence, prompt included. None: the model's context, at most 4096."""
    batch_sizes: tuple[int, ...] | None = None
    """Batches that are compiled; others are filled up to the next. None: powers of two up to 64."""
    prompt_lengths: tuple[int, ...] | None = None
    """Lengths that prompts are filled up to. None: in CUDA graphs powers of two from 16; else none, since one
    compilation serves every length."""
    cache_lengths: tuple[int, ...] | None = None
    """Lengths of the key-value cache; a call takes the first that holds it. None: powers of two from 256."""
    graph_prompt_tokens: int = 512
    """Prompts of at most so many tokens, over the batch, run in CUDA graphs; larger ones would not gain."""
    backend: str | None = None
    """A backend of `torch.compile`. None: mixq where the model has quantized modules, else inductor."""
    mode: str | None = None
    """A `torch.compile` mode. None: reduce-overhead on GPUs (CUDA graphs), default elsewhere."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the backend: the fields of MixqOptions, or Inductor's."""
    warm_up: bool = False
    """Compile all batches, cache lengths and prompt lengths now, on made-up tokens that teach nothing."""

    def __post_init__(self) -> None:
        for name in ("max_length", "graph_prompt_tokens"):
            value = getattr(self, name)
            least = 0 if name == "graph_prompt_tokens" else SHORTEST_PROMPT
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise OptionError(f"{name} must be a whole number from {least}, not {value!r}.")
        for name, least in (
            ("batch_sizes", 1),
            ("prompt_lengths", SHORTEST_PROMPT),
            ("cache_lengths", SHORTEST_PROMPT),
        ):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, _ascending(name, given, least))
        if self.backend is not None and self.backend not in torch.compiler.list_backends(None):
            raise unknown_name("backend", self.backend, torch.compiler.list_backends(None))
        if self.mode is not None and self.mode not in torch_compat.mode_names():
            raise unknown_name("mode", self.mode, torch_compat.mode_names())
        if not isinstance(self.warm_up, bool):
            raise OptionError(f"warm_up must be True or False, not {self.warm_up!r}.")
        if not isinstance(self.options, Mapping):
            raise OptionError(f"options takes a mapping of the backend's options, not {self.options!r}.")
        if self.options and self.backend in (None, MIXQ):
            MixqOptions.from_user(options=self.options)
        if self.options.get("mode") is not None:
            raise OptionError(
                "the mode is an option of prepare_for_generation itself: give mode=… beside options."
            )

    @classmethod
    def from_user(cls, given: Mapping[str, Any]) -> GenerationOptions:
        """Options from keyword arguments. Raises OptionError for an unknown name, with the valid ones."""
        valid = [entry.name for entry in dataclasses.fields(cls)]
        for name in given:
            if name not in valid:
                raise unknown_name("option of prepare_for_generation", name, valid)
        return cls(**given)


def _ascending(name: str, given: Any, least: int) -> tuple[int, ...]:
    values = (given,) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(values, (list, tuple)) or not values:
        raise OptionError(f"{name} takes whole numbers, for example ({least}, {16 * least}), not {given!r}.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} takes whole numbers from {least}, not {value!r}.")
    return tuple(sorted(set(values)))


@dataclass(frozen=True)
class Sizes:
    """The sizes that calls of one model on one device are rounded up to."""

    max_length: int
    batches: tuple[int, ...]
    caches: tuple[int, ...]
    prompts: tuple[int, ...]
    """Empty: prompts keep their lengths."""

    @classmethod
    def of(cls, options: GenerationOptions, context: int | None, in_graphs: bool) -> Sizes:
        """The sizes for a model with this context. Raises OptionError where more than that is asked."""
        longest = options.max_length or min(context or LONGEST_BY_DEFAULT, LONGEST_BY_DEFAULT)
        if context is not None and longest > context:
            raise OptionError(f"max_length={longest} is more than the model's context of {context} tokens.")
        for name in ("prompt_lengths", "cache_lengths"):
            largest = max(getattr(options, name) or (0,))
            if largest > longest:
                raise OptionError(f"{name} has {largest}, more than max_length={longest}.")
        prompts = options.prompt_lengths or ()
        if options.prompt_lengths is None and in_graphs:
            most = min(longest, options.graph_prompt_tokens)
            prompts = _powers_of_two(SHORTEST_BUCKET, most)
        caches = options.cache_lengths or _powers_of_two(SMALLEST_CACHE, longest)
        return cls(
            max_length=longest,
            batches=options.batch_sizes or _powers_of_two(1, LARGEST_BATCH),
            caches=tuple(sorted({*caches, longest})) if options.cache_lengths is None else caches,
            prompts=prompts,
        )

    def batch(self, rows: int) -> int | None:
        """The compiled batch that these rows run in; None where none is large enough."""
        return _next(self.batches, rows)

    def prompt(self, length: int, cache: int) -> int | None:
        """The length that a prompt is filled up to, within its cache; None where it keeps its own."""
        found = _next(self.prompts, length)
        return found if found is None or found <= cache else cache

    def cache(self, length: int) -> int | None:
        """The cache that holds so many tokens; None where none is long enough."""
        return _next(self.caches, max(length, SHORTEST_PROMPT))


def _next(sizes: tuple[int, ...], wanted: int) -> int | None:
    return next((size for size in sizes if size >= wanted), None)


def _powers_of_two(first: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= 2
    return tuple(sizes)
