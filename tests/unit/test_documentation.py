"""The two READMEs say the same: they have the same sections, tables, blocks of code, commands and pictures."""

import re
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
ENGLISH, CHINESE = ((HOME / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def blocks(text):
    return re.findall(r"^```.*?^```$", text, flags=re.DOTALL | re.MULTILINE)


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def outline(text):
    """Per section its depth, its list items and its rows."""
    sections = re.split(r"^(#+) ", prose(text), flags=re.MULTILINE)[1:]
    return [
        (depth, len(re.findall(r"^- ", body, flags=re.MULTILINE)), len(re.findall(r"^\|", body, flags=re.MULTILINE)))
        for depth, body in zip(sections[::2], sections[1::2], strict=True)
    ]


def test_the_blocks_of_code_are_the_same():
    assert len(blocks(ENGLISH)) >= 8
    assert blocks(CHINESE) == blocks(ENGLISH)


def test_the_sections_are_the_same():
    assert outline(CHINESE) == outline(ENGLISH)


@pytest.mark.parametrize(
    "what",
    [
        r"`(?:trackopt|make|pip install -e|tensorboard|git) [^`]*`",  # commands
        r"`(?:trackopt\.|run\.)[^`]*`",  # names of the public interface
        r"!\[[^\]]*\]\(([^)]*)\)",  # pictures
    ],
)
def test_whatever_can_be_typed_is_named_in_both(what):
    def told(text):
        return {each.replace("PATH_TO_THIS_REPOSITORY", "本仓库的路径") for each in re.findall(what, prose(text))}

    assert told(CHINESE) == told(ENGLISH)
