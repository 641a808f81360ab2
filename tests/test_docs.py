"""What README and docs name is there: files, folders, modules, links, options, and names said to stand in a file."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("quasar_cli", "quasar_core", "tests", "tools", "docs", "dev")
PAGES = [
    ROOT / "README.md",
    ROOT / "dev" / "quantizing.md",
    ROOT / "quasar_core" / "demo" / "model" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.(?:py|h|cpp))\b")
FOLDER = re.compile(r"(?<![\w./$-])((?:[\w-]+/)+)(?![\w.*-])")
MODULE = re.compile(r"\b((?:quasar_core|quasar_cli|tools)(?:\.[a-z_]+)+)\b")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
DEFINED = re.compile(r"`(\w+)(?:\.(\w+))?` in `([\w/]+\.py)`")
OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]+)")
VARIABLE = re.compile(r"\bQUASAR_[A-Z_]+\b")
TREE = re.compile(r"^```text\n(quasar_cli/ .*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def paths() -> frozenset[str]:
    """Files and folders of the checkout, by their paths from its root; a folder's ends with a slash."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return frozenset(
        [f"{path.relative_to(ROOT).as_posix()}{'/' if path.is_dir() else ''}" for path in found]
        + [f"{folder}/" for folder in FOLDERS]
        + [path.name for path in ROOT.iterdir() if path.is_file()]
    )


@cache
def sources() -> str:
    """All Python that takes options or reads variables."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "Makefile"])


def is_there(name: str) -> bool:
    """Whether some path of the checkout is this one or ends with it."""
    return any(path == name or path.endswith(f"/{name}") for path in paths())


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_and_folders_that_are_named_exist(page: Path) -> None:
    spans = CODE.findall(page.read_text(encoding="utf-8"))
    files = {name for span in spans for name in FILE.findall(span)}
    folders = {name for span in spans for name in FOLDER.findall(span) if name.split("/")[0] in FOLDERS}
    assert not {name for name in files | folders if not is_there(name)}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_modules_that_are_named_exist(page: Path) -> None:
    missing = set()
    for name in MODULE.findall(page.read_text(encoding="utf-8")):
        path = name.replace(".", "/")
        parent = path.rpartition("/")[0]
        if not {f"{path}.py", f"{path}/"} & paths() and not ({f"{parent}.py"} & paths() or parent == "quasar_core"):
            missing.add(name)
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "dev" / "log.md"], ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert not {target for target in targets if not (page.parent / target).exists()}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_stand_in_the_files_that_are_said_to_hold_them(page: Path) -> None:
    for name, member, path in DEFINED.findall(page.read_text(encoding="utf-8")):
        file = next(found for found in sorted(paths()) if found == path or found.endswith(f"/{path}"))
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"\b{name}\b", text), f"{name} is not in {path}"
        assert not member or re.search(rf"\b{member}\b", text), f"{member} is not in {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if "results" not in page.parts], ids=page_id)
def test_options_and_variables_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    spans = [*CODE.findall(text), *re.findall(r"^(?:quasar|python|make) .*$", text, re.MULTILINE)]
    options = {option for span in spans for option in OPTION.findall(span)}
    known = sources()
    names = {option: {f"--{option}", f"--no-{option}"} for option in options}
    assert not {option for option, forms in names.items() if not any(form in known for form in forms)}
    assert not {name for name in VARIABLE.findall(text) if name not in known}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "dev").glob("*.md")], ids=page_id)
def test_lines_are_of_120_characters_at_most(page: Path) -> None:
    """But for rows of tables, which Markdown cannot break, and commands."""
    lines = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_readmes_tree_is_that_of_the_folders() -> None:
    """It names no folder that is not there, and leaves none out that holds code."""
    (tree,) = TREE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    named, above = set(), []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above = [*above[:depth], name]
        named.add("".join(above))
    assert not named - paths()
    packages = {
        f"{path.parent.relative_to(ROOT).as_posix()}/"
        for package in ("quasar_core", "quasar_cli")
        for path in (ROOT / package).rglob("__init__.py")
    }
    others = {
        f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py")) if path.name[0] != "."
    }
    assert not (packages | others & {f"{folder}/" for folder in FOLDERS}) - named
