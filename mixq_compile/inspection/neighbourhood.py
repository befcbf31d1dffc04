"""What a pass changed, drawn: the changed nodes of one layer and those up to two edges away, as SVG.

The page of a report styles the drawing: nodes and edges carry the classes `added`, `removed`, `changed`
and `context`, and nodes their name as `data-node`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

from mixq_compile.inspection.alike import Alike, group_alike
from mixq_compile.inspection.blast_radius import layer_of
from mixq_compile.ir.diff import GraphDiff
from mixq_compile.ir.snapshot import NodeRow, Snapshot

if TYPE_CHECKING:
    import networkx

HOPS = 2
MOST_NODES = 60
MOST_PICTURES = 24
HUB = 8
"""A neighbour that this many nodes read is drawn, but its other readers are not."""

CHARACTER, PADDING, BOX_HEIGHT = 6.1, 8, 34
FIRST_LINE, SECOND_LINE, ONLY_LINE = 14, 27, 21
COLUMN_GAP, ROW_GAP, MARGIN = 28, 10, 10
GRID_COLUMNS = 5
MOST_LETTERS = 22
SWEEPS = 6
SIGNS = {"added": "+", "removed": "−", "changed": "~", "context": ""}
_NUMBER = re.compile(r"\d+")
Place = tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """One kind of change that a pass made, drawn for the first layer that it happened to."""

    kind: str
    """The layer's name, with `*` for numbers where several are alike; empty outside of all modules."""
    layer: str
    """The layer that is drawn."""
    alike: int
    """To how many layers the same happened."""
    drawn: int
    left_out: int
    """Nodes within reach that are not drawn."""
    svg: str


@dataclass(frozen=True)
class Surroundings:
    """The nodes and edges of a graph before and after a pass, as one graph."""

    rows: Mapping[str, NodeRow]
    """Each node as it is afterwards, or as it was."""
    states: Mapping[str, str]
    """added, removed, changed, or context."""
    order: Mapping[str, int]
    inputs: Mapping[str, Mapping[str, str]]
    """Of each node, the nodes that it reads or read: added, removed, or context."""
    readers: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, before: Snapshot, after: Snapshot, diff: GraphDiff) -> Surroundings:
        """What lies around a difference."""
        states = dict.fromkeys(before.by_name | after.by_name, "context")
        states |= {row.name: "added" for row in diff.added}
        states |= {row.name: "removed" for row in diff.removed}
        states |= {new.name: "changed" for _, new in diff.changed}
        inputs = {name: dict(_edges(before.by_name.get(name), after.by_name.get(name))) for name in states}
        readers: dict[str, list[str]] = {name: [] for name in states}
        for name, sources in inputs.items():
            for source in sources:
                readers[source].append(name)
        order = {name: place for place, name in enumerate(_merged_order(before, after))}
        return cls(before.by_name | after.by_name, states, order, inputs, readers)

    def around(self, focus: Collection[str], most: int = MOST_NODES) -> tuple[list[str], int]:
        """The nodes up to two edges away, nearest first, and how many were left out."""
        found = dict.fromkeys(sorted(focus, key=self.order.__getitem__))
        frontier: Iterable[str] = tuple(found)
        beyond: set[str] = set()
        for _ in range(HOPS):
            reached: dict[str, None] = {}
            for name in frontier:
                readers = self.readers[name]
                if name not in focus and len(readers) >= HUB:
                    beyond.update(readers)
                    readers = ()
                reached.update(dict.fromkeys((*self.inputs[name], *readers)))
            frontier = tuple(name for name in reached if name not in found)
            found.update(reached)
        drawn = list(found)[:most]
        return drawn, len({*found, *beyond}.difference(drawn))


