"""What the site takes from outside of docs/: the README as its first page, CONTRIBUTING, examples and configs as files."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
FOLDERS = ("examples", "configs")
FENCE = re.compile(r"^(```\w+) .*$", re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what lies outside."""
    for place, source in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they hold on the site, and fences without the reason why a block is not run."""
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri in PAGES:
        markdown = markdown.replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
    else:
        markdown = markdown.replace(f"]({up}../README.md", f"]({up}index.md")
    markdown = markdown.replace("](examples/cluster)", "](clusters.md)")
    for folder in FOLDERS:
        markdown = markdown.replace(f"]({up}../{folder}/", f"]({up}{folder}/")
    return FENCE.sub(r"\1", markdown)
