"""`mixq.prepare_for_generation`: makes a transformers model's own `generate()` run compiled."""

from __future__ import annotations

import copy
import inspect
import logging
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixq_compile.errors import MixqError
from mixq_compile.runtime import torch_compat
from mixq_compile.runtime.generation_cache import LayerShape, SharedCaches, own_copy, rewind
from mixq_compile.runtime.generation_calls import (
    CallShape,
    check_cache,
    check_model,
    context_of,
    place_of,
    shape_of_call,
)
from mixq_compile.runtime.generation_inputs import Prompt, decoding_inputs, prompt_inputs
from mixq_compile.runtime.generation_options import (
    INDUCTOR,
    MIXQ,
    SHORTEST_PROMPT,
    TAKE_MODES,
    GenerationOptions,
    Sizes,
)
from mixq_compile.runtime.mixq_linear import MixqLinear
from mixq_compile.runtime.outlier_control import hold_states

log = logging.getLogger(__name__)

GRAPHS = "reduce-overhead"
GRAPH_MODES = (GRAPHS, "max-autotune")
WITHOUT_GRAPHS = {GRAPHS: None, "max-autotune": "max-autotune-no-cudagraphs"}
STEPS = ("prepare_inputs_for_generation", "forward")
"""Methods that stand on a model in place of its own while it generates."""
RUNS_UNTIL_RECORDED = 2
"""A CUDA graph is recorded by the second run."""


def prepare_for_generation(model: nn.Module, **options: Any) -> nn.Module:
    """Makes `model.generate(...)` run compiled, in place; returns the model.

    Prompts and decoding are compiled, on GPUs into CUDA graphs. Prompts and batches are filled up to a few
    sizes, and the static key-value cache is kept between calls, so that another prompt compiles nothing.
    What fills up teaches nothing and changes no result. Calls that cannot run so (beam search, assistants,
    longer than `max_length`, …) run as they did, and the log says why. `restore_generation` undoes it.

        >>> model = mixq_compile.prepare_for_generation(mixq_compile.quantize(model), max_length=2048)
        >>> model.generate(**inputs, max_new_tokens=128)

    Args:
        model: a decoder of transformers, quantized by `quantize` or not. Prepare it after `quantize`.
        options: the fields of `GenerationOptions`.

    Raises OptionError for wrong options, and for a model that cannot be prepared (an encoder, a cache with
    a sliding window, flash attention, several devices), saying why.
    """
    chosen = GenerationOptions.from_user(options)
    check_model(model)
    restore_generation(model)
    prepared = PreparedGeneration(model, chosen)
    prepared.examine()
    prepared.install("generate")
    if chosen.warm_up:
        try:
            prepared.warm_up()
        except BaseException:
            restore_generation(model)
            raise
    return model


def restore_generation(model: nn.Module) -> bool:
    """Gives a model its own `generate()` back and frees the cache; False where it was not prepared."""
    prepared = prepared_generation(model)
    if prepared is None:
        return False
    with prepared.lock:
        prepared.remove("generate")
        prepared.forget()
    return True


def prepared_generation(model: nn.Module) -> PreparedGeneration | None:
    """What `prepare_for_generation` put on a model; None where it was not prepared."""
    entry = model.__dict__.get("generate")
    return entry.prepared if isinstance(entry, Entry) else None


