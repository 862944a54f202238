"""markdown.js and the small modules, run in the browser that users have."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.helpers.browser import Visit
from tests.helpers.fake_api import FakeApi


@pytest.fixture(scope="module")
def module_page(browser: Browser, running_api: FakeApi) -> Iterator[Page]:
    running_api.reset()
    with Visit(browser, running_api.url) as visit:
        visit.page.goto(running_api.url + "/")
        visit.page.evaluate("""async () => {
            const { MarkdownView } = await import("/web/markdown_view.js");
            window.html = (text) => {
                const root = document.createElement("div");
                new MarkdownView(root).update(text, true);
                return root.innerHTML;
            };
            window.pieces = (pieces) => {
                const root = document.createElement("div");
                const view = new MarkdownView(root);
                let text = "";
                for (const piece of pieces) view.update(text += piece);
                view.update(text, true);
                const whole = document.createElement("div");
                new MarkdownView(whole).update(text, true);
                return root.isEqualNode(whole) ? "" : root.innerHTML;
            };
            window.growing = (text) => {
                const root = document.createElement("div");
                new MarkdownView(root).update(text);
                return root.innerHTML;
            };
        }""")
        yield visit.page


LINK = 'rel="noopener noreferrer" target="_blank"'


def code(text: str, language: str = "text") -> str:
    return (
        f'<div class="code-block"><div class="code-head"><span>{language}</span><button type="button" '
        f'class="copy-code" aria-label="Copy code">Copy</button></div><pre tabindex="0"><code>{text}</code></pre></div>'
    )


def table(rows: str) -> str:
    return f'<div class="table-scroll" tabindex="0" role="region" aria-label="Table"><table>{rows}</table></div>'


CASES = {
    "paragraphs": ("one\n\ntwo", "<p>one</p><p>two</p>"),
    "a single line break is kept": ("roses\nviolets", "<p>roses<br>violets</p>"),
    "headings start below the page's own": ("# a\n### b ###", '<h3 class="h-1">a</h3><h5 class="h-3">b</h5>'),
    "seven marks are no heading": ("####### a", "<p>####### a</p>"),
    "a mark without a space is no heading": ("#a", "<p>#a</p>"),
    "underlined heading": ("Title\n===", '<h3 class="h-1">Title</h3>'),
    "a rule under text stays a rule": ("text\n---\nmore", "<p>text</p><hr><p>more</p>"),
    "rules": ("***\n\n_ _ _", "<hr><hr>"),
    "emphasis": (
        "*a* _b_ **c** __d__ ***e***",
        "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <em><strong>e</strong></em></p>",
    ),
    "nested emphasis": ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    "emphasis within a word": ("a*b*c snake_case_name", "<p>a<em>b</em>c snake_case_name</p>"),
    "marks between spaces are text": ("2 * 3 * 4 and 2 ** 3", "<p>2 * 3 * 4 and 2 ** 3</p>"),
    "unclosed marks are text": ("**a and *b", "<p>**a and *b</p>"),
    "strikethrough": ("~~old~~ ~new~", "<p><del>old</del> ~new~</p>"),
    "code": ("`a*b*` ``x`y``", "<p><code>a*b*</code> <code>x`y</code></p>"),
    "an unclosed tick is text": ("a ` b", "<p>a ` b</p>"),
    "escapes": (r"\*a\* \# \_", "<p>*a* # _</p>"),
    "entities": ("&lt;b&gt; &#65; &#x42; &unknown; &valueOf;", "<p>&lt;b&gt; A B &amp;unknown; &amp;valueOf;</p>"),
    "fence": ("```python\nx = 1\n\n  y\n```\nafter", code("x = 1\n\n  y", "python") + "<p>after</p>"),
    "tilde fence with ticks inside": ("~~~\n```\n~~~", code("```")),
    "unclosed fence": ("```js\nlet a", code("let a", "js")),
    "longer fence": ("````\n```\n````", code("```")),
    "indented code": ("    a\n\n    b", code("a\n\nb")),
    "quote": ("> a\n> b\n\nc", "<blockquote><p>a<br>b</p></blockquote><p>c</p>"),
    "quote that goes on without its mark": ("> a\nb", "<blockquote><p>a<br>b</p></blockquote>"),
    "nested quote": ("> a\n>> b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    "list": ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
    "ordered list from 3": ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    "nested list": ("- a\n  - b\n    - c\n- d", "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>"),
    "bullets under numbers": ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    "bullets under numbers, two columns": ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    "loose list": ("- a\n\n- b", '<ul class="loose"><li><p>a</p></li><li><p>b</p></li></ul>'),
    "paragraphs in an item": ("- a\n\n  b", '<ul class="loose"><li><p>a</p><p>b</p></li></ul>'),
    "code in an item": ("1. a\n   ```sh\n   ls\n   ```\n2. b", f"<ol><li>a{code('ls', 'sh')}</li><li>b</li></ol>"),
    "a list ends a paragraph": ("text\n- a", "<p>text</p><ul><li>a</li></ul>"),
    "a year does not begin a list": ("born in\n1984. Then", "<p>born in<br>1984. Then</p>"),
    "other bullets, other list": ("- a\n* b", "<ul><li>a</li></ul><ul><li>b</li></ul>"),
    "tasks": (
        "- [x] a\n- [ ] b",
        '<ul><li class="task"><input type="checkbox" disabled="" checked="" aria-label="done">a</li>'
        '<li class="task"><input type="checkbox" disabled="" aria-label="open">b</li></ul>',
    ),
    "table": (
        "| a | b |\n|:--|--:|\n| 1 | `x\\|y` |",
        table(
            '<thead><tr><th scope="col">a</th><th class="right" scope="col">b</th></tr></thead>'
            '<tbody><tr><td>1</td><td class="right"><code>x|y</code></td></tr></tbody>'
        ),
    ),
    "a short row is filled": (
        "a | b\n-|-\n1",
        table(
            '<thead><tr><th scope="col">a</th><th scope="col">b</th></tr></thead>'
            "<tbody><tr><td>1</td><td></td></tr></tbody>"
        ),
    ),
    "break in a cell": (
        "| a |\n|---|\n| 1<br>2 |",
        table('<thead><tr><th scope="col">a</th></tr></thead><tbody><tr><td>1<br>2</td></tr></tbody>'),
    ),
    "a bar without a second line is text": ("a | b", "<p>a | b</p>"),
    "link": ("[a *b*](https://x.org/y_z)", f'<p><a href="https://x.org/y_z" {LINK}>a <em>b</em></a></p>'),
    "link with brackets": ("[a](https://x.org/b_(c))", f'<p><a href="https://x.org/b_(c)" {LINK}>a</a></p>'),
    "link with a title": ('[a](https://x.org/ "t")', f'<p><a href="https://x.org/" {LINK}>a</a></p>'),
    "mail": ("[a](mailto:a@b.org)", f'<p><a href="mailto:a@b.org" {LINK}>a</a></p>'),
    "angle link": ("<https://x.org/>", f'<p><a href="https://x.org/" {LINK}>https://x.org/</a></p>'),
    "bare link": ("see https://x.org/a_b.", f'<p>see <a href="https://x.org/a_b" {LINK}>https://x.org/a_b</a>.</p>'),
    "bare link in strong": (
        "**https://x.org/a**",
        f'<p><strong><a href="https://x.org/a" {LINK}>https://x.org/a</a></strong></p>',
    ),
    "bare link in brackets": ("(https://x.org/a)", f'<p>(<a href="https://x.org/a" {LINK}>https://x.org/a</a>)</p>'),
    "brackets without an address": ("[a] [b](c", "<p>[a] [b](c</p>"),
    "a picture is a link: no request": (
        "![p](https://x.org/p.png)",
        f'<p><a href="https://x.org/p.png" {LINK}>p</a></p>',
    ),
    "a link whose text is an address": (
        "[see *https://x.org/a*](https://x.org/a)",
        f'<p><a href="https://x.org/a" {LINK}>see <em>https://x.org/a</em></a></p>',
    ),
    "a picture in a link": (
        "[![b](https://x.org/p.png)](https://x.org/a)",
        f'<p><a href="https://x.org/a" {LINK}>b</a></p>',
    ),
    "closing brackets after an address": (
        "(see https://x.org/b_(c)).)",
        f'<p>(see <a href="https://x.org/b_(c)" {LINK}>https://x.org/b_(c)</a>).)</p>',
    ),
    "carriage returns": ("# a\r\n\r\nb\r\n", '<h3 class="h-1">a</h3><p>b</p>'),
    "nothing": ("", ""),
    # What must not become markup
    "script": ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
    "handler": ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    "script address": ("[a](javascript:alert(1))", "<p><span>a</span></p>"),
    "script address in capitals": ("[a](JaVaScRiPt:alert(1))", "<p><span>a</span></p>"),
    "script address by entity": ("[a](&#106;avascript:alert(1))", "<p><span>a</span></p>"),
    "script address with white space": ("[a](<java\tscript:alert(1)>)", "<p><span>a</span></p>"),
    "data address": ("[a](data:text/html,x)", "<p><span>a</span></p>"),
    "file address": ("[a](file:///etc/passwd)", "<p><span>a</span></p>"),
    "relative address": ("[a](/v1/models) [b](//x.org)", "<p><span>a</span> <span>b</span></p>"),
    "picture with a script": ("![a](javascript:alert(1))", "<p><span>a</span></p>"),
    "quotes cannot leave an attribute": (
        '[a](https://x.org/"onmouseover="alert(1))',
        f'<p><a href="https://x.org/%22onmouseover=%22alert(1)" {LINK}>a</a></p>',
    ),
    "markup in code": (
        "`<b>`\n```\n</code><script>\n```",
        "<p><code>&lt;b&gt;</code></p>" + code("&lt;/code&gt;&lt;script&gt;"),
    ),
    "markup as a language": ("```<b>\nx\n```", code("x", "&lt;b&gt;")),
    "markup in a cell": (
        "| <b>a</b> |\n|---|\n| <svg onload=x> |",
        table(
            '<thead><tr><th scope="col">&lt;b&gt;a&lt;/b&gt;</th></tr></thead>'
            "<tbody><tr><td>&lt;svg onload=x&gt;</td></tr></tbody>"
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_markdown(module_page: Page, name: str) -> None:
    text, html = CASES[name]
    assert module_page.evaluate("html", text) == html


GROWING = {
    "strong": ("a **bo", "<p>a <strong>bo</strong></p>"),
    "marks alone": ("a **", "<p>a </p>"),
    "code": ("a `x y", "<p>a <code>x y</code></p>"),
    "address": ("see [the page](https://x.or", "<p>see the page</p>"),
    "only the last block is open": ("**a\n\nb `c", "<p>**a</p><p>b <code>c</code></p>"),
}


@pytest.mark.parametrize("name", GROWING)
def test_text_that_grows_shows_marks_as_they_will_be(module_page: Page, name: str) -> None:
    text, html = GROWING[name]
    assert module_page.evaluate("growing", text) == html


def test_piece_by_piece_ends_as_all_at_once(module_page: Page) -> None:
    """Whatever the pieces, the nodes at the end are those of the whole text."""
    rng = random.Random(3)
    lines = [text for text, _ in CASES.values()] + [
        "#",
        "-",
        "1",
        "1.",
        "|",
        "|-|",
        ">",
        "  x",
        "    y",
        "```",
        "",
        "",
        "**",
        "a",
    ]
    for _ in range(600):
        text = rng.choice(["\n", "\n\n"]).join(rng.choice(lines) for _ in range(rng.randint(1, 9)))
        pieces, at = [], 0
        while at < len(text):
            size = rng.choice([1, 1, 2, 3, 7, 40])
            pieces.append(text[at : at + size])
            at += size
        assert module_page.evaluate("pieces", pieces) == "", repr(text)


def test_nodes_that_do_not_change_are_kept(module_page: Page) -> None:
    """Selections and scroll positions live in nodes: growing text must not replace them."""
    kept = module_page.evaluate("""async () => {
        const { MarkdownView } = await import("/web/markdown_view.js");
        const root = document.createElement("div");
        const view = new MarkdownView(root);
        view.update("# a\\n\\nb\\n\\n```py\\nx");
        const before = [...root.children, root.querySelector("pre"), root.querySelector("code").firstChild];
        view.update("# a\\n\\nb\\n\\n```py\\nx = 1\\ny");
        const after = [...root.children, root.querySelector("pre"), root.querySelector("code").firstChild];
        return before.every((node, index) => node === after[index]) && after.at(-1).data;
    }""")
    assert kept == "x = 1\ny"


REPEATED = ["*a ", "[", "`a ``b ", "> ", "- ", "**_", "![", "[a](", "~~", "1. ", "|", "<", "&", "*a*b_c_"]


@pytest.mark.parametrize(
    "text",
    [pytest.param(piece * (20_000 // len(piece)), id=piece) for piece in REPEATED]
    + [
        pytest.param("https://x" + ")" * 60_000, id="closing brackets"),
        pytest.param("![a" * 3000 + "](b)" * 3000, id="nested links"),
        pytest.param("*a _b " * 3000 + "c" + "_*" * 3000, id="nested marks"),
        pytest.param("[" + "*a _b " * 3000 + "c" + "_*" * 3000 + "](b)", id="nested marks in a link"),
    ],
)
def test_hostile_repetition_is_read_in_time(module_page: Page, text: str) -> None:
    """Tens of thousands of marks take milliseconds, not minutes: nothing grows with the square of the text."""
    took = module_page.evaluate(
        "(text) => { const t = performance.now(); html(text); return performance.now() - t; }", text
    )
    assert took < 2500


def test_history_keeps_its_size(module_page: Page) -> None:
    """A day and more of messages at two a second stay in fixed memory, and coarse points are means and highs."""
    result = module_page.evaluate("""async () => {
        const { History } = await import("/web/history.js");
        const history = new History({ rate: "mean", worst: "max" });
        const n = 2 * 3600 * 26;
        for (let i = 0; i < n; i += 1) history.push(1e9 + i / 2, { rate: i % 2, worst: i === n - 50 ? 9 : 1 });
        const sizes = [120, 600, 7200, 86400].map((s) => history.read(s).time.length);
        const hours = history.read(7200);
        return { sizes, means: hours.rate.slice(1, 5), worst: Math.max(...hours.worst), step: hours.step,
            ends: hours.time.at(-1) === history.latest };
    }""")
    assert result["sizes"][0] in (240, 241, 242)
    assert max(result["sizes"]) <= 1441
    assert result["means"] == [0.5] * 4
    assert (result["worst"], result["step"], result["ends"]) == (9, 5, True)


def test_events_survive_any_split(module_page: Page) -> None:
    """Pieces of the network end anywhere: inside a character, between CR and LF, inside a field."""
    texts = module_page.evaluate("""async () => {
        const { events } = await import("/web/sse.js");
        const bytes = new TextEncoder().encode(': hello\\r\\ndata: {"a":"ü€😀"}\\r\\n\\r\\n'
            + 'data:x\\ndata: y\\n\\nid: 3\\n\\ndata: cut off');
        const all = [];
        for (let size = 1; size < 12; size += 1) {
            const stream = new ReadableStream({ start(c) {
                for (let i = 0; i < bytes.length; i += size) c.enqueue(bytes.slice(i, i + size));
                c.close();
            } });
            const got = [];
            for await (const data of events(new Response(stream))) got.push(data);
            all.push(JSON.stringify(got));
        }
        return [...new Set(all)];
    }""")
    assert texts == ['["{\\"a\\":\\"ü€😀\\"}","x\\ny"]']
