"""The page's style. Colours of series are Okabe and Ito's, which most people can tell apart, each a little lighter on
dark; nothing is said by colour alone."""

from __future__ import annotations

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a67c00", "#3aa0d8", "#6b6b6b")
DARK = ("#4aa8e8", "#ff8c42", "#2fd0a0", "#e9a3c8", "#e8c23a", "#8fd0ff", "#b0b0b0")


def _colours(colours: tuple[str, ...]) -> str:
    return " ".join(f"--c{index}: {colour};" for index, colour in enumerate(colours))


STYLE = (
    f"""
:root {{
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #1c1f23; --soft: #5c636b; --line: #dfe2e5; --accent: #0b5cad;
  --good: #0a7a4b; --bad: #b3261e; --stripe: #f4f5f3;
  {_colours(LIGHT)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #14171a; --card: #1c2024; --ink: #e7e9ec; --soft: #a0a8b1; --line: #343a41; --accent: #7cb8f5;
    --good: #4fd197; --bad: #ff8a80; --stripe: #20252a;
    {_colours(DARK)}
  }}
}}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .6rem; }
h4 { font-size: .92rem; margin: 1.2rem 0 .3rem; color: var(--soft); font-weight: 600; }
p { margin: .5rem 0; }
.note, .none { color: var(--soft); font-size: .88rem; }
.none { border: 1px dashed var(--line); border-radius: 8px; padding: .7rem .9rem; }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: 1.4rem 0 0;
  padding: .6rem 0; background: var(--page); border-bottom: 1px solid var(--line); font-size: .86rem; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { scroll-margin-top: 3.5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: 1.2rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem 1.1rem; }
.tile b { font-size: 1.45rem; margin-right: .5rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
.tile.bad b { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.2rem; }
.goal { color: var(--soft); font-size: .86rem; }
.choice { font-size: 1.5rem; font-weight: 650; line-height: 1.25; margin: .1rem 0 .2rem; overflow-wrap: anywhere; }
.value b { font-variant-numeric: tabular-nums; font-size: 1.1rem; }
.with, .margin { font-size: .88rem; color: var(--soft); }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th.w, td.w { text-align: left; white-space: normal; min-width: 7rem; }
th.group { text-align: center; border-left: 1px solid var(--line); }
tbody tr:nth-child(even) { background: var(--stripe); }
.card table { font-size: .82rem; margin-top: .4rem; }
.card th, .card td { padding: .18rem .5rem; }
.card tbody tr:nth-child(even) { background: none; }
.good { color: var(--good); }
.bad, .failed { color: var(--bad); }
.pill { display: inline-block; border: 1px solid var(--line); border-radius: 99px; padding: 0 .6rem;
  margin: .1rem .2rem; font-size: .8rem; }
.pill.good { border-color: var(--good); }
.pill.bad { border-color: var(--bad); }
details { margin: .7rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .9rem; }
pre, code { font: .84em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }
svg { display: block; width: 100%; height: auto; margin: .4rem 0; }
svg text, svg .word { fill: var(--ink); font-size: 12px; }
svg .label { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; font-weight: 600; }
svg .tick { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .name { fill: var(--soft); font-size: 13px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .zero { stroke: var(--soft); stroke-width: 1.5; }
svg .front { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .diagonal { fill: none; stroke: var(--soft); stroke-width: 1.2; }
svg circle { stroke: var(--page); stroke-width: 1.2; }
svg .pair { fill: var(--c0); opacity: .55; }
svg .mean { fill: var(--ink); }
svg .interval { stroke: var(--ink); stroke-width: 2.2; }
.pair-of-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .86rem; color: var(--soft); }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .4rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); }
@media print { nav { display: none; } body { background: #fff; } .card, section { break-inside: avoid; } }
"""
    + "".join(
        f"svg .s{index} {{ fill: var(--c{index}); }} .k{index} {{ background: var(--c{index}); }}\n"
        f"svg .h{index} {{ fill: var(--page); stroke: var(--c{index}); stroke-width: 2; }}\n"
        for index in range(len(LIGHT))
    )
)
