"""The chat page in a real browser against a server that follows a script."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.helpers.browser import ChatPage, Visit
from tests.helpers.fake_api import WEB, FakeApi
from tests.helpers.http_stream import until

PHONE = {"width": 360, "height": 740}


def test_an_answer_appears_while_it_is_written(chat: ChatPage, api: FakeApi) -> None:
    first, second = threading.Event(), threading.Event()
    api.script = [("gate", first), ("text", "One **two"), ("gate", second), ("text", "** three")]
    chat.open().ask("count")
    expect(chat.page.locator(".waiting")).to_be_visible()
    first.set()
    chat.wait_for("One two")
    assert chat.answer().inner_html() == "<p>One <strong>two</strong></p>"
    assert chat.page.locator(".message.assistant").get_attribute("aria-busy") == "true"
    second.set()
    chat.wait_until_done()
    assert chat.answer().inner_html() == "<p>One <strong>two</strong> three</p>"
    body = api.bodies[-1]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert body["model"] == "tiny/Wheel-135M"
    assert body["messages"] == [{"role": "user", "content": "count"}]


def test_times_and_tokens_stand_under_the_answer(chat: ChatPage, api: FakeApi) -> None:
    api.script = [("wait", 0.15), *[act for _ in range(5) for act in (("text", "x "), ("wait", 0.05))]]
    chat.open().ask("go")
    chat.wait_until_done()
    parts = chat.page.locator(".stats span").all_inner_texts()
    ttft = re.fullmatch(r"TTFT (\d+) ms", parts[0])
    assert ttft and 150 <= int(ttft[1]) < 9000
    speed = re.fullmatch(r"([\d.]+) tokens/s", parts[1])
    assert speed and 0.5 < float(speed[1]) <= 20.5  # four tokens after the first, at least 50 ms apart
    assert parts[2] == "12 → 5 tokens"
    assert chat.page.locator("#context").inner_text() == "17 of 8,192 tokens of context"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request(chat: ChatPage, api: FakeApi, how: str) -> None:
    api.script = [("text", "It began"), ("gate", threading.Event())]
    chat.open().ask("go")
    chat.wait_for("It began")
    if how == "button":
        chat.page.click("#stop")
    else:
        chat.page.keyboard.press("Escape")
    chat.wait_until_done()
    until(lambda: api.disconnects == 1)
    assert chat.answer().inner_text() == "It began"
    assert "stopped" in chat.page.locator(".stats").inner_text()
    assert "tokens" not in chat.page.locator(".stats").inner_text()  # no usage came: no number is made up
    api.script = None
    chat.ask("and then?")
    chat.wait_until_done()
    assert [message["role"] for message in api.bodies[-1]["messages"]] == ["user", "assistant", "user"]


def test_leaving_the_page_ends_the_request_and_keeps_the_text(chat: ChatPage, api: FakeApi) -> None:
    api.script = [("text", "It began"), ("gate", threading.Event())]
    chat.open().ask("go")
    chat.wait_for("It began")
    chat.page.reload()
    until(lambda: api.disconnects == 1)
    chat.wait_for("It began")
    assert chat.page.locator(".message.assistant").get_attribute("aria-busy") == "false"


def test_hostile_text_stays_text(chat: ChatPage, api: FakeApi) -> None:
    api.script = [
        ("text", "<script>window.pwned = 1</scr"), ("text", "ipt><img src=x onerror='window.pwned = 1'>\n\n"),
        ("text", "[click](javascript:window.pwned=1) ![pixel](https://evil.example/p.png)\n\n"),
        ("text", "```html\n<svg onload=window.pwned=1></svg>\n```\n"), ("think", "<iframe src='https://evil.example'>"),
    ]  # fmt: skip
    chat.open().ask("<b>me</b><script>window.pwned = 1</script>")
    chat.wait_until_done()
    chat.page.locator(".reasoning summary").click()
    chat.visit.until("document.querySelector('.reasoning .markdown').textContent.includes('iframe')")
    messages = chat.page.locator("#messages")
    for tag in ("script", "img", "iframe", "b", ".markdown svg"):
        assert messages.locator(tag).count() == 0, tag
    links = chat.answer().locator("a")
    assert links.count() == 1  # the picture, as a link that nobody follows by itself
    assert links.get_attribute("rel") == "noopener noreferrer"
    assert "<b>me</b>" in chat.page.locator(".bubble").inner_text()
    assert chat.page.evaluate("window.pwned") is None
    assert "<script>" in chat.page.locator("#conversations").inner_text()  # the title


def test_reasoning_is_folded(chat: ChatPage, api: FakeApi) -> None:
    gate = threading.Event()
    api.script = [("think", "Let me *see*."), ("gate", gate), ("text", "42")]
    chat.open().ask("why")
    expect(chat.page.locator(".reasoning summary")).to_have_text("Thinking…")
    expect(chat.page.locator(".reasoning .markdown")).to_be_hidden()
    gate.set()
    chat.wait_until_done()
    expect(chat.page.locator(".reasoning summary")).to_have_text(re.compile(r"Thought for [\d.]+ ms"))
    chat.page.locator(".reasoning summary").click()
    expect(chat.page.locator(".reasoning .markdown em")).to_have_text("see")
    assert chat.answer().inner_text() == "42"
    chat.ask("again")
    chat.wait_until_done()
    assert api.bodies[-1]["messages"][1] == {"role": "assistant", "content": "42"}  # without the reasoning


def test_opened_reasoning_stays_in_view(chat: ChatPage, api: FakeApi) -> None:
    api.script = [("think", "thought\n\n" * 100 + "the last"), ("text", "42")]
    chat.open().ask("why")
    chat.wait_until_done()
    summary = chat.page.locator(".reasoning summary")
    summary.click()
    expect(chat.page.locator(".reasoning .markdown")).to_contain_text("the last")
    expect(summary).to_be_in_viewport()


def test_parameters_are_sent_and_kept(chat: ChatPage, api: FakeApi) -> None:
    chat.open()
    numbers = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    for name, value in numbers.items():
        chat.set_parameter(name, str(value))
    chat.set_parameter("stop-strings", "END\n\n\\n###")
    chat.set_parameter("system", "Be brief.")
    chat.ask("hi")
    chat.wait_until_done()
    body = api.bodies[-1]
    assert {name: body[name] for name in numbers} == numbers
    assert body["stop"] == ["END", "\\n###"]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]

    chat.page.reload()
    chat.wait_until_ready()
    chat.ask("again")
    chat.wait_until_done()
    assert {name: api.bodies[-1][name] for name in numbers} == numbers
    chat.page.click("#defaults")
    chat.ask("plain")
    chat.wait_until_done()
    assert set(api.bodies[-1]) == {"model", "messages", "stream", "stream_options"}


def test_a_wrong_parameter_is_not_sent(chat: ChatPage, api: FakeApi) -> None:
    chat.open()
    wrong = {
        "temperature": ("3", "At most 2."),
        "top_p": ("0", "More than 0."),
        "top_k": ("1.5", "A whole number"),
        "max_tokens": ("0", "At least 1."),
    }
    for name, (value, problem) in wrong.items():
        chat.set_parameter(name, value)
        assert problem in chat.page.locator(f"#{name}-problem").inner_text()
        assert chat.page.locator(f"#{name}").get_attribute("aria-invalid") == "true"
        chat.ask("hi")
        assert problem in chat.page.locator("#problem").inner_text()
        assert chat.page.input_value("#prompt") == "hi"  # nothing that was typed is lost
        chat.set_parameter(name, "1")
        assert chat.page.locator(f"#{name}-problem").inner_text() == ""
    assert api.bodies == []
    chat.page.click("#send")
    chat.wait_until_done()
    assert {name: api.bodies[-1][name] for name in wrong} == dict.fromkeys(wrong, 1)


def test_json_mode(chat: ChatPage, api: FakeApi) -> None:
    chat.open().page.click("#open-settings")
    chat.page.locator("input[value=json]").check()
    expect(chat.page.locator("#mode")).to_have_text("JSON")
    chat.ask("json")
    chat.wait_until_done()
    assert api.bodies[-1]["response_format"] == {"type": "json_object"}
    shown = chat.answer().locator("code").inner_text()
    assert shown == json.dumps({"asked_for": {"type": "json_object"}}, indent=2)


def test_json_by_schema(chat: ChatPage, api: FakeApi) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    chat.open().page.click("#open-settings")
    chat.page.locator("input[value=schema]").check()
    chat.ask("json")
    assert "Type or paste a JSON schema" in chat.page.locator("#problem").inner_text()
    chat.page.fill("#schema", "{broken")
    assert "Not a schema" in chat.page.locator("#schema-problem").inner_text()
    chat.page.fill("#schema", json.dumps(schema))
    chat.page.click("#send")
    chat.wait_until_done()
    expected = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    assert api.bodies[-1]["response_format"] == expected
    chat.page.fill("#schema", json.dumps({"name": "place", "schema": schema}))
    chat.ask("again")
    chat.wait_until_done()
    assert api.bodies[-1]["response_format"]["json_schema"] == {"name": "place", "schema": schema}


def test_an_error_in_mid_stream_keeps_the_text_and_offers_another_try(chat: ChatPage, api: FakeApi) -> None:
    api.script = [("text", "Half an"), ("error", "A replica died.")]
    chat.open().ask("go")
    chat.wait_until_done()
    assert chat.answer().inner_text() == "Half an"
    notice = chat.page.locator(".notice.error").last
    assert "A replica died." in notice.inner_text() and "Try again" in notice.inner_text()
    api.script = None
    chat.page.get_by_role("button", name="Try again").click()
    chat.wait_for("You said: go")
    assert chat.page.locator(".message").count() == 2
    assert chat.page.locator(".notice.error").is_hidden()


def test_an_answer_that_is_cut_off_is_an_error(chat: ChatPage, api: FakeApi) -> None:
    api.script = [("text", "Half an"), ("cut", "")]
    chat.open().ask("go")
    chat.wait_until_done()
    assert "cut off" in chat.page.locator(".notice.error").inner_text()


REFUSALS: list[tuple[int, str, dict[str, str], str]] = [
    (400, "temperature must be at most 2.", {}, "Change the parameter"),
    (400, "The prompt has 9000 tokens; max_model_len is 8192.", {}, "Shorten the message"),
    (429, "Too many requests.", {"Retry-After": "7"}, "Try again in 7 s"),
    (503, "The model is loading.", {}, "still loading"),
    (500, "Oops.", {}, "log"),
]


def test_errors_say_what_to_do(chat: ChatPage, api: FakeApi) -> None:
    chat.open()
    for status, message, headers, advice in REFUSALS:
        api.refusal = (status, message, headers)
        chat.ask(f"go {status}")
        notice = chat.page.locator(".notice.error:visible").last
        expect(notice).to_contain_text(message)
        expect(notice).to_contain_text(advice)
        chat.wait_until_done()
    api.refusal = None
    chat.ask("another")
    chat.wait_for("You said")
    # The failed answers are not part of what the model gets, and questions in a row become one.
    questions = [f"go {status}" for status, *_ in REFUSALS] + ["another"]
    assert api.bodies[-1]["messages"] == [{"role": "user", "content": "\n\n".join(questions)}]


def test_a_server_that_is_gone_is_named(chat: ChatPage) -> None:
    chat.open()
    chat.visit.context.set_offline(True)
    chat.ask("go")
    chat.wait_until_done()
    text = chat.page.locator(".notice.error").inner_text()
    assert "does not answer" in text and "still runs" in text


def test_the_key_is_asked_for_once_and_forgotten_with_the_tab(chat: ChatPage, api: FakeApi) -> None:
    api.key = "secret"
    chat.page.goto(chat.visit.base_url)
    chat.page.fill("#key-input", "wrong")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#key-problem")).to_have_text("The server did not accept that key.")
    chat.page.fill("#key-input", "secret")
    chat.page.keyboard.press("Enter")
    chat.page.wait_for_selector("#examples button")
    chat.ask("hi")
    chat.wait_for("You said: hi")
    chat.page.reload()
    chat.wait_until_ready()
    chat.ask("hello")
    chat.wait_for("You said: hello")
    assert "secret" not in chat.page.evaluate("JSON.stringify(localStorage)")
    assert chat.page.evaluate("sessionStorage.getItem('pelton.key')") == "secret"


def test_declining_the_key_says_so(chat: ChatPage, api: FakeApi) -> None:
    api.key = "secret"
    chat.page.goto(chat.visit.base_url)
    chat.page.click("#key-cancel")
    expect(chat.page.locator("#about")).to_contain_text("Enter the API key")
    chat.page.get_by_role("button", name="Try again").click()
    chat.page.fill("#key-input", "secret")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#greeting")).to_have_text("Chat with Wheel-135M")


def test_regenerate_and_edit(chat: ChatPage, api: FakeApi) -> None:
    api.script = [("text", "first")]
    chat.open().ask("one")
    chat.wait_for("first")
    chat.wait_until_done()
    api.script = [("text", "second")]
    chat.page.get_by_role("button", name="Regenerate").click()
    chat.wait_for("second")
    chat.wait_until_done()
    assert chat.page.locator(".message").count() == 2
    assert api.bodies[-1]["messages"] == api.bodies[-2]["messages"]

    api.script = None
    chat.page.get_by_role("button", name="Edit", exact=True).click()
    area = chat.page.get_by_label("Edit the message")
    area.fill("two")
    area.press("Escape")
    assert chat.page.locator(".bubble").inner_text() == "one"
    chat.page.get_by_role("button", name="Edit", exact=True).click()
    area.fill("two")
    area.press("Enter")
    chat.wait_for("You said: two")
    assert api.bodies[-1]["messages"] == [{"role": "user", "content": "two"}]
    assert chat.page.locator(".message").count() == 2


def test_nothing_is_dropped_for_a_request_that_cannot_be_sent(chat: ChatPage) -> None:
    chat.open().ask("one")
    chat.wait_until_done()
    chat.set_parameter("temperature", "3")
    chat.page.get_by_role("button", name="Edit", exact=True).click()
    area = chat.page.get_by_label("Edit the message")
    area.fill("two")
    area.press("Enter")
    expect(chat.page.locator("#problem")).to_contain_text("At most 2.")
    expect(area).to_have_value("two")
    expect(chat.answer()).to_have_text("You said: one")
    chat.set_parameter("temperature", "1")
    area.press("Enter")
    chat.wait_for("You said: two")
    chat.wait_until_done()

    chat.page.route("**/v1/models", lambda route: route.abort())
    chat.page.reload()
    chat.wait_until_ready()
    chat.page.get_by_role("button", name="Regenerate").click()
    expect(chat.page.locator("#problem")).to_contain_text("not known yet")
    expect(chat.answer()).to_have_text("You said: two")


def test_copying_code_and_messages(visit_as: Callable[..., Visit], api: FakeApi) -> None:
    api.script = [("text", "Run\n\n```sh\nls -l\n```")]
    chat = ChatPage(visit_as(permissions=["clipboard-read", "clipboard-write"])).open()
    chat.ask("how")
    chat.wait_until_done()
    done = re.compile(r"\bdone\b")
    code = chat.page.get_by_role("button", name="Copy code")
    code.click()
    expect(code).to_have_class(done)
    assert chat.page.evaluate("navigator.clipboard.readText()") == "ls -l"
    whole = chat.page.locator(".message.assistant .tools").get_by_role("button", name="Copy")
    whole.click()
    expect(whole).to_have_class(done)
    assert chat.page.evaluate("navigator.clipboard.readText()") == "Run\n\n```sh\nls -l\n```"


def test_conversations_survive_a_reload_and_can_be_deleted_and_brought_back(chat: ChatPage) -> None:
    chat.open().ask("about turbines")
    chat.wait_until_done()
    chat.page.click("#new")
    chat.ask("about wheels")
    chat.wait_until_done()
    assert chat.conversations() == ["about wheels", "about turbines"]
    chat.page.reload()
    chat.wait_for("You said: about wheels")
    assert chat.conversations() == ["about wheels", "about turbines"]
    chat.page.get_by_role("button", name="about turbines", exact=True).click()
    chat.wait_for("You said: about turbines")
    chat.page.locator("#conversations li", has_text="about turbines").hover()
    chat.page.get_by_role("button", name="Delete “about turbines”").click()
    assert chat.conversations() == ["about wheels", "Deleted. Undo"]
    assert chat.page.locator("#title").inner_text() == "New conversation"
    chat.page.get_by_role("button", name="Deleted. Undo").click()
    chat.wait_for("You said: about turbines")
    assert chat.conversations() == ["about wheels", "about turbines"]


def test_an_answer_goes_on_while_another_conversation_is_read(chat: ChatPage, api: FakeApi) -> None:
    gate = threading.Event()
    api.script = [("text", "slow "), ("gate", gate), ("text", "but sure")]
    chat.open().ask("slow one")
    chat.wait_for("slow")
    chat.page.click("#new")
    api.script = None
    chat.ask("quick one")
    chat.wait_for("You said: quick one")
    gate.set()
    expect(chat.page.locator("#conversations li.running")).to_have_count(0)
    chat.page.get_by_role("button", name="slow one", exact=True).click()
    chat.wait_for("slow but sure")
    assert api.disconnects == 0


def test_what_another_tab_writes_disturbs_nobody(chat: ChatPage) -> None:
    chat.open().ask("one")
    chat.wait_until_done()
    writer = chat.visit.context.new_page()
    writer.goto(chat.visit.base_url)

    def write(text: str) -> None:
        writer.evaluate(
            """(text) => {
                const key = Object.keys(localStorage).find((name) => name.startsWith("pelton.conversation."));
                const conversation = JSON.parse(localStorage.getItem(key));
                Object.assign(conversation.messages.at(-1), { content: text, state: "streaming" });
                localStorage.setItem(key, JSON.stringify(conversation));
            }""",
            text,
        )
        chat.wait_for(text[-5:])

    long = "line\n\n" * 100
    write(long + "first")
    chat.page.get_by_role("button", name="Edit", exact=True).click()
    area = chat.page.get_by_label("Edit the message")
    area.fill("draft")
    expect(chat.page.locator("#latest")).to_be_visible()
    before = chat.page.evaluate("document.querySelector('#thread').scrollTop")
    write(long + "first, then")
    expect(area).to_have_value("draft")
    expect(area).to_be_focused()
    assert chat.page.evaluate("document.querySelector('#thread').scrollTop") == before
    # The other tab may have gone: the answer is not left open.
    expect(chat.page.locator(".message.assistant")).to_have_attribute("aria-busy", "false")
    expect(chat.page.get_by_role("button", name="Regenerate")).to_be_attached()
    area.press("Enter")
    chat.wait_for("You said: draft")


def test_the_list_of_conversations_keeps_the_focus(chat: ChatPage, api: FakeApi) -> None:
    gate = threading.Event()
    api.script = [("text", "slow"), ("gate", gate)]
    chat.open().ask("one")
    chat.wait_for("slow")
    delete = chat.page.get_by_role("button", name="Delete “one”")
    delete.focus()
    gate.set()
    expect(chat.page.locator("#conversations li.running")).to_have_count(0)
    expect(delete).to_be_focused()
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_role("button", name="Deleted. Undo")).to_be_focused()
    chat.page.keyboard.press("Enter")
    chat.wait_for("slow")


def test_a_screen_without_a_pointer_shows_every_button(visit_as: Callable[..., Visit]) -> None:
    chat = ChatPage(visit_as(viewport={"width": 1280, "height": 800}, has_touch=True, is_mobile=True)).open()
    chat.ask("one")
    chat.wait_until_done()
    expect(chat.page.get_by_role("button", name="Delete “one”")).to_have_css("opacity", "1")


def test_damaged_storage_is_left_out(chat: ChatPage) -> None:
    chat.open().page.evaluate("""() => {
        localStorage.setItem("pelton.conversation.a", "{broken");
        localStorage.setItem("pelton.conversation.b", JSON.stringify({ id: "b", messages: [{ role: "user" }] }));
        localStorage.setItem("pelton.parameters", "[");
    }""")
    chat.page.reload()
    chat.wait_until_ready()
    chat.ask("still here")
    chat.wait_until_done()
    assert chat.conversations() == ["still here"]


def test_calls_of_tools_are_shown(chat: ChatPage, api: FakeApi) -> None:
    def piece(**function: str) -> tuple[str, str]:
        delta = {"tool_calls": [{"index": 0, "id": "call-1", "type": "function", "function": function}]}
        return "raw", f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"

    api.script = [piece(name="weather", arguments='{"city"'), piece(arguments=': "Bern"}')]
    chat.open().ask("weather?")
    chat.wait_until_done()
    block = chat.page.locator(".message.assistant .code-block")
    assert block.locator(".code-head span").inner_text() == "call of weather"
    assert block.locator("code").inner_text() == '{"city": "Bern"}'


@pytest.mark.parametrize("broken", ["full", "forbidden"])
def test_the_page_works_without_storage(visit: Visit, api: FakeApi, broken: str) -> None:
    api.key = "secret"
    visit.context.add_init_script(
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
        if broken == "full"
        else "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    chat = ChatPage(visit)
    chat.page.goto(visit.base_url)
    chat.page.fill("#key-input", "secret")
    chat.page.keyboard.press("Enter")
    chat.wait_until_ready()
    chat.ask("hi")
    chat.wait_for("You said: hi")
    chat.wait_until_done()
    expect(chat.page.locator("#problem")).to_contain_text("will not survive a reload")
    chat.page.get_by_role("button", name="Use the dark theme").click()
    assert chat.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_export(chat: ChatPage, tmp_path: Path) -> None:
    chat.open()
    assert chat.page.locator("#export").is_disabled()
    chat.set_parameter("temperature", "0.5")
    chat.ask("What is a Pelton wheel?")
    chat.wait_until_done()
    with chat.page.expect_download() as download:
        chat.page.click("#export")
    assert download.value.suggested_filename == "what-is-a-pelton-wheel.json"
    download.value.save_as(tmp_path / "chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert [message["content"] for message in saved["messages"]] == [
        "What is a Pelton wheel?",
        "You said: What is a Pelton wheel?",
    ]
    assert saved["messages"][1]["request"] == {"model": "tiny/Wheel-135M", "temperature": 0.5}


def test_several_models_can_be_chosen(chat: ChatPage, api: FakeApi) -> None:
    chat.open()
    expect(chat.page.locator("#model")).to_be_hidden()
    api.models = [*api.models, {"id": "adapter-legal", "object": "model", "max_model_len": 4096}]
    chat.page.reload()
    chat.page.get_by_label("Model").select_option("adapter-legal")
    chat.ask("hi")
    chat.wait_until_done()
    assert api.bodies[-1]["model"] == "adapter-legal"


def test_keys(chat: ChatPage, api: FakeApi) -> None:
    chat.open()
    expect(chat.page.locator("#prompt")).to_be_focused()
    chat.page.keyboard.type("one")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("two")
    assert api.bodies == []
    chat.page.keyboard.press("Enter")
    chat.wait_until_done()
    assert api.bodies[-1]["messages"][-1]["content"] == "one\ntwo"
    assert chat.page.input_value("#prompt") == ""
    chat.page.keyboard.press("Enter")  # nothing to send
    chat.page.keyboard.type("   ")
    chat.page.keyboard.press("Enter")
    assert chat.page.locator(".message").count() == 2
    assert len(api.bodies) == 1


def test_the_page_follows_only_a_reader_who_is_at_the_end(chat: ChatPage, api: FakeApi) -> None:
    more, end = threading.Event(), threading.Event()
    api.script = [
        ("text", "line\n\n" * 60),
        ("gate", more),
        ("text", "line\n\n" * 30 + "middle"),
        ("gate", end),
        ("text", "\n\nlast"),
    ]
    chat.open().ask("long")
    chat.wait_for("line")
    at_end = """() => {
        const thread = document.querySelector("#thread");
        return thread.scrollHeight - thread.scrollTop - thread.clientHeight < 3;
    }"""
    chat.visit.until(at_end)
    expect(chat.page.locator("#latest")).to_be_hidden()
    chat.page.hover("#thread")
    chat.page.mouse.wheel(0, -600)
    expect(chat.page.locator("#latest")).to_be_visible()
    chat.visit.until("""() => new Promise((resolve) => {  // scrolling has come to rest
        const thread = document.querySelector("#thread");
        const before = thread.scrollTop;
        setTimeout(() => resolve(thread.scrollTop === before), 100);
    })""")
    before = chat.page.evaluate("document.querySelector('#thread').scrollTop")
    more.set()
    chat.wait_for("middle")
    assert abs(chat.page.evaluate("document.querySelector('#thread').scrollTop") - before) < 2
    chat.page.click("#latest")
    chat.visit.until(at_end)
    end.set()
    chat.wait_for("last")
    chat.visit.until(at_end)


def test_a_long_answer_costs_little_while_it_streams(chat: ChatPage, api: FakeApi) -> None:
    """The work for one more piece does not grow with the length of the answer."""
    chat.open()
    early, late = chat.page.evaluate("""async () => {
        const { MarkdownView } = await import("/web/markdown_view.js");
        const root = document.createElement("div");
        document.querySelector("#messages").append(root);
        const view = new MarkdownView(root);
        const part = "Some *text* with `code` and **more**.\\n\\n- a\\n- b\\n\\n";
        let text = "";
        const time = (n) => {
            const begin = performance.now();
            for (let i = 0; i < n; i += 1) view.update(text += part);
            return performance.now() - begin;
        };
        time(100);
        const best = () => Math.min(time(50), time(50), time(50), time(50));
        const early = best();
        time(4000);
        return [early, best()];
    }""")
    assert late < 15 * early + 20  # a whole reading of 230 kB would cost hundreds of times more


# Appearance


def ratio(page: Page, front: str, back: str) -> float:
    """The WCAG contrast of two colours of the theme."""
    return float(
        page.evaluate(
            """([front, back]) => {
                const probe = document.body.appendChild(document.createElement("span"));
                const light = (name) => {
                    probe.style.color = `var(--${name})`;
                    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3)
                        .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
                probe.remove();
                return (a + 0.05) / (b + 0.05);
            }""",
            [front, back],
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit_as: Callable[..., Visit], scheme: str) -> None:
    """WCAG AA: 4.5 for text, 3 for lines and shapes that carry meaning."""
    page = ChatPage(visit_as(color_scheme=scheme)).open().page
    for front in ("text", "muted", "accent", "danger"):
        for back in ("bg", "surface", "sunken"):
            assert ratio(page, front, back) >= 4.5, (front, back)
    pairs = [("text", "accent-soft"), ("text", "danger-soft"), ("danger", "danger-soft"), ("text", "hover"),
            ("muted", "hover"),
             ("on-accent", "accent"), ("good", "surface"), ("warn", "surface")]  # fmt: skip
    for front, back in pairs:
        assert ratio(page, front, back) >= 4.5, (front, back)
    for front in ("output", "prompt", "third", "wait", "danger", "line-strong"):
        assert ratio(page, front, "surface") >= 3, front


def test_dark_and_light_follow_the_system_until_the_reader_chooses(visit_as: Callable[..., Visit]) -> None:
    page = ChatPage(visit_as(color_scheme="dark")).open().page
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.get_by_role("button", name="Use the light theme").click()
    light = page.evaluate(colour)
    assert light != dark
    page.reload()
    assert page.evaluate(colour) == light
    page.goto(page.url.split("#")[0] + "dashboard")
    assert page.evaluate(colour) == light
    page.get_by_role("button", name="Use the dark theme").click()
    assert page.evaluate(colour) == dark
    assert page.evaluate("localStorage.getItem('pelton.theme')") is None  # as the system again
    page.emulate_media(color_scheme="light")
    assert page.evaluate(colour) == light


def test_a_phone_needs_no_sideways_scrolling(visit_as: Callable[..., Visit], api: FakeApi) -> None:
    wide = (
        "| " + " | ".join(["column"] * 12) + " |\n|" + "---|" * 12 + "\n\n```\n" + "x" * 300 + "\n```\n\n" + "y" * 300
    )
    api.script = [("text", wide)]
    visit = visit_as(viewport=PHONE, has_touch=True)
    chat = ChatPage(visit).open()
    assert visit.sideways() == 0
    chat.ask("z" * 300)
    chat.wait_until_done()
    assert visit.sideways() == 0
    thread = "(() => { const t = document.querySelector('#thread'); return t.scrollWidth - t.clientWidth; })()"
    assert chat.page.evaluate(thread) == 0
    chat.page.click("#open-settings")
    chat.page.wait_for_selector("#settings:not([hidden])")
    assert visit.sideways() == 0
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#settings")).to_be_hidden()
    chat.page.click("#open-sidebar")
    expect(chat.page.get_by_role("button", name="New conversation")).to_be_in_viewport()
    chat.page.get_by_role("button", name="New conversation").click()
    expect(chat.page.locator("#sidebar")).not_to_be_in_viewport()
    assert visit.sideways() == 0


def test_everything_has_a_name(chat: ChatPage) -> None:
    """Buttons, fields and links have names for screen readers; there is one h1 and one main."""
    chat.open().ask("hi")
    chat.wait_until_done()
    chat.page.click("#open-settings")
    assert unnamed(chat.page) == []


def unnamed(page: Page) -> list[str]:
    found = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, a, canvas")]
      .filter((node) => {
        const name = node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.[0]?.textContent.trim();
        return !name;
    }).map((node) => node.outerHTML)""")
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    return list(found)


def test_files_hold_nothing_inline_and_no_address() -> None:
    for path in WEB.iterdir():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") < 800, path.name
        assert "innerHTML" not in text and "eval(" not in text, path.name
        if path.suffix == ".html":
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", text), path.name
        for address in re.findall(r"https?://[^\s\"'`)]+", text):
            assert address.startswith("http://www.w3.org/"), (path.name, address)


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_a_page_weighs_little(visit: Visit, path: str) -> None:
    """All files of a page, uncompressed: 96 KiB."""
    visit.page.goto(visit.base_url + path, wait_until="networkidle" if path == "/" else "load")
    sizes = visit.page.evaluate("""() => ["navigation", "resource"]
        .flatMap((type) => performance.getEntriesByType(type)).map((entry) => [entry.name, entry.decodedBodySize])""")
    files = {name: size for name, size in sizes if "/web/" in name or name.endswith(path)}
    assert len(files) > 10
    assert 40_000 < sum(files.values()) < 96 * 1024
