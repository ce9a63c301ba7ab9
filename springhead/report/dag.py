"""The pipeline as an inline SVG: one node per step, its matrix items counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape

from springhead.lineage.graph import Graph, branch_of, item_of, step_of
from springhead.progress import duration

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 124, 50, 44, 22, 10  # pixels
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


def _x(node: _Node) -> int:
    return _MARGIN + node.column * (_WIDTH + _GAP_X)


def _svg(branch: str, nodes: dict[str, _Node], edges: set[tuple[str, str]]) -> str:
    spans = [nodes[b].column - nodes[a].column for a, b in edges if nodes[a].row == nodes[b].row]
    top = _MARGIN + (20 + 13 * max(spans) if spans and max(spans) > 1 else 12)

    def y(node: _Node) -> int:
        return top + node.row * (_HEIGHT + _GAP_Y)

    width = max(_x(node) for node in nodes.values()) + _WIDTH + _MARGIN
    height = max(y(node) for node in nodes.values()) + _HEIGHT + _MARGIN
    title = _TITLES.get(branch, branch)
    steps = ", ".join(nodes)
    parts = [
        f'<svg class="dag" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}: the steps {escape(steps)} and what reads what">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
    ]
    for before, after in sorted(edges):
        parts.append(f'<path class="edge" d="{_path(nodes[before], nodes[after], y)}" marker-end="url(#tip)"/>')
    parts += [_box(node, y(node)) for node in nodes.values()]
    caption = f"<figcaption>{escape(title)}</figcaption>"
    return f'<figure class="dag-figure">{caption}<div class="scroll">{"".join(parts)}</svg></div></figure>'


def _path(before: _Node, after: _Node, y: Callable[[_Node], int]) -> str:
    """Returns a line to the next column, or an arc over the nodes in between."""
    x1, x2 = _x(before) + _WIDTH, _x(after)
    y1, y2 = y(before) + _HEIGHT // 2, y(after) + _HEIGHT // 2
    span = after.column - before.column
    if span == 1 or before.row != after.row:
        bend = (x2 - x1) // 2
        return f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2 - 2} {y2}"
    rise = y(before) - 12 - 13 * span
    start, end = _x(before) + _WIDTH * 3 // 4, _x(after) + _WIDTH // 4
    return f"M{start} {y(before)} C{start + 20} {rise} {end - 20} {rise} {end} {y(after) - 2}"


def _box(node: _Node, y: int) -> str:
    count = f" ×{len(node.items)}" if len(node.items) > 1 else ""
    time = duration(node.seconds) if node.seconds else ""
    middle, items = _x(node) + _WIDTH // 2, ", ".join(item for item in node.items if item)
    tooltip = escape(f"{node.name}{': ' + items if items else ''}")
    return (
        f'<g class="node {node.state}"><title>{tooltip}</title>'
        f'<rect x="{_x(node)}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="9"/>'
        f'<text x="{middle}" y="{y + 21}" class="name">{escape(node.name)}{count}</text>'
        f'<text x="{middle}" y="{y + 38}" class="time">{escape(time)}</text></g>'
    )
