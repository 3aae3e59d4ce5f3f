"""The page's frame: style for light and dark, wide and narrow, and the script that sorts its tables."""

from __future__ import annotations

from string import Template

# The policy makes the promise of no network one that the browser keeps, whatever a run's files hold.
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f1f3f5; --line: #d5d9de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171a; --soft: #20252a; --line: #3a4149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
.lede { margin: 0 0 1rem; opacity: .8; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.cards div { background: var(--soft); border-radius: .5rem; padding: .75rem 1rem; }
dt { font-size: .8rem; opacity: .75; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem;
  margin-top: 1.5rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
details { margin: .25rem 0; } summary { cursor: pointer; }
.facts td:last-child { white-space: normal; overflow-wrap: anywhere; }
</style></head><body>
$body
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const rising = head.ariaSort !== "ascending", body = table.tBodies[0];
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const text = row => row.cells[column].textContent;
    const key = row => parseFloat(text(row).replaceAll(",", ""));
    // empty cells stay below, whichever way the others are sorted
    const order = (a, b) => !text(a) - !text(b)
      || (rising ? 1 : -1) * (isNaN(key(a)) || isNaN(key(b)) ? text(a).localeCompare(text(b)) : key(a) - key(b));
    body.append(...[...body.rows].sort(order));
  }));
}
</script></body></html>
""")