def pictures_of(
    before: Snapshot, after: Snapshot, diff: GraphDiff, layers: Iterable[str]
) -> tuple[tuple[Picture, ...], int]:
    """A picture for each kind of change that a pass made, and how many kinds were left out."""
    kinds = _kinds(diff, {layer: place for place, layer in enumerate(layers)})
    if not kinds:
        return (), 0
    surroundings = Surroundings.of(before, after, diff)
    pictures = []
    for kind, focus in kinds[:MOST_PICTURES]:
        drawn, left_out = surroundings.around(focus)
        svg = neighbourhood_svg(surroundings, drawn, focus)
        pictures.append(Picture(kind.pattern, kind.fqns[0], len(kind.fqns), len(drawn), left_out, svg))
    return tuple(pictures), max(0, len(kinds) - MOST_PICTURES)


def neighbourhood_svg(surroundings: Surroundings, drawn: Sequence[str], focus: Collection[str]) -> str:
    """These nodes and the edges between them as an SVG, data flowing from left to right.

    Nodes of the focus and their edges have the class `focus` as well.
    """
    joined, alone = _split(surroundings, drawn)
    labels = {name: _label(surroundings.rows[name]) for name in drawn}
    widths = {
        name: 2 * PADDING + CHARACTER * max(len(label[0]) + 3, len(label[1]))
        for name, label in labels.items()
    }
    columns, edges = _columns(surroundings, joined)
    places, width, height = _places(columns, edges, widths)
    places, width, height = _grid(alone, widths, places, width, height)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="neighbourhood" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="group" '
        'aria-label="Changed nodes and their neighbours">'
    ]
    for (source, name), (chain, state) in edges.items():
        kind = f"{state} focus" if source in focus or name in focus else state
        parts.append(_edge(chain, kind, places, widths))
    for name in drawn:
        kind = f"{surroundings.states[name]} focus" if name in focus else surroundings.states[name]
        parts.append(_box(surroundings, name, kind, labels[name], places[name], widths[name]))
    return "".join([*parts, "</svg>"])


def _edges(before: NodeRow | None, after: NodeRow | None) -> Iterator[tuple[str, str]]:
    old, new = (row.inputs if row is not None else () for row in (before, after))
    both = before is not None and after is not None
    for name in dict.fromkeys((*new, *old)):
        if both and (name in old) != (name in new):
            yield name, "added" if name in new else "removed"
        else:
            yield name, "context"


def _merged_order(before: Snapshot, after: Snapshot) -> Iterator[str]:
    """All nodes of both: in the second's order, removed ones where they stood in the first."""
    leaving: dict[str | None, list[str]] = {}
    previous = None
    for row in before.rows:
        if row.name in after.by_name:
            previous = row.name
        else:
            leaving.setdefault(previous, []).append(row.name)
    yield from leaving.get(None, ())
    for row in after.rows:
        yield row.name
        yield from leaving.get(row.name, ())


def _kinds(diff: GraphDiff, layers: dict[str, int]) -> list[tuple[Alike, list[str]]]:
    """Each kind of change, and the changed nodes of its first layer; linears first, in the order they run."""
    groups: dict[str, list[tuple[str, NodeRow]]] = {}
    for state, rows in (
        ("removed", diff.removed),
        ("changed", [new for _, new in diff.changed]),
        ("added", diff.added),
    ):
        for row in rows:
            groups.setdefault(layer_of(row.fqn, layers) or row.fqn, []).append((state, row))
    changes = {
        layer: frozenset(
            Counter((state, row.op, _NUMBER.sub("*", row.target)) for state, row in found).items()
        )
        for layer, found in sorted(groups.items(), key=lambda group: layers.get(group[0], len(layers)))
    }
    return [(kind, [row.name for _, row in groups[kind.fqns[0]]]) for kind in group_alike(changes)]


def _label(row: NodeRow) -> tuple[str, str]:
    """What a node is in a few characters, and its value."""
    if row.op.startswith("call"):
        what = _operator(row.target)
        if what == "getitem":
            what = f"getitem {row.arguments[-1]}"
    elif row.op == "output":
        what = "return"
    else:
        what = ".".join((row.fqn or row.target).split(".")[-2:])
    return _shortened(what, MOST_LETTERS), _shortened(row.value, MOST_LETTERS)


