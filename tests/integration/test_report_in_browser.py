"""The report in a real browser: what it draws, what its script does, and that it asks for nothing from outside."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
from matplotlib.image import imread

from lmkit.evaluation.report import Bar, Report, ShownToken, render
from lmkit.evaluation.report_assets import COLOURS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--window-size=1000,1600",
]
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium or chrome here")

HOSTILE = "</script><script>document.documentElement.dataset.hacked = 1</script>"
BITS = [colour.from_bits + 0.1 for colour in COLOURS]
ALTERNATIVES = (("the", 0.5), (HOSTILE, 0.25), ("\n", 0.125), ("cat", 0.0625))


def report() -> Report:
    """A token of each colour, one that is an alternative, a hostile one, one that was not scored, and many more."""
    nats = 0.6931471805599453
    text = [ShownToken(f" bits{i}", bits * nats, ALTERNATIVES) for i, bits in enumerate(BITS)]
    text += [ShownToken(" cat", 4 * nats, ALTERNATIVES), ShownToken(HOSTILE, 20 * nats, ALTERNATIVES)]
    text += [ShownToken("\n", float("nan"))]
    text += [ShownToken("\n" if i % 20 == 19 else f" word{i}", 3 * nats) for i in range(2000)]
    return Report(
        title="a run",
        rows=[("word_ppl", "89.49")],
        protocol={"context": 128, HOSTILE: HOSTILE},
        by_position=[Bar("0", 5.0, 10), Bar("1", 3.0, 30)],
        by_frequency=[Bar("never", 9.0, 4)],
        by_length=[Bar("1", 2.0, 7)],
        text=text,
        text_note="all of it",
        warnings=[],
    )


@dataclass
class Shown:
    """What the browser made of a page."""

    dom: str
    console: list[str]
    picture: Path

    def root(self, attribute: str) -> str | None:
        found = re.search(rf'<html[^>]* {attribute}="([^"]*)"', self.dom)
        return unescape(found[1]) if found else None

    def popup(self) -> str:
        (content,) = re.findall(r'(<div id="popup".*?)</div>\s*<script', self.dom, re.DOTALL)
        return str(content)


Show = Callable[..., Shown]


def run_browser(folder: Path, page: str, *flags: str, fragment: str = "") -> Shown:
    assert BROWSER is not None
    path, picture = folder / "report.html", folder / "screenshot.png"
    path.write_text(page, encoding="utf-8", newline="\n")
    asked = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", "--dump-dom", *flags]
    command = [BROWSER, *FLAGS, *asked, path.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=300)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Shown(done.stdout, console, picture)


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Show:
    """Skips where the browser is there but cannot start, or may not read temporary files (a snap)."""
    if "it works" not in run_browser(tmp_path_factory.mktemp("probe"), "<p>it works").dom:
        pytest.skip(f"{BROWSER} shows no local page here")
    return lambda page, *flags, fragment="": run_browser(
        tmp_path_factory.mktemp("browser"), page, *flags, fragment=fragment
    )


@pytest.fixture(scope="module")
def linked(show: Show) -> Shown:
    """The page as people get it, opened at the token that is among the model's alternatives."""
    return show(render(report()), LIGHT, fragment=f"#token-{len(BITS)}")


def test_the_page_is_shown_without_an_error_or_a_request_and_no_text_in_it_has_run(linked: Shown) -> None:
    """The console would also hold whatever the page's policy has stopped: a request of any kind, a foreign script."""
    assert linked.root("data-ready") == "true"
    assert linked.root("data-error") is None
    assert linked.root("data-hacked") is None
    assert linked.console == []


def test_charts_and_tokens_are_there(linked: Shown) -> None:
    assert linked.dom.count("<svg ") == 3
    assert len(re.findall('class="bar" x=', linked.dom)) == 4
    (text,) = re.findall(r'<div id="text".*?</div>', linked.dom, re.DOTALL)
    assert text.count("<span ") == len(report().text)


def test_every_colour_of_the_scale_is_in_the_picture(linked: Shown) -> None:
    """A few hundred pixels each: the backgrounds of the token and of the legend."""
    pixels = (imread(io.BytesIO(linked.picture.read_bytes()))[..., :3] * 255).round().astype(int)
    colours = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    for colour in COLOURS:
        assert (colours == int(colour.light[1:], 16)).sum() > 300, colour


def test_the_address_of_a_token_opens_it(linked: Shown) -> None:
    popup = linked.popup()
    assert 'class="pinned"' in popup
    assert "hidden" not in popup.split(">")[0]
    assert '<bdi class="token">cat</bdi>' in popup
    assert "surprisal 4.00 bits (2.77 nats)" in popup
    assert "probability 6.25 %" in popup
    rows = re.findall(r"<tr( class=.chosen.)?><th[^>]*><bdi>(.*?)</bdi>.*?<td>([^<]*)</td></tr>", popup)
    assert [(bool(chosen), unescape(label), chance) for chosen, label, chance in rows] == [
        (False, "the", "50.0 %"),
        (False, HOSTILE, "25.0 %"),
        (False, "↵", "12.5 %"),
        (True, "cat", "6.25 %"),
    ]
    assert re.findall('<span class="([^"]*)" tabindex="0"', linked.dom) == ["s5 shown"]


