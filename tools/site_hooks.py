"""Hooks of the documentation's site: pages that lie elsewhere in the project, and links to them.

In the project, links lead from file to file, so that they work wherever files are shown. In the site all pages lie in
one folder.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Files that are not in docs/, and what they are called in the site.
ELSEWHERE = {
    "passes/README.md": "passes.md",
    "benchmarks/RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
#: The project indents lists in lists by the width of the number in front; the site's parser wants four spaces.
INNER_LIST = re.compile(r"^ {2,3}(?=[*-] )", re.MULTILINE)
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to where pages are in the site, and lists in lists be such."""
    sources = {name: source for source, name in ELSEWHERE.items()}
    spaced = INNER_LIST.sub("    ", markdown)
    return relink(spaced, sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))


def relink(markdown: str, source: str) -> str:
    """Links of a file of the project as links of a page of the site.

    Args:
        markdown: its text.
        source: its path in the project.
    """

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(str(PurePosixPath(source).parent / match["path"]))
        inside = ELSEWHERE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        return match[0] if inside is None else f"]({inside}{match['anchor'] or ''})"

    return LINK.sub(lead, markdown)
