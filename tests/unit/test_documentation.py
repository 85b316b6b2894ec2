"""The documents: links lead somewhere, commands and names exist, scripts are shown as they are, translations agree."""

import ast
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import trackopt
from trackopt import cli

HOME = Path(__file__).parents[2]
GUIDES = HOME / "examples" / "guides"
DOCUMENTS = [*sorted(HOME.glob("*.md")), HOME / "examples" / "README.md", *sorted(GUIDES.glob("*.md"))]
TRANSLATED = [HOME / "README.md", *(GUIDES / f"{name}.md" for name in ("metrics", "resume", "curves"))]
WORDS = 900  # of the README, code blocks not counted
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(HOME)))
translated = pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: path.stem)


def text_of(path):
    return path.read_text(encoding="utf-8")


def blocks(path, language=None):
    return [code for found, code in FENCE.findall(text_of(path)) if language in {None, found}]


def prose(path):
    return FENCE.sub("", text_of(path))


def chinese(path):
    return path.with_name(f"{path.stem}.zh-CN.md")


def links(path):
    """Targets of links and pictures that stay within the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path):
    """The headings of a document, as GitHub addresses them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents
def test_links_lead_somewhere(path):
    for target in links(path):
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), target
        assert place.is_relative_to(HOME), target
        assert not anchor or anchor in anchors(place), target


