"""The house that docs/architecture.md draws, read from the imports: who imports whom, and how large things may be."""

from __future__ import annotations

import ast
import re

import pytest
import yaml
from here import ROOT

from docs.architecture import FACADE, LEAVES, arrows, imports, inside, sources

FOLDERS = ("patchrank", "cluster", "jobs", "benchmarks", "examples", "docs", "tests")
# Whom the modules of a room may import, themselves and `LEAVES` apart.
ORDER = {
    "patchrank.store": (),
    "patchrank.model": ("patchrank.store",),
    "patchrank.data": ("patchrank.model", "patchrank.store"),
}
ORDER["patchrank.search"] = ORDER["patchrank.pruning"] = ("patchrank.data", *ORDER["patchrank.data"])
ORDER["patchrank.training"] = ("patchrank.search", "patchrank.pruning", *ORDER["patchrank.search"])
ORDER["patchrank.evaluation"] = ("patchrank.training", *ORDER["patchrank.training"])
ORDER["patchrank.report"] = ("patchrank.evaluation", *ORDER["patchrank.evaluation"])
ORDER["cluster"] = ("patchrank",)
ORDER["jobs"] = ("patchrank", "cluster")
ORDER["benchmarks"] = ORDER["examples"] = ORDER["docs"] = ("patchrank", "cluster", "jobs")
ORDER["tests"] = ("patchrank", "cluster", "jobs", "benchmarks", "docs")
# Seconds to import: only where and when they are used.
HEAVY = ("ray", "deepspeed", "duckdb", "matplotlib", "jinja2", "transformers")
LINES = 400
PARAMETERS = 8
FILES = ("patchrank.pruning.bundle",)  # the parameters of `Bundle` are the keys of its config.json, whatever they are


def against_the_order(modules: dict[str, str]) -> list[str]:
    wrong = []
    for name, targets in arrows(modules).items():
        room = next((room for room in ORDER if inside(name, (room,))), None)
        if room is None and name != FACADE and not inside(name, LEAVES):
            wrong.append(f"{name} is in no room")
        allowed = LEAVES if room is None else (room, *LEAVES, *ORDER[room])
        wrong += [f"{name}:{line} {target}" for target, line in targets.items() if not inside(target, allowed)]
    return wrong


def circles(modules: dict[str, str]) -> list[str]:
    """Modules that import each other, at their heads or later. What types alone need is never imported."""
    graph, wrong, done = arrows(modules, types=False), [], set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            wrong.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in graph[name]:
                walk(target, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())
    return wrong


def knows_ray(modules: dict[str, str]) -> list[str]:
    """Ray and DeepSpeed outside of `cluster` (benchmarks may ask Ray for its machines), and what there needs no Ray."""
    wrong = []
    for name, source in modules.items():
        used = {each.target.split(".")[0] for each in imports(source)} & {"ray", "deepspeed"}
        wrong += [f"{name} imports {package}" for package in used if inside(name, ("patchrank", "jobs"))]
    needs = {name for name, source in modules.items() if any(inside(each.target, ("ray",)) for each in imports(source))}
    graph = {name: targets for name, targets in arrows(modules).items() if inside(name, ("cluster",))}
    while more := {name for name, targets in graph.items() if targets.keys() & needs & graph.keys()} - needs:
        needs |= more
    return wrong + [f"{name} knows no Ray" for name in sorted(graph.keys() - needs - {"cluster"})]


def heavy_at_once(modules: dict[str, str]) -> list[str]:
    return [
        f"{name}:{each.line} {each.target}"
        for name, source in modules.items()
        for each in imports(source)
        if each.when == "first"
        and inside(each.target, HEAVY)
        and not inside(name, ("tests", "benchmarks", "examples", "docs"))
        if not (inside(name, ("cluster",)) and inside(each.target, ("ray",)))
    ]


def too_long(modules: dict[str, str]) -> list[str]:
    return [name for name, source in modules.items() if source.count("\n") > LINES]


