"""The house: a room imports only from floors below it, and what else holds the tree together, read from its source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"runtime": "aloud", "kernels": "aloud.kernels", "benchmarks": "aloud.benchmarks"}

# Top to bottom. Rooms of one entry are strangers to each other; a module is in the room of the longest name it begins
# with. The package itself, `aloud`, is in none: it takes its public names from everywhere, when they are asked for.
FLOORS: list[list[str]] = [
    ["aloud.cli"],
    ["aloud.server"],
    ["aloud.benchmarks"],
    ["aloud.live"],
    ["aloud.api", "aloud.session"],
    ["aloud.live_speech", "aloud.engine_stats"],
    ["aloud.arrivals", "aloud.utterance", "aloud.session_caches"],
    ["aloud.conversation"],
    ["aloud.speech", "aloud.prepare"],
    ["aloud.voice"],
    ["aloud.engine", "aloud.checkpoint", "aloud.text"],
    ["aloud.models"],
    ["aloud.codec"],
    ["aloud.kernels"],
    ["aloud._sampler"],
    ["aloud.audio"],
    ["aloud.audio_plot", "aloud.audio_show"],
    ["aloud.audio_file"],
    ["aloud.prompt_block"],
    ["aloud.request", "aloud.memory", "aloud.open_files"],
    ["aloud.errors"],
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    """The name that a source file is imported by."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[0] = PACKAGES[parts[0]]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}
RUNTIME = [module for module in SOURCES if not module.startswith("aloud.benchmarks")]


def imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every module of Aloud that a module imports at run time, late imports included."""
    tree = TREES[module]
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    is_package = SOURCES[module].name == "__init__.py"
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            # `from package import module` imports the module, `from module import name` the module before it.
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        else:
            continue
        for name in names:
            if name == "aloud" or name.startswith("aloud."):
                yield node.lineno, name


def is_module(name: str) -> bool:
    return name in SOURCES or name == "aloud._sampler"


def room_of(module: str) -> str | None:
    """The room that a module is in; None for the package itself."""
    rooms = [room for room in LEVEL if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def test_the_reader_of_imports_sees_them() -> None:
    """What the tests below rest on: a few edges that are there."""
    seen = {module: {name for _, name in imports(module)} for module in SOURCES}
    assert "aloud.checkpoint.load" in seen["aloud.api"]
    assert "aloud.audio_plot" in seen["aloud.audio"]  # late, inside a function
    assert "aloud.codec.mimi" in seen["aloud.prepare"]  # `from aloud.codec import mimi`
    assert "aloud._sampler" in seen["aloud.kernels.draw"]
    assert "aloud.audio" not in seen["aloud.request"]  # for types only


def test_every_module_has_a_room() -> None:
    assert [module for module in SOURCES if module != "aloud" and room_of(module) is None] == []


def test_a_room_imports_only_from_floors_below_it() -> None:
    wrong = []
    for module in SOURCES:
        room = room_of(module)
        if room is None:
            continue
        for line, name in imports(module):
            other = room_of(name)
            if other in (None, room):
                continue
            if LEVEL[other] <= LEVEL[room]:
                wrong.append(f"{SOURCES[module].relative_to(ROOT)}:{line} ({room}) imports {name} ({other})")
    assert wrong == []


def test_inside_the_package_names_come_from_their_own_modules() -> None:
    """`from aloud import Runtime` would be a way around the floors; only the version is the package's own."""
    for module in RUNTIME:
        for node in ast.walk(TREES[module]):
            if module != "aloud" and isinstance(node, ast.ImportFrom) and node.module == "aloud":
                taken = [alias.name for alias in node.names if not is_module(f"aloud.{alias.name}")]
                assert set(taken) <= {"__version__"}, f"{module}, line {node.lineno}"


def test_no_module_imports_itself_round_about() -> None:
    """Inside a room, too: there is an order in which every module can be imported."""
    left = {module: {name for _, name in imports(module)} - {module} for module in SOURCES if module != "aloud"}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


def test_kernels_know_nothing_of_models() -> None:
    for module in RUNTIME:
        if module.startswith("aloud.kernels"):
            allowed = ("aloud.kernels", "aloud._sampler")
            assert [name for _, name in imports(module) if not name.startswith(allowed)] == [], module


def test_only_the_draw_calls_the_extension() -> None:
    assert [module for module in SOURCES if any(name == "aloud._sampler" for _, name in imports(module))] == [
        "aloud.kernels.draw"
    ]


def test_the_engine_knows_no_family_of_models() -> None:
    for module in RUNTIME:
        if module.startswith("aloud.engine"):
            assert [name for _, name in imports(module) if name.startswith(("aloud.models", "aloud.codec"))] == [], (
                module
            )


def test_only_the_bindings_know_python() -> None:
    includes = {
        path.name: set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))
        for path in (ROOT / "csrc").iterdir()
        if path.suffix in (".h", ".cpp")
    }
    assert includes["sampler.cpp"] >= {"sampler.h", "philox.h"}
    assert [name for name, found in includes.items() if any("pybind11" in header for header in found)] == [
        "bindings.cpp"
    ]
    assert [
        name for name, found in includes.items() if any(re.match("Python|torch|ATen|c10", header) for header in found)
    ] == []


@pytest.mark.parametrize("module", RUNTIME)
def test_nothing_depends_on_the_environment_or_reads_pickles(module: str) -> None:
    for node in ast.walk(TREES[module]):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "environb", "getenv"), f"line {line}: an environment switch"
            assert not (
                node.attr == "load" and ast.unparse(node.value) in ("torch", "pickle", "np", "numpy", "joblib")
            ), f"line {line}: reads a pickle"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            assert not names & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}, f"line {line}"
            assert not names & {"environ", "getenv"}, f"line {line}"


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_says_what_it_is(module: str) -> None:
    docstring = ast.get_docstring(TREES[module])
    assert docstring
    first = docstring.splitlines()[0]
    assert first.endswith((".", ":"))
    assert len(first) <= 120


def test_public_names_are_there_and_no_others_are_promised() -> None:
    import aloud

    assert set(aloud.__all__) <= set(dir(aloud))
    for name in aloud.__all__:
        assert getattr(aloud, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'speak'"):
        _ = aloud.speak


def test_help_answers_without_torch() -> None:
    code = """
import sys, aloud, aloud.cli
try:
    aloud.cli.main(["--version"])
except SystemExit:
    pass
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "tokenizers", "huggingface_hub"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