DRIVER = """
const seen = {}, tokens = document.querySelectorAll("#text span"), popup = document.getElementById("popup");
const facts = () => popup.hidden ? null : popup.innerText;
const point = (type, i) => tokens[i].dispatchEvent(new PointerEvent(type, { bubbles: type !== "pointerleave" }));
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const leave = () => document.getElementById("text").dispatchEvent(new PointerEvent("pointerleave"));
const box = (element) => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };

seen.start = facts();
point("pointerover", 3);
seen.hover = facts();
point("pointerover", HOSTILE);
seen.hostile = facts();
point("pointerover", UNSCORED);
seen.unscored = facts();
leave();
seen.left = facts();

document.querySelector("#text [tabindex]").focus();
seen.focus = facts();
press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
seen.moved = facts();
press("End");
seen.end = facts();
seen.endBoxes = [box(popup), box(tokens[tokens.length - 1]), [innerWidth, innerHeight]];
seen.tabStops = document.querySelectorAll("#text [tabindex]").length;
press("Home"); press("Enter");
seen.hash = location.hash;
point("pointerover", 5); leave();
seen.pinned = facts();
press("Escape");
seen.escaped = facts();
tokens[7].click();
seen.clicked = [facts(), location.hash];
document.querySelector("h1").click();
seen.clickedElsewhere = facts();

const style = (element) => getComputedStyle(element);
seen.page = style(document.body).backgroundColor;
seen.colours = [...tokens].slice(0, NUM_COLOURS).map((t) => [style(t).backgroundColor, style(t).color]);
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.documentElement.dataset.seen = JSON.stringify(seen);
"""


def drive(show: Show, *flags: str) -> dict[str, object]:
    """What a user's moves show. The page's policy is taken out, since it would stop the driver."""
    page = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(report()))
    driver = DRIVER.replace("UNSCORED", str(len(BITS) + 2)).replace("HOSTILE", str(len(BITS) + 1))
    driver = driver.replace("NUM_COLOURS", str(len(COLOURS)))
    shown = show(page.replace("</body>", f"<script>{{{driver}}}</script></body>"), *flags)
    assert shown.root("data-error") is None
    assert shown.console == []
    seen = shown.root("data-seen")
    assert seen is not None
    found: dict[str, object] = json.loads(seen)
    return found


@pytest.fixture(scope="module")
def seen(show: Show) -> dict[str, object]:
    return drive(show, LIGHT)


def test_hovering_over_a_token_shows_what_the_model_expected(seen: dict[str, object]) -> None:
    assert seen["start"] is None
    assert str(seen["hover"]).startswith("bits3\nsurprisal 2.10 bits (1.46 nats)\nprobability 23.3 %\n")
    assert re.sub(r"\s+", " ", str(seen["hover"])).endswith(
        f"the 50.0 % {HOSTILE} 25.0 % ↵ 12.5 % cat 6.25 % bits3 23.3 % token 3"
    )
    assert str(seen["hostile"]).startswith(f"{HOSTILE}\nsurprisal 20.00 bits (13.86 nats)\nprobability 1 in 1,048")
    assert str(seen["unscored"]).startswith("↵\nnot scored, only read")
    assert seen["left"] is None


def test_the_keyboard_moves_from_token_to_token_behind_one_tab_stop(seen: dict[str, object]) -> None:
    assert str(seen["focus"]).startswith("bits0\n")
    assert str(seen["moved"]).startswith("bits1\n")
    assert str(seen["end"]).endswith(f"token {len(report().text) - 1}")
    assert seen["tabStops"] == 1


def test_a_token_that_was_chosen_stays_open_until_it_is_closed(seen: dict[str, object]) -> None:
    assert seen["hash"] == "#token-0"
    assert str(seen["pinned"]).startswith("bits0\n")
    assert seen["escaped"] is None
    text, fragment = seen["clicked"]  # type: ignore[misc]
    assert str(text).startswith("bits7\n")
    assert fragment == "#token-7"
    assert seen["clickedElsewhere"] is None


def test_the_popup_stands_by_its_token_inside_of_the_window(seen: dict[str, object]) -> None:
    (left, top, right, bottom), (_, above, _, below), (width, height) = seen["endBoxes"]  # type: ignore[misc]
    assert left >= 0
    assert right <= width
    assert top >= 0
    assert bottom <= height
    assert top >= below or bottom <= above, "it does not hide its token"


def rgb(colour: str) -> str:
    return f"rgb({int(colour[1:3], 16)}, {int(colour[3:5], 16)}, {int(colour[5:7], 16)})"


@pytest.fixture(scope="module")
def dark(show: Show) -> dict[str, object]:
    """In the dark scheme, in a window as narrow as a headless browser makes it."""
    return drive(show, DARK, "--window-size=500,900")


def test_the_colours_follow_the_scheme_of_the_system(seen: dict[str, object], dark: dict[str, object]) -> None:
    assert seen["page"] == rgb(COLOURS[0].light)
    assert dark["page"] == rgb(COLOURS[0].dark)
    assert seen["colours"] == [[rgb(colour.light), rgb(colour.light_ink)] for colour in COLOURS]
    assert dark["colours"] == [[rgb(colour.dark), rgb(colour.dark_ink)] for colour in COLOURS]


def test_no_window_needs_to_be_scrolled_sideways(seen: dict[str, object], dark: dict[str, object]) -> None:
    assert seen["wide"] == dark["wide"] == 0