def too_many_parameters(modules: dict[str, str]) -> list[str]:
    wrong = []
    for name, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                all_ = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(argument.arg not in ("self", "cls") for argument in all_)
                if count > PARAMETERS and not (inside(name, FILES) and node.name == "__init__"):
                    wrong.append(f"{name}:{node.lineno} {node.name} has {count}")
    return wrong


CHECKS = [against_the_order, circles, knows_ray, heavy_at_once, too_long, too_many_parameters]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(check):
    modules = sources(*FOLDERS)
    assert len(modules) > 100 and {"patchrank", "cluster.pool", "jobs.search", "tests.test_house"} <= modules.keys()
    assert check(modules) == []


@pytest.mark.parametrize(
    "check, modules, expected",
    [
        (against_the_order, {"patchrank.store.a": "def f():\n    from patchrank.model import b"}, []),  # no such module
        (against_the_order, {"patchrank.store.a": "from patchrank.store.b import f", "patchrank.store.b": ""}, []),
        (
            against_the_order,
            {"patchrank.store.a": "def f():\n    from patchrank.model import b", "patchrank.model.b": ""},
            ["patchrank.store.a:2 patchrank.model.b"],
        ),
        (
            against_the_order,
            {"patchrank.search.a": "import patchrank.pruning.b", "patchrank.pruning.b": ""},
            ["patchrank.search.a:1 patchrank.pruning.b"],
        ),
        (
            against_the_order,
            {"patchrank.tokens": "if TYPE_CHECKING:\n    from patchrank.store.b import F", "patchrank.store.b": ""},
            ["patchrank.tokens:2 patchrank.store.b"],
        ),
        (against_the_order, {"patchrank.x": "", "other": ""}, ["patchrank.x is in no room", "other is in no room"]),
        (against_the_order, {"patchrank.data.a": "from jobs.b import f", "jobs.b": ""}, ["patchrank.data.a:1 jobs.b"]),
        (circles, {"jobs.a": "import jobs.b", "jobs.b": "import jobs.c", "jobs.c": "", "jobs.d": "import jobs.b"}, []),
        (
            circles,
            {"jobs.a": "import jobs.b", "jobs.b": "from jobs.c import f", "jobs.c": "def f():\n    import jobs.b"},
            ["jobs.b -> jobs.c -> jobs.b"],
        ),
        (circles, {"jobs.a": "import jobs.b", "jobs.b": "if TYPE_CHECKING:\n    import jobs.a"}, []),
        (knows_ray, {"cluster.a": "import ray", "cluster.b": "from cluster.a import f", "cluster": ""}, []),
        (
            knows_ray,
            {"cluster.a": "", "cluster.b": "import cluster.a", "jobs.c": "def f():\n    from ray.train import g"},
            ["jobs.c imports ray", "cluster.a knows no Ray", "cluster.b knows no Ray"],
        ),
        (heavy_at_once, {"patchrank.report.a": "def f():\n    import duckdb", "cluster.b": "import ray"}, []),
        (heavy_at_once, {"jobs.a": "try:\n    import jinja2\nfinally:\n    pass"}, ["jobs.a:2 jinja2"]),
        (too_long, {"a": "\n" * 400, "b": "\n" * 401}, ["b"]),
        (too_many_parameters, {"jobs.a": "class A:\n    def f(self, a, b, c, d, /, e, f, *g, h, i, **j): ..."}, []),
        (too_many_parameters, {"jobs.a": "async def f(a, b, c, d, /, e, f, *, g, h, i): ..."}, ["jobs.a:1 f has 9"]),
    ],
)
def test_what_is_not_in_order_is_told(check, modules, expected):
    assert check(modules) == expected


def test_a_commit_is_checked_as_make_lint_checks():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert [hook["entry"] for hook in hooks["hooks"]] == [
        f".venv/{each}" for each in re.findall(r"VENV\)/(bin.*)", lint)
    ]
