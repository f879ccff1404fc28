"""What mkdocs does to each page, so that one Markdown file reads well on the site and on a forge such as GitHub."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

WIDE_COLUMNS = 5
_LINK = re.compile(r"\[([^\]]*)\]\((\.\.?/[^)\s#]+)(#[^)\s]*)?\)")
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_CELL_CODE = re.compile(r"(?<=<td><code>)[^<]*")
_CODE_SPAN = re.compile(r"`[^`\n]*`")


def on_config(config: MkDocsConfig) -> None:
    """Make a heading's anchor as GitHub does: `# A & B` is `#a--b`."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    del files
    root = Path(config.config_file_path).parent
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        text = match[1]
        address = match[2]
        anchor = match[3] or ""
        target = (folder / address).resolve()
        if target.is_relative_to(config.docs_dir) or not target.exists():
            return match[0]
        return _outside(text, target.relative_to(root).as_posix(), anchor, config.repo_url)

    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # its menu would have one entry
    elif "\n## " not in markdown and ":::" not in markdown:
        page.meta["hide"] = ["toc"]  # it would be empty
    return "\n".join(_unescape_pipes(line) for line in _LINK.sub(link, markdown).split("\n"))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let names in wide tables break after a dot or an underscore."""
    del page, config, files
    return _TABLE.sub(lambda table: _breakable(table[0]) if table[0].count("</th>") >= WIDE_COLUMNS else table[0], html)


def _breakable(table: str) -> str:
    return _CELL_CODE.sub(lambda code: re.sub(r"(?<=\w)[._]", r"\g<0><wbr>", code[0]), table)


def _outside(text: str, path: str, anchor: str, repo_url: str | None) -> str:
    """A link to a file of the repository that is not on the site: to its forge, or its path as code without one."""
    if repo_url:
        return f"[{text}]({repo_url.rstrip('/')}/blob/HEAD/{path}{anchor})"
    is_path = path.endswith(text.strip("`"))
    return f"`{path}`" if is_path else f"{text} (`{path}`)"


def _unescape_pipes(line: str) -> str:
    r"""Show `a \| b` in a table as `a | b`. GitHub needs the backslash there; Python-Markdown would print it."""
    if not line.startswith("|"):
        return line
    return _CODE_SPAN.sub(lambda code: code[0].replace("\\|", "|"), line)
