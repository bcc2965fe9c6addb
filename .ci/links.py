#!/usr/bin/env python3
"""Checks the links of Markdown pages and of rustdoc's HTML that lead to files of this project, with their anchors.

    links.py --docs target/doc README.md docs/*.md

A link that begins with a scheme is not followed; one to the project's own pages on GitHub is checked as the file that it
names, and one to this project's pages on docs.rs as the page in --docs. Prints every link that leads nowhere; the status
is 1 if there are any."""

import argparse
import html.parser
import re
import sys
import urllib.parse
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Page(html.parser.HTMLParser):
    """The links and anchors of an HTML page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        for name in ("href", "src"):
            if attributes.get(name):
                self.links.append(attributes[name])


class Markdown:
    """The links and anchors of a Markdown page, as GitHub makes them; code is left out."""

    def __init__(self, text):
        text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.M | re.S)
        headings = re.findall(r"^#+ +(.*?) *#*$", text, flags=re.M)
        self.anchors = {""}
        for heading in headings:
            words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
            anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            self.anchors.add(anchor if anchor not in self.anchors else f"{anchor}-1")
        text = re.sub(r"`[^`\n]*`", "code", text)
        self.links = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(r"^\[[^]]+\]: *(\S+)", text, flags=re.M)
        self.links += re.findall(r"(?:href|src)=\"([^\"]+)", text)


@cache
def load(path):
    text = path.read_text(encoding="utf-8")
    return Page(text) if path.suffix == ".html" else Markdown(text)


def wrong(path, link, repository, docs):
    """Why a link of the page at `path` leads nowhere; None if it does not, or was not followed."""
    base = path.parent
    if repository and link.startswith(repository):
        # .../blob/main/FILE, .../tree/main/FOLDER; anything else there is a page of GitHub.
        match = re.match(r"/(?:blob|tree)/main/(.*)", link[len(repository) :])
        if not match:
            return None
        base, link = ROOT, match[1]
    match = re.match(r"https://docs\.rs/nf4[a-z-]*/latest/(.*)", link)
    if match and docs:
        base, link = docs, match[1]
    if re.match(r"[a-z]+:|//", link):
        return None
    name, _, anchor = link.partition("#")
    target = (base / urllib.parse.unquote(name.partition("?")[0])).resolve() if name else path
    if not target.exists():
        return "no such file"
    if target.is_dir() and path.suffix == ".html":
        target /= "index.html"
    if anchor and target.suffix in (".html", ".md"):
        # rustdoc's source pages have lines as anchors; GitHub has them for any file.
        known = load(target).anchors
        if not re.fullmatch(r"L?\d+(-L?\d+)?", anchor) and not {anchor, urllib.parse.unquote(anchor)} & known:
            return "no such anchor"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, help="folder of rustdoc's HTML")
    parser.add_argument("pages", nargs="*", type=Path)
    args = parser.parse_args()
    manifest = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    repository = re.search(r'^repository = "(.*)"', manifest, flags=re.M)
    repository = repository[1] if repository else None
    pages = [page.resolve() for page in args.pages]
    docs = args.docs.resolve() if args.docs else None
    if docs:
        # Not the views of source files; nor pages that lead to an index, which rustdoc does not write.
        left_out = ("src", "help.html", "settings.html")
        pages += [p for p in sorted(docs.rglob("*.html")) if p.relative_to(docs).parts[0] not in left_out]
    links, failures = 0, []
    for page in pages:
        for link in dict.fromkeys(load(page).links):
            links += 1
            reason = wrong(page, link, repository, docs)
            if reason:
                failures.append(f"{page.relative_to(ROOT)}: {link}: {reason}")
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"{len(pages)} pages, {links} links, {len(failures)} lead nowhere")
    if not links or failures:
        sys.exit(1)


main()
