"""The graph as DVC sees it: names, edges, hints; which part is needed; what is up to date."""

import pytest

from pipelines.graph import Graph, Node, changed, read_graph, settled
from springhead.errors import BadInput
from tests.pipelines.conftest import Light

pytestmark = pytest.mark.unit


def graph_of(edges: dict[str, tuple[str, ...]]) -> Graph:
    return Graph({name: Node(name, upstream) for name, upstream in edges.items()})


DIAMOND = graph_of({"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ()})


def test_reads_names_edges_and_hints_from_dvc(light: Light) -> None:
    graph = read_graph(light.root)
    assert graph.stages == ["a-make@x", "a-make@y", "a-sum", "b-read", "b-check"]
    assert graph.nodes["a-sum"].upstream == ("a-make@x", "a-make@y")
    assert graph.nodes["b-check"].upstream == ("a-sum", "b-read")
    assert graph.nodes["a-make@x"].group == "a-make"
    assert graph.nodes["a-make@y"].description == "write rows"
    assert [n.name for n in graph.nodes.values() if n.retry == 1] == ["a-make@x", "a-make@y"]
    assert [n.name for n in graph.nodes.values() if n.gpu] == ["b-read"]
    assert graph.nodes["a-sum"].uncached == ("data/metrics/a-sum.json",)


def test_a_dvc_file_is_a_source_and_no_stage(light: Light) -> None:
    light.write("raw.txt", "raw")
    light.dvc("add", "-q", "raw.txt")
    light.write("dvc.yaml", light.read("dvc.yaml").replace("source.txt", "raw.txt"))
    graph = read_graph(light.root)
    assert graph.nodes["raw.txt.dvc"].source
    assert "raw.txt.dvc" not in graph.stages
    assert graph.nodes["b-read"].upstream == ("raw.txt.dvc",)


@pytest.mark.parametrize(
    ("meta", "message"),
    [("{retry: -1}", "meta.retry"), ("{retry: yes}", "meta.retry"), ("{gpu: 1}", "meta.gpu"), ("[gpu]", "mapping")],
)
def test_a_bad_hint_is_named(light: Light, meta: str, message: str) -> None:
    light.write("dvc.yaml", light.read("dvc.yaml").replace("meta: {gpu: true}", f"meta: {meta}"))
    with pytest.raises(BadInput, match=rf"b-read.*{message}"):
        read_graph(light.root)


def test_a_wrong_template_is_reported_in_dvcs_words(light: Light) -> None:
    light.write("dvc.yaml", light.read("dvc.yaml").replace("${a.tasks}", "${a.taks}"))
    with pytest.raises(BadInput, match="taks"):
        read_graph(light.root)


def test_ancestors_and_descendants() -> None:
    assert DIAMOND.ancestors(["d"]) == {"a", "b", "c", "d"}
    assert DIAMOND.descendants("a") == {"b", "c", "d"}
    assert DIAMOND.descendants("e") == set()


def test_restriction_keeps_what_a_target_needs(light: Light) -> None:
    graph = read_graph(light.root)
    assert graph.restricted(["b-read"]).stages == ["b-read"]
    assert graph.restricted(["a-make"]).stages == ["a-make@x", "a-make@y"]  # all items
    assert graph.restricted(["a-make@y"]).stages == ["a-make@y"]
    assert graph.restricted(["b-check"]).stages == graph.stages


def test_an_unknown_target_gets_a_hint(light: Light) -> None:
    with pytest.raises(BadInput, match="no stage 'a-mak'; did you mean a-make"):
        read_graph(light.root).restricted(["a-mak"])


def test_urgency_is_the_longest_remaining_chain() -> None:
    urgency = DIAMOND.urgency({"a": 1, "b": 10, "c": 2, "d": 3, "e": 5})
    assert urgency == {"a": 14, "b": 13, "c": 5, "d": 3, "e": 5}


def test_nothing_is_settled_before_the_first_run(light: Light) -> None:
    assert settled(light.root, read_graph(light.root)) == set()


def test_what_is_settled_needs_no_checkout(built: Light) -> None:
    light, graph = built, read_graph(built.root)
    assert changed(light.root) == {}
    light.run("rm", "-r", "data/a/make", "data/b")
    # a-sum depends on the folder above the outputs of a-make, which only a checkout can decide.
    assert settled(light.root, graph) == {"a-make@x", "a-make@y", "b-read"}
    light.write("source.txt", "other\n")
    assert settled(light.root, graph) == {"a-make@x", "a-make@y"}
    light.write("params.yaml", light.read("params.yaml").replace("rows: 2", "rows: 5"))
    assert settled(light.root, graph) == set()


def test_a_stage_whose_cache_object_is_gone_is_not_settled(built: Light) -> None:
    built.run("rm", "-r", ".dvc/cache/files")
    assert settled(built.root, read_graph(built.root)) == set()


def test_changes_name_the_stage(built: Light) -> None:
    light = built
    light.write("source.txt", "other\n")
    assert list(changed(light.root)) == ["b-read"]
    assert list(changed(light.root, ["b-check"])) == ["b-read"]
    assert changed(light.root, ["a-sum"]) == {}
