"""Launch plans without a GPU: what is recorded, when it is repeated, and what a key tells apart.

The compiled library implements an operator on CPUs here, over a driver that writes down each launch.
"""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from mixq_compile.kernels.tl import plan_library, plan_recording
from mixq_compile.kernels.tl.plan_recording import Recording, enqueue, recorded
from mixq_compile.ops import providers

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or plan_library.TRITON_PROBLEM is not None,
    reason="compiles the launcher with g++ and the headers that Triton brings",
)
OPERATOR = "mixq_tried::doubled"
CAPACITY = 8
RUNS: list[str] = []
"""What the implementation in Python was called for."""


class Launched(NamedTuple):
    function: int
    grid: tuple[int, int, int]
    stream: int
    parameters: tuple[int, ...]


class Launch(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


class Driver:
    """What a plan calls of CUDA's driver: the launches that it was asked for, and their streams."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.stream = threading.local()
        self.failure = 0
        self.parameters = 5
        self.reads_descriptors = False
        number, address = ctypes.c_int, ctypes.c_void_p
        self._kept = [
            ctypes.CFUNCTYPE(number, ctypes.POINTER(Launch), address, ctypes.POINTER(address), address)(
                self._launch
            ),
            ctypes.CFUNCTYPE(number, address, address)(self._readdress),
            ctypes.CFUNCTYPE(number, address, address)(lambda *_: 0),
            ctypes.CFUNCTYPE(number, number, ctypes.POINTER(ctypes.c_char_p))(self._text),
            *[ctypes.CFUNCTYPE(number, address, address, ctypes.c_uint)(lambda *_: 0)] * 3,
            ctypes.CFUNCTYPE(number, ctypes.POINTER(address))(self._context),
            *[ctypes.CFUNCTYPE(number, address, address)(lambda *_: 0)] * 3,
            ctypes.CFUNCTYPE(number, number, ctypes.POINTER(address))(self._stream),
        ]

    def addresses(self) -> list[int | None]:
        return [ctypes.cast(function, ctypes.c_void_p).value for function in self._kept]

    def _launch(self, config: Any, function: int, parameters: Any, _: Any) -> int:
        words = range(16 if self.reads_descriptors else 1)
        read = tuple(
            ctypes.c_int64.from_address(parameters[at] + 8 * word).value
            for at in range(self.parameters) for word in words
        )  # fmt: skip
        found = config.contents
        self.launches.append(Launched(function, (found.gx, found.gy, found.gz), found.stream or 0, read))
        return self.failure

    def _readdress(self, descriptor: int, address: int) -> int:
        ctypes.c_int64.from_address(descriptor).value = address
        return 0

    def _context(self, context: Any) -> int:
        context[0] = 1
        return 0

    def _stream(self, _device: int, stream: Any) -> int:
        stream[0] = getattr(self.stream, "number", 7)
        return 0

    def _text(self, _failure: int, text: Any) -> int:
        text[0] = b"out of sorts"
        return 0


SIGNATURE = {"x": "*fp32", "out": "*fp32", "rows": "i32", "BLOCK": "constexpr"}


class Compiled(NamedTuple):
    """As much of a kernel that Triton has compiled as a recording reads."""

    function: int = 4242
    packed_metadata: tuple[int, int, int] = (4, 1, 64)
    global_scratch_size: int = 0

    @property
    def metadata(self) -> Any:
        class Metadata:
            global_scratch_size = self.global_scratch_size
            profile_scratch_size = 0
            launch_pdl = launch_cooperative_grid = False

        return Metadata

    @property
    def src(self) -> Any:
        class Source:
            signature = SIGNATURE

        return Source


class Kernel:
    """A kernel that doubles x, in place of one of Triton's."""

    arg_names = ("x", "out", "rows", "BLOCK")

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(x: Tensor, out: Tensor, rows: int, BLOCK: int) -> Compiled:
            out.copy_(2 * x) if _unseen() else None
            return self.compiled

        return run


def _unseen() -> bool:
    """False where a recording would see the arithmetic that stands in for a kernel's."""
    return plan_recording._CURRENT.recording is None


KERNEL = Kernel(Compiled())


def doubled(x: Tensor, other: Tensor | None, note: str) -> Tensor:
    """The operator: one buffer, one launch; notes ask for what a plan cannot or must not repeat."""
    RUNS.append(note)
    out = torch.empty_like(x)
    if note == "copies":
        x = x + 1
    enqueue(KERNEL, (x.shape[0],), x, out, x.shape[0], BLOCK=16)
    return out


IMPLEMENTATION = doubled


def implementation(*arguments: Any) -> Tensor:
    """The operator in Python, which a test may exchange."""
    return IMPLEMENTATION(*arguments)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """The operator, by plans, over a driver that writes down what it is asked for."""
    library = torch.library.Library("mixq_tried", "DEF")
    library.define("doubled(Tensor x, Tensor? other, str note) -> Tensor")
    library.impl("doubled", implementation, "CompositeExplicitAutograd")
    made = Driver()
    plan_library.use_driver(made.addresses())
    plan_library.implement(OPERATOR, implementation, "CPU", capacity=CAPACITY)
    yield made
    library._destroy()


@pytest.fixture(autouse=True)
def fresh(driver: Driver) -> None:
    plan_library.forget_plans()
    RUNS.clear()
    driver.launches.clear()
    driver.failure = 0


def call(x: Tensor, other: Tensor | None = None, note: str = "") -> Tensor:
    return torch.ops.mixq_tried.doubled.default(x, other, note)  # type: ignore[no-any-return]


def warm(x: Tensor, other: Tensor | None = None, note: str = "") -> None:
    """Twice in Python: a key is met, and recorded when it comes again."""
    call(x, other, note), call(x, other, note)


def test_the_third_call_of_a_key_runs_no_python(driver: Driver) -> None:
    x = torch.randn(4, 8)
    warm(x)
    assert (len(RUNS), driver.launches, plan_library.plans_of(OPERATOR)) == (2, [], 1)
    result = call(x)
    assert len(RUNS) == 2, "a planned call ran the Python implementation"
    (launch,) = driver.launches
    assert (launch.function, launch.grid, launch.stream) == (4242, (4, 1, 1), 7)
    assert launch.parameters[:2] == (x.data_ptr(), result.data_ptr())
    assert launch.parameters[2:] == (4, 0, 0), "rows, and the two pointers to scratch memory"
    assert (result.shape, result.stride(), result.dtype) == (x.shape, x.stride(), x.dtype)


def test_addresses_are_those_of_the_call(driver: Driver) -> None:
    warm(torch.randn(4, 8))
    seen = set()
    for _ in range(4):
        x = torch.randn(4, 8)
        result = call(x)
        assert driver.launches[-1].parameters[:2] == (x.data_ptr(), result.data_ptr())
        seen.add(x.data_ptr())
        memory = x.untyped_storage()
        del x, result, memory  # the next call may get the same memory, or other
    assert len(RUNS) == 2


X = torch.randn(6, 8)
OTHER_KEYS = {
    "shape": lambda: (torch.randn(5, 8), None, ""),
    "stride": lambda: (torch.randn(6, 16)[:, :8], None, ""),
    "dtype": lambda: (torch.randn(6, 8, dtype=torch.float64), None, ""),
    "alignment": lambda: (torch.randn(49)[1:].view(6, 8), None, ""),
    "operand present": lambda: (torch.randn(6, 8), torch.randn(3), ""),
    "operands at one address": lambda: (X, X, ""),
    "text": lambda: (torch.randn(6, 8), None, "else"),
}


@pytest.mark.parametrize("difference", OTHER_KEYS)
def test_what_a_provider_may_look_at_is_in_the_key(driver: Driver, difference: str) -> None:
    warm(X)
    call(*OTHER_KEYS[difference]())
    assert (len(RUNS), driver.launches) == (3, []), f"a plan was repeated for another {difference}"


def test_operands_beside_each_other_differ_from_operands_at_one_address(driver: Driver) -> None:
    one, other = torch.randn(6, 8), torch.randn(6, 8)
    warm(one, other)
    call(one, one)
    assert (len(RUNS), driver.launches) == (3, [])


def test_what_cannot_be_repeated_goes_on_in_python(driver: Driver) -> None:
    x = torch.randn(4, 8)
    for _ in range(4):
        call(x, None, "copies")
    assert (len(RUNS), driver.launches) == (4, [])
    assert (plan_library.plans_of(OPERATOR), plan_library.keys_of(OPERATOR)) == (0, 1)


def test_many_shapes_keep_the_memory_bounded(driver: Driver) -> None:
    for rows in range(1, 50):
        warm(torch.randn(rows, 8))
        assert plan_library.keys_of(OPERATOR) <= CAPACITY
    assert plan_library.plans_of(OPERATOR) == CAPACITY
    RUNS.clear()
    call(torch.randn(49, 8))
    assert RUNS == [], "the last shape was forgotten"
    call(torch.randn(1, 8))
    assert RUNS == [""], "the first shape is still remembered"


def test_the_least_recently_used_key_is_forgotten(driver: Driver) -> None:
    for rows in range(1, CAPACITY + 1):
        warm(torch.randn(rows, 8))
    call(torch.randn(1, 8))
    warm(torch.randn(CAPACITY + 1, 8))
    RUNS.clear()
    call(torch.randn(1, 8))
    assert RUNS == [], "a key that was used lately was forgotten"
    call(torch.randn(2, 8))
    assert RUNS == [""]


def test_threads_share_plans_and_each_launches_on_its_stream(driver: Driver) -> None:
    x = torch.randn(4, 8)
    warm(x)
    results: list[tuple[int, int]] = []
    problems: list[BaseException] = []

    def work(number: int) -> None:
        driver.stream.number = number
        try:
            for _ in range(50):
                own = torch.randn(4, 8)
                call(own)
                results.append((number, own.data_ptr()))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (problems, len(RUNS)) == ([], 2)
    assert sorted((one.stream, one.parameters[0]) for one in driver.launches) == sorted(results)


def test_a_failed_launch_says_which_operator_and_why(driver: Driver) -> None:
    x = torch.randn(4, 8)
    warm(x)
    driver.failure = 1
    with pytest.raises(RuntimeError, match=r"mixq_tried::doubled: out of sorts\."):
        call(x)


class Described(NamedTuple):
    """A tensor descriptor, as Triton's is."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class DescribedKernel(Kernel):
    """A kernel that takes two matrices by descriptors."""

    arg_names = ("left", "right")

    class _Compiled(NamedTuple):
        function: int = 4243
        packed_metadata: tuple[int, int, int] = (4, 1, 64)

        class metadata:
            global_scratch_size = profile_scratch_size = 0
            launch_pdl = launch_cooperative_grid = False
            tensordesc_meta = ("left's", "right's")

        class src:
            signature: ClassVar[dict[str, str]] = dict.fromkeys(("left", "right"), "tensordesc<fp32[64, 64]>")

    def __init__(self) -> None:
        super().__init__(Compiled())

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda left, right: self._Compiled()


def test_a_descriptor_gets_the_address_of_the_call_and_keeps_the_rest(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, rest = DescribedKernel(), {"left's": 100, "right's": 200}
    monkeypatch.setattr(plan_recording, "encoded", lambda _, meta: [rest[meta] + word for word in range(16)])

    def described(x: Tensor, other: Tensor | None, note: str) -> Tensor:
        RUNS.append(note)
        out = torch.empty_like(x)
        enqueue(kernel, (1,), *(Described(each, (6, 8), (8, 1)) for each in (x, out)))
        return out

    monkeypatch.setattr(driver, "reads_descriptors", True)
    monkeypatch.setattr(driver, "parameters", 1)
    monkeypatch.setitem(globals(), "IMPLEMENTATION", described)
    warm(torch.randn(6, 8))
    for _ in range(2):
        x = torch.randn(6, 8)
        call(x)
        assert driver.launches[-1].parameters == (x.data_ptr(), *range(101, 116))
    monkeypatch.setattr(driver, "reads_descriptors", False)
    monkeypatch.setattr(driver, "parameters", 12)
    result = call(x)
    sizes = (6, 8, 8, 1)
    expected = (x.data_ptr(), *sizes, result.data_ptr(), *sizes, 0, 0)
    assert driver.launches[-1].parameters == expected
    assert len(RUNS) == 2


def test_plans_are_forgotten_where_a_provider_is_registered(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "_AFTER_CHANGES", [plan_library.forget_plans])
    monkeypatch.setitem(providers._PROVIDERS, "weight_only_linear", {})
    warm(torch.randn(4, 8))

    @providers.provider("weight_only_linear", name="other", priority=1, supports=lambda query: True)
    def other(x: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
        return x

    assert plan_library.keys_of(OPERATOR) == 0, "a call would go on with the kernel chosen before"


def words_of(function: Any, *arguments: Any) -> tuple[list[int] | None, str | None]:
    """The plan of a call, or why there is none."""
    with Recording(arguments) as recording:
        result = function(*arguments)
    return recording.plan(result), recording.refusal


def test_a_refusal_says_why() -> None:
    x = torch.randn(4, 8)
    cases = {
        "it runs aten": lambda x: doubled(x, None, "copies"),
        "no memory that the call allocated": lambda x: x,
        "no operand's": lambda x: (
            enqueue(KERNEL, (1,), X, torch.empty_like(x), 4, BLOCK=16) or torch.empty_like(x)
        ),
        "scratch memory of its own": lambda x: enqueue(
            Kernel(Compiled(global_scratch_size=8)), (1,), x, torch.empty_like(x), 4, BLOCK=16
        ),
    }
    for reason, function in cases.items():
        plan, refusal = words_of(function, x)
        assert plan is None, reason
        assert reason in (refusal or "")


def test_operands_that_overlap_are_refused() -> None:
    memory = torch.randn(100)
    plan, refusal = words_of(lambda x, y: torch.empty_like(x), memory[:60], memory[50:])
    assert (plan, refusal) == (None, "operands overlap")


def test_a_part_of_an_operand_is_named_by_its_offset() -> None:
    x = torch.randn(4, 8)

    def on_the_second_half(x: Tensor) -> Tensor:
        out = torch.empty(2, 8)
        enqueue(KERNEL, (2,), x[2:], out, 2, BLOCK=16)
        return out

    plan, refusal = words_of(on_the_second_half, x)
    assert plan is not None, refusal
    assert plan[-13:-10] == [plan_recording.OPERAND, 0, 2 * 8 * 4], "pointer of x: operand 0, 64 bytes on"


def test_an_empty_grid_is_not_launched(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "IMPLEMENTATION", doubled)
    x = torch.randn(0, 8)
    warm(x)
    assert call(x).shape == (0, 8)
    assert (len(RUNS), driver.launches) == (2, []), "the driver refuses a grid without programs"


def test_a_recorded_call_gives_what_an_unrecorded_one_gives() -> None:
    offered: list[list[int]] = []
    x = torch.randn(4, 8)
    result = recorded(doubled, offered.append)(x, None, "")
    assert (result.shape, len(offered)) == (x.shape, 1)
