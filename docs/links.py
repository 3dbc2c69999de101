"""Follow every link of the built site: `python docs/links.py [FOLDER]`. Broken ones end it with 1; those to other sites are listed."""

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

LOADING = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src", "embed": "src", "object": "data"}


@dataclass
class Page(HTMLParser):
    "What a page links to, what it loads, and the places in it that can be linked to."

    text: str
    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self):
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        elif (place := LOADING.get(tag)) and given.get(place):
            self.loads.add(given[place])
        self.loads |= {one for name in ("style",) for one in addresses(given.get(name, ""))}

    handle_startendtag = handle_starttag


def addresses(style: str) -> set[str]:
    "What a style sheet loads."
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)", style) + re.findall(r"@import\s+['\"]([^'\"]+)", style)
    return {one for one in found if not one.startswith(("data:", "#"))}


def is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).scheme or address.startswith("//"))


def check(site: Path) -> tuple[list[str], set[str]]:
    "Faults (a missing file or anchor, anything that is loaded from another site), and the links to other sites."
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults, elsewhere = [], set()
    for path, page in pages.items():
        name = path.relative_to(site)
        faults += [f"{name} loads {one} from another site" for one in page.loads if is_elsewhere(one) and not one.startswith("data:")]
        for link in page.links | {one for one in page.loads if not is_elsewhere(one)}:
            if is_elsewhere(link):
                elsewhere.add(link)
                continue
            address, anchor = urldefrag(link)
            target = (path.parent / unquote(urlsplit(address).path)).resolve() if urlsplit(address).path else path
            if not target.is_file():
                faults.append(f"{name}: {link}: no such file")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                faults.append(f"{name}: {link}: no such place in the page")
    for path in site.rglob("*.css"):
        for one in addresses(path.read_text(encoding="utf-8")):
            if is_elsewhere(one):
                faults.append(f"{path.relative_to(site)} loads {one} from another site")
            elif not (path.parent / urldefrag(one)[0].split("?")[0]).resolve().is_file():
                faults.append(f"{path.relative_to(site)}: {one}: no such file")
    return faults, elsewhere


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "build/docs")
    faults, elsewhere = check(site)
    print(*sorted(elsewhere), f"{len(elsewhere)} links to other sites, not followed", *faults, sep="\n")
    sys.exit(bool(faults))
