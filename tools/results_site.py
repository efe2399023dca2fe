"""Hook for MkDocs: the page `results.md` shows RESULTS.md, whose links are relative to the repository's root."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return RESULTS.md for `results.md`, and links to RESULTS.md as links to that page elsewhere."""
    source = page.file.src_uri
    if source == "results.md":
        return (ROOT / "RESULTS.md").read_text(encoding="utf-8").replace("](docs/", "](")
    here = "../" * source.count("/")
    return markdown.replace(f"]({here}../RESULTS.md)", f"]({here}results.md)")
