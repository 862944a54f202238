"""The dashboard in a real browser, fed with the messages of a small simulation."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.helpers.browser import DashboardPage, Visit
from tests.helpers.dashboard_messages import messages
from tests.helpers.fake_api import FakeApi
from tests.server.web.test_pages import PHONE, unnamed

CANVASES = [
    "#output canvas",
    "#prompt canvas",
    "#latency-over-time canvas",
    "#load canvas",
    "#requests canvas",
    "#kv canvas",
]


@pytest.fixture(scope="module")
def feed() -> list[dict[str, Any]]:
    return messages(130)


@pytest.fixture
def live(dashboard: DashboardPage, api: FakeApi, feed: list[dict[str, Any]]) -> DashboardPage:
    """The dashboard after the last half minute of messages."""
    api.dashboard, api.interval_s = feed[-60:], 0.002
    dashboard.open().wait_for_state("live")
    wait_for_time(dashboard, feed[-1])
    return dashboard


def wait_for_time(dashboard: DashboardPage, message: dict[str, Any]) -> None:
    """Until the page shows the message, told by its number of finished requests."""
    finished = f"{message['finished']['stop']:,}"
    expect(dashboard.page.locator("#totals dl > div").first.locator("dd")).to_have_text(finished)


def test_every_part_is_drawn(live: DashboardPage, feed: list[dict[str, Any]]) -> None:
    last, page = feed[-1], live.page
    about = page.locator("#about").inner_text()
    assert "tiny/Wheel-135M" in about and "version 0.1.0" in about and "up 1 h 7 min" in about
    recent = [message["output_tokens_per_s"] for message in feed[-11:]]
    assert abs(float(live.tile("Output").split()[0].replace(",", "")) - sum(recent) / len(recent)) < 1
    assert live.tile("Running").split() == [str(last["running"]), "of", "8"]
    assert live.tile("Waiting").split()[0] == str(last["waiting"])
    assert live.tile("KV cache").startswith(f"{round(last['kv_use'] * 100)} %")

    for canvas in CANVASES:
        assert live.colours(canvas) > 3, canvas
        assert len(page.locator(canvas).first.get_attribute("aria-label") or "") > 30, canvas
    assert page.locator("#kv canvas").count() == 2  # one for each replica

    rows = page.locator("#percentiles tbody tr:not(.range)")
    assert rows.nth(0).inner_text().split("\t")[0] == "TTFT"
    assert rows.nth(1).locator("td").first.inner_text() == "40.5 ms"
    assert page.locator("#goodput").inner_text().split("\n\n") == [
        "Requests that met every level\n94 %",
        "TTFT ≤ 500 ms, TPOT ≤ 60.0 ms",
    ]

    gauges = page.locator("#gauges .gauge").all_inner_texts()
    assert gauges[1].startswith("MBU") and "of 41.3 GB/s measured" in gauges[1]
    assert gauges[2].startswith("MFU") and "of 1.21 TFLOP/s measured" in gauges[2]
    meter = page.locator("#gauges [role=meter]").nth(1)
    assert meter.get_attribute("aria-valuenow") == str(round(last["mbu"] * 100))

    ops = page.locator("#ops tbody tr")
    assert ops.count() == 5
    assert ops.first.inner_text().split() == ["linear", "29.1", "ms", "74", "%", "81", "%"]
    widths = ops.first.evaluate("(row) => [...row.querySelectorAll('i')].map((i) => parseFloat(i.style.width))")
    assert widths == pytest.approx([81, 19])
    totals = dict(
        zip(page.locator("#totals dt").all_inner_texts(), page.locator("#totals dd").all_inner_texts(), strict=True)
    )
    assert totals["Finished"] == str(last["finished"]["stop"])
    assert totals["Rejected"] == "3" and totals["Energy per token"] == "not measured"
    assert page.locator("#replicas li").all_inner_texts() == ["Replica 0\nready", "Replica 1\nready"]
    assert unnamed(page) == []


def test_numbers_that_are_missing_are_named(dashboard: DashboardPage, api: FakeApi, feed: list[dict[str, Any]]) -> None:
    nothing: dict[str, Any] = {
        "mbu": None, "mfu": None, "peak_bandwidth": None, "peak_flops": None, "prefix_hit_rate": None,
        "goodput": None, "ops": None,
        "latency": dict.fromkeys(["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"]), "requests": [], "steps": [], "kv_map": [],
    }  # fmt: skip
    api.dashboard = [{**feed[0], **nothing}]
    dashboard.open().wait_for_state("live")
    page = dashboard.page
    expect(page.locator("#gauges .gauge").nth(1)).to_contain_text("not measured on this machine")
    expect(page.locator("#goodput")).to_contain_text("No service levels are set")
    expect(page.locator("#ops")).to_contain_text("No step has been profiled")
    assert page.locator("#percentiles td").first.inner_text() == "–"


def test_tables_say_what_the_charts_show(live: DashboardPage, feed: list[dict[str, Any]]) -> None:
    page = live.page
    page.locator("#load summary").click()
    expect(page.locator("#load tbody tr").first).to_be_visible()  # the table is drawn at the next frame
    first = page.locator("#load tbody tr").first.locator("td").all_inner_texts()
    assert first == [str(feed[-1]["running"]), str(feed[-1]["waiting"])]
    page.locator("#requests summary").click()
    rows = page.locator("#requests tbody tr")
    expect(rows).to_have_count(20)
    ids = [request["id"] for request in sorted(feed[-1]["requests"], key=lambda request: -request["arrived"])]
    assert ids[0] == rows.first.locator("th").inner_text()


def test_the_pointer_reads_values(live: DashboardPage) -> None:
    page = live.page
    page.locator("#output canvas").hover()
    expect(page.locator("#output .tip")).to_contain_text("output")
    page.mouse.move(0, 0)
    expect(page.locator("#output .tip")).to_be_hidden()
    box = page.locator("#requests canvas").bounding_box()
    assert box is not None
    page.locator("#requests canvas").scroll_into_view_if_needed()
    found = page.evaluate("""() => {  // a pixel of the decode colour in the first lane
        const canvas = document.querySelector("#requests canvas");
        const row = canvas.getContext("2d").getImageData(0, 6, canvas.width, 1).data;
        for (let x = 0; x < canvas.width; x += 1) if (row[4 * x + 2] > 120 && row[4 * x] < 40) return x;
        return -1;
    }""")
    assert found >= 0
    page.locator("#requests canvas").hover(position={"x": found + 1, "y": 6})
    expect(page.locator("#requests .tip")).to_contain_text("chatcmpl-")


def test_another_measure_and_another_range(live: DashboardPage) -> None:
    page = live.page
    page.get_by_role("button", name="ITL").click()
    assert page.get_by_role("button", name="ITL").get_attribute("aria-pressed") == "true"
    expect(page.locator("#latency-over-time .legend")).to_contain_text("p50 39.9 ms")
    assert page.locator("#latency-over-time canvas").count() == 1
    picture = "document.querySelector('#load canvas').toDataURL()"
    for seconds in ("600", "7200", "86400"):
        before = page.evaluate(picture)
        page.select_option("#range", seconds)
        live.visit.until(f"(before) => {picture} !== before", before)
        assert live.colours("#load canvas") > 3


def test_charts_that_left_the_page_are_forgotten(live: DashboardPage) -> None:
    devtools = live.visit.context.new_cdp_session(live.page)

    def nodes() -> int:
        devtools.send("HeapProfiler.collectGarbage")
        return int(devtools.send("Memory.getDOMCounters")["nodes"])

    before = nodes()
    for _ in range(20):
        for name in ("ITL", "E2E"):
            live.page.get_by_role("button", name=name).click()
    assert nodes() < before + 300  # forty charts have some 1,500


def test_pause_keeps_the_picture_and_goes_on_collecting(
    dashboard: DashboardPage, api: FakeApi, feed: list[dict[str, Any]]
) -> None:
    api.dashboard, api.interval_s = feed, 0.01
    dashboard.open().wait_for_state("live")
    page = dashboard.page
    dashboard.visit.until("document.querySelector('#about').textContent !== ''")
    page.click("#pause")
    dashboard.wait_for_state("paused")
    before = page.locator("#panels").inner_text()
    page.wait_for_timeout(300)  # some thirty messages
    assert page.locator("#panels").inner_text() == before
    page.click("#pause")
    wait_for_time(dashboard, feed[-1])
    dashboard.wait_for_state("live")


def test_what_is_looked_at_during_a_pause_is_of_the_moment_of_the_pause(
    dashboard: DashboardPage, api: FakeApi, feed: list[dict[str, Any]]
) -> None:
    api.dashboard, api.interval_s = feed[:60], 0.002
    dashboard.open().wait_for_state("live")
    wait_for_time(dashboard, feed[59])
    page = dashboard.page
    page.click("#pause")
    dashboard.wait_for_state("paused")

    def pictures() -> list[str]:
        found = page.evaluate("""async () => {
            for (let i = 0; i < 2; i += 1) await new Promise(requestAnimationFrame);
            return ["#requests", "#load"].map((id) => document.querySelector(`${id} canvas`).toDataURL());
        }""")
        return list(found)

    before = pictures()
    api.dashboard = feed
    page.wait_for_timeout(300)  # the present is half a minute later
    page.locator("#requests canvas").hover()
    page.mouse.move(0, 0)
    page.select_option("#range", "600")
    page.select_option("#range", "120")
    assert pictures() == before
    page.locator("#requests summary").click()
    newest = max(feed[59]["requests"], key=lambda request: request["arrived"])
    expect(page.locator("#requests tbody th").first).to_have_text(newest["id"])


def test_a_hidden_page_draws_nothing(live: DashboardPage, api: FakeApi, feed: list[dict[str, Any]]) -> None:
    page = live.page
    page.evaluate("""() => {
        window.drawn = 0;
        const clear = CanvasRenderingContext2D.prototype.clearRect;
        CanvasRenderingContext2D.prototype.clearRect = function (...args) {
            window.drawn += 1;
            return clear.apply(this, args);
        };
        Object.defineProperty(document, "hidden", { get: () => window.away, configurable: true });
        window.away = true;
    }""")
    page.wait_for_timeout(100)
    page.evaluate("window.drawn = 0")
    page.wait_for_timeout(200)
    assert page.evaluate("window.drawn") == 0
    page.evaluate("() => { window.away = false; document.dispatchEvent(new Event('visibilitychange')); }")
    live.visit.until("window.drawn > 0")


def test_it_reconnects_when_the_server_comes_back(dashboard: DashboardPage, feed: list[dict[str, Any]]) -> None:
    own = FakeApi()
    own.dashboard = feed[:3]
    own.start()
    dashboard.visit.base_url = own.url
    dashboard.open().wait_for_state("live")
    page = dashboard.page
    expect(page.locator("#about")).to_contain_text("Wheel")
    own.stop()
    dashboard.wait_for_state("waiting")
    expect(page.locator("#state")).to_contain_text("Reconnecting in")
    expect(page.locator("#announcer")).to_contain_text("Not connected")
    assert "stale" in (page.locator("#panels").get_attribute("class") or "")
    own.dashboard = [{**feed[3], "model": "another/Model"}]
    own.start()
    page.locator("#retry").dispatch_event("click")  # no real click: the countdown may end at any moment
    dashboard.wait_for_state("live", 15_000)
    expect(page.locator("#about")).to_contain_text("another/Model")
    expect(page.locator("#announcer")).to_have_text("The dashboard is live")
    assert "stale" not in (page.locator("#panels").get_attribute("class") or "")
    page.goto("about:blank")
    own.stop()


def test_the_key_is_asked_for(dashboard: DashboardPage, api: FakeApi, feed: list[dict[str, Any]]) -> None:
    api.key, api.dashboard = "secret", feed[:2]
    page = dashboard.open().page
    page.click("#key-cancel")
    dashboard.wait_for_state("refused")
    page.get_by_role("button", name="Enter").click()
    page.fill("#key-input", "secret")
    page.keyboard.press("Enter")
    dashboard.wait_for_state("live")


def test_a_restarted_server_loses_its_requests(
    dashboard: DashboardPage, api: FakeApi, feed: list[dict[str, Any]]
) -> None:
    """A request that no message names any more must not stay on the timeline for ever."""
    busy = next(message for message in feed if message["running"] > 2)
    api.dashboard, api.interval_s = [busy, {**busy, "time": busy["time"] + 0.5, "requests": []}], 0.05
    dashboard.open().wait_for_state("live")
    expect(dashboard.page.locator("#requests canvas")).to_have_attribute("aria-label", re.compile("0 running"))


@pytest.mark.parametrize(
    ("requests", "steps", "kept"),
    [pytest.param(20, 40, (122 * 20, 122 * 40), id="busy"), pytest.param(60, 100, (4000, 6000), id="too-busy")],
)
def test_memory_stays_bounded(dashboard: DashboardPage, requests: int, steps: int, kept: tuple[int, int]) -> None:
    """Twenty minutes leave only the last 61 seconds on the timeline, and heavy traffic not even those."""
    sizes = dashboard.open().page.evaluate(
        """async ([requestsEach, stepsEach]) => {
            const { Timeline } = await import("/web/timeline.js");
            const section = document.createElement("section");
            document.body.append(section);
            const timeline = new Timeline(section);
            for (let i = 0; i < 2400; i += 1) {
                const time = 1e9 + i / 2;
                const requests = Array.from({ length: requestsEach }, (_, k) => ({ id: `${i}-${k}`, replica: "0",
                    arrived: time - 1, scheduled: time - 0.9, first_token: time - 0.5, finished: time - 0.1,
                    reason: "stop", prompt_tokens: 1, cached_tokens: 0, output_tokens: 9 }));
                const steps = Array.from({ length: stepsEach }, (_, k) => ({
                    t: time - (stepsEach - k - 0.5) / (2 * stepsEach), s: 0.005, prefill: 1, decode: 1, running: 1,
                    waiting: 0, kv_use: 0 }));
                timeline.add({ time, requests, steps });
            }
            return [timeline.requests.size, timeline.steps.length];
        }""",
        [requests, steps],
    )
    assert tuple(sizes) == kept


def test_a_phone_needs_no_sideways_scrolling(
    visit_as: Callable[..., Visit], api: FakeApi, feed: list[dict[str, Any]]
) -> None:
    api.dashboard, api.interval_s = feed[-40:], 0.002
    visit = visit_as(viewport=PHONE, has_touch=True)
    dashboard = DashboardPage(visit).open()
    wait_for_time(dashboard, feed[-1])
    for summary in dashboard.page.locator("summary").all():
        summary.click()
    assert visit.sideways() == 0
    assert dashboard.page.evaluate(
        "[...document.querySelectorAll('.card')].every((card) => card.scrollWidth <= card.clientWidth + 1)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_take_the_theme(
    visit_as: Callable[..., Visit], api: FakeApi, feed: list[dict[str, Any]], scheme: str
) -> None:
    api.dashboard, api.interval_s = feed[-40:], 0.002
    dashboard = DashboardPage(visit_as(color_scheme=scheme)).open()
    wait_for_time(dashboard, feed[-1])
    api.dashboard = [feed[-1]]
    picture = "document.querySelector('#load canvas').toDataURL()"
    time.sleep(0.1)
    before = dashboard.page.evaluate(picture)
    dashboard.page.locator("[data-theme-toggle]").click()
    dashboard.visit.until(f"{picture} !== {before!r}")