def commands(path, program):
    """The words of each such command, in blocks of code, after a prompt or not, and within sentences."""
    lines = [line.removeprefix("$ ") for code in blocks(path, "") for line in code.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", prose(path))
    found = [re.split(r"\s+[|>&]\s|\s#\s|;\s", each)[0] for each in [*lines, *spans] if each.startswith(f"{program} ")]
    return [shlex.split(each.removeprefix(program)) for each in found]


@documents
def test_commands_and_their_options_exist(path):
    context = click.Context(cli.group)
    for name, *words in commands(path, "trackopt"):
        assert name in cli.group.list_commands(context), name
        options = {word for each in cli.group.get_command(context, name).params for word in each.opts}
        given = words[: words.index("--")] if "--" in words else words
        dashed = {word for word in given if word.startswith("-") and " " not in word}
        assert dashed <= options | {"--help"}, (name, words)


@documents
def test_make_has_the_targets(path):
    targets = set(re.findall(r"^(\w+):", (HOME / "Makefile").read_text(), flags=re.MULTILINE))
    assert {words[0] for words in commands(path, "make")} <= targets


def python(path):
    """The python blocks, and the pieces of python within sentences, as trees; of the latter those that parse."""
    for code in blocks(path, "python"):
        yield ast.parse(code)
    for span in re.findall(r"`((?:trackopt|run)\.(?!py`|json`)[^`\n]+)`", prose(path)):
        yield ast.parse(span.replace("…", "..."))


@documents
def test_python_parses_and_names_what_exists(path):
    """Modules, public names, members of a run, and arguments of the public functions."""
    run = {*vars(trackopt.Run), "dir", "resumed_from"}
    for node in (node for tree in python(path) for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("trackopt"):
            assert {each.name for each in node.names} <= names_of(node.module), node.module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "run" or node.attr in run, node.attr
            assert node.value.id != "trackopt" or node.attr in {*trackopt.__all__, "journal"}, node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert_arguments(node)


def names_of(module):
    """What a module defines; read, since frameworks take seconds to import."""
    path = Path(importlib.util.find_spec(module).origin)
    found = {getattr(node, "name", "") for node in ast.parse(text_of(path)).body}
    return (
        found | set(trackopt.__all__) | {each.stem for each in path.parent.glob("*.py")}
        if module == "trackopt"
        else found
    )


def assert_arguments(call):
    """Keywords that an argument could take are arguments; `wrap` and `restore` take objects under any other."""
    owner, name = getattr(call.func.value, "id", ""), call.func.attr
    if owner not in {"trackopt", "run"} or (owner == "trackopt" and name == "journal"):
        return
    known = inspect.signature(getattr(trackopt if owner == "trackopt" else trackopt.Run, name)).parameters
    free = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
    for keyword in call.keywords:
        assert keyword.arg in known or (free and not isinstance(keyword.value, ast.Constant)), (name, keyword.arg)


def test_options_in_tables_are_those_of_wrap():
    known = inspect.signature(trackopt.wrap).parameters
    options = {
        name
        for path in DOCUMENTS
        for row in re.findall(r"^\| (`\w+=.*?) \|", prose(path), flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)=", row)
    }
    assert {"stats", "resume", "keep", "save_overlap", "progress_bar"} <= options <= known.keys()


@documents
def test_the_script_of_the_guides_is_shown_as_it_is(path):
    shown = [code for code in blocks(path, "python") if code.startswith('"""')]
    assert all(code == text_of(HOME / "examples" / "train.py") for code in shown)


@pytest.mark.parametrize("name", ["distributed", "frameworks"])
def test_a_guide_shows_its_scripts(name):
    """Each is linked; the job as it is; of the others the lines shown are in the script, but for indentation."""
    guide = GUIDES / f"{name}.md"
    scripts = {path for path in (HOME / "examples" / name).iterdir() if path.suffix in {".py", ".slurm"}}
    assert {(guide.parent / target).resolve() for target in links(guide) if f"../{name}/" in target} == scripts
    if name == "distributed":
        assert blocks(guide, "bash") == [text_of(HOME / "examples" / name / "job.slurm")]
    for section in re.split(r"^## ", text_of(guide), flags=re.MULTILINE):
        linked = re.findall(rf"\]\(\.\./({name}/\w+\.py)\)", section)
        shown = re.findall(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
        if linked and shown:
            lines = {line.strip() for line in text_of(HOME / "examples" / linked[0]).splitlines()}
            assert {line.strip() for line in shown[0].splitlines()} - {"..."} <= lines


def outline(path):
    """Per section its depth, its list items and its rows."""
    sections = re.split(r"^(#+) ", prose(path), flags=re.MULTILINE)[1:]
    return [
        (depth, len(re.findall(r"^- ", body, flags=re.MULTILINE)), len(re.findall(r"^\|", body, flags=re.MULTILINE)))
        for depth, body in zip(sections[::2], sections[1::2], strict=True)
    ]


@translated
def test_a_translation_has_the_same_sections_and_blocks(path):
    assert blocks(chinese(path)) == blocks(path)
    assert outline(chinese(path)) == outline(path)


@translated
@pytest.mark.parametrize(
    "pattern",
    [
        r"`(?:trackopt|make|pip install -e|tensorboard|git) [^`]*`",  # commands
        r"`(?:trackopt\.|run\.)[^`]*`",  # names of the public interface
        r"`\w+=[^`]*`",  # options
        r"!\[[^\]]*\]\(([^)]*)\)",  # pictures
    ],
)
def test_a_translation_names_the_same(path, pattern):
    assert set(re.findall(pattern, prose(chinese(path)))) == set(re.findall(pattern, prose(path)))


@translated
def test_a_translation_has_the_same_links(path):
    """To translations where there are some; and each language leads to the other."""

    def neutral(target):
        return target.replace(".zh-CN.md", ".md")

    translations = {chinese(each) for each in TRANSLATED}
    assert sorted(map(neutral, links(chinese(path)))) == sorted(map(neutral, links(path)))
    assert path.name in links(chinese(path))
    assert chinese(path).name in links(path)
    for target in links(chinese(path))[1:]:
        place = (path.parent / target).resolve()
        assert place == path or chinese(place) not in translations, f"{target} is there in Chinese"


def test_every_guide_is_linked_from_the_readme_and_back():
    guides = {path for path in GUIDES.glob("*.md") if not path.name.endswith(".zh-CN.md")}
    assert {(HOME / target).resolve() for target in links(HOME / "README.md") if "/guides/" in target} == guides
    assert all("../../README.md" in links(guide) for guide in guides)


def test_the_readme_is_short_and_says_how_to_begin():
    assert len(prose(HOME / "README.md").split()) <= WORDS
    starts = {line.split("#")[0].strip() for code in blocks(HOME / "README.md", "") for line in code.splitlines()}
    assert {"make demo", "make test"} <= starts
