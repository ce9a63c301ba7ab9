"""The drawing of the pipeline: names fit their boxes, and no line runs through a box."""

import re

import pytest

from springhead.report import dag

pytestmark = pytest.mark.unit

EDGES = {
    ("a", "b"),
    ("b", "c"),
    ("a", "c"),
    ("s", "b"),
    ("s", "late_evaluation"),
    ("b", "quite_a_long_name"),
    ("c", "d"),
}
EDGES |= {("quite_a_long_name", "d"), ("a", "late_evaluation"), ("quite_a_long_name", "late_evaluation")}
EDGES |= {("s", "e"), ("d", "e"), ("c", "e")}


def drawn() -> str:
    names = sorted({name for edge in EDGES for name in edge})
    nodes = {name: dag._Node(name, items=["x", "y"] if name == "quite_a_long_name" else [""]) for name in names}
    dag._place(nodes, EDGES)
    assert {node.row for node in nodes.values()} >= {0, 1}
    return dag._svg("llm", nodes, EDGES)


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    found = re.findall(
        r'<title>(\w+).*?<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)".*?class="name">([^<]+)<', svg
    )
    for name, _, _, width, _, label in found:
        assert int(width) >= 7.8 * len(label) + 10, name
    return {name: (int(x), int(y), int(x) + int(w), int(y) + int(h)) for name, x, y, w, h, _ in found}


def points(path: str) -> list[tuple[float, float]]:
    """Points along a path of moves, cubic curves and horizontal lines."""
    along: list[tuple[float, float]] = []
    for kind, text in re.findall(r"([MCH])([^MCH]*)", path):
        n = [float(number) for number in text.split()]
        if kind == "M":
            along.append((n[0], n[1]))
            continue
        here = along[-1]
        ends = [here, (n[0], here[1]), (n[0], here[1]), (n[0], here[1])] if kind == "H" else [
            here, *zip(n[::2], n[1::2], strict=True)
        ]  # fmt: skip
        for step in range(1, 51):
            t = step / 50
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
            x, y = (sum(w * end[axis] for w, end in zip(weights, ends, strict=True)) for axis in (0, 1))
            along.append((x, y))
    return along


def test_names_fit_and_no_line_crosses_a_box() -> None:
    svg = drawn()
    found, paths = boxes(svg), re.findall(r'class="edge" d="([^"]+)"', svg)
    assert len(found) == 8 and len(paths) == len(EDGES)
    for path in paths:
        for x, y in points(path)[2:-2]:
            inside = [n for n, (x1, y1, x2, y2) in found.items() if x1 + 3 < x < x2 - 3 and y1 + 3 < y < y2 - 3]
            assert not inside, (path, inside)
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())  # type: ignore[union-attr]
    assert all(x2 <= width and y2 <= height for _, _, x2, y2 in found.values())
    assert min(y for path in paths for _, y in points(path)) >= 0
