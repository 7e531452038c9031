"""How the report looks and moves: the colours of surprisal, the style sheet and the script of the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """The background and the ink of the tokens from so many bits of surprisal on, in the light and the dark scheme."""

    from_bits: float
    light: str
    light_ink: str
    dark: str
    dark_ink: str


LIGHT, DARK = "#1b1b1f", "#e8e8ec"

COLOURS = [
    Colour(0, "#ffffff", LIGHT, "#15171c", DARK),
    Colour(0.5, "#fff8dc", LIGHT, "#211c38", DARK),
    Colour(1, "#fff0b8", LIGHT, "#2c1b4e", DARK),
    Colour(2, "#ffe28c", LIGHT, "#421d6b", DARK),
    Colour(3, "#fecd68", LIGHT, "#5d207a", DARK),
    Colour(4, "#fdb04f", LIGHT, "#7d2a80", DARK),
    Colour(6, "#fb8f46", LIGHT, "#9f3479", DARK),
    Colour(8, "#f26c42", LIGHT, "#e8657a", "#17101a"),
    Colour(10, "#cf2f2c", "#ffffff", "#fda06f", "#17101a"),
    Colour(13, "#850726", "#ffffff", "#fde7a0", "#17101a"),
]
"""More surprise is further from the page, in hue and in lightness, so that it also reads in grey."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1b1b1f; --quiet: #5d6068; --rule: #dcdee3; --panel: #f6f7f9;
  --bar: #3b6fb5; --accent: #1f5fb0; --warn: #fff4d6; --warn-edge: #d99a00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #15171c; --ink: #e8e8ec; --quiet: #a2a6b0; --rule: #343842; --panel: #1e2128;
    --bar: #5f92d8; --accent: #86b4f2; --warn: #33290f; --warn-edge: #d9a520;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem) 4rem; max-width: 84rem;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.6rem; break-after: avoid; }
p { margin: 0.3rem 0; max-width: 60rem; }
a { color: var(--accent); }
small, .hint, footer { color: var(--quiet); }
.hint, footer, small { font-size: 0.85rem; }
footer { margin-top: 3rem; }
summary { cursor: pointer; color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-edge); padding: 0.5rem 1rem; }
.warnings ul { margin: 0; padding-left: 1rem; }

table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.22rem 0.6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: normal; color: var(--quiet); }
figure table { width: 100%; font-size: 0.78rem; }
figure th, figure td { padding: 0.15rem 0.28rem; white-space: nowrap; }
figure td, figure thead th + th { text-align: right; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 2.5rem; }
.pair h2 { margin-top: 0.8rem; }
.pairs { width: 100%; }
.pairs th { padding-left: 0; width: 40%; overflow-wrap: anywhere; }
.pairs td { padding-right: 0; overflow-wrap: anywhere; }
#numbers th { width: auto; }
#numbers td { text-align: right; font-weight: 600; }
.wide { overflow-x: auto; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem 2.5rem; }
figure { margin: 0; max-width: 27rem; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 0.2rem; }
figcaption small { display: block; font-weight: normal; }
svg { display: block; width: 100%; height: auto; font-size: 12px; font-variant-numeric: tabular-nums; }
svg text { fill: var(--ink); }
svg .quiet { fill: var(--quiet); font-size: 11px; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .value { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }
svg .bar { fill: var(--bar); }
svg .hit { fill: transparent; }
svg .row:hover .bar { fill: var(--accent); }
svg .row:hover .quiet { fill: var(--ink); }
svg .mean { stroke: var(--quiet); }

.legend { padding: 0.5rem 0; background: var(--page); }
.legend p { font-size: 0.85rem; color: var(--quiet); }
.legend ol {
  display: grid; grid-template-columns: repeat(10, 1fr); gap: 2px;
  margin: 0; padding: 0; list-style: none; max-width: 52rem;
}
.legend li { text-align: center; line-height: 1.3; }
.legend li > span { display: block; border: 1px solid var(--rule); border-radius: 3px; font-size: 0.85rem; }
#most-surprising td:first-child { text-align: right; }
#text { margin-top: 1rem; padding: 0.2rem; font-size: 1rem; line-height: 1.75; }
#text p {
  margin: 0; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext;
}
#text span { border-radius: 3px; border-inline-start: 1px solid var(--page); cursor: pointer; }
#text .shown { outline: 2px solid var(--accent); }
#text, mark, .legend li > span {
  print-color-adjust: exact; -webkit-print-color-adjust: exact; forced-color-adjust: none;
}
mark { border-radius: 2px; }

