"""The chat page in a headless browser: by keyboard, with who wrote each token, in both colour schemes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from helpers.browser import Browser, find_chromium
from helpers.serving import FIXED, LINES, QUESTION, client, demo_pair, plain, serving

from quasar_core.decode.generator import Generator
from quasar_core.decode.text import encode_prompt


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, str]]:
    """A tab of a browser, and the address of a server."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed")
    with serving(demo_pair()) as server, Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser, server.url


@pytest.fixture
def page(tab: tuple[Browser, str]) -> Browser:
    """The page as it comes."""
    browser, address = tab
    browser.call("Emulation.clearDeviceMetricsOverride")
    browser.call("Emulation.setEmulatedMedia", features=[])
    browser.call("Page.navigate", url="about:blank")
    browser.wait("document.URL === 'about:blank'")
    browser.call("Page.navigate", url=address)
    browser.wait("document.getElementById('verify')?.options.length")
    return browser


def test_an_answer_is_asked_and_read_by_keyboard_alone(page: Browser, tmp_path: Path) -> None:
    pair = demo_pair()
    config = plain(FIXED, max_new_tokens=40)
    wanted = Generator(pair, config).generate(encode_prompt(pair.tokenizer, LINES))
    page.run("document.getElementById('length').value = 40")
    assert page.run("document.activeElement.id") == "message"
    page.call("Input.insertText", text=QUESTION)
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('.assistant .figures')?.textContent")
    assert page.run("document.querySelector('.assistant .text:not(.thought)').textContent") == wanted.text
    figures = page.run("document.querySelector('.assistant .figures').textContent")
    assert "acceptance length" in figures
    assert "tokens/s" in figures
    assert "exact: the model's own text" in figures
    kinds = set(page.run("[...document.querySelectorAll('.assistant .text span')].map((s) => s.className)"))
    assert kinds <= {"prompt", "draft", "bonus", "target", "corrected"}
    assert len(kinds) > 1
    assert page.run("document.activeElement.id") == "message"
    assert "own" in page.run("document.getElementById('promise').textContent")
    if folder := os.environ.get("QUASAR_PICTURES"):
        for scheme in ("light", "dark"):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            page.picture(Path(folder) / f"chat-{scheme}.png")


def test_everything_has_a_name_and_news_are_announced(page: Browser) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"textbox", "button", "combobox", "spinbutton", "checkbox", "log"}
    found = [node for node in nodes if node.get("role", {}).get("value") in roles and not node.get("ignored")]
    assert {node["role"]["value"] for node in found} >= {"textbox", "button", "combobox", "log"}
    assert all(node["name"]["value"] for node in found)
    assert page.run("document.getElementById('status').getAttribute('role')") == "status"
    assert page.run("document.documentElement.lang") == "en"
    assert not page.run("document.getElementById('key').checkVisibility()"), "no key is asked for here"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_the_ground(page: Browser, scheme: str) -> None:
    """WCAG's contrast of 4.5, in both schemes; and more than the colour tells who wrote a token."""
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.run("document.getElementById('length').value = 8")
    page.call("Input.insertText", text=QUESTION)
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('.assistant .figures')?.textContent")
    ratios = page.run("""(() => {
      const light = (text) => {
        const parts = text.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255);
        const [r, g, b] = parts.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ground = light(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll('#legend span, footer, #model, label, .figures')].map((element) => {
        const own = light(getComputedStyle(element).color);
        return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
      });
    })()""")
    assert min(ratios) >= 4.5
    styles = page.run("""[...document.querySelectorAll('#legend span')].map((element) => {
      const style = getComputedStyle(element);
      return style.fontWeight + style.textDecorationLine + style.textDecorationStyle;
    })""")
    assert len(set(styles)) == 4


def test_a_mode_and_a_new_conversation_are_chosen(page: Browser) -> None:
    choose = (
        "(() => { const s = document.getElementById('verify'); s.value = %r; s.dispatchEvent(new Event('change')); })()"
    )
    page.run(choose % "quantized")
    assert "copy decides" in page.run("document.getElementById('promise').textContent")
    page.run("document.getElementById('clear').click()")
    assert page.run("document.querySelectorAll('article').length") == 0


def test_a_new_conversation_knows_nothing_of_an_answer_that_was_being_written(page: Browser) -> None:
    page.run("document.getElementById('length').value = 1500")
    page.call("Input.insertText", text=QUESTION)
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('.assistant .text:not(.thought)')?.textContent.length > 20")
    page.run("document.getElementById('clear').click()")
    page.run("document.getElementById('length').value = 8")
    page.call("Input.insertText", text=QUESTION)
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('.assistant .figures')?.textContent")
    assert page.run("messages.map((message) => message.role).join()") == "user,assistant"
    assert page.run("document.getElementById('status').textContent") == "The answer has ended."
    assert page.run("document.getElementById('stop').disabled")


