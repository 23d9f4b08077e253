"""The page of `polyturn view` in a browser, over real files and the real server.

One browser and one server serve all tests. Whatever a page logs as an error, throws or asks in a dialog fails its test.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, ViewportSize, expect

from polyturn.viewer.export import ExportChoice, export_page
from polyturn.viewer.opening import open_answers, open_viewer
from tests.support.chat_server import chat_server, message
from tests.support.chromium import headless_chromium
from tests.viewer.fixture import FixtureRun, write_fixture
from tests.viewer.test_playing_on import stored_run

WIDE: ViewportSize = {"width": 1200, "height": 900}
PHONE: ViewportSize = {"width": 360, "height": 720}
expect.set_options(timeout=10_000)
IMAGES = Path(__file__).parents[2] / "docs" / "images"
STEP = 3
"""One that is finished: the fourth episode of its first group failed, and its first wrote hostile text."""
GROUP = f"g{(STEP - 1) * 4:08d}"
HOSTILE, BRANCHING, TRUNCATED, FAILED = (f"{GROUP}-{sample}" for sample in range(4))


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The page's address, and the files that it shows."""

    url: str
    files: FixtureRun

    def view(self, *path: str, **query: object) -> str:
        tail = f"?{urlencode(query, doseq=True)}" if query else ""
        return f"{self.url}#/{'/'.join(path)}{tail}"

    def run(self, *path: str, **query: object) -> str:
        return self.view("run", self.files.run.name, *path, **query)

    def episode(self, episode: str, **query: object) -> str:
        return self.run("episode", episode, set="train", step=STEP, **query)


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with headless_chromium(is_required=request.config.getoption("--require-chromium")) as started:
        yield started


