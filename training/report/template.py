# SPDX-License-Identifier: Apache-2.0
"""Look and behaviour of progress.html, both inside the page: it loads nothing."""

# Nothing but what is in the file, even where a run's name or a warning holds markup that slipped through.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = '''
:root { color-scheme: light dark; --back: #f5f6f8; --card: #fff; --text: #1b1f24; --soft: #5d6671;
  --edge: #dfe3e8; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --warn: #fff4e0; --warn-edge: #e0a030; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --card: #1e2226; --text: #e7eaee; --soft: #98a2ad; --edge: #343a41;
    --c0: #56b4e9; --c1: #f08a3c; --c2: #2fc79a; --warn: #33290f; --warn-edge: #8a6a1f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 32px 0 12px; }
h3 { font-size: 14px; margin: 0; }
.soft, .none { color: var(--soft); }
.top { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; }
.bar { height: 10px; border-radius: 5px; background: var(--edge); overflow: hidden; margin: 14px 0 16px; }
.bar div { height: 100%; border-radius: 5px; background: var(--c0); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.card, .chart, .sheet, .facts, .warnings { background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; }
.card { padding: 10px 14px; }
.card b { display: block; font-size: 20px; line-height: 1.3; font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.warnings { background: var(--warn); border-color: var(--warn-edge); padding: 10px 14px 10px 34px;
  margin: 0; overflow-wrap: anywhere; }
.sheets { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 16px; }
.sheet, .chart { margin: 0; padding: 12px 14px; position: relative; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; margin-bottom: 8px; }
img { display: block; max-width: 100%; border-radius: 4px; cursor: zoom-in; }
.sheet img { width: 100%; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; }
.strip .sheet { padding: 8px; display: flex; flex-direction: column-reverse; }
.strip figcaption { margin: 6px 0 0; color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--edge); } .axis { stroke: var(--soft); } .hair { stroke: var(--soft); display: none; }
.num { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.band { opacity: .16; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.dot.c0, .band.c0 { fill: var(--c0); } .dot.c1, .band.c1 { fill: var(--c1); }
.dot.c2, .band.c2 { fill: var(--c2); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.key.c0 i { background: var(--c0); } .key.c1 i { background: var(--c1); } .key.c2 i { background: var(--c2); }
.tip { display: none; position: absolute; opacity: .92; padding: 4px 9px; border-radius: 6px; font-size: 13px;
  background: var(--text); color: var(--card); pointer-events: none; white-space: pre;
  font-variant-numeric: tabular-nums; }
.facts { padding: 12px 16px; margin: 0; display: grid; gap: 4px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); }
.facts div { display: flex; gap: 10px; }
dt { color: var(--soft); flex: 0 0 130px; } dd { margin: 0; overflow-wrap: anywhere; }
dialog { padding: 0; border: 0; background: none; max-width: 98vw; max-height: 98vh; }
dialog::backdrop { background: rgba(0, 0, 0, .8); }
dialog img { cursor: zoom-out; width: min(96vw, 94vh); }
'''

SCRIPT = '''
for (const figure of document.querySelectorAll('.chart')) {
  const svg = figure.querySelector('svg');
  if (!svg) continue;
  const data = JSON.parse(figure.dataset.chart), tip = figure.querySelector('.tip');
  const hair = svg.querySelector('.hair');
  const show = (event) => {
    const box = svg.getBoundingClientRect(), scale = data.total / box.width;
    const at = ((event.clientX - box.left) * scale - data.left) / data.width * data.end;
    const distance = (x) => Math.abs(x - at);
    const nearest = (xs) => xs.reduce((best, x, i) => distance(x) < distance(xs[best]) ? i : best, 0);
    const first = data.curves[0].x, kimg = first[nearest(first)];
    const lines = data.curves.map(curve => curve.label + ': ' + curve.y[nearest(curve.x)]);
    tip.textContent = ['kimg ' + kimg, ...lines].join('\\n');
    const x = data.left + kimg / data.end * data.width;
    hair.setAttribute('x1', x);
    hair.setAttribute('x2', x);
    hair.style.display = tip.style.display = 'block';
    const outer = figure.getBoundingClientRect(), pixel = box.left - outer.left + x / scale + 12;
    tip.style.top = box.top - outer.top + 'px';
    tip.style.left = Math.max(0, Math.min(pixel, figure.clientWidth - tip.offsetWidth - 8)) + 'px';
  };
  svg.addEventListener('pointermove', show);
  svg.addEventListener('pointerleave', () => { hair.style.display = tip.style.display = 'none'; });
}
const dialog = document.querySelector('dialog');
document.addEventListener('click', (event) => {
  if (dialog.open) return dialog.close();
  if (event.target.tagName !== 'IMG') return;
  dialog.querySelector('img').src = event.target.src;
  dialog.showModal();
});
'''
