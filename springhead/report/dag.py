"""The pipeline as an inline SVG: one node per step, its matrix items counted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape

from springhead.lineage.graph import Graph, branch_of, item_of, step_of
from springhead.progress import duration

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 112, 50, 40, 22, 10  # pixels; a column is wider where a name needs it
_LETTER = 7.8  # pixels of a bold letter of the names
_TITLES = {"rl": "Safe policies", "llm": "Language models"}


@dataclass
class _Node:
    """One step of a branch with all its items."""

    name: str
    items: list[str] = field(default_factory=list)
    states: set[str] = field(default_factory=set)
    seconds: float = 0.0
    column: int = 0
    row: int = 0

    @property
    def label(self) -> str:
        """Its name, and how many items it has."""
        return f"{self.name} ×{len(self.items)}" if len(self.items) > 1 else self.name

    @property
    def state(self) -> str:
        """The worst state of any item."""
        return next((state for state in ("failed", "stale", "missing") if state in self.states), "made")


def draw(graph: Graph, states: Mapping[str, str], seconds: Mapping[str, float]) -> str:
    """Returns one ``<figure>`` with an SVG per branch; empty for an empty graph.

    Args:
        graph: the artefact graph.
        states: state of each stage: ``made``, ``stale``, ``missing`` or ``failed``.
        seconds: how long each stage's last execution took.
    """
    figures = []
    for branch in sorted({branch_of(name) for name in graph.receipts}, reverse=True):
        nodes, edges = _collapse(graph, branch, states, seconds)
        _place(nodes, edges)
        figures.append(_svg(branch, nodes, edges))
    return "\n".join(figures)


def _collapse(
    graph: Graph, branch: str, states: Mapping[str, str], seconds: Mapping[str, float]
) -> tuple[dict[str, _Node], set[tuple[str, str]]]:
    nodes: dict[str, _Node] = {}
    for name in graph.order:
        if branch_of(name) == branch:
            node = nodes.setdefault(step_of(name), _Node(step_of(name)))
            node.items.append(item_of(name))
            node.states.add(states.get(name, "made"))
            node.seconds += seconds.get(name, 0.0)
    edges = {
        (step_of(maker), step_of(link.stage))
        for link in graph.links
        for maker in link.makers
        if branch_of(link.stage) == branch and branch_of(maker) == branch
    }
    return nodes, {(a, b) for a, b in edges if a != b}


def _place(nodes: dict[str, _Node], edges: set[tuple[str, str]]) -> None:
    """Puts each step one column after what it reads; a source stands just before its first reader."""
    for _ in nodes:
        for before, after in sorted(edges):
            nodes[after].column = max(nodes[after].column, nodes[before].column + 1)
    reads = {after for _, after in edges}
    for name, node in nodes.items():
        readers = [nodes[after].column for before, after in edges if before == name]
        if name not in reads and readers:
            node.column = min(readers) - 1
    taken: dict[int, int] = {}
    # The main line keeps row 0: whatever has something to read comes before late sources.
    for name in sorted(nodes, key=lambda n: (nodes[n].column, n not in reads, n)):
        node = nodes[name]
        node.row = taken.get(node.column, 0)
        taken[node.column] = node.row + 1


class _Grid:
    """Where boxes stand, in pixels.

    Args:
        nodes: What stands in it; a column is as wide as its longest name needs.
        top: Upper edge of row 0.
    """

    def __init__(self, nodes: Iterable[_Node], top: int) -> None:
        self.top = top
        self._widths: dict[int, int] = {}
        for node in nodes:
            needed = max(_WIDTH, round(_LETTER * len(node.label)) + 16)
            self._widths[node.column] = max(needed, self._widths.get(node.column, 0))

    def width(self, node: _Node) -> int:
        """Width of a node's box."""
        return self._widths[node.column]

    def x(self, node: _Node) -> int:
        """Left edge of a node's box."""
        before = [width for column, width in self._widths.items() if column < node.column]
        return _MARGIN + sum(before) + len(before) * _GAP_X

    def y(self, node: _Node) -> int:
        """Upper edge of a node's box."""
        return self.top + node.row * (_HEIGHT + _GAP_Y)


def _svg(branch: str, nodes: dict[str, _Node], edges: set[tuple[str, str]]) -> str:
    spans = [nodes[b].column - nodes[a].column for a, b in edges if nodes[a].row == nodes[b].row == 0]
    top = _MARGIN + (20 + 13 * max(spans) if spans and max(spans) > 1 else 12)
    grid = _Grid(nodes.values(), top)
    width = max(grid.x(node) + grid.width(node) for node in nodes.values()) + _MARGIN
    height = max(grid.y(node) for node in nodes.values()) + _HEIGHT + _MARGIN
    title = _TITLES.get(branch, branch)
    steps = ", ".join(nodes)
    parts = [
        f'<svg class="dag" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}: the steps {escape(steps)} and what reads what">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
    ]
    for before, after in sorted(edges):
        parts.append(f'<path class="edge" d="{_path(nodes[before], nodes[after], grid)}" marker-end="url(#tip)"/>')
    parts += [_box(node, grid) for node in nodes.values()]
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure class="dag-figure">{caption}<div class="scroll">{"".join(parts)}</svg></div></figure>'


def _path(before: _Node, after: _Node, grid: _Grid) -> str:
    """Returns a line to the next column, an arc over row 0, or a way between two rows: no box is crossed."""
    x1, x2 = grid.x(before) + grid.width(before), grid.x(after)
    y1, y2 = grid.y(before) + _HEIGHT // 2, grid.y(after) + _HEIGHT // 2
    span = after.column - before.column
    if span == 1:
        bend = (x2 - x1) // 2
        return f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2 - 2} {y2}"
    if before.row == after.row == 0:
        rise = grid.top - 12 - 13 * span
        start, end = x1 - _WIDTH // 4, x2 + _WIDTH // 4
        return f"M{start} {grid.top} C{start + 20} {rise} {end - 20} {rise} {end} {grid.top - 2}"
    # The lane above the row it comes to, or, on its way up, below it.
    lane = grid.y(after) - _GAP_Y // 2 if before.row <= after.row else grid.y(after) + _HEIGHT + _GAP_Y // 2
    half = _GAP_X // 2
    return (
        f"M{x1} {y1} C{x1 + half} {y1} {x1 + half // 2} {lane} {x1 + _GAP_X} {lane} H{x2 - _GAP_X} "
        f"C{x2 - half // 2} {lane} {x2 - half} {y2} {x2 - 2} {y2}"
    )


def _box(node: _Node, grid: _Grid) -> str:
    x, y, width = grid.x(node), grid.y(node), grid.width(node)
    time = duration(node.seconds) if node.seconds else ""
    middle, items = x + width // 2, ", ".join(item for item in node.items if item)
    tooltip = escape(f"{node.name}{': ' + items if items else ''}")
    return (
        f'<g class="node {node.state}"><title>{tooltip}</title>'
        f'<rect x="{x}" y="{y}" width="{width}" height="{_HEIGHT}" rx="9"/>'
        f'<text x="{middle}" y="{y + 21}" class="name">{escape(node.label)}</text>'
        f'<text x="{middle}" y="{y + 38}" class="time">{escape(time)}</text></g>'
    )
