"""What passes know about a node: JSON under `node.meta["custom"]["mixq"]`, behind typed attributes.

`meta["custom"]` is the only metadata that survives deepcopy, `ExportedProgram.module()`, saving and
AOTAutograd, and saving fails on anything in it that is not JSON.
"""

import json
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, overload

from torch.fx import Node

KEY = "mixq"
T = TypeVar("T")


def as_json(value: Any, what: str) -> Any:
    """The value as JSON has it (tuples become lists). Raises TypeError for anything else."""
    if value is None or type(value) in (str, bool, int):
        return value
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must be JSON, and {value!r} is not: {error}.") from error


class _Field(Generic[T]):
    """One annotation; None where it is not set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "_Field[T]": ...

    @overload
    def __get__(self, instance: "Annotations", owner: type) -> T | None: ...

    def __get__(self, instance: "Annotations | None", owner: type) -> "_Field[T] | T | None":
        if instance is None:
            return self
        value: T | None = instance.to_json().get(self.name)
        return value

    def __set__(self, instance: "Annotations", value: T | None) -> None:
        instance.update({self.name: value})


class Annotations:
    """The annotations of one node. Every write replaces the dictionary, so that copies never share one."""

    __slots__ = ("_node",)

    fqn = _Field[str]()
    """Name of the module or linear that the node belongs to."""
    role = _Field[str]()
    """What a linear is in its network; see `roles.py`."""
    scheme = _Field[str]()
    """Name of the scheme that `select-scheme` chose."""
    parameters = _Field[dict[str, Any]]()
    """That scheme with the outlier options applied, as `QuantScheme.to_json` writes it."""
    outlier_columns = _Field[list[int]]()
    """Calibrated columns that stay in 16 bit."""
    column_max = _Field[list[float]]()
    """The largest magnitude of each of `outlier_columns`."""
    skip = _Field[str]()
    """Why the node is left as it is."""
    kernel = _Field[str]()
    """Name of the provider that `select-kernels` chose."""
    origin = _Field[list[str]]()
    """Passes that made the node, oldest first; the pipeline writes it."""
    policy = _Field[dict[str, Any]]()
    """Of a quantization: its outlier policy; quantizations with other policies are not joined."""
    readers = _Field[list[str]]()
    """Of a quantization: names of the nodes whose weights read it; `share-quantize` joins them."""
    parameter = _Field[str]()
    """Of a linear whose weight is derived: name of the node of the parameter that it was computed from."""
    equalized = _Field[str]()
    """Name of the attribute that holds what the channels of its input are multiplied by, `[K]`."""
    rotated = _Field[str]()
    """The rotation of its input, such as `Hadamard of order 4096`."""
    members = _Field[list[dict[str, Any]]]()
    """Of a product for several linears: the annotations of each, in the order of their rows. Of a region that
    stays: those of each linear inside."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def to_json(self) -> dict[str, Any]:
        """Everything that is set. Treat it as read-only."""
        custom = self._node.meta.get("custom")
        found: dict[str, Any] = custom.get(KEY, {}) if isinstance(custom, dict) else {}
        return found

    def update(self, values: Mapping[str, Any]) -> None:
        """Sets several annotations; None clears one.

        Raises TypeError for a value that is not JSON, AttributeError for an unknown name.
        """
        for name in values:
            if name not in FIELDS:
                raise AttributeError(f"no annotation is named {name!r}. Valid: {', '.join(FIELDS)}.")
        merged = {**self.to_json(), **{name: as_json(v, f"annotation {name}") for name, v in values.items()}}
        kept = {name: value for name, value in merged.items() if value is not None}
        self._node.meta["custom"] = {**(self._node.meta.get("custom") or {}), KEY: kept}

    def clear(self) -> None:
        """Removes every annotation of mixq_compile from the node."""
        custom = {key: value for key, value in (self._node.meta.get("custom") or {}).items() if key != KEY}
        self._node.meta["custom"] = custom

    def __repr__(self) -> str:
        return f"Annotations({self._node.name}: {self.to_json()})"


FIELDS: tuple[str, ...] = tuple(
    name for name, field in vars(Annotations).items() if isinstance(field, _Field)
)
"""Names of all annotations."""
