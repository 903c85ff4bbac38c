"""The style sheet of a report's page. System fonts; colours by the reader's scheme; room for a phone and a laptop."""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1d2126; --muted: #5b636d; --line: #e4e7eb; --soft: #f6f7f9;
  --accent: #0072b2; --change: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --text: #e8eaed; --muted: #a3abb5; --line: #2c3238; --soft: #1c2024; --accent: #6cbcf0;
    --change: #f0985a; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--ground); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 56px 32px 96px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
h1 { font-size: 2.25rem; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 12px; font-weight: 650; }
h2 { font-size: 1.4rem; letter-spacing: -0.01em; margin: 88px 0 8px; font-weight: 650; scroll-margin-top: 24px; }
h3 { font-size: 1rem; margin: 0; font-weight: 600; }
p { margin: 0 0 12px; max-width: 46rem; }
.lead { font-size: 1.125rem; color: var(--muted); max-width: 44rem; }
.note, .caption, figcaption { color: var(--muted); font-size: 0.875rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 24px; margin: 28px 0 0; padding: 12px 0; font-size: 0.9375rem;
  border-block: 1px solid var(--line); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 28px 32px; margin: 40px 0 0; }
.over { margin: 40px 0 -24px; font-weight: 600; }
.tiles div { display: flex; flex-direction: column; }
.tiles dt { order: 1; color: var(--muted); font-size: 0.875rem; line-height: 1.4; }
.tiles dd { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 56px 48px; margin-top: 32px; }
.charts figure { margin: 0; }
.charts img { display: block; width: 100%; height: auto; margin-top: 16px; }
.charts .note { margin: 2px 0 0; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 32px 48px; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 4px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }
.table { margin: 24px 0 0; min-width: 0; }
.caption { margin: 0 0 6px; }
th, td { padding: 5px 0 5px 20px; text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child { padding-left: 0; }
thead th { white-space: normal; min-width: 4.5rem; line-height: 1.35; overflow-wrap: normal; }
thead th { color: var(--muted); font-size: 0.8125rem; vertical-align: bottom; border-bottom: 1px solid var(--muted); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody tr.marked > * { border-top: 1px solid var(--muted); }
.text { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--ground); max-width: 15rem; overflow: hidden;
  text-overflow: ellipsis; }
details { margin-top: 20px; }
summary { cursor: pointer; color: var(--accent); font-size: 0.9375rem; width: fit-content; padding: 4px 0; }
details .table { margin-top: 12px; }
details .scroll { max-height: 70vh; overflow: auto; }
details thead th { position: sticky; top: 0; background: var(--ground); z-index: 1; }
.scale { display: inline-block; width: 96px; height: 10px; border-radius: 2px; margin: 0 6px; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 32px; }
.gone { display: inline-block; width: 12px; height: 12px; border-radius: 2px; vertical-align: -1px; margin-right: 6px; }
.image { padding: 24px 0 28px; border-top: 1px solid var(--line); }
.image:first-of-type { border-top: 0; }
.image header { display: flex; flex-wrap: wrap; gap: 2px 20px; align-items: baseline; margin-bottom: 12px; }
.panels { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 16px 20px; }
.panels figure { margin: 0; min-width: 0; }
.panels figcaption { margin-top: 6px; line-height: 1.4; }
.panels strong, .answers dd { color: var(--text); font-weight: 400; }
.picture { outline: 1px solid var(--line); outline-offset: -1px; background-size: 100% 100%;
  border-radius: 3px; overflow: hidden; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.picture img { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.answers { display: flex; flex-wrap: wrap; gap: 4px 28px; margin: 14px 0 0; font-size: 0.875rem; }
.answers div { display: flex; gap: 8px; }
.answers dt { color: var(--muted); }
.answers dd { margin: 0; }
.panels .differs, .answers .differs { color: var(--change); font-weight: 600; }
.missing { border-left: 3px solid var(--change); padding-left: 12px; font-size: 0.9375rem; }
.facts { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 6px 28px; margin: 24px 0 0;
  font-size: 0.9375rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; }
pre { background: var(--soft); padding: 14px 16px; border-radius: 6px; overflow-x: auto; font-size: 0.8125rem;
  margin: 20px 0 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 760px) {
  main { padding: 32px 16px 64px; }
  h1 { font-size: 1.75rem; }
  h2 { margin-top: 64px; }
  .lead { font-size: 1rem; }
  .charts, .pair { grid-template-columns: minmax(0, 1fr); gap: 40px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 24px 20px; }
  .tiles dd { font-size: 1.625rem; }
  .panels { grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 14px 10px; }
  .panels figure { grid-column: span 2; }
  .panels .first { grid-column: span 3; }
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .facts dd { margin-bottom: 10px; }
  tbody th { max-width: 9.5rem; }
  th, td { padding-left: 16px; }
}
@media print {
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .image, .charts figure { break-inside: avoid; }
}
"""
