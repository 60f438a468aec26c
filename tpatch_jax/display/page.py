"""One self-contained page: its style, pictures and all in one file, and nothing fetched from anywhere."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from tpatch_jax.display.markup import STYLE, Child, element, written
from tpatch_jax.errors import TPatchError
from tpatch_jax.storage.files import write_text

__all__ = ["check_page", "page", "write_page"]

PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; background: #fff; color: #1c1f23; }
main { max-width: 76em; margin: 0 auto; padding: 1em; }
h1 { font: 600 1.6em/1.25 system-ui, sans-serif; margin: .3em 0; overflow-wrap: anywhere; }
figure { margin: .8em 0; }
figcaption { font-size: .92em; opacity: .8; }
figure img { display: block; max-width: 100%; min-width: 38em; height: auto; background: #fff; border-radius: 4px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22em), 1fr)); gap: 1em 2em; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .9em; }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #e4e6e9; }
  .tpatch .good { color: #58c98b; }
  .tpatch .bad { color: #ff8277; }
  figure img { filter: brightness(.9); }
}
@media print { .tpatch .scroll { overflow: visible; } }
"""
# The browser itself then refuses whatever the page might ask of a network.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, children: Sequence[Child]) -> str:
    """A whole HTML document.

    Args:
        title: its title and first heading.
        children: what follows it.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", STYLE + PAGE_STYLE),
    )
    main = element("main", element("h1", title), *children, class_="tpatch")
    whole: Element = element("html", head, element("body", main), lang="en")
    return f"<!DOCTYPE html>\n{written(whole)}\n"


def check_page(path: Path) -> None:
    """Make sure that a name is one for a page, so that nothing else is ever overwritten.

    Raises:
        TPatchError: it does not end in ``.html``.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise TPatchError(f"{path} is no name for a page; choose one that ends in .html")


def write_page(path: str | Path, title: str, children: Sequence[Child]) -> int:
    """Write a page, whole or not at all; one that is there already is replaced.

    Args:
        path: the file, whose name ends in ``.html``.
        title: its title and first heading.
        children: what follows it.

    Returns:
        How many bytes it has.

    Raises:
        TPatchError: the name ends otherwise, or the file cannot be written.
    """
    path = Path(path)
    check_page(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page(title, children))
    except OSError as error:
        raise TPatchError(f"cannot write {path}: {error.strerror}; choose another place") from None
    return path.stat().st_size