#popup {
  position: absolute; left: var(--x, 0); top: var(--y, 0); width: 21rem; max-width: calc(100vw - 1rem);
  padding: 0.6rem 0.8rem; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  box-shadow: 0 4px 18px rgb(0 0 0 / 25%); font-size: 0.85rem; pointer-events: none; z-index: 2;
}
#popup[hidden] { display: none; }
#popup.pinned { pointer-events: auto; border-color: var(--accent); }
#popup .token { font-size: 1.05rem; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; }
#popup table { width: 100%; margin-top: 0.4rem; table-layout: fixed; }
#popup th, #popup td { padding: 0.08rem 0.3rem; border: 0; }
#popup th { width: 40%; color: var(--ink); overflow: hidden; text-overflow: ellipsis; white-space: pre; }
#popup td:last-child { width: 7rem; text-align: right; white-space: nowrap; }
#popup .bar { height: 0.7em; margin-top: 0.4em; background: var(--bar); border-radius: 2px; min-width: 1px; }
#popup .chosen th, #popup .chosen td { font-weight: 700; }
#popup .chosen th::before { content: "\\25B8  "; }

@media (min-width: 48rem) and (min-height: 30rem) { .legend { position: sticky; top: 0; z-index: 1; } }
@media (max-width: 36rem) {
  .legend ol { grid-template-columns: repeat(5, 1fr); }
  #popup { position: fixed; left: 0.5rem; right: 0.5rem; top: auto; bottom: 0.5rem; width: auto; }
  #popup.above { top: 0.5rem; bottom: auto; }
}
@media print {
  body { padding: 0; max-width: none; font-size: 10pt; }
  #popup, .hint, details:not([open]), footer { display: none; }
  #text .shown { outline: 0; }
  .legend { position: static; }
}
"""

SCRIPT = """
(() => {
  "use strict";
  const page = document.documentElement;
  window.addEventListener("error", (event) => { page.dataset.error = event.message; });
  const text = document.getElementById("text");
  const popup = document.getElementById("popup");
  const tokens = text ? [...text.querySelectorAll("span")] : [];
  const indexOf = new Map(tokens.map((token, i) => [token, i]));
  let data = null, shown = -1, pinned = false, stop = 0;

  const element = (name, className, content) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (content !== undefined) made.textContent = content;
    return made;
  };

  const chance = (p) => {
    if (p >= 0.001) return (100 * p).toPrecision(3) + " %";
    return p > 1e-7 ? "1 in " + Math.round(1 / p).toLocaleString("en") : p.toExponential(1);
  };

  const row = (label, p, largest, chosen) => {
    const made = element("tr", chosen ? "chosen" : "");
    const head = element("th");
    head.scope = "row";
    head.append(element("bdi", "", label));
    const bar = element("div", "bar");
    bar.style.width = 100 * p / largest + "%";
    const middle = element("td");
    middle.append(bar);
    made.append(head, middle, element("td", "", chance(p)));
    return made;
  };

  const fill = (i) => {
    data = data || JSON.parse(document.getElementById("alternatives").textContent);
    const [nats, which, ...pairs] = data.tokens[i];
    const own = tokens[i].textContent.replace(/[\\n\\t]/g, "");
    const label = own.trim() || "\\u2423".repeat(own.length);
    popup.replaceChildren(element("bdi", "token", label));
    if (nats === null) {
      popup.append(element("div", "facts", "not scored, only read"));
    } else {
      popup.append(
        element("div", "facts", `surprisal ${(nats / Math.LN2).toFixed(2)} bits (${nats.toFixed(2)} nats)`),
        element("div", "facts", "probability " + chance(Math.exp(-nats))),
      );
    }
    if (pairs.length) {
      const table = element("table"), p = Math.exp(-nats), largest = Math.max(p, ...pairs.filter((_, k) => k % 2));
      table.setAttribute("aria-label", "What the model expected");
      for (let k = 0; k < pairs.length; k += 2) {
        table.append(row(data.words[pairs[k]], pairs[k + 1], largest, k / 2 === which));
      }
      if (which < 0 && nats !== null) table.append(row(label, p, largest, true));
      popup.append(table);
    }
    popup.append(element("small", "", "token " + i));
  };

  const place = (token) => {
    const boxes = [...token.getClientRects()];
    const box = boxes.reduce((a, b) => (b.width > a.width ? b : a), boxes[0]);
    const right = page.clientWidth - popup.offsetWidth - 8;
    const below = box.bottom + 6, above = box.top - 6 - popup.offsetHeight;
    const y = below + popup.offsetHeight > window.innerHeight && above > 0 ? above : below;
    popup.classList.toggle("above", box.top > window.innerHeight / 2);
    popup.style.setProperty("--x", Math.max(8, Math.min(box.left, right)) + window.scrollX + "px");
    popup.style.setProperty("--y", y + window.scrollY + "px");
  };

  const close = () => {
    if (shown >= 0) tokens[shown].classList.remove("shown");
    popup.hidden = true;
    popup.classList.remove("pinned");
    shown = -1;
    pinned = false;
  };

  const open = (i, pin) => {
    close();
    shown = i;
    pinned = pin;
    tokens[i].classList.add("shown");
    popup.classList.toggle("pinned", pin);
    fill(i);
    popup.hidden = false;
    place(tokens[i]);
  };

  const focus = (i) => {
    tokens[stop].removeAttribute("tabindex");
    stop = i;
    tokens[i].tabIndex = 0;
    tokens[i].focus({ preventScroll: true });
    tokens[i].scrollIntoView({ block: "nearest" });
  };

  const pin = (i) => {
    history.replaceState(null, "", "#token-" + i);
    open(i, true);
  };

  const followHash = () => {
    const found = /^#token-(\\d+)$/.exec(location.hash);
    if (!found || !tokens[found[1]]) return;
    tokens[found[1]].scrollIntoView({ block: "center" });
    focus(+found[1]);
    open(+found[1], true);
  };

  if (tokens.length) {
    tokens[0].tabIndex = 0;
    text.addEventListener("pointerover", (event) => {
      const i = indexOf.get(event.target);
      if (i !== undefined && !pinned) open(i, false);
    });
    text.addEventListener("pointerleave", () => { if (!pinned) close(); });
    text.addEventListener("focusin", (event) => { if (!pinned) open(indexOf.get(event.target), false); });
    text.addEventListener("focusout", () => { if (!pinned) close(); });
    text.addEventListener("keydown", (event) => {
      const i = indexOf.get(event.target), last = tokens.length - 1;
      const to = { ArrowRight: Math.min(i + 1, last), ArrowLeft: Math.max(i - 1, 0), Home: 0, End: last }[event.key];
      if (to !== undefined) {
        pinned = false;
        focus(to);
      } else if (event.key === "Enter") {
        pin(i);
      } else {
        return;
      }
      event.preventDefault();
    });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
    document.addEventListener("click", (event) => {
      const i = indexOf.get(event.target);
      if (i === undefined) {
        if (pinned && !popup.contains(event.target)) close();
      } else if (pinned && i === shown) {
        close();
      } else {
        pinned = false;
        focus(i);
        pin(i);
      }
    });
    const follow = () => { if (shown >= 0) place(tokens[shown]); };
    window.addEventListener("scroll", follow);
    new ResizeObserver(follow).observe(text);
    window.addEventListener("hashchange", followHash);
    followHash();
  }
  page.dataset.ready = "true";
})();
"""