def _operator(target: str) -> str:
    """The operator alone: `mul` of `aten.mul.Tensor`, `silu` of `nn.functional.silu`."""
    parts = target.split(".")
    overloaded = len(parts) == 3 and not target.startswith(("nn.", "_"))
    return parts[1] if overloaded else parts[-1]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _split(surroundings: Surroundings, drawn: Sequence[str]) -> tuple[list[str], list[str]]:
    """The nodes that have an edge to another one here, and those that have none; both in order."""
    known = set(drawn)
    linked = {name for name in drawn if known.intersection(surroundings.inputs[name])}
    linked |= {source for name in drawn for source in surroundings.inputs[name] if source in known}
    ordered = sorted(drawn, key=surroundings.order.__getitem__)
    return [name for name in ordered if name in linked], [name for name in ordered if name not in linked]


Columns = list[list[str]]
Edges = dict[tuple[str, str], tuple[list[str], str]]


def _columns(surroundings: Surroundings, joined: Sequence[str]) -> tuple[Columns, Edges]:
    """The nodes in columns, and each edge as the chain of places that it runs through."""
    import networkx

    flow = networkx.DiGraph()
    flow.add_nodes_from(joined)
    known = set(joined)
    edges: Edges = {}
    for name in joined:
        for source, state in surroundings.inputs[name].items():
            if source in known:
                edges[source, name] = ([source, name], _edge_state(surroundings, source, name, state))
                # A node that moved may read one that stands behind it: such an edge places nothing.
                if surroundings.order[source] < surroundings.order[name]:
                    flow.add_edge(source, name)
    ranks = {
        name: rank for rank, nodes in enumerate(networkx.topological_generations(flow)) for name in nodes
    }
    for name in joined:
        if flow.in_degree(name) == 0 and flow.out_degree(name) > 0:
            ranks[name] = min(ranks[reader] for reader in flow.successors(name)) - 1
    columns: Columns = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    for name in joined:
        columns[ranks[name]].append(name)
    for (source, name), (chain, _) in edges.items():
        for rank in range(ranks[source] + 1, ranks[name]):
            # A space never stands in the name of a node.
            bend = f"{source} {name} {rank}"
            columns[rank].append(bend)
            chain.insert(-1, bend)
    return _untangled(columns, edges), edges


def _edge_state(surroundings: Surroundings, source: str, reader: str, state: str) -> str:
    ends = (surroundings.states[source], surroundings.states[reader])
    return next((end for end in ends if end in ("added", "removed")), state)


def _links(edges: Edges) -> networkx.Graph:
    import networkx

    links = networkx.Graph()
    for chain, _ in edges.values():
        links.add_edges_from(pairwise(chain))
    return links


def _untangled(columns: Columns, edges: Edges) -> Columns:
    """The columns, each ordered by the mean place of its nodes' neighbours in the column beside it."""
    links = _links(edges)
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        numbers = range(1, len(columns)) if forth else range(len(columns) - 2, -1, -1)
        for number in numbers:
            beside = columns[number - 1 if forth else number + 1]
            place = {name: index for index, name in enumerate(beside)}
            own = {name: index for index, name in enumerate(columns[number])}
            means = {
                name: fmean(found) if (found := [place[n] for n in links[name] if n in place]) else own[name]
                for name in own
            }
            columns[number] = sorted(own, key=means.__getitem__)
    return columns


def _places(
    columns: Columns, edges: Edges, widths: Mapping[str, float]
) -> tuple[dict[str, Place], float, float]:
    """The middle of each node and bend; the width and height of the whole."""
    links = _links(edges)
    heights = {name: BOX_HEIGHT if name in widths else ROW_GAP for column in columns for name in column}
    tops: dict[str, float] = {}
    for column in columns:
        _stack(column, heights, dict.fromkeys(column, 0.0), tops)
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 else reversed(columns):
            wanted = {name: fmean([tops[n] for n in links[name]] or [tops[name]]) for name in column}
            _stack(column, heights, wanted, tops)
    first = min((tops[name] - heights[name] / 2 for name in tops), default=0.0)
    places: dict[str, Place] = {}
    left = float(MARGIN)
    for column in columns:
        room = max((widths[name] for name in column if name in widths), default=0.0)
        places.update({name: (left + room / 2, tops[name] - first + MARGIN) for name in column})
        left += room + COLUMN_GAP
    height = max((y + heights[name] / 2 for name, (_, y) in places.items()), default=0.0) + MARGIN
    return places, max(left - COLUMN_GAP + MARGIN, 2 * MARGIN), height