def test_a_message_that_could_not_be_answered_may_be_sent_again(page: Browser) -> None:
    page.run("document.getElementById('verify').append(new Option('gated', 'gated', true, true))")
    page.call("Input.insertText", text=QUESTION)
    page.press("Enter", 13, "\r")
    page.wait("document.querySelector('.error')")
    assert "verify" in page.run("document.querySelector('.error').textContent")
    assert page.run("document.getElementById('message').value") == QUESTION
    assert page.run("messages.length") == 0


def test_the_end_is_followed_unless_one_reads_above(page: Browser) -> None:
    page.run("document.getElementById('length').value = 300")
    place = """(() => {
      const log = document.getElementById('conversation');
      return log.scrollHeight - log.scrollTop - log.clientHeight;
    })()"""
    for ask, follows in (("", True), ("document.getElementById('conversation').scrollTop = 0", False)):
        page.call("Input.insertText", text=QUESTION)
        page.press("Enter", 13, "\r")
        page.run(ask)
        page.wait("document.querySelector('article:last-child .figures').textContent")
        assert (page.run(place) < 2) == follows


def test_on_a_phone_most_of_the_page_is_the_conversation(page: Browser) -> None:
    heights = {}
    for width, height in ((390, 844), (900, 900)):
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        page.wait(f"document.getElementById('settings').open === {str(width > 640).lower()}")
        assert page.run("document.documentElement.scrollWidth") <= width
        heights[width] = page.run("document.getElementById('conversation').clientHeight") / height
    assert min(heights.values()) > 0.5


def test_indents_are_nobodys_and_the_prompts_token_is_the_deciders(page: Browser) -> None:
    """Lines under white space would look like text; in `full` and `exact` the model passes the prompt."""
    shown = """(() => {
      const into = add('assistant', 'Answer').text;
      const pieces = [['prompt', 'if'], ['draft', ' x'], ['draft', ':\\n'], ['draft', '    '], ['bonus', ' y']];
      const tokens = [...pieces, ['draft', '\\n\\n z']].map(([by, text]) => ({ by, text }));
      write(into, tokens.map((t) => t.text).join(''), tokens, %r);
      return [...into.childNodes].map((n) => [n.className || '', n.textContent]);
    })()"""
    texts = [["", "     "], ["", "\n\n "]]
    for mode, first, own in (
        ("exact", "target", "bonus"),
        ("full", "target", "target"),
        ("quantized", "bonus", "bonus"),
    ):
        found = page.run(shown % mode)
        assert found == [[first, "if"], ["draft", " x:\n"], texts[0], [own, "y"], texts[1], ["draft", "z"]]


def test_a_key_is_asked_for_and_a_message_waits_for_it(page: Browser) -> None:
    def enter(name: str, text: str) -> None:
        page.run(f"document.getElementById('{name}').value = ''")
        page.run(f"document.getElementById('{name}').focus()")
        page.call("Input.insertText", text=text)
        page.press("Enter", 13, "\r")

    said = "document.getElementById('status')?.textContent"
    with serving(demo_pair(), api_key="a-key-of-some-length") as server:
        page.call("Page.navigate", url=server.url)
        page.wait(f"{said} === 'This server asks for an API key.'")
        assert page.run("document.activeElement.id") == "key"
        enter("message", QUESTION)
        page.wait("document.activeElement.id === 'key'")
        enter("key", "another-key-of-some-length")
        page.wait(f"{said}?.startsWith('This is not')")
        enter("key", "a-key-of-some-length")
        page.wait("document.activeElement.id === 'message'")
        assert page.run("document.querySelectorAll('article').length") == 0
        page.run("document.getElementById('length').value = 8")
        enter("message", QUESTION)
        page.wait("document.querySelector('.assistant .figures')?.textContent")
        assert page.run("document.querySelectorAll('.error').length") == 0


def test_html_in_an_answer_stays_text(page: Browser) -> None:
    page.run("write(add('assistant', 'Answer').text, '<img src=x onerror=\"window.hit = 1\">', null)")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("window.hit === undefined")


def test_the_pages_files_come_with_a_policy_and_load_nothing_from_elsewhere() -> None:
    with serving(demo_pair()) as server, client(server) as http:
        for path in ("/", "/chat.js", "/chat.css"):
            reply = http.get(path)
            assert reply.status_code == 200
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            assert "://" not in reply.text


def test_a_whole_reply_says_who_wrote_each_token() -> None:
    with serving(demo_pair()) as server, client(server) as http:
        body = {"messages": LINES, "max_tokens": 30, "trace": True}
        choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert "".join(token["text"] for token in choice["tokens"]) == choice["message"]["content"]
    assert choice["tokens"][0]["by"] == "prompt"