class Entry:
    """Stands on a model in place of one of its methods.

    An object and no bound method, because those come back from pickle as the class's own.
    """

    def __init__(self, prepared: PreparedGeneration, method: str) -> None:
        self.prepared, self.method = prepared, method

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the prepared model's method of this name."""
        return getattr(self.prepared, self.method)(*arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:
        return self.prepared.signature(self.method)


@dataclass
class Call:
    """One call of `generate` under way."""

    thread: int
    prompt: Prompt
    cache: Any
    length: int
    """Of the cache."""
    prefilled: bool = False


class PreparedGeneration:
    """The compiled functions and caches of one model."""

    def __init__(self, model: Any, options: GenerationOptions) -> None:
        self.model = model
        self.options = options
        self.replaced: dict[str, Any] = {}
        """What stood on the model itself in place of its class's methods, or None, by name."""
        self.forget()

    def forget(self) -> None:
        """Drops everything that was compiled, and the cache."""
        self.lock = threading.RLock()
        self.call: Call | None = None
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.caches: SharedCaches | None = None
        self.sizes: Sizes | None = None
        self.in_graphs = False
        """Whether steps run in CUDA graphs."""
        self._signatures: dict[str, inspect.Signature] = {}
        self._place: Any = None
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model compiles for itself.
        return {"model": self.model, "options": self.options, "replaced": self.replaced}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def own(self, method: str) -> Callable[..., Any]:
        """The model's own method, past what stands on it here."""
        found = self.replaced[method] if method in self.replaced else self.model.__dict__.get(method)
        if found is None:
            found = getattr(type(self.model), method).__get__(self.model)
        return found  # type: ignore[no-any-return]

    def signature(self, method: str) -> inspect.Signature:
        """The signature of the model's own method, which transformers asks for at every token."""
        found = self._signatures.get(method)
        if found is None:
            found = self._signatures[method] = inspect.signature(self.own(method))
        return found

    def install(self, method: str) -> None:
        """Stands in place of a method of the model."""
        self.replaced[method] = self.model.__dict__.get(method)
        self.model.__dict__[method] = Entry(self, method)

    def remove(self, method: str) -> None:
        """Gives the model's method back."""
        replaced = self.replaced.pop(method)
        if replaced is None:
            del self.model.__dict__[method]
        else:
            self.model.__dict__[method] = replaced

    def examine(self) -> None:
        """Looks at the model's cache by one call on two made-up tokens, which teach nothing."""
        place = place_of(self.model)
        if place == self._place:
            return
        self.compiled, self._signatures = {}, {}
        self.in_graphs = place[0].type == "cuda" and self.options.mode in (None, *GRAPH_MODES)
        from transformers import StaticCache

        config = self.model.config.get_text_config(decoder=True)
        self.sizes = Sizes.of(self.options, context_of(self.model), self.in_graphs)
        cache = StaticCache(config=config, max_cache_len=4)
        check_cache(cache.layers, self.model)
        with torch.inference_mode(False), torch.no_grad(), hold_states(self.model):
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=place[0])
            self.own("forward")(input_ids=tokens, past_key_values=cache, use_cache=True)
        self.caches = SharedCaches(config, [LayerShape.of(layer) for layer in cache.layers])
        self._place = place

    def generate(self, inputs: Any = None, *positional: Any, **arguments: Any) -> Any:
        """The model's `generate`, compiled where the call can be."""
        if positional:
            names = list(inspect.signature(self.own("generate")).parameters)[1:]
            arguments |= dict(zip(names, positional, strict=False))
        if self.call is not None and self.call.thread == threading.get_ident():
            return self.own("generate")(inputs, **arguments)  # by something that this very call runs
        shape, reason = shape_of_call(self.model, inputs, arguments)
        if shape is not None:
            with self.lock:
                self.examine()
                call = self._call_of(shape)
                if isinstance(call, Call):
                    return self._run(call, shape, inputs, arguments)
                reason = call
        if reason not in self._said:
            self._said.add(str(reason))
            log.warning("generate() runs as the unprepared model's: %s (said once)", reason)
        return self.own("generate")(inputs, **arguments)

    def _call_of(self, shape: CallShape) -> Call | str:
        """The sizes and the cache of a call; or why none fit."""
        assert self.sizes is not None
        assert self.caches is not None
        batch = self.sizes.batch(shape.rows)
        if batch is None:
            most = self.sizes.batches[-1]
            return f"{shape.rows} sequences are more than the largest of batch_sizes, {most}"
        length = self.sizes.cache(shape.total)
        if length is None:
            most = self.sizes.caches[-1]
            return f"{shape.total} tokens are more than the longest cache, {most}: raise max_length"
        filled = self.sizes.prompt(shape.length, length)
        if self.in_graphs and batch * (filled or 0) > self.options.graph_prompt_tokens:
            filled = None
        prompt = Prompt(
            rows=shape.rows,
            length=shape.length,
            batch=batch,
            filled=filled or max(shape.length, SHORTEST_PROMPT),
            masked=filled is not None,
        )
        return Call(threading.get_ident(), prompt, self.caches.empty(batch, length), length)

    def _run(self, call: Call, shape: CallShape, inputs: Any, arguments: dict[str, Any]) -> Any:
        given = dict(arguments)
        given.pop("cache_implementation", None)
        config = given.get("generation_config")
        if config is None:
            given["disable_compile"] = True
        else:
            given["generation_config"] = config = copy.deepcopy(config)
            config.disable_compile, config.cache_implementation = True, None
        # `generate` refuses a cache beside the name of one, and takes the name from here.
        usual = self.model.generation_config
        implementation, usual.cache_implementation = usual.cache_implementation, None
        own = self.own("generate")
        self.call = call
        try:
            for method in STEPS:
                self.install(method)
            result = own(inputs, past_key_values=call.cache, **given)
        finally:
            self.call = None
            usual.cache_implementation = implementation
            for method in STEPS:
                if method in self.replaced:
                    self.remove(method)
        if shape.returns_cache:
            # This one is the next call's.
            text_config = self.model.config.get_text_config(decoder=True)
            result.past_key_values = own_copy(call.cache, shape.rows, text_config)
        return result

    def _current(self, cache: Any) -> Call | None:
        """The call under way that uses this cache; None for other threads' and other models' calls."""
        call = self.call
        mine = call is not None and call.cache is cache and call.thread == threading.get_ident()
        return call if mine else None

    def prepare_inputs_for_generation(self, input_ids: Tensor, *positional: Any, **given: Any) -> Any:
        """The model's inputs, filled up to the sizes that are compiled."""
        prepare = self.own("prepare_inputs_for_generation")
        call = None if positional else self._current(given.get("past_key_values"))
        if call is None:
            return prepare(input_ids, *positional, **given)
        if input_ids.shape[1] > call.length:
            raise MixqError(f"generate() goes on beyond its {call.length} tokens: pass max_new_tokens.")
        if call.prefilled:
            return decoding_inputs(prepare, call.prompt.batch, input_ids, given)
        return prompt_inputs(prepare, call.prompt, call.length, input_ids, given)

    def forward(self, *positional: Any, **inputs: Any) -> Any:
        """The model's forward: compiled where it is a step of the call under way."""
        call = None if positional else self._current(inputs.get("past_key_values"))
        if call is None:
            return self.own("forward")(*positional, **inputs)
        prompt = call.prompt
        if call.prefilled:
            outputs = self._compiled(call, inputs)(inputs)
            outputs.logits = outputs.logits[: prompt.rows]
            return outputs
        if "logits_to_keep" in inputs:
            place = torch.full((1,), prompt.length - 1, dtype=torch.int64, device=inputs["input_ids"].device)
            inputs["logits_to_keep"] = place
        outputs = self._compiled(call, inputs)(inputs)
        rewind(call.cache, prompt.length)
        call.prefilled = True
        last = slice(None) if "logits_to_keep" in inputs else slice(prompt.length - 1, prompt.length)
        outputs.logits = outputs.logits[: prompt.rows, last]
        return outputs

    def _compiled(self, call: Call, inputs: dict[str, Any]) -> Callable[..., Any]:
        """The compiled forward for a step's sizes."""
        tokens = inputs["input_ids"].shape[1]
        masked = inputs.get("attention_mask") is not None
        graphs = self.in_graphs and (
            call.prefilled
            or (call.prompt.masked and call.prompt.batch * tokens <= self.options.graph_prompt_tokens)
        )
        key = (call.prefilled, call.prompt.batch, call.length, masked, graphs)
        if not call.prefilled:
            _mark_lengths(inputs)
        if key not in self.compiled:
            step = "decoding" if call.prefilled else "prompts"
            log.info(
                "generate() compiles %s: batch %d, cache of %d tokens%s",
                step, call.prompt.batch, call.length, ", in CUDA graphs" if graphs else "",
            )  # fmt: skip
            name = f"generation_{step}_{call.prompt.batch}_{call.length}_{int(masked)}_{int(graphs)}"
            self.compiled[key] = self._compile(name, graphs, dynamic=None if not call.prefilled else False)
        return self.compiled[key]

    def _compile(self, name: str, graphs: bool, dynamic: bool | None) -> Callable[..., Any]:
        backend = self.options.backend or (MIXQ if _is_quantized(self.model) else INDUCTOR)
        mode = self.options.mode
        if mode is None:
            mode = GRAPHS if graphs and backend in TAKE_MODES else None
        elif mode in GRAPH_MODES and not graphs:
            mode = WITHOUT_GRAPHS[mode]
        options = dict(self.options.options)
        if options and mode is not None and backend == MIXQ:
            options["mode"] = mode
        elif options and mode is not None:
            options = {**torch_compat.mode_patches(mode), **options}
        chosen: dict[str, Any] = {"options": options} if options else {"mode": mode}
        function = _named(self.own("forward"), name)
        return torch.compile(function, backend=backend, dynamic=dynamic, **chosen)

    def warm_up(self) -> None:
        """Compiles every combination of sizes by calls on made-up tokens, which teach nothing."""
        self.examine()
        assert self.sizes is not None
        with hold_states(self.model):
            for length in reversed(self.sizes.caches):
                for batch in reversed(self.sizes.batches):
                    prompts = [size for size in self.sizes.prompts if size < length] or [length // 2]
                    for prompt in prompts:
                        self._warm_up(batch, prompt, length)

    def _warm_up(self, batch: int, prompt: int, length: int) -> None:
        tokens = torch.ones(batch, prompt, dtype=torch.int64, device=self.model.device)
        for _ in range(RUNS_UNTIL_RECORDED):
            given = {"do_sample": False, "max_new_tokens": min(3, length - prompt), "eos_token_id": None}
            shape = CallShape(batch, prompt, length, False)
            with self.lock:
                call = self._call_of(shape)
                assert isinstance(call, Call), call
                self._run(call, shape, tokens, {"attention_mask": torch.ones_like(tokens), **given})


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, MixqLinear) for module in model.modules())


def _mark_lengths(inputs: dict[str, Any]) -> None:
    """Lets one compilation serve prompts of every length."""
    for name, dimension in (("input_ids", 1), ("position_ids", 1), ("attention_mask", 2)):
        value = inputs.get(name)
        for tensor in value.values() if isinstance(value, dict) else (value,):
            if isinstance(tensor, Tensor):
                torch_compat.suggest_dynamic(tensor, dimension)


def _named(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that calls `forward`, with code of its own: torch counts recompilations by code."""

    def step(inputs: dict[str, Any]) -> Any:
        return forward(**inputs)

    code = step.__code__.replace(co_name=name)
    return types.FunctionType(code, step.__globals__, name, step.__defaults__, step.__closure__)