def _stack(
    column: Sequence[str],
    heights: Mapping[str, float],
    wanted: Mapping[str, float],
    tops: dict[str, float],
) -> None:
    """Places a column in its order, without overlap and as near as can be to where each node wants to be."""
    offsets = [0.0]
    for above, below in pairwise(column):
        offsets.append(offsets[-1] + (heights[above] + heights[below]) / 2 + ROW_GAP)
    # Without overlap means that place minus offset never falls: pools of nodes take their common mean.
    pools: list[tuple[float, int]] = []
    for name, offset in zip(column, offsets, strict=False):
        mean, size = wanted[name] - offset, 1
        while pools and pools[-1][0] > mean:
            above_mean, above_size = pools.pop()
            mean = (mean * size + above_mean * above_size) / (size + above_size)
            size += above_size
        pools.append((mean, size))
    starts = [mean for mean, size in pools for _ in range(size)]
    tops.update({name: start + offset for name, start, offset in zip(column, starts, offsets, strict=False)})


def _grid(
    alone: Sequence[str],
    widths: Mapping[str, float],
    places: dict[str, Place],
    width: float,
    height: float,
) -> tuple[dict[str, Place], float, float]:
    """Adds the nodes without edges below the others, in rows."""
    room = max((widths[name] for name in alone), default=0.0) + ROW_GAP
    for index, name in enumerate(alone):
        row, column = divmod(index, GRID_COLUMNS)
        x = MARGIN + column * room + widths[name] / 2
        places[name] = (x, max(height, MARGIN) + row * (BOX_HEIGHT + ROW_GAP) + BOX_HEIGHT / 2)
        width = max(width, x + widths[name] / 2 + MARGIN)
    if alone:
        height = max(places[name][1] for name in alone) + BOX_HEIGHT / 2 + MARGIN
    return places, width, height


def _edge(chain: Sequence[str], kind: str, places: Mapping[str, Place], widths: Mapping[str, float]) -> str:
    """A line from the right of one box to the left of another, through its bends."""
    x, y = places[chain[0]]
    x += widths[chain[0]] / 2
    steps = [f"M{x:.0f} {y:.0f}"]
    for name in chain[1:]:
        to_x, to_y = places[name]
        to_x -= widths.get(name, 0) / 2
        middle = (x + to_x) / 2
        steps.append(f"C{middle:.0f} {y:.0f} {middle:.0f} {to_y:.0f} {to_x:.0f} {to_y:.0f}")
        x, y = to_x, to_y
    return f'<path class="edge {kind}" d="{"".join(steps)}"/>'


def _box(
    surroundings: Surroundings, name: str, kind: str, label: tuple[str, str], place: Place, width: float
) -> str:
    row, sign = surroundings.rows[name], SIGNS[surroundings.states[name]]
    left, top = place[0] - width / 2, place[1] - BOX_HEIGHT / 2
    what, value = label
    first = FIRST_LINE if value else ONLY_LINE
    texts: list[tuple[str, float, int, str]] = [
        ("what", PADDING, first, what),
        ("value", PADDING, SECOND_LINE, value),
        ("sign", width - PADDING, first, sign),
    ]
    inside = "".join(
        f'<text class="{part}" x="{x:.0f}" y="{y}">{escape(text)}</text>'
        for part, x, y, text in texts
        if text
    )
    return (
        f'<g class="node {kind}" data-node="{escape(name)}" transform="translate({left:.0f} {top:.0f})" '
        f'tabindex="0" role="button" aria-label="{escape(name)}, {surroundings.states[name]}">'
        f"<title>{escape(row.line)}</title>"
        f'<rect width="{width:.0f}" height="{BOX_HEIGHT}" rx="4"/>{inside}</g>'
    )