@pytest.fixture(scope="module")
def site(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("viewer")
    files = write_fixture(folder / "runs")
    stack = contextlib.AsyncExitStack()

    async def start() -> str:
        playable = await stored_run(folder / "playable")
        policy = await stack.enter_async_context(chat_server(message("It is \\boxed{nowhere}.")))
        server = open_viewer(
            [files.folder, playable],
            host="127.0.0.1",
            port=0,
            policy_url=policy.url,
            policy_options={"model": "m"},
        )
        stack.push_async_callback(server.stop)
        return await server.start()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        url = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=60)
        yield Site(url=url, files=files)
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(timeout=30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One for all tests: what a page keeps in it is the choice of colours alone."""
    opened = browser.new_context(viewport=WIDE, color_scheme="light", reduced_motion="reduce")
    opened.set_default_timeout(10_000)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    opened = context.new_page()
    complaints = watch(opened)
    yield opened
    opened.close()
    assert not complaints


def watch(page: Page) -> list[str]:
    """What goes wrong in a page, as it comes."""
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def dialog(opened: object) -> None:
        complaints.append(f"dialog: {opened}")
        opened.dismiss()  # type: ignore[attr-defined]

    page.on("dialog", dialog)
    return complaints


def rows(page: Page, table: str = "Episodes") -> Locator:
    return page.get_by_role("grid", name=table).locator(".vrow:not(.coming)")


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than the screen."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def test_runs_are_listed_and_lead_to_their_views(site: Site, page: Page) -> None:
    page.goto(site.url)
    cards = page.get_by_role("list", name="Runs").get_by_role("listitem").filter(has=page.locator(".title"))
    expect(cards).to_have_count(5)
    running = cards.filter(has_text=site.files.run.name)
    expect(running).to_contain_text("running")
    expect(running).to_contain_text("5 of 40")
    expect(running).to_contain_text("reward/mean")
    running.get_by_role("link", name=site.files.run.name).click()
    expect(page).to_have_url(site.run("curves"))
    expect(page.get_by_role("heading", level=1)).to_have_text(site.files.run.name)
    page.get_by_role("link", name="Episodes", exact=True).click()
    expect(rows(page)).to_have_count(16)
    page.go_back()
    expect(page).to_have_url(site.run("curves"))
    assert page.title().startswith(site.files.run.name)


def views(site: Site) -> dict[str, tuple[str, Callable[[Page], Locator]]]:
    """Every view, with something that stands in it alone."""
    evaluation, other = site.files.evaluation.name, site.files.other_evaluation.name
    return {
        "runs": (site.url, lambda page: page.get_by_role("list", name="Runs")),
        "curves": (
            site.run("curves"),
            lambda page: page.get_by_role("img", name=re.compile("^Reward .*reward.mean")),
        ),
        "two runs": (
            site.view("curves", run=[site.files.run.name, site.files.other_run.name], step=STEP),
            lambda page: page.get_by_role("slider", name="Step"),
        ),
        "step": (site.run("episodes", step=STEP), lambda page: rows(page).first),
        "group": (
            site.run("group", GROUP, set="train", step=STEP),
            lambda page: page.get_by_role("region", name="Episode 4"),
        ),
        "episode": (site.episode(BRANCHING), lambda page: page.get_by_role("list", name="Messages")),
        "tokens": (site.episode(BRANCHING, tab="tokens"), lambda page: page.locator("#token-0")),
        "ledger": (
            site.episode(BRANCHING, tab="ledger"),
            lambda page: page.get_by_role("link", name="Segment 1"),
        ),
        "turns": (
            site.episode(BRANCHING, tab="turns"),
            lambda page: page.get_by_role("region", name="Tools"),
        ),
        "mismatch": (
            site.run("mismatch"),
            lambda page: page.get_by_role("img", name=re.compile("^Largest mean")),
        ),
        "about": (site.run("about"), lambda page: page.get_by_role("heading", name="Config")),
        "report": (
            site.view("run", evaluation, "report"),
            lambda page: page.get_by_role("region", name="Scores"),
        ),
        "comparison": (
            site.view("compare", a=evaluation, b=other),
            lambda page: page.get_by_role("region", name="Effects"),
        ),
    }


def test_every_view_opens_and_fits_a_phone(site: Site, page: Page) -> None:
    for name, (address, landmark) in views(site).items():
        page.set_viewport_size(WIDE)
        page.goto(address)
        expect(landmark(page), name).to_be_visible()
        expect(page.get_by_role("alert"), name).to_have_count(0)
        assert overflow(page) <= 0, name
        page.set_viewport_size(PHONE)
        expect(landmark(page), name).to_be_visible()
        assert overflow(page) <= 0, f"{name} scrolls sideways on a phone"


def test_filters_are_in_the_address_and_narrow_the_table(site: Site, page: Page) -> None:
    page.goto(site.run("episodes", step=STEP))
    expect(rows(page)).to_have_count(16)
    status = page.get_by_role("status").filter(has_text="episode")
    bars = page.locator(".histogram svg")
    box = bars.bounding_box()
    assert box is not None
    # The upper tenth of the rewards: 0.95 and 1 are two bins, or one, of twenty.
    page.mouse.move(box["x"] + 0.92 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20, steps=3)
    page.mouse.up()
    expect(status).to_contain_text("of 16 episodes")
    assert "min=" in page.url and "max=" in page.url
    rewards = rows(page).locator("[role=gridcell]:nth-child(2)").all_inner_texts()
    assert rewards and all(float(reward) >= 0.9 for reward in rewards)
    page.get_by_role("button", name="All", exact=True).click()
    expect(rows(page)).to_have_count(16)
    page.get_by_label("Outcome", exact=True).select_option("failed")
    expect(rows(page)).to_have_count(1)
    expect(rows(page).first).to_contain_text("environment")
    filtered = page.url
    page.get_by_role("button", name="Clear").click()
    expect(rows(page)).to_have_count(16)
    page.get_by_label("Tool errors", exact=True).select_option("yes")
    expect(rows(page)).to_have_count(1)
    page.goto("about:blank")
    page.goto(filtered)
    expect(rows(page)).to_have_count(1)
    expect(page.get_by_label("Outcome", exact=True)).to_have_value("failed")
    page.get_by_role("button", name="Clear").click()
    expect(rows(page)).to_have_count(16)
    page.get_by_role("searchbox").fill("QUARRY")
    expect(page).to_have_url(re.compile("text=QUARRY"))
    expect(rows(page)).to_have_count(1)


def test_rows_are_sorted_and_only_those_in_sight_are_drawn(site: Site, page: Page) -> None:
    page.goto(site.run("episodes", step="all"))
    table = page.get_by_role("grid", name="Episodes")
    expect(table).to_have_attribute("aria-rowcount", "97")
    assert 15 < rows(page).count() < 50
    table.get_by_role("button", name="advantage").click()
    expect(table.get_by_role("columnheader", name="advantage")).to_have_attribute("aria-sort", "descending")
    cells = rows(page).locator("[role=gridcell]").filter(has_text=re.compile(r"^[+-]\d"))
    expect(cells.first).to_contain_text("+")
    values = [float(text) for text in cells.all_inner_texts()]
    assert values == sorted(values, reverse=True)
    last = page.locator(".vrow:not(.coming)[aria-rowindex='97']")
    table.evaluate("table => table.scrollTop = table.scrollHeight")
    expect(last).to_be_visible()
    assert rows(page).count() < 50
    # Other rows are shown from their first one, and those further down are asked for again.
    table.get_by_role("button", name="reward", exact=True).click()
    expect(page.locator(".vrow:not(.coming)[aria-rowindex='2']")).to_be_visible()
    table.evaluate("table => table.scrollTop = table.scrollHeight")
    expect(last).to_be_visible()
    expect(page.locator(".vrow.coming")).to_have_count(0)


def test_keys_move_through_the_page(site: Site, page: Page) -> None:
    page.goto(site.run("episodes", step=STEP))
    expect(rows(page)).to_have_count(16)
    selected = page.locator(".vrow.selected")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    expect(selected).to_have_attribute("aria-rowindex", "3")
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("j?")
    expect(page.get_by_role("searchbox")).to_have_value("j?")
    page.get_by_role("searchbox").fill("")
    page.keyboard.press("Escape")
    expect(page.get_by_role("searchbox")).not_to_be_focused()
    expect(rows(page)).to_have_count(16)
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("next row")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("ArrowLeft")
    expect(page).to_have_url(re.compile(f"step={STEP - 1}"))
    page.keyboard.press("ArrowRight")
    expect(rows(page)).to_have_count(16)
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(f"/episode/{GROUP}-"))
    page.keyboard.press("n")
    expect(page.get_by_text("of 4 in the group")).to_be_visible()
    page.keyboard.press("j")
    expect(page.locator(".message.selected")).to_have_count(1)
    page.keyboard.press("2")
    expect(page.locator("#token-0")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-0")).to_have_class(re.compile(r"\bat\b"))
    page.keyboard.press("Escape")
    expect(page).to_have_url(re.compile(rf"/episodes\?.*step={STEP}"))
    expect(rows(page)).to_have_count(16)
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "what has the focus is not seen"


def test_dark_and_light(site: Site, page: Page) -> None:
    page.goto(site.url)
    page.get_by_role("list", name="Runs").wait_for()

    def brightness() -> int:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", color)[:3]) // 3

    assert brightness() > 200
    page.emulate_media(color_scheme="dark")
    assert brightness() < 60
    toggle = page.get_by_role("button", name=re.compile("^Colours"))
    toggle.click()
    assert brightness() > 200, "the reader's choice goes before the system's"
    page.reload()
    page.get_by_role("list", name="Runs").wait_for()
    assert brightness() > 200, "and lasts"
    toggle.click()
    assert brightness() < 60
    page.evaluate("localStorage.clear()")


def test_hostile_text_stays_text(site: Site, page: Page) -> None:
    """Each step has another kind of it: markup, control sequences, directions, templates, one line of 60,000."""
    found: dict[int, str] = {}
    for step in range(1, 6):
        episode = f"g{(step - 1) * 4:08d}-0"
        for tab in ("conversation", "tokens"):
            page.goto(site.run("episode", episode, set="train", step=step, tab=tab))
            page.locator(".message, #token-0").first.wait_for()
            assert page.title().endswith("Polyturn")
            assert page.locator("main img, main script, main iframe").count() == 0
            assert overflow(page) <= 0
            if tab == "conversation":
                found[step] = page.locator("main").inner_text()
        page.goto(site.run("group", episode[:-2], set="train", step=step))
        page.get_by_role("region", name="Episode 4").wait_for()
        assert page.locator("main img, main script, main iframe").count() == 0
    texts = "".join(found.values())
    assert "<script>document.title='owned'</script>" in texts
    assert "ESC" in texts and "\x1b" not in texts
    assert "RLO" in texts and "ZWSP" in texts and not re.search("[\u200b\u202e\ufeff]", texts)
    assert "{{constructor.constructor" in texts
    assert "more of" in texts and all(len(text) < 40_000 for text in found.values()), "a huge line is folded"


def test_an_episode_shows_its_parts(site: Site, page: Page) -> None:
    page.goto(site.episode(BRANCHING))
    thinking = page.locator("details.thinking").first
    expect(thinking.locator(".foreign")).to_be_hidden()
    thinking.locator("summary").click()
    expect(thinking.locator(".foreign")).to_contain_text("head office")
    expect(page.locator(".call").first).to_contain_text("head office")
    expect(page.get_by_role("region", name="Timeline")).to_be_visible()
    page.get_by_role("link", name="Ledger (2)").click()
    expect(page.locator(".tree ul a")).to_contain_text("as in segment 0")
    page.locator(".tree ul a").click()
    expect(page).to_have_url(re.compile("segment=1"))
    # Another colour by another quantity, and ids under the pointer.
    choice = page.get_by_label("Colour by")
    expect(choice).to_have_value("sampled")
    sampled = page.locator(".t.trained").first
    before = sampled.evaluate("token => getComputedStyle(token).backgroundColor")
    choice.select_option("version")
    assert sampled.evaluate("token => getComputedStyle(token).backgroundColor") != before
    offered = choice.get_by_role("option").all_inner_texts()
    assert {"logprob", "trainer \u2212 engine", "ratio", "clipped", "advantage", "policy version"} <= {
        *offered
    }
    sampled.hover()
    card = page.locator(".token-card")
    expect(card).to_contain_text(re.compile(r"id\s*\d+"))
    expect(card).to_contain_text(re.compile(r"trainer \u2212 engine\s*-?0\.\d"))
    sampled.click()
    assert "token=" in page.url and "color=version" in page.url


def test_why_an_episode_was_dropped(site: Site, page: Page) -> None:
    page.goto(site.run("episodes", step=STEP))
    page.get_by_role("button", name=re.compile("1 dropped")).click()
    expect(rows(page)).to_have_count(1)
    rows(page).first.click()
    expect(page.get_by_role("group", name="Why it failed")).to_contain_text("does not answer")
    expect(page.get_by_text("No step was trained on this episode")).to_be_visible()


def test_a_group_says_where_its_episodes_part(site: Site, page: Page) -> None:
    group = f"g{(STEP - 1) * 4 + 1:08d}"
    page.goto(site.run("group", group, set="train", step=STEP))
    expect(page.locator(".column")).to_have_count(4)
    expect(page.locator(".column .parting").last).to_contain_text(re.compile(r"at token \d"))
    expect(page.locator(".column").first).to_contain_text(re.compile(r"reward [\d.-]+, advantage [+-]?\d"))
    page.get_by_role("link", name="Episode 4").click()
    expect(page).to_have_url(re.compile(f"/episode/{group}-3"))


def test_an_episode_is_played_on(site: Site, page: Page) -> None:
    page.goto(site.view("run", "playable", "episode", "played", set="train", step=1))
    page.get_by_role("button", name="Play on from here").last.click()
    played = page.get_by_role("region", name="Played on")
    expect(played.locator(".chip").first).to_have_text("done")
    expect(played).to_contain_text("reward 0")
    expect(played.locator(".message")).to_have_count(1)
    expect(played.locator(".message")).to_contain_text("nowhere")


def test_evaluations_and_what_flipped(site: Site, page: Page) -> None:
    page.goto(site.view("run", site.files.evaluation.name, "report"))
    scores = page.get_by_role("region", name="Scores")
    expect(scores.get_by_role("row")).to_have_count(4)
    expect(scores).to_contain_text("93.8 %")
    expect(scores.get_by_role("img", name=re.compile("interval from")).first).to_be_visible()
    page.get_by_label("Compare with").select_option(label=site.files.other_evaluation.name)
    expect(page.get_by_role("region", name="Effects")).to_contain_text("over all")
    flipped = page.get_by_role("link", name=re.compile("^Episodes of [AB] on ")).first
    flipped.click()
    expect(page).to_have_url(re.compile("task=two-hop"))
    expect(rows(page)).to_have_count(2)


def test_several_runs_lie_over_one_another(site: Site, page: Page) -> None:
    page.goto(site.url)
    for run in (site.files.run, site.files.other_run):
        page.get_by_role("checkbox", name=f"Choose {run.name}").check()
    page.get_by_role("button", name="Curves of 2 chosen").click()
    chart = page.get_by_role("img", name=re.compile("^reward.mean"))
    expect(chart).to_have_accessible_name(re.compile(f"{site.files.run.name} .*{site.files.other_run.name}"))
    page.get_by_role("slider", name="Step").fill("1")
    expect(chart).to_have_accessible_name(re.compile("at step 2"))
    assert "step=2" in page.url
    page.get_by_text("Other metrics").click()
    page.get_by_label("Find a metric").fill("policy/ver")
    page.get_by_role("checkbox", name="policy/version").check()
    expect(page.get_by_role("img", name=re.compile("^policy.version"))).to_be_visible()


def test_a_run_under_way_is_followed(site: Site, page: Page) -> None:
    page.goto(site.url)
    card = page.get_by_role("listitem").filter(has_text=site.files.run.name)
    expect(card).to_contain_text("5 of 40")
    with (site.files.run / "metrics.jsonl").open("ab") as file:
        file.write(b'an": 0.9}\n')  # The rest of a row that was being written.
    expect(card).to_contain_text("6 of 40")


def test_the_export_needs_no_server(site: Site, page: Page, tmp_path: Path) -> None:
    path = tmp_path / "seen.html"
    export_page(open_answers([site.files.folder]), path, ExportChoice(first_step=STEP, last_step=STEP))
    exported = Site(url=path.as_uri(), files=site.files)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for name, (address, landmark) in views(exported).items():
        page.goto(address)
        expect(landmark(page), name).to_be_visible()
        expect(page.get_by_role("alert"), name).to_have_count(0)
    page.goto(exported.run("episodes", step=STEP, outcome="completed", sort="-reward"))
    expect(rows(page)).to_have_count(14)
    page.get_by_role("searchbox").fill("quarry")
    expect(page).to_have_url(re.compile("text=quarry"))
    expect(rows(page)).to_have_count(1)
    page.get_by_label("Outcome", exact=True).select_option("failed")
    expect(page.get_by_text("No episode passes the filter")).to_be_visible()
    assert all(url.startswith(("file:", "data:")) for url in requests)


SCREENSHOTS = ("curves", "step", "episode", "tokens", "group", "comparison")


def test_screenshots_of_the_docs(site: Site, page: Page, request: pytest.FixtureRequest) -> None:
    """Those that docs/viewer.md shows are there and small; --write-screenshots makes them anew."""
    if request.config.getoption("--write-screenshots"):
        page.set_viewport_size({"width": 1200, "height": 760})
        group = f"g{(STEP - 1) * 4 + 1:08d}"
        addresses = {
            **{name: address for name, (address, _) in views(site).items()},
            "tokens": site.episode(BRANCHING, tab="tokens", color="logprob", token=60),
            "group": site.run("group", group, set="train", step=STEP),
            "episode": site.run("episode", f"{group}-3", set="train", step=STEP),
        }
        for name in SCREENSHOTS:
            page.goto(addresses[name])
            views(site)[name][1](page).wait_for()
            page.wait_for_load_state("networkidle")
            page.screenshot(path=IMAGES / f"viewer_{name}.png")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size(PHONE)
        page.goto(addresses["episode"])
        page.get_by_role("list", name="Messages").wait_for()
        page.screenshot(path=IMAGES / "viewer_phone.png")
    for name in (*SCREENSHOTS, "phone"):
        image = IMAGES / f"viewer_{name}.png"
        assert image.stat().st_size < 150_000, image.name
